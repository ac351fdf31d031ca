"""Learned activations, one function a channel: phi_i(x) = act(x) + sum_m c_im B_m(x), forward and backward, with the
bases B recomputed wherever they are needed, so that of the data the input alone is kept. Gated, the input holds gates
and then values, and the result is phi(gate) * value.

    plain_channel_spline  the formula in plain PyTorch: any device, any grid, any derivative, much time and memory
    channel_spline        the same function as one operator; a pass forward and one backward. On uniform knots
                          channel.cpp does them on a CPU, if there is a compiler, and on any knots channel_triton.py
                          on a GPU, in float32 both; elsewhere they are the plain formula in row chunks

Legend: C channels; G grid intervals; k spline order; K = G + k bases; P = G + 2k + 1 knots; N rows; R numbers in a row
of the input, C or gated 2 C.
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor

from layers import native
from layers.spline import (
    ACTIVATIONS,
    activation_gradient,
    bases_derivative,
    basis_function,
    check_backend,
    check_devices,
    interprets_triton,
    is_batched,
    is_eager,
    is_transformed,
    keep,
    name_of,
    no_autocast,
    recursive_bases,
    smooth_bases,
    to_working_dtype,
    uniform_bases,
    warn,
)

BACKEND = 'auto'  # the first of 'triton', 'native', 'plain' that suits the input; or one, else plain
OPERATORS = __name__.replace('.', '_')  # their namespace, as in spline.py
SPARE = 4  # numbers behind the sums of a block, for loads of four
ROWS = 256  # of a block, whose sum of the gradient of the coefficients is added to those of the others
CHUNK = 1 << 20  # numbers of the bases of a chunk of the plain formula


def plain_channel_spline(x, weight, knots, k, activation, gated, bases=recursive_bases):
    """What channel_spline computes, and its reference."""
    with no_autocast(x):
        gate, value = halves(x, weight, gated)
        rows, knots, coefficients = to_working_dtype(gate, knots, weight)
        y = activation(rows) + (bases(rows, knots, k) * coefficients.t()).sum(1)
        return (y if value is None else y * value).to(x.dtype)


def halves(x, weight, gated):
    """(gate, value), (N, C) each; not gated, x is the gate and there is no value: (x, None)."""
    return x.split(len(weight), 1) if gated else (x, None)


def channel_spline(x, weight, knots, k, activation, gated=False):
    """phi(x), or gated phi(x[:, :C]) * x[:, C:]: x (N, R), weight (C, K), knots (C, P), activation an element-wise
    module without parameters that torch.func can differentiate -> (N, C) in the dtype of x, computed in float32, or in
    float64 if x is. Deterministic. Differentiable in every mode and order. ValueError for other shapes, and
    for several devices.
    """
    if not x.is_floating_point() or x.size(1) != (1 + gated) * len(weight):
        wanted = f'floating point numbers (N, {(1 + gated) * len(weight)})'
        raise ValueError(f'expected {wanted}, got {x.dtype} {tuple(x.shape)}')
    is_exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # exports hold only PyTorch's own operators
    if is_exported or is_transformed() or (knots.requires_grad and torch.is_grad_enabled()):
        return plain_channel_spline(x, weight, knots, k, activation, gated)
    shape = len(weight), weight.size(1) + k + 1
    if knots.shape != shape:
        of = f'weight {tuple(weight.shape)} and order {k}'
        raise ValueError(f'expected knots {shape} for {of}, got {tuple(knots.shape)}')
    check_devices(x, weight, knots)
    function = ChannelSplineFunction.apply if is_eager(x, weight, knots) else channel_forward
    return function(x, weight, knots, k, name_of(activation), gated)


def run_forward(x, weight, knots, k, activation, gated):
    with torch.no_grad(), no_autocast(x):
        backend = choose_backend(x, weight, knots, k, activation, gated)
        if backend == 'triton':
            from layers import channel_triton

            return channel_triton.forward(x, weight, knots, k, activation, gated)
        if backend == 'native':
            return native_forward(x, weight, knots, k, activation, gated)
        settings = weight, knots, k, ACTIVATIONS[activation], gated, basis_function(knots)
        return torch.cat([plain_channel_spline(rows, *settings) for rows in chunks(x, weight)])


def run_backward(grad, x, weight, knots, k, activation, gated):
    """The gradients of x and of weight."""
    with torch.no_grad(), no_autocast(x):
        backend = choose_backend(x, weight, knots, k, activation, gated)
        if backend == 'triton':
            from layers import channel_triton

            return channel_triton.backward(grad, x, weight, knots, k, activation, gated)
        if backend == 'native':
            return native_backward(grad, x, weight, knots, k, activation, gated)
        derivative = functools.partial(bases_derivative, bases=basis_function(knots))
        settings = weight, knots, k, ACTIVATIONS[activation], gated, derivative
        pairs = zip(chunks(grad, weight), chunks(x, weight))
        parts = [plain_gradients(*pair, *settings) for pair in pairs]
        return torch.cat([dx for dx, _ in parts]), torch.stack([dw for _, dw in parts]).sum(0).to(weight.dtype)


@torch.library.custom_op(f'{OPERATORS}::channel_spline', mutates_args=())
def channel_forward(x: Tensor, weight: Tensor, knots: Tensor, k: int, activation: str, gated: bool) -> Tensor:
    return run_forward(x, weight, knots, k, activation, gated)


@torch.library.custom_op(f'{OPERATORS}::channel_spline_backward', mutates_args=())
def channel_backward(
    grad: Tensor, x: Tensor, weight: Tensor, knots: Tensor, k: int, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    return run_backward(grad, x, weight, knots, k, activation, gated)


@channel_forward.register_fake
def _(x, weight, knots, k, activation, gated):
    return x.new_empty(x.size(0), weight.size(0))


@channel_backward.register_fake
def _(grad, x, weight, knots, k, activation, gated):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def differentiate(ctx, grad, backward=channel_backward):
    x, weight, knots = ctx.saved_tensors
    if torch.is_grad_enabled() or is_transformed():  # the gradients are to be differentiated in their turn
        k, activation, gated = ctx.settings
        derivative = bases_derivative if is_transformed() else smooth_bases(knots)
        with no_autocast(grad):
            dx, dw = plain_gradients(grad, x, weight, knots, k, ACTIVATIONS[activation], gated, derivative)
            dw = dw.to(weight.dtype)
    else:
        dx, dw = backward(grad, x, weight, knots, *ctx.settings)
    return dx, dw, None, None, None, None


channel_forward.register_autograd(differentiate, setup_context=keep)


class ChannelSplineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        keep(ctx, inputs, None)
        return run_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return differentiate(ctx, grad, channel_backward if is_batched(grad) else run_backward)


def plain_gradients(grad, x, weight, knots, k, activation, gated, derivative):
    """What channel_backward computes, in operators that can be differentiated; `derivative` as bases_derivative. The
    gradient of weight is not rounded to its dtype: chunks of rows add up first.
    """
    gate, value = halves(x, weight, gated)
    grad, rows, knots, coefficients = to_working_dtype(grad, gate, knots, weight)
    dphi = grad if value is None else grad * value
    bases = derivative(rows, knots, k, 0)  # (N, K, C)
    dx = activation_gradient(activation, rows, dphi)
    dx = dx + dphi * (derivative(rows, knots, k, 1) * coefficients.t()).sum(1)
    if value is not None:
        phi = activation(rows) + (bases * coefficients.t()).sum(1)
        dx = torch.cat([dx, grad * phi], 1)
    dw = (bases * dphi.unsqueeze(1)).sum(0).t()
    return dx.to(x.dtype), dw


def chunks(rows, weight):
    """Parts of the rows whose bases fill CHUNK; 1 at least."""
    return rows.split(max(1, CHUNK // max(1, weight.numel())))


def choose_backend(x, weight, knots, k, activation, gated):
    """The fastest way that suits the input: the fused ones want an order from 1 to 3, no float64, `native` uniform
    knots, too.
    """
    check_backend(BACKEND, ('auto', 'triton', 'native', 'plain'))
    if BACKEND == 'plain' or k not in (1, 2, 3) or torch.float64 in (x.dtype, weight.dtype):
        return 'plain'
    if activation not in native.ACTIVATIONS:
        return 'plain'
    if interprets_triton(BACKEND) or (BACKEND in ('auto', 'triton') and x.is_cuda and triton_works(x.device)):
        return 'triton'
    suits_native = x.device.type == 'cpu' and BACKEND != 'triton' and basis_function(knots) is uniform_bases
    return 'native' if suits_native and library(k, activation, gated) is not None else 'plain'


@functools.cache
def triton_works(device):
    """Whether the kernels run on this GPU."""
    if not importlib.util.find_spec('triton'):
        return False
    try:
        from layers import channel_triton

        x, weight = torch.zeros(256, 512, device=device), torch.zeros(256, 4, device=device)
        knots = torch.arange(7.0, device=device).repeat(256, 1)
        y = channel_triton.forward(x, weight, knots, 2, 'SiLU()', True)
        channel_triton.backward(y, x, weight, knots, 2, 'SiLU()', True)
        torch.cuda.synchronize(device)
        return True
    except Exception as error:  # whatever a compiler or a card can raise: the plain formula does the same work
        return warn('the Triton kernels do not work here, learned activations run without them', error)


# on a CPU


def library(k, activation, gated):
    definitions = dict(ORDER=k, GATED=int(gated), ACTIVATION=native.ACTIVATIONS[activation], SPARE=SPARE)
    return native.compile('channel.cpp', **definitions)


def native_forward(x, weight, knots, k, activation, gated):
    tensors = native.to_floats(x, weight, knots)
    y = x.new_empty(len(x), len(weight), dtype=torch.float32)
    sizes = native.integers(*y.shape, weight.size(1), torch.get_num_threads())
    library(k, activation, gated).forward(*map(native.address, (*tensors, y)), *sizes)
    return y.to(x.dtype)


def native_backward(grad, x, weight, knots, k, activation, gated):
    tensors = native.to_floats(grad, x, weight, knots)
    dx, dw, (C, K) = torch.empty_like(tensors[1]), torch.empty_like(tensors[2]), weight.shape
    partial = dx.new_zeros(math.ceil(len(x) / ROWS), C * (K + 2 * k) + SPARE)  # the sums of each block of rows
    sizes = native.integers(*grad.shape, K, ROWS, torch.get_num_threads())
    library(k, activation, gated).backward(*map(native.address, (*tensors, partial, dx, dw)), *sizes)
    return dx.to(x.dtype), dw.to(weight.dtype)
