"""
The arithmetic of a model, counted while it runs on tensors without data: the matrix products of the layers and of attention,
forward and backward, one multiplication and one addition each. Passes over single numbers (bases, activations, norms) are left
out, as PyTorch's counter leaves them out; attention counts whole T x T matrices, whether a kernel skips the causal half or not.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import kernels  # noqa: F401, whose operators are counted
from model import GPT, GPTConfig


@register_flop_formula(torch.ops.kan.spline_linear)
def forward_flops(x, weight, *settings, out_shape=None):
    """Shapes in, a number out: a product with all K + 1 columns of each feature."""
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.kan.spline_linear_backward)
def backward_flops(grad, x, weight, knots, k, activation, dtype, needed, out_shape=None):
    return sum(needed) * forward_flops(x, weight)


def count_flops(model_args):
    """FLOPs per token, forward and backward, of a GPT with these arguments on sequences of block_size tokens."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**model_args))
        idx = torch.zeros(1, model.config.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    return counter.get_total_flops() / idx.numel()


def count_parameters(model_args):
    """All of them, embeddings and positions included."""
    with torch.device('meta'):
        return GPT(GPTConfig(**model_args)).get_num_params(non_embedding=False)
