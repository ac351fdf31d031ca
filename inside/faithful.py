"""What a model loses when edges of its KAN layers are cut, or do what their formulas say.

    with edited([(layer.seen, without(layer, keep))]):
        loss = ...

An Edit takes the place of a layer's output while the context lasts; the model itself stays as it is.
"""

import contextlib
import functools
import math
import statistics
from dataclasses import dataclass, field

import torch

from inside.edges import CHUNK, columns_of
from inside.formulas import FAMILIES, NAMES
from kan import ChannelSpline
from layers.spline import no_autocast, spline_linear
from run.tables import markdown_table
from surgery.prune import strongest

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of the edges of every layer that are cut
REPLACED = (0.01, 0.1, 1.0)  # of the strongest edges that get their formulas
LEVELS = (0.99,)  # of R2 above which all edges get theirs


@dataclass
class Edit:
    """What a layer gives instead: its edges by `weights` (O, P, I), straight lines `slopes` (O, I), formulas, and
    a constant (O,). Of channels O is 1, the constants are theirs, and nothing is summed over them.
    """

    weights: torch.Tensor
    constant: torch.Tensor
    slopes: torch.Tensor | None = None
    domain: tuple = ()  # (low, high) of the features, (I,) each, beyond which formulas stay what they are at its ends
    formulas: list = field(default_factory=list)  # (f, outputs, features, a, b, c) of each family, (E,) each

    def output(self, layer, x):
        """(n, I) -> (n, O) float32"""
        of_channels = isinstance(layer, ChannelSpline)
        with no_autocast(x):
            if of_channels:
                y = (columns_of(layer, x) * self.weights).sum(1) + self.constant
            else:
                arguments = layer.grid, layer.spline_order, layer.base_activation, torch.float32
                y = spline_linear(x, self.weights.flatten(1), *arguments) + self.constant
            if self.slopes is not None:
                y = y + (x * self.slopes if of_channels else x @ self.slopes.t())
            if self.formulas:
                y = y + self.sum_formulas(x.clamp(*self.domain).t().contiguous(), y.size(1), of_channels).t()
        return y

    def sum_formulas(self, x, n_outputs, of_channels):
        """(I, n) -> (O, n), or (I, n) of channels"""
        total = x.new_zeros(n_outputs, x.size(1))
        for f, outputs, features, *numbers in self.formulas:
            outputs = features if of_channels else outputs
            for part in torch.arange(len(outputs), device=x.device).split(1024):
                a, b, c = (tensor[part].unsqueeze(1) for tensor in numbers)
                total.index_add_(0, outputs[part], f(x[features[part]] * a + b) * c)
        return total


@contextlib.contextmanager
def edited(edits):
    """The layers of (Seen, Edit) pairs give what the edits say, whatever weights they are called with."""
    own = [(seen.layer, vars(seen.layer).get('forward')) for seen, _ in edits]  # as libraries put in place
    for seen, edit in edits:
        seen.layer.forward = functools.partial(forward, seen.layer, edit)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, before in own:
            del layer.forward
            if before is not None:
                layer.forward = before


def forward(layer, edit, x, *settings, **named):
    """What stands for the forward pass of a KANLinear, (..., I) -> (..., O), or of a ChannelSpline."""
    if isinstance(layer, ChannelSpline):
        gate = layer.gate_of(x, *settings, **named)
        y = output(layer, edit, gate).to(x.dtype)
        return y if gate is x else y * x[..., layer.in_features :]
    y = output(layer, edit, x)
    if layer.bias is not None:
        y += layer.bias.float()
    return y.to(layer.compute_dtype())


def output(layer, edit, x):
    rows = x.reshape(-1, layer.in_features).float()
    y = torch.cat([edit.output(layer, part) for part in rows.split(CHUNK)])
    return y.view(*x.shape[:-1], y.size(1))


def collect(layer, numbers):
    """Numbers of edges (O, I) summed for each output; those of channels stay apart, (I,)."""
    return numbers[0] if layer.seen.of_channels else numbers.sum(1)


def lost(layer, keep):
    """(O,) what the edges that are not kept gave on average; of channels (I,)."""
    return collect(layer, layer.edges.mean * ~keep)


def without(layer, keep):
    """A Layer of report.py without the edges where keep (O, I) is False, but for their means."""
    return Edit(layer.seen.weights * keep.unsqueeze(1), lost(layer, keep))


def by_formula(layer, chosen):
    """The layer with the chosen edges (O, I) as the search found them: straight lines where nothing is better."""
    edges, found = layer.edges, layer.found
    curved = chosen & edges.alive & ~layer.affine
    straight = chosen & ~curved
    slopes = torch.where(straight & edges.alive, edges.slope, 0.0)
    offsets = torch.where(straight, edges.mean - slopes * edges.centre, 0.0) + torch.where(curved, found.d, 0.0)
    formulas = []
    for n in found.family[curved].unique().tolist():
        outputs, features = (curved & (found.family == n)).nonzero(as_tuple=True)
        numbers = (tensor[outputs, features] for tensor in (found.a, found.b, found.c))
        formulas.append((FAMILIES[NAMES[n]].f, outputs, features, *numbers))
    weights, domain = layer.seen.weights * ~chosen.unsqueeze(1), (edges.low, edges.high)
    return Edit(weights, collect(layer, offsets), slopes, domain, formulas)


# what stays, by a function of a layer and the share to keep


def most_active(layer, kept):
    return strongest(layer.edges.activity, kept)


def at_random(draw):
    generator = torch.Generator().manual_seed(draw)
    return lambda layer, kept: strongest(torch.rand(layer.edges.activity.shape, generator=generator), kept)


# losses; `loss` is a function without arguments


def prune_curve(layers, loss, keep):
    """The loss with each of SHARES of every layer cut."""
    losses = []
    for cut in SHARES:
        edits = [(layer.seen, without(layer, keep(layer, 1 - cut).to(layer.seen.x.device))) for layer in layers]
        with edited(edits):
            losses.append(loss())
    return losses


def formula_losses(layers, loss):
    """[(which edges, their share of all, the loss with their formulas in their place)]"""
    kinds = [(f'the strongest {kept:.0%}', [most_active(layer, kept) for layer in layers]) for kept in REPLACED]
    kinds += [(f'R² above {level}', [layer.r2 > level for layer in layers]) for level in LEVELS]
    found = []
    for name, masks in kinds:
        with edited([(layer.seen, by_formula(layer, mask)) for layer, mask in zip(layers, masks)]):
            part = sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
            found.append((name, part, loss()))
    return found


def measure_losses(layers, loss, draws=2):
    """All of these, in a dict; without draws none at random."""
    found = dict(full=loss(), shares=list(SHARES), by_activity=prune_curve(layers, loss, most_active))
    found['formulas'] = formula_losses(layers, loss)
    if draws:
        random = [prune_curve(layers, loss, at_random(draw)) for draw in range(draws)]
        found['at_random'] = [statistics.mean(losses) for losses in zip(*random)]
        found['at_random_std'] = [statistics.stdev(losses) for losses in zip(*random)]
    return found


def loss_text(loss, digits=4):
    """A loss; NaN and None, as a record has it for NaN, too."""
    return 'not finite' if loss is None or not math.isfinite(loss) else f'{loss:.{digits}f}'


def table(now, before):
    """What measure_losses found as markdown, of a model and of the one with random initial weights, if any."""

    def beside(text, old):
        return f'{text} (random weights: {old})' if before else text

    def losses(ours, theirs):
        return beside(loss_text(ours), loss_text(theirs, 3))

    old = before or now
    cut = [['none', losses(now['full'], old['full']), '']]
    for i, share in enumerate(now['shares']):
        active = losses(now['by_activity'][i], old['by_activity'][i])
        cut.append([f'{share:.0%}', active, loss_text(now['at_random'][i])])
    replaced = []
    for (name, part, loss), (_, old_part, old_loss) in zip(now['formulas'], old['formulas']):
        replaced.append([name, beside(f'{part:.1%}', f'{old_part:.1%}'), losses(loss, old_loss)])
    lines = markdown_table(['functions cut', 'the least active', 'drawn at random'], cut, 'lll')
    lines += ['', *markdown_table(['functions replaced by their formulas', 'share of all', 'loss'], replaced, 'lll')]
    return '\n'.join(lines) + '\n'
