"""Formulas of edges: planted ones come back, and what is said of a fit is what the data say."""

import functools
import math

import numpy as np
import pytest
import sympy
import torch
import torch.nn as nn

from helpers import FUNCTIONS
from inside.edges import Edges, measure, values, watch
from inside.formulas import (
    FAMILIES,
    NAMES,
    Formula,
    expression,
    function_of,
    plainest,
    refine,
    search,
    simplest,
)
from inside.report import look
from kan import KANLinear
from study.interpret import brute_force

MARGIN, TIE = 0.01, 1e-4  # the usual ones of `search`
pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

PLANTED = {  # (a, b, c, d) over inputs from -1 to 1, in the plainest form
    'x^2': (1.0, -0.2, 1.5, 0.4),
    'x^3': (1.0, 0.1, -0.7, -0.2),
    'x^4': (1.0, 0.3, 0.8, 1.0),
    'abs': (1.0, 0.4, -1.1, 0.3),
    'relu': (-1.0, 0.2, 2.0, -0.5),
    'sqrt': (1.0, 1.05, -1.3, 0.6),
    '1/x': (-1.0, 1.3, 0.4, -0.1),
    '1/x^2': (1.0, 1.4, -0.3, 0.2),
    'log': (1.0, 1.1, 0.9, 0.2),
    'exp': (-3.0, 0.0, 0.2, 0.7),
    'sin': (5.0, 0.7, -0.6, 0.1),
    'tanh': (4.0, -1.0, 0.5, -0.3),
    'atanh': (0.6, 0.36, -0.5, 0.2),
    'gaussian': (2.5, 0.8, -0.9, 0.2),
    'silu': (-6.0, 1.5, 0.3, 0.4),
}


def study(layer, x):
    (seen,) = watch(layer, lambda: layer(x)).values()
    edges = measure(seen)
    return seen, edges, search(seen, edges)


def read(layer, x, pairs):
    seen, edges, found = study(layer, x)
    return refine(seen, edges, found, pairs)


def r2_of(fit, g):
    return 1 - np.square(g - fit).mean() / g.var()


@functools.cache
def edges_of_noise():
    """(seen, edges, found) of a layer of wild edges over inputs of a bell, some of them outside its uneven grid."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer, x = KANLinear(6, 8), 0.6 * torch.randn(600, 6)
        with torch.no_grad():
            layer.spline_weight.normal_(std=0.5)
        layer.update_grid(x)
        return study(layer, x)


PAIRS = [(o, i) for o in range(8) for i in range(6)]


def curve_of(seen, edges, o, i):
    """The places t in the domain and the values of an edge over the data, in float64."""
    t = (seen.x[:, i] - edges.low[i]) / (edges.high[i] - edges.low[i])
    return t.double().numpy(), values(seen, [(o, i)])[:, 0].double().numpy()


# planted functions


@torch.no_grad()
def plant(*functions, grid_size=100, grid_range=(-1.0, 1.0)):
    """A layer of one feature with an output for each function: the spline nearest to it over the grid, and no base."""
    layer = KANLinear(1, len(functions), grid_size, grid_range=grid_range, enable_standalone_scale_spline=False)
    x = torch.linspace(*grid_range, 1501)[:-1].unsqueeze(1)
    layer.spline_weight.copy_(layer.curve2coeff(x, torch.stack([y(x) for y in functions], 2)))
    nn.init.zeros_(layer.base_weight)
    return layer


def planted_layer(noise=0.0):
    """An output for each family."""
    layer = plant(
        *(
            lambda x, f=FAMILIES[name].f, a=a, b=b, c=c, d=d: c * f(a * x + b) + d
            for name, (a, b, c, d) in PLANTED.items()
        )
    )
    with torch.no_grad():
        layer.spline_weight += noise * torch.randn_like(layer.spline_weight)
    return layer


def even_inputs(n=2000, low=-0.999, high=0.999):
    return torch.linspace(low, high, n).unsqueeze(1)


@functools.cache
def planted_formulas(noise, bell):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        x = (0.35 * torch.randn(2000, 1)).clamp(-0.999, 0.999) if bell else even_inputs()
        return dict(zip(PLANTED, read(planted_layer(noise), x, [(o, 0) for o in range(len(PLANTED))])))


def same_number(found, expected, tolerance):
    return found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize('bell', [False, True], ids=['even', 'bell'])
@pytest.mark.parametrize('name', PLANTED)
def test_a_planted_function_is_found(name, bell):
    formula = planted_formulas(0.0, bell)[name]
    assert formula.family == name and formula.r2 > 0.999
    numbers = formula.a, formula.b, formula.c, formula.d
    if name in ('tanh', 'gaussian') and formula.a * PLANTED[name][0] < 0:  # one odd, the other even
        numbers = -formula.a, -formula.b, formula.c * (-1 if name == 'tanh' else 1), formula.d
    assert all(same_number(*pair, 0.03) for pair in zip(numbers, PLANTED[name])), formula


@pytest.mark.parametrize('name', PLANTED)
def test_a_planted_function_is_found_under_noise(name):
    """Its curve, as that of its rivals may come as near to the data."""
    formula = planted_formulas(0.02, False)[name]
    a, b, c, d = PLANTED[name]
    x = np.linspace(-0.98, 0.98, 300)
    true = c * FUNCTIONS[name](a * x + b) + d
    assert dict([(formula.family, formula.r2), *formula.others])[name] > formula.r2 - 0.002
    assert r2_of(function_of(formula)(torch.tensor(x)).numpy(), true) > 0.99
    assert formula.r2 < 0.99999


def test_a_sigmoid_is_a_tanh():
    layer = plant(lambda x: 3 * torch.sigmoid(6 * x + 1) - 1)
    (formula,) = read(layer, even_inputs(), [(0, 0)])
    sign = math.copysign(1, formula.a)
    numbers = sign * formula.a, sign * formula.b, sign * formula.c, formula.d
    assert formula.family == 'tanh' and numbers == pytest.approx((3.0, 0.5, 1.5, 0.5), abs=0.03)


def test_a_planted_function_far_from_zero():
    """The place and the width of the domain change nothing but a and b."""
    layer = plant(lambda x: 0.5 * torch.tanh(16 * (x - 20.25) - 1) - 0.3, grid_range=(20.0, 20.5))
    (formula,) = read(layer, even_inputs(low=20.001, high=20.499), [(0, 0)])
    sign = math.copysign(1, formula.a)
    assert formula.family == 'tanh' and formula.r2 > 0.999
    assert (sign * formula.a, -formula.b / formula.a) == pytest.approx((16, 20.25 + 1 / 16), rel=0.01)
    assert (sign * formula.c, formula.d) == pytest.approx((0.5, -0.3), abs=0.01)


def test_the_simplest_of_equals_is_named():
    """A silu under a base weight alone is a silu, and what is nearly a parabola is one, though a sine fits, too."""
    layer = plant(lambda x: 0 * x, lambda x: torch.cos(0.3 * x))
    with torch.no_grad():
        layer.base_weight[0, 0] = -2.0
    (silu,) = read(layer, even_inputs(low=-2, high=2), [(0, 0)])
    (parabola,) = read(layer, even_inputs(), [(1, 0)])
    assert silu.family == 'silu' and (silu.a, silu.b, silu.c, silu.d) == pytest.approx((1, 0, -2, 0), abs=0.05)
    assert parabola.family == 'x^2' and parabola.c == pytest.approx(-0.045, rel=0.02)


def test_formulas_are_the_same_under_autocast():
    layer, x = planted_layer(), even_inputs()
    with torch.autocast('cpu', torch.bfloat16):
        seen, edges, found = study(layer, x)
        (formula,) = refine(seen, edges, found, [(0, 0)])
    _, _, expected = study(layer, x)
    assert torch.equal(found.r2, expected.r2) and torch.equal(found.family, expected.family)
    assert formula == read(layer, x, [(0, 0)])[0]


def test_ties_go_to_the_first():
    r2 = torch.tensor([[0.5, 0.9, 0.2], [0.5 + TIE / 2, 0.9 + 2 * TIE, 0.1], [0.4, 0.2, 0.2]])
    assert simplest(r2, TIE).tolist() == [0, 1, 0]


# affine and constant edges


def test_affine_edges_are_called_affine():
    layer = KANLinear(2, 3, base_activation=nn.Identity)
    with torch.no_grad():
        layer.spline_weight *= 0
        layer.spline_weight[2] += 0.05 * torch.randn(2, 8)  # a bend of which a formula makes little
    x = torch.randn(500, 2) + 3
    seen, edges, found = study(layer, x)
    formulas = refine(seen, edges, found, [(o, i) for o in range(2) for i in range(2)])
    for formula, weight in zip(formulas, layer.base_weight[:2].flatten().tolist()):
        assert formula.family == 'affine' and formula.r2 == pytest.approx(1, abs=1e-5)
        assert formula.c == pytest.approx(weight, abs=1e-4) and formula.d == pytest.approx(0, abs=1e-3)
        assert function_of(formula)(torch.tensor(2.0)) == pytest.approx(2 * weight, abs=1e-3)
    assert (found.best[:2] <= 1).all() and (found.best - edges.affine_r2)[:2].max() <= MARGIN
    for formula in refine(seen, edges, found, [(2, 0), (2, 1)]):
        others = dict(formula.others)
        best = max(others.values())
        assert (formula.family == 'affine') == (best - formula.affine_r2 <= MARGIN)


def test_a_bend_that_is_worth_little_is_affine_and_one_that_is_worth_more_is_not():
    """On either side of the margin: a parabola beside a line, by the share of the variance that it has."""
    bends = [math.sqrt(share / (1 - share) * (1 / 3) / (4 / 45)) for share in (0.8 * MARGIN, 1.3 * MARGIN)]
    layer = plant(*(lambda x, bend=bend: x + bend * x.square() for bend in bends))
    below, above = read(layer, even_inputs(), [(0, 0), (1, 0)])
    assert below.family == 'affine' and below.r2 == below.affine_r2 == pytest.approx(1 - 0.8 * MARGIN, abs=5e-4)
    assert above.family == 'x^2' and above.affine_r2 == pytest.approx(1 - 1.3 * MARGIN, abs=5e-4) and above.r2 > 0.9999
    assert (below.c, above.affine_r2 < above.r2) == (pytest.approx(1, abs=0.01), True)


def test_a_dead_feature_is_a_constant():
    layer, x = KANLinear(3, 2), torch.randn(300, 3)
    x[:, 1] = 0.7
    (found,) = look(layer, lambda: layer(x), n_edges=6)
    formulas = dict(zip(found.pairs, found.formulas))
    for o in range(2):
        formula = formulas[o, 1]
        assert formula.family == 'constant' and math.isnan(formula.r2) and formula.others == ()
        assert formula.digits == 3  # though it has no deviation to measure a rounding by
        alone = layer(torch.tensor([0.0, 0.7, 0.0])) - layer(torch.zeros(3))  # and what feature 1 gives at zero
        with torch.no_grad():
            at_zero = (layer.scaled_spline_weight[o, 1] * layer.b_splines(torch.zeros(3))[1]).sum()
        assert function_of(formula)(torch.tensor(5.0)) == pytest.approx((alone[o] + at_zero).item(), abs=1e-5)
        assert formulas[o, 0].family != 'constant' and not found.affine[o, 1] and found.r2[o, 1] == 0


def test_a_zero_edge_is_a_constant():
    layer, x = KANLinear(3, 2), torch.randn(300, 3)
    with torch.no_grad():
        layer.base_weight[1, 2] = 0
        layer.spline_weight[1, 2] = 0
    formula = read(layer, x, [(1, 2)])[0]
    assert formula.family == 'constant' and (formula.c, formula.d) == (0, 0) and math.isnan(formula.r2)


def test_a_layer_of_zeros():
    """As an adapter before it has learned."""
    layer = KANLinear(2, 2)
    nn.init.zeros_(layer.base_weight)
    nn.init.zeros_(layer.spline_weight)
    (found,) = look(layer, lambda: layer(torch.randn(50, 2)), n_edges=4)
    assert {formula.family for formula in found.formulas} == {'constant'} and not found.affine.any()


# what is said of the fit


def test_r2_of_a_formula_is_exact():
    """Of families of every kind: c f(a x + b) + d by numpy, on the data."""
    seen, edges, found = edges_of_noise()
    formulas, kinds = refine(seen, edges, found, PAIRS), set()
    for (o, i), formula in zip(PAIRS, formulas):
        x, g = seen.x[:, i].double().numpy(), curve_of(seen, edges, o, i)[1]
        fit = formula.c * FUNCTIONS[formula.family](formula.a * x + formula.b) + formula.d
        assert r2_of(fit, g) == pytest.approx(formula.r2, abs=1e-4), formula
        assert function_of(formula)(seen.x[:, i]).numpy() == pytest.approx(fit, abs=1e-4)
        line = np.polyval(np.polyfit(x, g, 1), x)
        assert r2_of(line, g) == pytest.approx(formula.affine_r2, abs=1e-4)
        assert all(r2 <= formula.r2 + TIE for _, r2 in formula.others) and len(formula.others) == 2
        kinds.add(formula.family)
    assert len(kinds) >= 4


def check_numbers_of_the_search(seen, edges, found, pairs):
    """R2 comes from nodes, between which a candidate is taken for a line."""
    for o, i in pairs:
        x, g = seen.x[:, i].double().numpy(), curve_of(seen, edges, o, i)[1]
        a, b, c, d = (getattr(found, name)[o, i].item() for name in 'abcd')
        fit = c * FUNCTIONS[NAMES[found.family[o, i]]](a * x + b) + d
        assert r2_of(fit, g) == pytest.approx(found.best[o, i].item(), abs=2e-3)


def test_r2_of_the_search_is_that_of_its_numbers():
    check_numbers_of_the_search(*edges_of_noise(), PAIRS)


def test_r2_of_the_search_is_that_of_its_numbers_far_from_zero():
    """Where the mean of an activation is a thousand times what it varies by."""
    layer, x = KANLinear(2, 8, grid_range=(299.0, 301.0)), 300 + 0.3 * torch.randn(3000, 2)
    with torch.no_grad():
        layer.spline_weight.normal_()
    check_numbers_of_the_search(*study(layer, x), [(o, i) for o in range(8) for i in range(2)])


def test_refining_never_makes_worse():
    seen, edges, found = edges_of_noise()
    for (o, i), formula in zip(PAIRS, refine(seen, edges, found, PAIRS)):
        assert formula.r2 > found.best[o, i] - 2e-3


@pytest.mark.parametrize('o, i', PAIRS[1::4])
def test_no_formula_is_missed_that_brute_force_finds(o, i):
    seen, edges, found = edges_of_noise()
    (formula,) = refine(seen, edges, found, [(o, i)])
    t, g = curve_of(seen, edges, o, i)
    best = {name: brute_force(name, t, g) for name in NAMES}
    name = max(best, key=best.get)
    assert formula.r2 > best[name] - 1e-3, (name, best[name], formula)


# forms


@pytest.mark.parametrize('name', NAMES)
def test_the_plainest_form_is_the_same_function(name):
    for a, b, c, d in (2.5, 3.0, -0.4, 0.3), (-0.6, 2.0, 1.5, -1.0), (0.1, 1.5, 7.0, 0.0):
        if name == 'atanh':  # between -1 and 1
            a, b = a / 10, b / 10
        x = torch.linspace(-1, 1, 41, dtype=torch.float64)
        plain = plainest(name, a, b, c, d)
        before, after = (function_of(Formula(name, *numbers, 1.0, 0.5, ()))(x) for numbers in ((a, b, c, d), plain))
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-9)
        if FAMILIES[name].power or name == 'log':
            assert plain[0] == math.copysign(1, a)
        if name == 'exp':
            assert plain[1] == 0
        if name == 'sin':
            assert abs(plain[1]) <= math.pi / 2 + 1e-9


def test_the_phase_of_a_sine_comes_near_zero_by_half_turns():
    assert plainest('sin', 2.0, 7 * math.pi + 0.1, 3.0, 1.0) == pytest.approx((2.0, 0.1, -3.0, 1.0))
    assert plainest('sin', 2.0, -6 * math.pi - 0.1, 3.0, 1.0) == pytest.approx((2.0, -0.1, 3.0, 1.0))


OURS = {'relu': lambda z: np.maximum(z, 0), 'silu': FUNCTIONS['silu']}


def evaluate(text, x):
    """A formula as text, over numbers."""
    names = {name: sympy.Function(name) for name in OURS}
    return sympy.lambdify('x', sympy.sympify(text, locals=names), [OURS, 'numpy'])(x) + 0 * x


def test_what_is_written_is_the_function():
    """To three digits of each number."""
    x = np.linspace(-0.9, 0.9, 50)
    for name, (a, b, c, d) in PLANTED.items():
        formula = Formula(name, a, b, c, d, 1.0, 0.5, ())
        assert evaluate(str(expression(formula)), x) == pytest.approx(c * FUNCTIONS[name](a * x + b) + d, abs=1e-6)
    seen, edges, found = edges_of_noise()
    for (_, i), formula in zip(PAIRS[:16], refine(seen, edges, found, PAIRS[:16])):
        x = seen.x[:, i].double().numpy()
        true = formula.c * FUNCTIONS[formula.family](formula.a * x + formula.b) + formula.d
        assert r2_of(evaluate(str(expression(formula)), x), true) > 0.999, formula
        assert evaluate(str(expression(formula, digits=9)), x) == pytest.approx(true, abs=1e-5)


@pytest.mark.parametrize('centre, width', [(0.0, 1.0), (5.0, 0.05), (-3.0, 0.02)], ids=str)
def test_what_is_written_of_nearly_constant_features_is_the_function(centre, width):
    """Three digits are enough around zero, and too few where the distance from zero is many times the spread."""
    layer = KANLinear(2, 8, grid_size=20, grid_range=(centre - 4 * width, centre + 4 * width))
    with torch.no_grad():
        layer.spline_weight.normal_(generator=torch.Generator().manual_seed(2))
    pairs = [(o, i) for o in range(8) for i in range(2)]
    x = centre + width * torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    seen, edges, found = study(layer, x)
    formulas = refine(seen, edges, found, pairs)
    for (o, i), formula in zip(pairs, formulas):
        x = seen.x[:, i].double().numpy()
        true = function_of(formula)(torch.from_numpy(x)).numpy()
        written = evaluate(str(expression(formula)), x)
        assert np.abs(written - true).max() < 0.02 * edges.activity[o, i].item(), formula
    assert any(formula.digits == 3 for formula in formulas) == (centre == 0)


def test_what_is_written_has_a_value_where_the_function_has_one():
    """Also close to the end of a root, or a pole."""
    x = np.linspace(1.2375, 2.3, 200)
    for name in 'sqrt', 'log', '1/x', '1/x^2':
        formula = Formula(name, 1.0, -1.2373149, 1.0, 0.0, 1.0, 0.5, ())
        found, true = evaluate(str(expression(formula)), x), FUNCTIONS[name](x - 1.2373149)
        assert np.isfinite(found).all() and found == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize(
    'formula, text',
    [
        (('affine', 1.0, 0.0, -2.0, 0.5), '0.5 - 2.0*x'),
        (('constant', 0.0, 0.0, 0.0, 0.25), '0.250'),
        (('x^2', 1.0, 0.0, 2.0, 1.0), '2.0*x**2 + 1.0'),
        (('tanh', -3.0, 0.123456, 2.0, 1.0), '1.0 - 2.0*tanh(3.0*x - 0.123)'),
        (('relu', -1.0, 0.5, 2.0, 1.0), '2.0*relu(0.5 - x) + 1.0'),
        (('gaussian', 2.0, 0.5, 2.0, 1.0), '1.0 + 2.0*exp(-(2.0*x + 0.5)**2)'),
        (('sqrt', 1.0, -1.23731, 1.0, 0.0), '1.0*sqrt(x - 1.23731)'),
        (('atanh', 0.123456, 0.5, 1.0, 0.0), '1.0*atanh(0.123456*x + 0.5)'),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_formulas_as_text(formula, text):
    assert str(expression(Formula(*formula, 0.9, 0.5, ()))).replace(' ', '') == text.replace(' ', '')


def test_a_symbol_of_ones_own():
    assert sympy.latex(expression(Formula('abs', 1.0, 0.5, 2.0, 1.0, 0.9, 0.5, ()), symbol='x_{3}')) == (
        r'2.0 \left|{x_{3} + 0.5}\right| + 1.0'
    )


def test_every_kind_of_statistic_is_on_the_device_of_the_data():
    """As search and refine index one by the other."""
    _, edges, found = edges_of_noise()
    tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    assert isinstance(edges, Edges) and len(tensors) == 6 and {tensor.device.type for tensor in tensors} == {'cpu'}
    assert found.r2.shape == (len(NAMES), 8, 6) and (found.r2 >= 0).all() and (found.r2 <= 1).all()


def test_edges_and_features_beyond_those_of_a_part():
    """Both go by 64 at a time."""
    layer, x = KANLinear(66, 2), torch.randn(300, 66)
    nn.init.normal_(layer.spline_weight, std=0.5)
    seen, edges, found = study(layer, x)
    check_numbers_of_the_search(seen, edges, found, [(o, i) for o in range(2) for i in (0, 63, 64, 65)])
    pairs = [(o, i) for o in range(2) for i in range(31, 66)]
    formulas = refine(seen, edges, found, pairs)
    for (o, i), formula in [*zip(pairs, formulas, strict=True)][60:]:
        fit = function_of(formula)(seen.x[:, i]).double().numpy()
        assert r2_of(fit, curve_of(seen, edges, o, i)[1]) == pytest.approx(formula.r2, abs=1e-4)


@pytest.mark.parametrize('name', ['relu', 'sqrt', '1/x', '1/x^2', 'log', 'exp', 'silu'])
def test_a_planted_function_is_found_in_a_mirror(name):
    a, b, c, d = PLANTED[name]
    layer = plant(lambda x: c * FAMILIES[name].f(b - a * x) + d)
    (formula,) = read(layer, even_inputs(), [(0, 0)])
    assert formula.family == name and formula.r2 > 0.999
    assert (formula.a, formula.b) == pytest.approx((-a, b), rel=0.03, abs=0.03)


def test_the_margin_and_the_tie_are_those_asked_for():
    layer, x = plant(lambda x: x + 0.1 * x.square(), lambda x: torch.cos(0.3 * x)), even_inputs()

    def families(**thresholds):
        (found,) = look(layer, lambda: layer(x), **thresholds)
        formulas = dict(zip(found.pairs, found.formulas))
        return [formulas[o, 0].family for o in range(2)]

    assert families() == ['affine', 'x^2']
    assert families(margin=1e-4)[0] != 'affine'
    assert families(tie=0.0)[1] != 'x^2'


@pytest.mark.parametrize('b', [-900.0, -40.0, 40.0, 900.0])
def test_an_exponential_far_from_zero_stays_as_it_is(b):
    """e^b may be beyond all floats."""
    assert plainest('exp', 2.0, b, 3.0, 1.0) == (2.0, b, 3.0, 1.0)
