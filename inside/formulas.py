"""A formula for every edge of a KAN layer: the function c f(a x + b) + d that comes nearest to it over the data.

For given a and b the best c and d follow from covariances, and these from what inside/edges.py has measured: the R2 of
all edges of a feature against thousands of candidates f(a x + b) is one matrix product. `search` does that for every
edge of a layer; `refine` then moves a and b of the edges that matter and measures their R2 on the data themselves.

R2 is the share of the variance of an edge over the data that a formula has. A sigmoid is a tanh here:
sigmoid(z) = (1 + tanh(z / 2)) / 2.

Legend: I, O features in and out; P functions of a feature; N rows; Q nodes; H candidates of a family; E edges.
The place of an input in its domain is t = (x - low) / (high - low), and a candidate f(alpha t + beta).
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from inside.edges import NODES, evenly, indices, values, without_autocast

BLOCK = 256  # candidates at a time, so that their correlations with the edges of a feature stay in the cache
ROUNDS, SHRINK = 20, 0.7  # refine looks around the best place so far that often, each time that much closer
ROUGHLY = 0.01  # of the standard deviation of an edge: how far a formula as it is written may be from the formula


@dataclass
class Family:
    """A function f, and what alpha and beta may be: `kind` says how they follow from u and v, the sign of alpha is one
    of `signs`, and 1 alone where the other gives the same functions. f(r z) = r^power f(z) for r > 0, where it has one.
    """

    f: object
    kind: str
    signs: tuple = (1,)
    power: float = 0.0


# the simplest first
FAMILIES = {
    'x^2': Family(torch.square, 'placed', power=2),
    'x^3': Family(lambda z: z**3, 'placed', power=3),
    'x^4': Family(lambda z: z**4, 'placed', power=4),
    'abs': Family(torch.abs, 'placed', power=1),
    'relu': Family(torch.relu, 'placed', (1, -1), power=1),
    'sqrt': Family(torch.sqrt, 'bounded', (1, -1), power=0.5),
    '1/x': Family(torch.reciprocal, 'bounded', (1, -1), power=-1),
    '1/x^2': Family(lambda z: z**-2, 'bounded', (1, -1), power=-2),
    'log': Family(torch.log, 'bounded', (1, -1)),
    'exp': Family(torch.exp, 'rate', (1, -1)),
    'sin': Family(torch.sin, 'wave'),
    'tanh': Family(torch.tanh, 'scaled'),
    'atanh': Family(torch.atanh, 'within'),
    'gaussian': Family(lambda z: torch.exp(-z * z), 'scaled'),
    'silu': Family(F.silu, 'scaled', (1, -1)),
}
NAMES = tuple(FAMILIES)


def line_of(kind, sign, u, v):
    """(alpha, beta) of candidates"""
    if kind == 'placed':  # zero at v
        return sign + 0 * v, -sign * v
    if kind == 'scaled':
        return sign * u.exp(), -sign * u.exp() * v
    if kind == 'wave':  # v is the phase in the middle of the domain, so that a change of u alone turns about it
        return u.exp(), -math.pi * v - u.exp() / 2
    if kind == 'rate':  # f takes beta out as a factor: 0 at the end where f is greatest
        return sign * u.exp(), -u.exp() * (sign > 0)
    if kind == 'within':  # between -1 and 1 in the domain, where atanh goes from v - e^u to v + e^u
        first, last = (v - u.exp()).clamp_min(-4).tanh(), (v + u.exp()).clamp_max(4).tanh()
        return last - first, first
    return sign + 0 * u, u.exp() + (sign < 0)  # bounded: positive in the domain, e^u at the nearer end


def lattice(kind):
    """The candidates (u, v) of a kind, (H,) each."""
    if kind == 'placed':  # in the domain and on both sides of it
        v = evenly(-1, 2, 193)
        return 0 * v, v
    if kind in ('scaled', 'wave'):  # from a twentieth of a wave in the domain to 20
        u = evenly(math.log(0.3), math.log(120), 32)
        v = evenly(-0.25, 1.25, 73) if kind == 'scaled' else evenly(0, 1, 65)[:-1]
        return torch.cartesian_prod(u, v).unbind(1)
    if kind == 'within':
        return torch.cartesian_prod(evenly(math.log(0.2), math.log(4), 16), evenly(-3, 3, 61)).unbind(1)
    first, last = (0.05, 60) if kind == 'rate' else (1e-4, 10)
    u = evenly(math.log(first), math.log(last), 96)
    return u, 0 * u


@functools.cache
def candidates(name, device):
    """All candidates of a family: their sign, u and v (H,); what they give at the nodes (H, Q); in float64 that, its
    square and its product with its neighbour, whose last column meets an overlap of 0.
    """
    family = FAMILIES[name]
    sign = torch.tensor(family.signs, dtype=torch.float32)
    u, v = (numbers.repeat(len(sign)) for numbers in lattice(family.kind))
    places = tuple(numbers.to(device) for numbers in (sign.repeat_interleave(len(u) // len(sign)), u, v))
    alpha, beta = (numbers.unsqueeze(1) for numbers in line_of(family.kind, *places))
    h = family.f(alpha * evenly(0, 1, NODES, device) + beta)
    wide = h.double()
    return places, h, (wide, wide.square(), wide * wide.roll(-1, 1))


def moments(h, mass, overlap):
    """Of functions by their values h (..., H, Q) at the nodes of a feature, mass (..., Q), overlap (2, ..., Q): h less
    its mean over the data, and its variance (..., H), 0 where rounding leaves nothing of it.
    """
    mean = h @ mass.unsqueeze(-1)
    apart = h - mean
    variance = apart.square() @ overlap[0].unsqueeze(-1)
    variance = variance + 2 * ((apart[..., :-1] * apart[..., 1:]) @ overlap[1][..., :-1].unsqueeze(-1))
    return apart, torch.where(variance > 1e-9 * mean.square() + 1e-30, variance, 0.0).squeeze(-1)


@dataclass
class Found:
    """The best candidate of each edge, (O, I) each; its family is an index into NAMES."""

    r2: torch.Tensor  # (F, O, I) of each family's best
    family: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    d: torch.Tensor
    margin: float  # a formula is called affine unless its R2 is more than that above the best straight line's
    tie: float  # of formulas whose R2 are within that of the best, the simplest is taken

    @property
    def best(self):
        """(O, I) R2"""
        return self.r2.gather(0, self.family.unsqueeze(0)).squeeze(0)


@without_autocast
@torch.no_grad()
def search(seen, edges, progress=lambda: None, margin=0.01, tie=1e-4):
    """The best of some 14,000 candidates for every edge of a layer. Edges without variance have R2 0. The margin and
    the tie are for edges that learned from noisy data: an accurate KAN can do with less.
    """
    O, P, I = seen.weights.shape
    r2, numbers = seen.weights.new_zeros(len(NAMES), I, O), seen.weights.new_zeros(4, I, O)  # a, b, c, d
    family = seen.weights.new_zeros(I, O, dtype=torch.long)
    for group in torch.arange(I, device=r2.device).split(64):  # features at a time, as wider products are faster
        tried = [correlate(name, edges, group) for name in NAMES]
        for at, i in enumerate(group.tolist()):
            progress()
            weights = seen.weights[:, :, i].t().contiguous()  # (P, O)
            for n, (vectors, _, _) in enumerate(tried):
                r2[n, i] = highest_r2(vectors[at], weights, edges.activity[:, i])
            r2[:, i, ~edges.alive[:, i]] = 0
            family[i] = simplest(r2[:, i], tie)
            for n in family[i].unique().tolist():
                outputs = (family[i] == n).nonzero().squeeze(1)
                of_feature = [tensor[at] for tensor in tried[n]]
                numbers[:, i, outputs] = best_candidate(NAMES[n], *of_feature, weights[:, outputs], edges, outputs, i)
    return Found(r2.mT, family.t(), *numbers.mT, margin, tie)


def highest_r2(vectors, weights, activity):
    """Of a family for each edge of a feature, (O,): vectors (H, P) of its candidates, weights (P, O), activity (O,)."""
    highest = [(block @ weights).abs_().amax(0) for block in vectors.split(BLOCK)]
    return (torch.stack(highest).amax(0) / activity.clamp_min(1e-30)).square().clamp(max=1)


def best_candidate(name, vectors, mean, spread, weights, edges, outputs, i):
    """a, b, c, d (4, E) of the best candidate of a family for the edges from feature i to `outputs`, weights (P, E)."""
    alpha, beta = line_of(FAMILIES[name].kind, *candidates(name, vectors.device)[0])
    products = weights.t() @ vectors.t()  # (E, H)
    best = products.abs().argmax(1)
    width, low = (edges.high[i] - edges.low[i]).clamp_min(1e-30), edges.low[i]
    a, b = alpha[best] / width, beta[best] - alpha[best] * low / width
    c = products.gather(1, best.unsqueeze(1)).squeeze(1) / spread[best]
    return torch.stack([a, b, c, edges.mean[outputs, i] - c * mean[best]])


def correlate(name, edges, group):
    """Of all candidates of a family for a group of g features: vectors (g, H, P), whose products with the weights of an
    edge are its covariances with them over their standard deviations; their means and standard deviations, (g, H).
    """
    _, h, (values, squares, neighbours) = candidates(name, edges.mass.device)
    mean = edges.mass[group] @ values.t()
    first, second = edges.overlap[:, group]
    square = first @ squares.t() + 2 * second @ neighbours.t()
    variance = square - mean.square()
    kept = variance > 1e-9 * square + 1e-30  # beyond the rounding
    spread = torch.where(kept, variance, torch.inf).sqrt().float()
    vectors = h @ edges.cross[group].permute(1, 0, 2).flatten(1)  # (H, g * P)
    vectors = vectors.view(len(h), len(group), -1).transpose(0, 1) / spread.unsqueeze(2)
    return vectors.contiguous(), mean.float(), spread


def simplest(r2, tie):
    """The first of the families whose R2 (F, ...) is within `tie` of the best."""
    order = torch.arange(len(r2), device=r2.device).view(-1, *[1] * (r2.dim() - 1))
    return torch.where(r2 >= r2.amax(0) - tie, order, len(r2)).amin(0)


@dataclass
class Formula:
    """c f(a x + b) + d, with f of FAMILIES; or of the family 'affine' c x + d, or of 'constant' d."""

    family: str
    a: float
    b: float
    c: float
    d: float
    r2: float  # NaN of a constant
    affine_r2: float
    others: tuple  # (family, R2) of those next to it
    digits: int = 3  # that a, b, c and d are written with


@without_autocast
@torch.no_grad()
def refine(seen, edges, found, pairs, n_families=3):
    """A Formula for each of the edges (output, feature) in `pairs`, the best of n_families with a and b moved to where
    R2 is highest.
    """
    formulas = []
    for part in (pairs[i : i + 64] for i in range(0, len(pairs), 64)):
        formulas += refine_some(seen, edges, found, part, n_families)
    return formulas


def refine_some(seen, edges, found, pairs, n_families):
    outputs, features = indices(seen, pairs)
    g = values(seen, pairs).double()
    known = found.r2[:, outputs, features]  # (F, E)
    tried = known.argsort(0, descending=True)[:n_families]
    r2, lines = torch.full_like(known, -1.0), known.new_zeros(len(NAMES), 4, len(pairs))
    for n in tried.unique().tolist():
        at = (tried == n).any(0).nonzero().squeeze(1)
        alpha, beta = climb(seen, edges, NAMES[n], outputs[at], features[at])
        r2[n, at], lines[n][:, at] = fit(seen, edges, FAMILIES[NAMES[n]].f, alpha, beta, features[at], g[:, at])
    chosen = simplest(r2, found.tie).tolist()
    formulas = []
    for e, (o, i) in enumerate(pairs):
        formula = formula_of(edges, o, i, r2[:, e], lines[:, :, e], chosen[e], found.margin)
        x = torch.linspace(edges.low[i].item(), edges.high[i].item(), 65, dtype=torch.float64)
        formulas.append(with_digits(formula, x, edges.activity[o, i].item()))
    return formulas


def formula_of(edges, o, i, r2, lines, chosen, margin):
    """The Formula of an edge: a constant where it does not vary, a line where the chosen family is not better by the
    margin, else that family. r2 (F,) of all families, -1 of those not tried, and their a, b, c, d, lines (F, 4).
    """
    mean, straight, best = edges.mean[o, i].item(), edges.affine_r2[o, i].item(), r2[chosen].item()
    if not edges.alive[o, i]:
        return Formula('constant', 0.0, 0.0, 0.0, mean, math.nan, math.nan, ())
    tried = [n for n in r2.argsort(descending=True).tolist() if r2[n] >= 0]
    others = [(NAMES[n], r2[n].item()) for n in tried if n != chosen]
    if best - straight <= margin:
        slope = edges.slope[o, i].item()
        offset = mean - slope * edges.centre[i].item()
        return Formula('affine', 1.0, 0.0, slope, offset, straight, straight, ((NAMES[chosen], best), *others))
    return Formula(NAMES[chosen], *plainest(NAMES[chosen], *lines[chosen].tolist()), best, straight, tuple(others))


def climb(seen, edges, name, outputs, features):
    """(alpha, beta) where the R2 of a family is highest for edges, (E,) each: the best of its lattice, then of ever
    nearer surroundings.
    """
    family, weights = FAMILIES[name], seen.weights[outputs, :, features].unsqueeze(2)  # (E, P, 1)
    at = (correlate(name, edges, features)[0] @ weights).abs().argmax(1)  # (E, 1)
    sign, u, v = (numbers[at] for numbers in candidates(name, weights.device)[0])  # (E, 1)
    mass, overlap = edges.mass[features].float(), edges.overlap[:, features].float()
    target = edges.cross[features] @ weights  # (E, Q, 1)
    t = evenly(0, 1, NODES, target.device)
    around = torch.cartesian_prod(*[evenly(-1, 1, 3, t.device)] * 2)  # (9, 2)
    reach = 0.2 * around[:, 0], 0.02 * around[:, 1]
    for n in range(ROUNDS):
        us, vs = (u + SHRINK**n * reach[0]).clamp(-9, 9), v + SHRINK**n * reach[1]  # (E, 9)
        alpha, beta = (numbers.unsqueeze(2) for numbers in line_of(family.kind, sign, us, vs))
        apart, variance = moments(family.f(alpha * t + beta), mass, overlap)
        covariance = (apart @ target).squeeze(2)
        score = torch.where(variance > 0, covariance.square() / variance.clamp_min(1e-30), -1.0)
        at = score.argmax(1, keepdim=True)
        u, v = us.gather(1, at), vs.gather(1, at)
    return tuple(numbers.squeeze(1) for numbers in line_of(family.kind, sign, u, v))


def fit(seen, edges, f, alpha, beta, features, g):
    """R2 on the data of f(alpha t + beta) for edges whose values are g (N, E): (E,), and a, b, c, d (4, E)."""
    width = (edges.high[features] - edges.low[features]).clamp_min(1e-30)
    a = alpha / width
    b = beta - a * edges.low[features]
    t = (seen.x[:, features] - edges.low[features]) / width
    h = f(alpha * t + beta).double()
    g_apart, h_apart = g - g.mean(0), h - h.mean(0)
    covariance, variance = (g_apart * h_apart).mean(0), h_apart.square().mean(0).clamp_min(1e-30)
    c = covariance / variance
    r2 = covariance * c / g_apart.square().mean(0).clamp_min(1e-30)
    return r2.float(), torch.stack([a, b, c.float(), (g.mean(0) - c * h.mean(0)).float()])


def plainest(name, a, b, c, d):
    """The same function with a = 1 or -1 where f can give the size of a away, without b in an exponential, and with the
    phase of a sine near zero.
    """
    size = abs(a)
    if FAMILIES[name].power:
        return math.copysign(1, a), b / size, c * size ** FAMILIES[name].power, d
    if name == 'log':
        return math.copysign(1, a), b / size, c, d + c * math.log(size)
    if name == 'exp' and abs(b) < 30:
        return a, 0.0, c * math.exp(b), d
    if name == 'sin':
        turns = round(b / math.pi)  # half turns, each of which changes the sign
        return a, b - turns * math.pi, c * (-1) ** turns, d
    return a, b, c, d


def function_of(formula):
    """The function of x (a tensor) that a formula stands for."""
    if formula.family in ('affine', 'constant'):
        return lambda x: formula.c * x + formula.d
    f = FAMILIES[formula.family].f
    return lambda x: formula.c * f(formula.a * x + formula.b) + formula.d


def with_digits(formula, x, deviation):
    """The formula with as many digits, three to nine, as it is to be written with: at the numbers x it then moves by
    ROUGHLY of the standard deviation of its edge at most. Far from zero, or where terms cancel, three are too few.
    """
    if formula.family == 'constant':  # of an edge without a deviation to measure by
        return formula
    exact = function_of(formula)(x)
    for digits in range(3, 10):
        rounded = {name: float(f'{getattr(formula, name):.{digits}g}') for name in 'abcd'}
        if (function_of(replace(formula, **rounded))(x) - exact).abs().max() <= ROUGHLY * deviation:
            break
    return replace(formula, digits=digits)


def expression(formula, digits=None, symbol='x'):
    """A formula as an expression of sympy, its numbers rounded, by default to its own number of digits. Where f ends or
    has a pole near the data, a and b keep six at least: with fewer it might have no value there.
    """
    import sympy

    digits = digits or formula.digits
    has_end = formula.family in FAMILIES and FAMILIES[formula.family].kind in ('bounded', 'within')
    a, b = (sympy.Float(number, max(digits, 6) if has_end else digits) for number in (formula.a, formula.b))
    c, d = (sympy.Float(number, digits) for number in (formula.c, formula.d))
    x = sympy.Symbol(symbol)
    one = {1.0: x, -1.0: -x}
    z = one.get(formula.a, a * x) + (b if formula.b else 0)
    if formula.family == 'constant':
        return d
    functions = {
        'affine': lambda z: z,
        'x^2': lambda z: z**2,
        'x^3': lambda z: z**3,
        'x^4': lambda z: z**4,
        'abs': sympy.Abs,
        'relu': sympy.Function('relu'),
        'sqrt': sympy.sqrt,
        '1/x': lambda z: 1 / z,
        '1/x^2': lambda z: 1 / z**2,
        'log': sympy.log,
        'exp': sympy.exp,
        'sin': sympy.sin,
        'tanh': sympy.tanh,
        'atanh': sympy.atanh,
        'gaussian': lambda z: sympy.exp(-(z**2)),
        'silu': sympy.Function('silu'),
    }
    return c * functions[formula.family](z) + d
