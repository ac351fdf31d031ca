"""What a GPT costs: parameters, FLOPs per token, seconds per training step.

FLOPs are counted while the model runs on tensors without data: the matrix products of the layers and of attention,
forward and backward, one multiplication and one addition each. Passes over single numbers (bases, activations, norms)
are left out, as PyTorch's counter leaves them out. Attention counts whole T x T matrices, whether a kernel skips the
causal half or not, and graph attention whole ones of its coefficients, whichever edges it has.
"""

import functools

import torch

from layers import spline
from model import GPT, GPTConfig
from run.device import autocast, clock


def forward_flops(x, weight, *settings, out_shape=None):
    """Shapes in, a number out: a product with all K + 1 columns of each feature."""
    return 2 * x[0] * weight[0] * weight[1]


def backward_flops(grad, x, weight, knots, k, activation, dtype, needed, out_shape=None):
    return sum(needed) * forward_flops(x, weight)


OPERATORS = getattr(torch.ops, spline.OPERATORS)
COUNTED = {OPERATORS.spline_linear: forward_flops, OPERATORS.spline_linear_backward: backward_flops}


def count_flops(model_args):
    """FLOPs per token, forward and backward, on sequences of block_size tokens."""
    return count_by_blocks(count_flops_of, model_args)


def count_parameters(model_args):
    """All of them, embeddings and positions included."""
    return count_by_blocks(count_parameters_of, model_args)


def count_by_blocks(count, model_args):
    """What count(model_args) says, but in the time of a small GPT: blocks are alike, and two of them are counted."""
    n_layer = GPTConfig(**model_args).n_layer
    if n_layer == 1:
        return count(model_args)
    one, two = (count_once(count, tuple(sorted({**model_args, 'n_layer': n}.items()))) for n in (1, 2))
    return one + (two - one) * (n_layer - 1)


@functools.lru_cache(256)
def count_once(count, items):
    """Cached: a search for a depth varies n_layer alone."""
    return count(dict(items))


def count_flops_of(model_args):
    """The same as count_flops, with each block counted."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, too, where there is some

    with torch.device('meta'):
        model = GPT(GPTConfig(**model_args))
        idx = torch.zeros(1, model.config.block_size, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(idx, idx)[1].backward()
    return counter.get_total_flops() / idx.numel()


def count_parameters_of(model_args):
    """The same as count_parameters, with each block counted."""
    with torch.device('meta'):
        return GPT(GPTConfig(**model_args)).get_num_params(non_embedding=False)


def make_step(raw_model, batch_size, micro_steps, device, dtype, compile=True, muon=False):
    """A function that takes a training step as train.py does, on random tokens, and returns its seconds. On a GPU with
    `compile` by the compiled model.
    """
    model = torch.compile(raw_model) if compile and device.startswith('cuda') else raw_model
    optimizer = raw_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.split(':')[0], muon=muon)
    idx = torch.randint(raw_model.config.vocab_size, (batch_size, raw_model.config.block_size), device=device)

    def step():
        t0 = clock(device)
        for _ in range(micro_steps):
            with autocast(device, dtype):
                loss = model(idx, idx)[1]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return clock(device) - t0

    return step
