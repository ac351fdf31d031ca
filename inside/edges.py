"""What the edges of a KAN layer do to the inputs that it sees, without sampling one of them. The functions of a
ChannelSpline, one for each feature, are looked at as the edges to a single output: O is 1, and no sum is taken.

An edge is a function of one number, g(x) = c . phi(x), where phi(x) = [B_0(x) ... B_{K-1}(x), act(x)] holds what all
edges of a feature share. The mean and the covariance of phi over the data give every edge its variance, its best
straight line and what it has in common with any other function, by small matrix products.

    seen = watch(model, lambda: model(tokens))   # {name: Seen} of every KAN layer
    edges = measure(seen['h.0.mlp.0'])           # Edges

Legend: I, O features in and out; K bases of a spline, P = K + 1 with the activation; N rows of data; Q nodes.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kan import ChannelSpline, Splines
from layers.spline import basis_function, columns, no_autocast

NODES = 512  # even places in the domain of a feature, between which a candidate is taken for a line
CHUNK = 1024  # rows at a time
CURVE = 129  # even points of a domain on which roughness is measured


@dataclass
class Seen:
    """A KAN layer, the first rows of its inputs, and the weights that acted, which an adapter may have changed."""

    layer: Splines
    x: Tensor  # (N, I) float32
    weights: Tensor  # (O, P, I) float32

    @property
    def of_channels(self):
        return isinstance(self.layer, ChannelSpline)


def kan_layers(model):
    """{name: KANLinear or ChannelSpline}, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Splines)}


def weights_of(layer, *adapted, **named):
    """What acts, (O, P, I) float32: of channels (1, P, I), whose activation has the weight 1."""
    if isinstance(layer, ChannelSpline):
        ones = layer.spline_weight.new_ones(1, layer.in_features)
        return torch.cat([layer.spline_weight.t(), ones]).float().unsqueeze(0)
    return layer.packed_weight(*adapted, **named).float().unflatten(1, (-1, layer.in_features))


@torch.no_grad()
def watch(model, run, names=None, rows=16384):
    """{name: Seen} of the KAN layers, or of those named, while run() has the model read data. A layer that was not
    called is left out. ValueError where an input is not finite.
    """
    layers = kan_layers(model)
    parts, weights, handles = {}, {}, []

    def remember(name, layer, x, *settings, **named):
        if isinstance(layer, ChannelSpline):
            x, settings, named = layer.gate_of(x, *settings, **named), (), {}
        layer.check_input(x)
        left = rows - sum(map(len, parts.setdefault(name, [])))
        parts[name].append(x.reshape(-1, layer.in_features)[:left].float().clone())
        if name not in weights:
            weights[name] = weights_of(layer, *settings, **named)
            if not weights[name].isfinite().all():
                raise ValueError(f'{name} holds weights that are NaN or infinite')

    def hook(name, layer, args, kwargs):
        remember(name, layer, *args, **kwargs)

    for name in layers if names is None else names:
        bound = functools.partial(hook, name)
        handles.append(layers[name].register_forward_pre_hook(bound, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    seen = {name: Seen(layers[name], torch.cat(parts[name]), weights[name]) for name in layers if name in parts}
    for name, found in seen.items():
        if len(found.x) < 2:
            raise ValueError(f'{name} saw {len(found.x)} rows of data, and statistics want two at least')
        bad = ~found.x.isfinite()
        if bad.any():
            feature = bad.any(0).nonzero()[0].item()
            raise ValueError(f'{name}: {bad.sum()} inputs are NaN or infinite, the first in feature {feature}')
    return seen


def without_autocast(function):
    """The function of a Seen, all in float32."""

    @functools.wraps(function)
    def run(seen, *args, **kwargs):
        with no_autocast(seen.x):
            return function(seen, *args, **kwargs)

    return run


def evenly(first, last, n, device=None):
    """n evenly spaced numbers from first to last, in float32 whatever the default dtype is."""
    return torch.linspace(first, last, n, dtype=torch.float32, device=device)


def columns_of(layer, x, features=slice(None), dtype=torch.float32):
    """phi of the features, or of some of them, (n, I) -> (n, P, I)."""
    bases = basis_function(layer.grid)  # as the layer takes it: an even grid of bfloat16 is uneven in float32
    with no_autocast(x):
        grid, rows = layer.grid[features], x[:, features]
        return columns(rows, grid, layer.spline_order, layer.base_activation, bases, dtype)


@dataclass
class Edges:
    """The statistics of a layer: the first fields are of its features, those from `mean` on of its edges."""

    low: Tensor  # (I,) the domain: the least and the greatest input
    high: Tensor
    centre: Tensor  # (I,) mean of the inputs
    outside: Tensor  # (I,) share of inputs outside the grid
    mass: Tensor  # (I, Q) float64, mean of hat_q, which is 1 at node q, 0 at all others, and a line between
    overlap: Tensor  # (2, I, Q) float64, mean of hat_q hat_q and of hat_q hat_{q+1}
    cross: Tensor  # (I, Q, P) covariance of hat_q and phi
    output_sd: Tensor  # (O,) standard deviation of the outputs; of channels the root of their variances' sum
    # Of each edge, (O, I):
    mean: Tensor  # of what it adds to its output
    activity: Tensor  # standard deviation of that
    share: Tensor  # covariance with its output over the variance of that (of channels, of all): these sum to 1
    slope: Tensor  # of its best straight line
    affine_r2: Tensor  # share of its variance that that line has; NaN where it has no variance
    roughness: Tensor  # root mean square of its second derivative, in domains and activities; of a sine's period 39

    @property
    def alive(self):
        """(O, I) whether the edge varies at all, beyond the rounding of float32."""
        return self.activity > 1e-6 * self.activity.max().clamp_min(1e-30)


@without_autocast
@torch.no_grad()
def measure(seen):
    """The Edges of a layer."""
    layer, x, weights = seen.layer, seen.x, seen.weights
    means = sum(columns_of(layer, rows).double().sum(0) for rows in x.split(CHUNK)) / len(x)  # (P, I)
    centre = x.double().mean(0)
    sums = Sums(x.amin(0), x.amax(0), *weights.shape)
    for rows in x.split(CHUNK):
        sums.add(rows, rows - centre.float(), columns_of(layer, rows) - means.float(), weights)
    edges = Edges(**about_features(seen, centre, sums), **about_edges(seen, means, sums))
    edges.affine_r2[~edges.alive] = torch.nan
    return edges


def about_features(seen, centre, sums):
    """The fields of Edges that features have."""
    x, grid, k = seen.x, seen.layer.grid.float(), seen.layer.spline_order
    first, last = grid[:, k], grid[:, grid.size(1) - 1 - k]
    mass, cross = sums.mass / len(x), (sums.cross / len(x)).double()
    cross -= mass.unsqueeze(2) * cross.sum(1, keepdim=True)  # the rounding of the means of phi
    return dict(
        low=sums.low,
        high=sums.high,
        centre=centre.float(),
        outside=((x < first) | (x > last)).float().mean(0),
        mass=mass,
        overlap=sums.overlap / len(x),
        cross=cross.float(),
    )


def about_edges(seen, means, sums):
    """The fields of Edges that outputs and edges have."""
    N, c = len(seen.x), seen.weights.permute(2, 0, 1).double()  # (I, O, P)
    variance = (c @ (sums.cov / N) * c).sum(-1).clamp_min(0)  # (I, O)
    activity = variance.sqrt().t().float()
    if seen.of_channels:
        with_output = variance.t().float()
        output = with_output.sum(1)
    else:
        with_output = (seen.weights * (sums.with_output / N).permute(2, 0, 1)).sum(1)  # (O, I) covariances
        output = sums.output / N  # (O,) variances
    with_x = (c @ (sums.with_x / N).unsqueeze(-1)).squeeze(-1)  # (I, O) covariances
    slope = with_x / (sums.squares / N).clamp_min(1e-30).unsqueeze(1)
    return dict(
        output_sd=output.sqrt(),
        mean=(c @ means.t().unsqueeze(-1)).squeeze(-1).t().float(),
        activity=activity,
        share=with_output / output.clamp_min(1e-30).unsqueeze(1),
        slope=slope.t().float(),
        affine_r2=(slope * with_x / variance.clamp_min(1e-30)).clamp(max=1).t().float(),
        roughness=bend(seen.layer, sums.low, sums.high, c).t() / activity.clamp_min(1e-30),
    )


class Sums:
    """Sums over the rows, from which the means of Edges follow."""

    def __init__(self, low, high, O, P, I):
        make = low.new_zeros
        self.low, self.high = low, high
        self.per_node = (NODES - 1) / (high - low).clamp_min(1e-30)
        self.squares = make(I, dtype=torch.float64)
        self.cov = make(I, P, P, dtype=torch.float64)
        self.with_x = make(I, P, dtype=torch.float64)
        self.with_output = make(P, I, O)
        self.output = make(O)
        self.mass, self.overlap = (make(*shape, NODES, dtype=torch.float64) for shape in ((I,), (2, I)))
        self.cross = make(I, NODES, P)

    def add(self, x, centred, phi, weights):
        """x and its distance from the mean (n, I), phi less its mean (n, P, I), weights (O, P, I)"""
        self.squares += centred.double().square().sum(0)
        per_feature = phi.permute(2, 0, 1).contiguous()  # (I, n, P)
        self.cov += per_feature.mT @ per_feature
        self.with_x += (per_feature.mT @ centred.t().unsqueeze(-1)).squeeze(-1)
        y = phi.flatten(1) @ weights.flatten(1).t()  # (n, O), less its mean
        self.with_output += (phi.flatten(1).t() @ y).view_as(self.with_output)
        self.output += y.square().sum(0)
        place, first, second = self.hats(x)
        for offset, hat in (0, first), (1, second):
            self.mass.view(-1).index_add_(0, place + offset, hat.flatten())
            self.overlap[0].view(-1).index_add_(0, place + offset, hat.square().flatten())
            self.cross.view(-1, phi.size(1)).index_add_(
                0, place + offset, (per_feature * hat.float().unsqueeze(-1)).flatten(0, 1)
            )
        self.overlap[1].view(-1).index_add_(0, place, (first * second).flatten())

    def hats(self, x):
        """Of inputs (n, I) the nodes before them, (I n,) among those of all features, and what the hats of these and of
        the next nodes give, (I, n) each.
        """
        at = ((x - self.low) * self.per_node).t()  # (I, n)
        left = at.floor().clamp(0, NODES - 2)
        second = (at - left).clamp(0, 1).double()
        place = left.long() + NODES * torch.arange(len(at), device=x.device).unsqueeze(1)
        return place.flatten(), 1 - second, second


def bend(layer, low, high, c):
    """(I, O) root mean square of the second derivative of each edge by t in [0, 1], its place in its domain, of weights
    c (I, O, P).
    """
    shares = evenly(0, 1, CURVE, low.device).unsqueeze(1)
    # in float64, as small differences of large numbers are taken
    x = torch.lerp(low.double(), high.double(), shares.double())
    phi = columns_of(layer, x, dtype=torch.float64)  # (CURVE, P, I)
    second = (phi[2:] - 2 * phi[1:-1] + phi[:-2]) * (CURVE - 1) ** 2
    gram = torch.einsum('nai,nbi->iab', second, second) / len(second)
    return (c @ gram * c).sum(-1).clamp_min(0).sqrt().float()


def curves(seen, edges, pairs, n=64):
    """Of edges (output, feature) over their domains: x, g(x) and its part by the activation, (len(pairs), n) each."""
    outputs, features = indices(seen, pairs)
    shares = evenly(0, 1, n, seen.x.device).unsqueeze(1)
    x = torch.lerp(edges.low, edges.high, shares)  # (n, I)
    terms = columns_of(seen.layer, x, features) * seen.weights[outputs, :, features].t()  # (n, P, pairs)
    return x[:, features].t(), terms.sum(1).t(), terms[:, -1].t()


def values(seen, pairs):
    """What edges (output, feature) add for each row of the data, (N, len(pairs))."""
    outputs, features = indices(seen, pairs)
    weights = seen.weights[outputs, :, features].t()  # (P, pairs)
    return torch.cat([(columns_of(seen.layer, x, features) * weights).sum(1) for x in seen.x.split(CHUNK)])


def indices(seen, pairs):
    """The outputs and the features of pairs, as two tensors."""
    return torch.tensor(pairs, device=seen.x.device).unbind(1)
