"""Kolmogorov-Arnold layers: each edge of a linear layer is a learned function, a weighted activation plus a B-spline,

    y_o = sum_i base_weight[o, i] * act(x_i) + spline_scaler[o, i] * sum_m spline_weight[o, i, m] * B_m(x_i)

(Liu et al. 2024, arXiv 2404.19756, eq. 2.10, in the matrix form of efficient-kan; KANLinear and KAN have its names,
arguments and state dict). The backward pass recomputes the bases, so that of large inputs a layer keeps nothing else.

Legend: I, O features in and out; G grid intervals; k spline order; K = G + k bases; N rows.
The knots of one feature are G + 2k + 1 numbers: G intervals on the grid and k more on either side.
"""

import contextlib
import copy
import inspect
import math

import torch
import torch.nn as nn

from layers.channel import channel_spline
from layers.spline import has_data, name_of, recursive_bases, spline_linear, to_float64, to_working_dtype


def least_squares(gram, moments):
    """The c of least norm with gram @ c = moments, (I, K, K) and (I, K, ...), also where data left bases unseen."""
    return torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ moments


def points_within(knots, n):
    """n points within each interval of knots (I, M), evenly: (N, I)."""
    shares = torch.linspace(0, 1, n + 2, dtype=knots.dtype, device=knots.device)[1:-1]
    return torch.lerp(knots[:, :-1, None], knots[:, 1:, None], shares).flatten(1).t()


class Elementwise(nn.Module):
    """A function of x as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def make_activation(given):
    """The module of an activation: of a class or another function that makes one, of a module, of a function of x, or
    of the name of an activation of torch.nn in any case. ValueError for anything else, and for what a KAN layer cannot
    have.
    """
    made = given
    if isinstance(given, str):
        known = {**vars(nn.modules.activation), 'Identity': nn.Identity}
        classes = {name.lower(): kind for name, kind in known.items() if isinstance(kind, type)}
        with contextlib.suppress(TypeError):  # of one that wants arguments
            made = classes.get(given.lower(), lambda: None)()
    elif callable(given) and not isinstance(given, nn.Module):
        with contextlib.suppress(TypeError):
            made = given() if isinstance(given, type) else made_by(given)
    if not isinstance(made, nn.Module):
        wanted = "a class of modules (nn.SiLU), a module, a function of x, or a name ('silu')"
        raise ValueError(f'base_activation must be {wanted}, got {given!r}')
    rule = broken_rule(made)
    if rule:
        raise ValueError(f'base_activation must {rule}, got {given if isinstance(made, Elementwise) else made}')
    return made


@torch.no_grad()
@torch.inference_mode(False)  # in which tensors have no version
def broken_rule(activation):
    """What an activation must do, and this module does not, in words; None for a good one. A part of the numbers has to
    give a part of the result, in training, too, and nothing may be written into the numbers.
    """
    if any(True for _ in activation.parameters()):
        return 'have no parameters of its own'
    numbers = torch.linspace(-2, 3, 1000, dtype=torch.float32, device='cpu').view(10, 100)
    if not has_data(numbers):  # within torch's FakeTensorMode nothing can be tried
        return None
    is_elementwise = True
    for x in numbers.clone(), numbers.flip(0, 1):  # the part is without the lowest numbers, or without the highest
        part, version = x[1:, 1:].clone(), x._version
        try:
            in_training = copy.deepcopy(activation).train()  # in which dropout is random
            whole = in_training(x)[1:, 1:]
            is_elementwise &= torch.allclose(whole, in_training(part), atol=1e-6, equal_nan=True)
        except Exception:  # whatever it raises: without a forward, no tensor, one of another shape, or refused
            is_elementwise = False
        if x._version != version:
            return 'not change its input'
    return None if is_elementwise else 'act on each number by itself, always alike'


def made_by(function):
    """What a function makes that takes no arguments. One that takes x may make a module without it, or is the
    activation itself.
    """
    if takes(function) and not takes(function, 'x'):
        return function()
    made = None
    if takes(function):
        with contextlib.suppress(Exception):  # it wants x, whatever its signature says
            made = function()
    return made if isinstance(made, nn.Module) else Elementwise(function)


def takes(function, *args):
    """Whether a function can be called with these arguments, as far as Python knows."""
    try:
        inspect.signature(function).bind(*args)
        return True
    except (TypeError, ValueError):
        return False


class Splines(nn.Module):
    """What layers of splines share: a grid for each of I features, and spline_weight (..., I, K)."""

    scaled_spline_weight = property(lambda self: self.scale_splines(self.spline_weight))  # what acts

    def __init__(self, in_features, grid_size, spline_order, base_activation, grid_eps, grid_range):
        super().__init__()
        if in_features < 1:
            raise ValueError(f'in_features must be at least 1, got {in_features}')
        if grid_size < 1 or spline_order < 0:
            wanted = 'grid_size must be at least 1 and spline_order at least 0'
            raise ValueError(f'{wanted}, got {grid_size} and {spline_order}')
        low, high = grid_range
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f'grid_range must be (low, high) with low < high, got {tuple(grid_range)}')
        if not 0 <= grid_eps <= 1:
            raise ValueError(f'grid_eps must lie between 0 and 1, got {grid_eps}')
        self.in_features, self.grid_size, self.spline_order = in_features, grid_size, spline_order
        self.grid_eps, self.grid_range = grid_eps, (low, high)
        self.base_activation = make_activation(base_activation)
        name_of(self.base_activation)  # known before a compiler traces `forward`
        self.register_buffer('grid', self.even_knots().repeat(in_features, 1))  # (I, G + 2k + 1)

    def even_knots(self):
        """(G + 2k + 1,) on grid_range, in float32 at least"""
        (low, high), G, k = self.grid_range, self.grid_size, self.spline_order
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        knots = torch.arange(-k, G + k + 1, dtype=dtype) * ((high - low) / G) + low
        if has_data(knots) and not (knots.isfinite().all() and (knots.diff() > 0).all()):
            wanted = f'{knots.dtype} cannot tell the knots of {G} intervals apart'.replace('torch.', '')
            raise ValueError(f'{wanted} on grid_range={self.grid_range}')
        return knots

    def _apply(self, fn, recurse=True):
        """What `to` and `bfloat16` call. Knots stay in float32 at least, as splines are computed in it: rounded to a
        shorter dtype they would be those of other functions, or coincide.
        """
        grid = self.grid
        super()._apply(fn, recurse)
        if self.grid.dtype in (torch.bfloat16, torch.float16):
            self.grid = grid.to(self.grid.device, torch.float32)
        return self

    def __setstate__(self, state):  # of a copy, or of one from a file
        super().__setstate__(state)
        name_of(self.base_activation)

    def scale_splines(self, spline_weight):
        return spline_weight

    def check_input(self, x):
        if x.dim() == 0 or x.size(-1) != self.in_features or not x.is_floating_point():
            wanted = f'{self.in_features} features in the last dimension, of floating point numbers'
            raise ValueError(f'expected {wanted}, got shape {tuple(x.shape)} of {x.dtype}')

    def b_splines(self, x):
        """The bases of each feature, (..., I) -> (..., I, K). Differentiable in x."""
        self.check_input(x)
        rows, knots = to_working_dtype(x.reshape(-1, self.in_features), self.grid)
        bases = recursive_bases(rows, knots, self.spline_order).transpose(1, 2)
        return bases.to(x.dtype).reshape(*x.shape, bases.size(-1))

    def curve2coeff(self, x, y):
        """Coefficients of the splines nearest to points, by least squares: x (N, I), y (N, I, O) -> (O, I, K).
        ValueError for other shapes.
        """
        self.check_input(x)
        if x.dim() != 2 or y.dim() != 3 or y.shape[:2] != x.shape:
            raise ValueError(f'expected x (N, I) and y (N, I, O), got {tuple(x.shape)} and {tuple(y.shape)}')
        x, y, knots = (to_float64(tensor) for tensor in (x, y, self.grid))
        bases = recursive_bases(x, knots, self.spline_order)  # (N, K, I)
        gram = torch.einsum('nai,nbi->iab', bases, bases)
        moments = torch.einsum('nai,nio->iao', bases, y)
        return least_squares(gram, moments).permute(2, 0, 1).to(self.spline_weight)

    @torch.no_grad()
    def update_grid(self, x, margin=0.01):
        """Move the grid to where the inputs x (..., I) lie: `grid_eps` of the way from quantiles to an even grid (Liu
        et al. 2024, section 2.3), and refit every spline to the function it was, by least squares over x and, with a
        hundredth of the weight, over the whole grid: a basis that hardly saw data would else take an enormous
        coefficient to fit a single row. Outliers among x are fitted less well for it. Features whose grid stays keep
        their values. Memory is proportional to N * I. Of several processes each updates its own copy: call it with the
        same x in all, or before DistributedDataParallel takes the model. ValueError for inputs without rows or not
        finite, and for splines that cannot be written.
        """
        self.check_input(x)
        if not margin >= 0:
            raise ValueError(f'margin must not be negative, got {margin}')
        x = to_float64(x.reshape(-1, self.in_features))
        if x.size(0) == 0:
            raise ValueError('update_grid needs at least one row of inputs')
        self.check_splines()
        if not x.isfinite().all():
            n_nan, n_inf = x.isnan().sum().item(), x.isinf().sum().item()
            raise ValueError(f'update_grid wants finite inputs, got {n_nan} NaN and {n_inf} infinite ones')
        old, new = to_float64(self.grid), self.fitted_knots(x, margin).to(self.grid.dtype)
        if not new.isfinite().all():
            raise ValueError(f'update_grid: these inputs want knots beyond the numbers of {new.dtype}')
        new = torch.where(new[:, -1:] > new[:, :1], new, self.grid)  # where a feature is constant, up to rounding
        gram, cross = 0, 0  # sums over the rows of new' new and new' old, (I, K, K)
        G, k = self.grid_size, self.spline_order
        everywhere = points_within(to_float64(new)[:, k : k + G + 1], 2 * k + 2)
        parts = [(1.0, rows) for rows in x.split(256)]  # what a cache holds: three times as fast as 4096
        for weight, rows in [*parts, (0.01 * len(x) / len(everywhere), everywhere)]:
            before, after = (recursive_bases(rows, knots, self.spline_order) for knots in (old, to_float64(new)))
            gram = gram + weight * torch.einsum('nai,nbi->iab', after, after)
            cross = cross + weight * torch.einsum('nai,nbi->iab', after, before)
        # c + pinv(gram) (cross - gram) c is the least-squares fit nearest to c, and c itself where the knots stay. It
        # is linear in the coefficients c of a spline, so it acts on spline_weight, and a scaler stays.
        refit = to_float64(self.spline_weight)
        refit = refit + torch.einsum('iab,...ib->...ia', least_squares(gram, cross - gram), refit)
        self.spline_weight.copy_(refit)
        self.grid.copy_(new)

    @torch.no_grad()
    def refine_grid(self, grid_size):
        """Give the layer grid_size intervals in place of those it has (grid extension, Liu et al. 2024, section 2.4);
        returns the largest difference that this makes to the spline of an edge. A multiple of the present number makes
        none: each interval is divided evenly, and all knots stay. With another number the splines are the nearest, by
        least squares. The knots outside the grid stay in any case, so that it is no longer uniform. spline_weight is a
        new parameter: make the optimizer anew. ValueError for splines that cannot be written.
        """
        if grid_size < 1:
            raise ValueError(f'grid_size must be at least 1, got {grid_size}')
        self.check_splines()
        old, new = to_float64(self.grid), to_float64(self.refined_knots(grid_size).to(self.grid.dtype))
        x = points_within(new, 2 * self.spline_order + 2)  # more than a polynomial of an interval has numbers
        before, after = (recursive_bases(x, knots, self.spline_order) for knots in (old, new))
        gram = torch.einsum('nai,nbi->iab', after, after)
        cross = torch.einsum('nai,nbi->iab', after, before)
        coefficients, scaled = to_float64(self.spline_weight), to_float64(self.scaled_spline_weight)
        refit = torch.einsum('iab,...ib->...ia', least_squares(gram, cross), coefficients).to(self.spline_weight)
        self.spline_weight = nn.Parameter(refit.contiguous(), requires_grad=self.spline_weight.requires_grad)
        self.grid, self.grid_size = new.to(self.grid), grid_size
        rescaled, difference = to_float64(self.scaled_spline_weight), 0.0
        for ours, theirs in zip(after, before):  # at each point
            change = torch.einsum('ai,...ia->...i', ours, rescaled) - torch.einsum('ai,...ia->...i', theirs, scaled)
            if change.numel():
                difference = max(difference, change.abs().max().item())
        return difference

    def check_splines(self):
        """ValueError where spline_weight cannot be written, as parametrizations and torch.nn.utils.prune compute it."""
        if 'spline_weight' not in self._parameters:
            raise ValueError(
                'spline_weight is computed from other numbers, so no grid can be refitted: remove that first'
            )
        if hasattr(self.spline_weight, 'full_tensor'):
            raise ValueError('spline_weight is in parts on several processes: change the grid before fully_shard')

    def refined_knots(self, grid_size):
        """(I, grid_size + 2k + 1): evenly between the old ones, and the old ones outside the grid."""
        G, k, old = self.grid_size, self.spline_order, to_float64(self.grid)
        place = torch.linspace(0, G, grid_size + 1, dtype=old.dtype, device=old.device)
        first = place.long().clamp(max=G - 1)  # the interval in which each new knot lies
        inner = torch.lerp(old[:, k + first], old[:, k + first + 1], place - first)
        return torch.cat([old[:, :k], inner, old[:, k + G + 1 :]], 1)

    def fitted_knots(self, x, margin):
        """(N, I) -> (I, G + 2k + 1)"""
        G, k = self.grid_size, self.spline_order
        x = x.sort(0).values
        quantiles = x[torch.linspace(0, x.size(0) - 1, G + 1, dtype=x.dtype, device=x.device).long()]  # (G + 1, I)
        spacing = (x[-1] - x[0] + 2 * margin) / G  # (I,)
        steps = torch.arange(-k, G + k + 1, dtype=x.dtype, device=x.device).unsqueeze(1)  # (G + 2k + 1, 1)
        even = x[0] - margin + spacing * steps[k : k + G + 1]
        inner = self.grid_eps * even + (1 - self.grid_eps) * quantiles
        below, above = inner[0] + spacing * steps[:k], inner[-1] + spacing * (steps[k + G + 1 :] - G)
        return torch.cat([below, inner, above]).t()

    def regularization_loss(self, regularize_activation=1.0, regularize_entropy=1.0):
        """L1 of the spline weights and entropy of the splines' shares: Liu et al. eq. 2.20 as in efficient-kan."""
        tiny = torch.finfo(self.spline_weight.dtype).tiny
        strength = self.spline_weight.abs().mean(-1)  # of each spline
        if getattr(self, 'mask', None) is not None:
            strength = strength * self.mask
        total = strength.sum()
        share = strength / total.clamp_min(tiny**0.5)
        entropy = -(share * share.clamp_min(tiny).log()).sum()
        return regularize_activation * total + regularize_entropy * entropy


class KANLinear(Splines):
    """A layer of O x I learned functions, in place of nn.Linear(I, O): (..., I) -> (..., O).
    Arguments, parameters and state dict are efficient-kan's; `bias` and `mask` are additions. scale_base and
    scale_spline multiply the initial weights, while in efficient-kan a larger one makes them smaller. Outside the
    extended knots the splines vanish and the base path alone acts. With `mask` the layer has a buffer (O, I) of that
    name, and an edge acts and trains where it is True: see surgery/prune.py.
    """

    _packed = None  # see layers.generation.packed_weights
    weight = property(lambda self: self.base_weight)  # for code that looks at the dtype or device of a linear layer

    def __init__(
        self, in_features, out_features, grid_size=5, spline_order=3, scale_noise=0.1, scale_base=1.0, scale_spline=1.0,
        enable_standalone_scale_spline=True, base_activation=nn.SiLU, grid_eps=0.02, grid_range=(-1, 1), bias=False,
        mask=False,
    ):  # fmt: skip
        super().__init__(in_features, grid_size, spline_order, base_activation, grid_eps, grid_range)
        self.out_features = out_features
        self.scale_noise, self.scale_base, self.scale_spline = scale_noise, scale_base, scale_spline
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, grid_size + spline_order))
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer('mask', torch.ones(out_features, in_features, dtype=torch.bool) if mask else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """base_weight, spline_scaler   uniform in +-scale / sqrt(I), with scale_base and scale_spline
        spline_weight                curves through noise of +-scale_noise / (2 G) at the grid points
        bias                         zero
        grid                         even, on grid_range
        mask                         True: every edge acts
        On the meta device there is nothing to set.
        """
        if self.spline_weight.is_meta:
            return  # the fit of the noise would take a while, for nothing
        G, k, bound = self.grid_size, self.spline_order, 1 / math.sqrt(self.in_features)
        self.grid.copy_(self.even_knots())
        self.base_weight.uniform_(-self.scale_base * bound, self.scale_base * bound)
        points = self.grid.t()[k : k + G + 1]  # (G + 1, I)
        noise = torch.rand(*points.shape, self.out_features, dtype=points.dtype, device=points.device) - 0.5
        self.spline_weight.copy_(self.curve2coeff(points, noise * (self.scale_noise / G)))
        if self.enable_standalone_scale_spline:
            self.spline_scaler.uniform_(-self.scale_spline * bound, self.scale_spline * bound)
        else:
            self.spline_weight.mul_(self.scale_spline)
        if self.bias is not None:
            self.bias.zero_()
        if self.mask is not None:
            self.mask.fill_(True)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.pop('_packed', None)  # a copy has tensors of its own

    def scale_splines(self, spline_weight):
        if not self.enable_standalone_scale_spline:
            return spline_weight
        return spline_weight * self.spline_scaler.unsqueeze(-1)

    def forward(self, x, base_weight=None, spline_weight=None):
        """(..., I) -> (..., O) in the autocast dtype, else that of the weights. An adapter gives weights of its own."""
        self.check_input(x)
        own = base_weight is None and spline_weight is None
        if torch.is_grad_enabled() and self._packed is not None:
            self._packed = None  # it may train: the step of a fused optimizer leaves no trace
        weight = self.kept_weight() if own else None
        if weight is None:
            weight = self.packed_weight(base_weight, spline_weight)
        rows, dtype = x.reshape(-1, self.in_features), self.compute_dtype()
        y = spline_linear(rows, weight, self.grid, self.spline_order, self.base_activation, dtype)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def compute_dtype(self):
        device_type = self.base_weight.device.type
        autocast = device_type != 'meta' and torch.is_autocast_enabled(device_type)
        is_cast = autocast and self.base_weight.dtype != torch.float64  # as nn.Linear
        return torch.get_autocast_dtype(device_type) if is_cast else self.base_weight.dtype

    @torch.no_grad()
    def keep_packed(self):
        """Pack the weights once, for passes without gradients: they are packed anew where they have changed since. What
        torch.compile has made of the layer does not look for that. Weights that hooks compute before each pass, as
        torch.nn.utils.prune does, are not packed.
        """
        if self._forward_pre_hooks:
            return
        held = [*self.parameters(), *self.buffers()]  # so that no other tensor can get the id of one of them
        self._packed = self.packed_weight().to(self.compute_dtype()), self.versions(), held

    def kept_weight(self):
        if self._packed is None:
            return None
        weight, versions, _ = self._packed
        return weight if torch.compiler.is_compiling() or versions == self.versions() else None

    def versions(self):
        """What tells whether the numbers have changed; `.data` and fused optimizers change them without a trace."""
        tensors = [*self.parameters(), *self.buffers()]
        return self.compute_dtype(), [(id(x), x.device, 0 if x.is_inference() else x._version) for x in tensors]

    def packed_weight(self, base_weight=None, spline_weight=None):
        """(O, (K + 1) * I), basis-major, so that loops over columns run over neighbouring features; base last."""
        base = self.base_weight if base_weight is None else base_weight
        splines = self.scale_splines(self.spline_weight if spline_weight is None else spline_weight)
        if self.mask is not None:
            base, splines = base * self.mask, splines * self.mask.unsqueeze(-1)
        return torch.cat([splines.transpose(1, 2), base.unsqueeze(1)], 1).flatten(1)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, grid_size={self.grid_size}, spline_order={self.spline_order}'


class ChannelSpline(Splines):
    """A learned activation, one function a channel: phi_i(x) = act(x) + sum_m spline_weight[i, m] * B_m(x), the plain
    activation at first. (..., I) -> (..., I). Outside the extended knots the splines vanish. `update_grid` spaces the
    knots evenly by default, which the fast passes of layers/channel.py want.
    """

    def __init__(
        self, in_features, grid_size=8, spline_order=3, base_activation=nn.SiLU, grid_eps=1.0, grid_range=(-4, 4)
    ):
        super().__init__(in_features, grid_size, spline_order, base_activation, grid_eps, grid_range)
        self.spline_weight = nn.Parameter(torch.empty(in_features, grid_size + spline_order))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """spline_weight zero, grid even on grid_range"""
        self.spline_weight.zero_()
        self.grid.copy_(self.even_knots())

    def forward(self, x, gated=False):
        """Gated, x holds gates and then values, (..., 2 I), and the result is phi(gate) * value."""
        self.check_input(self.gate_of(x, gated))
        rows = x.reshape(-1, x.size(-1))
        y = channel_spline(rows, self.spline_weight, self.grid, self.spline_order, self.base_activation, gated)
        return y.view(*x.shape[:-1], self.in_features)

    def gate_of(self, x, gated=False):
        if gated and (x.dim() == 0 or x.size(-1) != 2 * self.in_features):
            wanted = f'expected {2 * self.in_features} features in the last dimension, gates and values'
            raise ValueError(f'{wanted}, got shape {tuple(x.shape)}')
        return x[..., : self.in_features] if gated else x

    def extra_repr(self):
        return f'{self.in_features}, grid_size={self.grid_size}, spline_order={self.spline_order}'


class KAN(nn.Module):
    """KANLinear layers in a row: KAN([I, hidden, O]) maps (..., I) to (..., O). The other arguments are KANLinear's."""

    def __init__(
        self, layers_hidden, grid_size=5, spline_order=3, scale_noise=0.1, scale_base=1.0, scale_spline=1.0,
        base_activation=nn.SiLU, grid_eps=0.02, grid_range=(-1, 1), bias=False, mask=False,
    ):  # fmt: skip
        super().__init__()
        if len(layers_hidden) < 2:
            raise ValueError(f'layers_hidden must hold two widths at least, got {layers_hidden}')
        self.grid_size, self.spline_order = grid_size, spline_order
        settings = dict(grid_size=grid_size, spline_order=spline_order, grid_range=grid_range, grid_eps=grid_eps)
        settings.update(scale_noise=scale_noise, scale_base=scale_base, scale_spline=scale_spline)
        settings.update(base_activation=base_activation, bias=bias, mask=mask)
        self.layers = nn.ModuleList(KANLinear(I, O, **settings) for I, O in zip(layers_hidden, layers_hidden[1:]))

    def forward(self, x, update_grid=False):
        for layer in self.layers:
            if update_grid:
                layer.update_grid(x)
            x = layer(x)
        return x

    def refine_grid(self, grid_size):
        """KANLinear.refine_grid of each layer; returns the largest of the differences."""
        methods = [layer.refine_grid for layer in self.layers]  # an adapted layer has none: an error before any change
        for layer in self.layers:
            layer.check_splines()
        difference = max(refine(grid_size) for refine in methods)
        self.grid_size = grid_size
        return difference

    def regularization_loss(self, regularize_activation=1.0, regularize_entropy=1.0):
        return sum(layer.regularization_loss(regularize_activation, regularize_entropy) for layer in self.layers)
