"""The spline layer, forward and backward: y = [B_0(x) ... B_{K-1}(x), act(x)] @ weight.T, with the bases B recomputed
wherever they are needed, so that of the data the input alone is kept.

    plain_spline_linear   the formula in plain PyTorch: any device, any grid, any derivative, much time and memory
    spline_linear         the same function as one operator, in row chunks: a pass writes the columns of a chunk, and
                          one matrix product takes them from the cache. A pass is one loop, by spline.cpp on a CPU with
                          a C++ compiler, and on uniform grids by torch.compile elsewhere; without them it is plain
                          PyTorch. Small inputs on a CPU, transforms of torch.func and exports take the plain formula
    spline_triton.py      on a GPU, the operator with columns that never reach its memory

The splines themselves stand in uniform_bases and recursive_bases, for torch.compile in fused_columns, and in the
languages of spline.cpp and spline_triton.py; whoever changes one changes all, and the tests compare them.

Legend: I, O features in and out; G grid intervals; k spline order; K = G + k bases; N rows, n of them in a chunk.
The knots of one feature are P = G + 2k + 1 numbers: G intervals on the grid and k more on either side.
"""

import contextlib
import copy
import functools
import importlib.util
import math
import os
import types
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from layers import native

BACKEND = 'auto'  # the first of 'triton', 'native', 'compiled', 'plain' that suits the input; or one, else plain
NUMBERS = {torch.float32: 'float', torch.bfloat16: 'bfloat16'}  # of columns, in spline.cpp
CHUNK_BYTES = {'plain': 4 << 20, 'compiled': 8 << 20, 'native': 8 << 20}  # of the columns of a row chunk on a CPU
CHUNK_BYTES_GPU = 256 << 20  # enough rows to fill a GPU
FUSED_ORDERS = {1: 1, 2: 2, 3: 3}  # looked up, an order is a constant to the compiler
WORTH_COMPILING = 1 << 15  # numbers in the input; below, calling a pass of torch.compile costs what it saves
SMALL = 1 << 15  # numbers in the input on a CPU, below which the columns may stay in memory
OPERATORS = __name__.replace('.', '_')  # their namespace: another copy of this file has another, and takes nothing over
UNIFORM = WeakTensorKeyDictionary()  # knots: (a copy of their numbers, whether they are uniform)


def cardinal_spline(d, k):
    """The B-spline of order k >= 1 on the integers, at distance d from its centre (Schoenberg 1946):
    sum_j (-1)^j C(k + 1, j) max((k + 1) / 2 - j - d, 0)^k / k!, for k = 3 (a^3 - 4 c^3) / 6.
    """
    factors = [(-1) ** j * math.comb(k + 1, j) / math.factorial(k) for j in range(k // 2 + 1)]
    terms = [((k + 1) / 2 - j - d).clamp_min_(0).pow_(k).mul_(factor) for j, factor in enumerate(factors)]
    return functools.reduce(Tensor.add_, terms)


def uniform_bases(x, knots, k):
    """The B-splines of order k on uniform knots, in closed form; x (N, I), knots (I, P) -> (N, P - 1 - k, I)."""
    if k == 0:  # steps are taken at the knots themselves, so that a value on a knot falls where the recursion puts it
        return recursive_bases(x, knots, k)
    first, per_spacing = measure_knots(knots)
    t = (x - first) * per_spacing  # position in knot spacings
    centres = torch.arange(knots.size(1) - 1 - k, dtype=x.dtype, device=x.device) + (k + 1) / 2
    return cardinal_spline((t.unsqueeze(1) - centres.unsqueeze(1)).abs(), k)


def measure_knots(knots):
    """The first of uniform knots (I, P) and one over their spacing, (I,) each."""
    return knots[:, 0].contiguous(), (knots.size(1) - 1) / (knots[:, -1] - knots[:, 0])


def recursive_bases(x, knots, k):
    """The B-splines of order k on any knots, by the recursion of Cox and de Boor; shapes as in uniform_bases."""
    x, knots = x.unsqueeze(1), knots.t()  # (N, 1, I) and (P, I)
    bases = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for p in range(1, k + 1):
        slope = reciprocal(knots[p:] - knots[:-p])  # one over the support of each basis of order p - 1
        rise, fall = (x - knots[: -p - 1]) * slope[:-1], (knots[p + 1 :] - x) * slope[1:]
        bases = rise * bases[:, :-1] + fall * bases[:, 1:]
    return bases


class Bases(torch.autograd.Function):
    """The r-th derivative by x of the B-splines of order k, by a function `bases` that suits the knots; shapes as in
    uniform_bases. Its own derivative by x is that of r + 1. Not under forward mode: a custom Function drops tangents.
    """

    @staticmethod
    def forward(ctx, x, knots, k, r, bases):
        ctx.save_for_backward(x, knots)
        ctx.k, ctx.r, ctx.bases = k, r, bases
        return bases_derivative(x, knots, k, r, bases)

    @staticmethod
    def backward(ctx, grad):
        derivative = bases_derivative if is_transformed() else Bases.apply
        return (grad * derivative(*ctx.saved_tensors, ctx.k, ctx.r + 1, ctx.bases)).sum(1), None, None, None, None


def smooth_bases(knots):
    """A function (x, knots, k, r=0) like the bases that suit these knots, whose derivatives by x are cheap."""
    bases = basis_function(knots)  # of the knots as they are: rounded ones may not be even in another dtype
    return lambda x, knots, k, r=0: Bases.apply(x, knots, k, r, bases)


def bases_derivative(x, knots, k, r, bases=recursive_bases):
    """The r-th derivative by x of the B-splines of order k, from those of order k - r."""
    if r > k:
        return torch.zeros_like(bases(x, knots, k))
    return raise_orders(bases(x, knots, k - r), knots, k - r + 1, k)


def raise_orders(bases, knots, first, last):
    """Derivatives of the B-splines of order `last` from the B-splines of order `first` - 1, (N, P - first, I), by
    dB_m/dx = r_m B'_m - r_{m+1} B'_{m+1}, with B' the bases of order p - 1 on the same knots and
    r_m = p / (knot_{m+p} - knot_m)  (de Boor 1978, ch. X).
    """
    knots = knots.t()
    for p in range(first, last + 1):
        bases = bases * (p * reciprocal(knots[p:] - knots[:-p]))
        bases = bases[:, :-1] - bases[:, 1:]
    return bases


def reciprocal(width):
    """1 / width, and 0 where knots coincide: the convention of de Boor for 0 / 0."""
    return torch.where(width > 0, 1 / width, 0)


def are_uniform(knots):
    """Whether the knots (I, P) of every feature are evenly spaced, up to the rounding of their dtype and a fiftieth of
    their spacing. (In bfloat16 rounding alone would hide that a grid is not even; the default one is off by a 70th.)
    """
    eps = torch.finfo(knots.dtype).eps
    knots = to_float64(knots)
    shares = torch.linspace(0, 1, knots.size(1), dtype=knots.dtype, device=knots.device)
    even = torch.lerp(knots[:, :1], knots[:, -1:], shares)
    off, spacing = (knots - even).abs().amax(1), (knots[:, -1] - knots[:, 0]) / (knots.size(1) - 1)
    return bool(((spacing > 0) & (off <= 2 * eps * knots.abs().amax(1)) & (off <= spacing / 50)).all())


def basis_function(knots):
    """The closed form where the knots are uniform, else the recursion. The numbers are compared with those last seen:
    `.data`, numpy and collectives change a tensor without a trace.
    """
    seen, uniform = UNIFORM.get(knots, (None, None))
    if not same_numbers(seen, knots):
        uniform = are_uniform(knots)
        UNIFORM[knots] = knots.clone(), uniform
    return uniform_bases if uniform else recursive_bases


def same_numbers(seen, knots):
    """False for None, and for numbers elsewhere or of another dtype."""
    if seen is None or (seen.device, seen.dtype) != (knots.device, knots.dtype):
        return False
    if knots.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # while a graph is recorded none can be read
    return torch.equal(seen, knots)


def to_working_dtype(*tensors):
    """Bases need float32: a recursion in bfloat16 loses 0.3 % of their sum."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def to_float64(tensor):
    """For least squares and comparisons. MPS has no float64, so there the work moves to the CPU."""
    return tensor.detach().to('cpu' if tensor.device.type == 'mps' else tensor.device, torch.float64)


def columns(x, knots, k, activation, bases, dtype):
    """(n, I) -> (n, K + 1, I) in `dtype`: the bases of every feature and then its activation."""
    x, knots = to_working_dtype(x, knots)
    return torch.cat([bases(x, knots, k), activation(x).unsqueeze(1)], 1).to(dtype)


def input_gradient(dcolumns, x, knots, k, activation, bases):
    """The gradient of the columns taken back to x, dcolumns (n, K + 1, I), x (n, I) -> (n, I) in the working dtype, by
    the formula of raise_orders.
    """
    x, knots = to_working_dtype(x, knots)
    dx = activation_gradient(activation, x, dcolumns[:, -1])
    if k == 0:
        return dx  # steps: their derivative is zero
    slope = k * reciprocal(knots[:, k:] - knots[:, :-k]).t()  # (K + 1, I)
    lower = bases(x, knots, k - 1).mul_(slope)  # (n, K + 1, I)
    return dx + (lower[:, :-1] - lower[:, 1:]).mul_(dcolumns[:, :-1]).sum(1)


def activation_gradient(activation, x, grad):
    has_hooks = activation._forward_hooks or activation._forward_pre_hooks
    function = activation if has_hooks else activation.forward  # past what a tracer does around modules
    return torch.func.vjp(function, x)[1](grad.to(x.dtype))[0]


def fused_columns(x, first, per_spacing, K, k, activation, dtype):
    """columns on the uniform knots first + m / per_spacing, in a form that a compiler turns into one loop."""
    k, activation = FUSED_ORDERS[k], ACTIVATIONS[activation]
    (x,) = to_working_dtype(x)
    t = (x - first) * per_spacing  # position in knot spacings
    bases = [cardinal_spline((t - (m + (k + 1) / 2)).abs(), k) for m in range(K)]
    return torch.cat([column.to(dtype) for column in (*bases, activation(x))], 1)


def fused_input_gradient(dcolumns, x, first, per_spacing, K, k, activation):
    """input_gradient on the same knots, in the same form; of order 2 or 3."""
    k, activation = FUSED_ORDERS[k], ACTIVATIONS[activation]
    (x,) = to_working_dtype(x)
    t = (x - first) * per_spacing
    lower = [cardinal_spline((t - (m + k / 2)).abs(), k - 1) for m in range(K + 1)]
    slope = sum(dcolumns[:, m] * (lower[m] - lower[m + 1]) for m in range(K))
    return slope * per_spacing + activation_gradient(activation, x, dcolumns[:, -1])


def plain_spline_linear(x, weight, knots, k, activation, dtype, bases=recursive_bases):
    """What spline_linear computes, and its reference."""
    with no_autocast(x):
        return columns(x, knots, k, activation, bases, dtype).flatten(1) @ weight.to(dtype).t()


def spline_linear(x, weight, knots, k, activation, dtype):
    """[B_0(x) ... B_{K-1}(x), act(x)] @ weight.T, computed in `dtype`, the bases in float32: x (N, I), weight
    (O, (K + 1) * I) with the columns basis-major, knots (I, P), activation an element-wise module without parameters
    that torch.func can differentiate -> (N, O). Deterministic; opaque to torch.compile. ValueError for other shapes or
    several devices.

    Differentiable in every mode and order. What is not a first backward pass takes memory for all columns of all rows.
    """
    is_exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # exports hold only PyTorch's own operators
    if is_exported or is_transformed() or (knots.requires_grad and torch.is_grad_enabled()):
        return plain_spline_linear(x, weight, knots, k, activation, dtype)
    if len(knots) != x.size(1) or weight.size(1) != (knots.size(1) - k) * x.size(1):
        raise ValueError(f'x {tuple(x.shape)}, weight {tuple(weight.shape)} and knots {tuple(knots.shape)} do not fit')
    check_devices(x, weight, knots)
    if not is_eager(x, weight, knots):
        return spline_linear_forward(x, weight, knots, k, name_of(activation), dtype)
    if is_small(x):
        return plain_spline_linear(x, weight, knots, k, activation, dtype, smooth_bases(knots))
    return SplineLinear.apply(x, weight, knots, k, name_of(activation), dtype)


def check_devices(x, *others):
    """ValueError for tensors on several devices: fused passes take addresses."""
    if any(other.device != x.device for other in others):
        places = ', '.join(str(tensor.device) for tensor in (x, *others))
        raise ValueError(f'expected x, weight and knots on one device, got {places}')


def is_eager(*tensors):
    """Whether an autograd.Function will do. Compilers, tracers and tensors without data want an operator, and calling
    one takes a fifth of a millisecond.
    """
    is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not is_traced and all(map(has_data, tensors))


def has_data(tensor):
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def is_small(x):
    """Whether the memory that the operator saves is too little to pay for what its second derivatives take."""
    if BACKEND != 'auto' or x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
        return False
    return torch.is_grad_enabled() and x.numel() < SMALL


def no_autocast(x):
    return torch.autocast(x.device.type, enabled=False) if x.device.type != 'meta' else contextlib.nullcontext()


def is_transformed():
    """Whether forward mode or a transform of torch.func is at work: operators of one's own lose tangents silently."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(grad):
    """Whether torch.autograd.grad was given several gradients at once (is_grads_batched): operators take them apart."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


ACTIVATIONS = {}  # modules by name: the arguments of an operator are tensors, numbers and strings
MODULE_FIELDS = frozenset(vars(torch.nn.Module()))  # what every module has
PLAIN_FIELDS = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)


def name_of(activation):
    """The name of an activation in ACTIVATIONS. One with tensors, modules or hooks is named by itself, PyTorch's own by
    what they print, others by type and settings, so that one compiled pass serves all layers of a model.
    """
    kind, fields = type(activation), vars(activation)
    settings = {key: value for key, value in fields.items() if key not in MODULE_FIELDS}  # and a `forward` put in place
    has_state = any(fields[key] for key in MODULE_FIELDS if isinstance(fields[key], dict))
    if has_state or not all(isinstance(value, PLAIN_FIELDS) for value in settings.values()):
        name = f'{kind.__name__} {id(activation)}'
        ACTIVATIONS[name] = activation
        return name
    if kind.__module__ in ('torch.nn.modules.activation', 'torch.nn.modules.linear') and 'forward' not in settings:
        name = repr(activation)
        if name not in ACTIVATIONS:
            # the original may get other settings, or hooks, and then has another name
            ACTIVATIONS[name] = copy.deepcopy(activation)
        return name
    values = [id(value) if callable(value) else repr(value) for value in settings.values()]
    name = ' '.join(map(str, [kind.__name__, id(kind), *settings, *values]))
    if f'{name} {activation.training}' not in ACTIVATIONS:
        for training in False, True:  # both are known before a compiler traces the one
            ACTIVATIONS[f'{name} {training}'] = copy.deepcopy(activation).train(training)
    return f'{name} {activation.training}'


def run_forward(x, weight, knots, k, activation, dtype):
    with torch.no_grad(), no_autocast(x):
        x, w = x.contiguous(), weight.to(dtype)
        backend = choose_backend(x, knots, k, activation, dtype)
        if backend == 'triton':
            from layers import spline_triton

            return spline_triton.forward(x, w, knots, k, activation)
        make_columns, _ = passes(backend, knots, k, activation)
        y = x.new_empty(x.size(0), w.size(0), dtype=dtype)
        for rows in chunks(x, w, backend):
            torch.mm(make_columns(x[rows], dtype).flatten(1), w.t(), out=y[rows])
        return y


def run_backward(grad, x, weight, knots, k, activation, dtype, needed):
    """The gradients of x and of weight; an empty tensor in place of one that is not needed."""
    with torch.no_grad(), no_autocast(x):
        grad, x, w = grad.to(dtype).contiguous(), x.contiguous(), weight.to(dtype)
        backend = choose_backend(x, knots, k, activation, dtype)
        if backend == 'triton':
            from layers import spline_triton

            dx, dw = spline_triton.backward(grad, x, w, knots, k, activation, needed)
            return dx, dw.to(weight.dtype)
        make_columns, take_back = passes(backend, knots, k, activation)
        dx = x.new_empty(x.shape if needed[0] else 0)
        dw = weight.new_zeros(weight.shape if needed[1] else 0, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rows in chunks(x, w, backend):
            if needed[1]:
                accumulate(dw, grad[rows].t(), make_columns(x[rows], dtype).flatten(1))
            if needed[0]:
                dx[rows] = take_back((grad[rows] @ w).view(-1, w.size(1) // x.size(1), x.size(1)), x[rows])
        return dx, dw.to(weight.dtype)


@torch.library.custom_op(f'{OPERATORS}::spline_linear', mutates_args=())
def spline_linear_forward(
    x: Tensor, weight: Tensor, knots: Tensor, k: int, activation: str, dtype: torch.dtype
) -> Tensor:
    return run_forward(x, weight, knots, k, activation, dtype)


@torch.library.custom_op(f'{OPERATORS}::spline_linear_backward', mutates_args=())
def spline_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, knots: Tensor, k: int, activation: str, dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run_backward(grad, x, weight, knots, k, activation, dtype, needed)


@spline_linear_forward.register_fake
def _(x, weight, knots, k, activation, dtype):
    return x.new_empty(x.size(0), weight.size(0), dtype=dtype)


@spline_linear_backward.register_fake
def _(grad, x, weight, knots, k, activation, dtype, needed):
    return tuple(tensor.new_empty(tensor.shape if need else 0) for tensor, need in zip((x, weight), needed))


def keep(ctx, inputs, output):
    x, weight, knots, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, knots)


def differentiate(ctx, grad, backward=spline_linear_backward):
    needed = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled() or is_transformed():  # the gradients are to be differentiated in their turn
        with no_autocast(grad):
            gradients = plain_gradients(grad, *ctx.saved_tensors, *ctx.settings, needed)
    else:
        gradients = backward(grad, *ctx.saved_tensors, *ctx.settings, needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed)), None, None, None, None


def plain_gradients(grad, x, weight, knots, k, activation, dtype, needed):
    """What spline_linear_backward computes, in operators that can be differentiated; None for what is not needed."""
    grad, activation = grad.to(dtype), ACTIVATIONS[activation]
    derivative = bases_derivative if is_transformed() else smooth_bases(knots)
    dx = dw = None
    if needed[0]:
        rows, places = to_working_dtype(x, knots)
        dcolumns = (grad @ weight.to(dtype)).to(rows.dtype).unflatten(1, (-1, x.size(1)))
        dx = (derivative(rows, places, k, 1) * dcolumns[:, :-1]).sum(1)
        dx = (dx + activation_gradient(activation, rows, dcolumns[:, -1])).to(x.dtype)
    if needed[1]:
        bases = functools.partial(derivative, r=0)
        dw = (grad.t() @ columns(x, knots, k, activation, bases, dtype).flatten(1)).to(weight.dtype)
    return dx, dw


spline_linear_forward.register_autograd(differentiate, setup_context=keep)


class SplineLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        keep(ctx, inputs, None)
        return run_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return differentiate(ctx, grad, spline_linear_backward if is_batched(grad) else run_backward)


def chunks(x, w, backend):
    """Slices of rows, about equal, whose columns in the dtype of w (O, (K + 1) * I) fill CHUNK_BYTES; 64 at least."""
    N, size = x.size(0), CHUNK_BYTES[backend] if x.device.type == 'cpu' else CHUNK_BYTES_GPU
    n = max(64, size // (w.size(1) * w.element_size()))
    n = math.ceil(N / math.ceil(N / n)) if N else 1
    return [slice(start, start + n) for start in range(0, N, n)]


def accumulate(total, a, b):
    """total += a @ b; a product in less than float32 is rounded before it is added."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def choose_backend(x, knots, k, activation, dtype):
    """The fastest way that suits the input: the fused ones want an order from 1 to 3, and `compiled` uniform knots and
    order 2 or 3: the slopes of order 1 jump at the knots, where a rounded place may be on the other side.
    """
    check_backend(BACKEND, ('auto', 'triton', 'native', 'compiled', 'plain'))
    if BACKEND == 'plain' or k not in FUSED_ORDERS:
        return 'plain'
    may_be_triton = BACKEND in ('auto', 'triton') and torch.float64 not in (x.dtype, dtype)
    suits_native = x.device.type == 'cpu' and x.dtype != torch.float64 and dtype in NUMBERS
    is_at_hand = x.is_cuda or interprets_triton(BACKEND)
    if may_be_triton and is_at_hand and triton_works(activation, x.device, dtype):
        return 'triton'
    if BACKEND in ('auto', 'native') and suits_native:
        return 'native' if library(k, activation, dtype) is not None else 'plain'
    if BACKEND in ('auto', 'compiled') and k > 1 and basis_function(knots) is uniform_bases:
        if BACKEND == 'compiled' or (x.numel() >= WORTH_COMPILING and compiler_works(x.device.type)):
            return 'compiled'
    return 'plain'


def check_backend(name, known):
    if name not in known:
        raise ValueError(f'BACKEND={name!r}: expected one of {", ".join(known)}')


def interprets_triton(backend):
    """Whether the kernels are asked for by name, on whatever device, and Triton's interpreter runs them."""
    return backend == 'triton' and os.environ.get('TRITON_INTERPRET') == '1'


@functools.cache
def triton_works(activation, device, dtype):
    """Whether the kernels run on this GPU, tried on tiles of their full size, or in Triton's interpreter."""
    if not importlib.util.find_spec('triton'):
        return False
    try:
        from layers import spline_triton

        if activation not in spline_triton.ACTIVATIONS:
            return False
        if device.type == 'cpu':  # of the interpreter
            return True
        x, w = torch.zeros(256, 256, device=device), torch.zeros(256, 5 * 256, device=device, dtype=dtype)
        knots = torch.arange(7.0, device=device).repeat(256, 1)
        y = spline_triton.forward(x, w, knots, 2, activation)
        spline_triton.backward(y, x, w, knots, 2, activation, [True, True])
        torch.cuda.synchronize(device)
        return True
    except Exception as error:  # whatever a compiler or a card can raise: the other passes do the same work
        return warn('the Triton kernels do not work here, KAN layers run without them', error)


@functools.cache
def compiler_works(device_type):
    try:
        torch.compile(torch.sin)(torch.zeros(16, device=device_type))
        return True
    except Exception as error:  # whatever a compiler can raise: the plain passes do the same work
        return warn('torch.compile does not work here, KAN layers run without fused passes', error)


def warn(message, error):
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    warnings.warn(f'{message}, slower: {reason}', stacklevel=3)
    return False


def passes(backend, knots, k, activation):
    """The two passes of a backend: (x, dtype) -> columns and (dcolumns, x) -> dx."""
    if backend == 'native':
        return native_passes(knots, k, activation)
    if backend == 'compiled':
        K = knots.size(1) - 1 - k
        make_columns = compiled(fused_columns, K, k, activation)
        take_back = compiled(fused_input_gradient, K, k, activation)
        settings = *measure_knots(*to_working_dtype(knots)), K, k, activation
    else:
        make_columns, take_back = columns, input_gradient
        settings = knots, k, ACTIVATIONS[activation], basis_function(knots)
    return lambda x, dtype: make_columns(x, *settings, dtype), lambda dcolumns, x: take_back(dcolumns, x, *settings)


@functools.cache
def compiled(function, K, k, activation):
    """A compiled pass, for any number of rows and features."""
    # its code is a copy, because PyTorch counts recompilations by code and gives up after a few
    code = function.__code__.replace(co_name=f'{function.__name__}_{K}_{k}_{activation}')
    return torch.compile(types.FunctionType(code, function.__globals__), dynamic=True)


@functools.cache
def library(k, activation, dtype):
    """spline.cpp for columns in `dtype`; an activation that it does not have is zero there."""
    name = native.ACTIVATIONS.get(activation, 'zero')
    return native.compile('spline.cpp', ORDER=k, ACTIVATION=name, NUMBER=NUMBERS[dtype])


def native_passes(knots, k, activation):
    """The passes by spline.cpp."""
    K = knots.size(1) - 1 - k
    is_even = k > 1 and basis_function(knots) is uniform_bases  # order 1 has no other passes
    knots = native.to_floats(knots)
    places, ending = (measure_knots(*knots), '') if is_even else (knots, '_any')

    def call(name, shape, dtype, *tensors):
        function = getattr(library(k, activation, dtype), name + ending)
        function(*map(native.address, tensors), *native.integers(*shape, K, torch.get_num_threads()))

    def make_columns(x, dtype):
        (x,) = native.to_floats(x)
        made = x.new_empty(len(x), K + 1, x.size(1), dtype=dtype)
        call('columns', x.shape, dtype, x, *places, made)
        if activation not in native.ACTIVATIONS:
            made[:, -1] = ACTIVATIONS[activation](x)
        return made

    def take_back(dcolumns, x):
        (x,), dcolumns = native.to_floats(x), dcolumns.contiguous()
        dx = torch.empty_like(x)
        call('input_gradient', x.shape, dcolumns.dtype, dcolumns, x, *places, dx)
        if activation not in native.ACTIVATIONS:
            dx += activation_gradient(ACTIVATIONS[activation], x, dcolumns[:, -1])
        return dx

    return make_columns, take_back
