"""What the figures of interpret.py show: the data they are given, in texts that can be read."""

import math

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from inside.figures import (
    block_maximum,
    compact,
    draw_edges,
    draw_growth,
    draw_maps,
    draw_prompt,
    draw_pruning,
    draw_r2,
    shorten,
    width,
)

LONG = 'transformer.' + 'very.long.name.' * 20 + 'mlp.0'
pytestmark = pytest.mark.filterwarnings('error::UserWarning', 'error::RuntimeWarning')
PER_CENT = np.linspace(0, 1, 11)


def make_edge(i=3, o=17, scale=1.0, **changes):
    x = np.linspace(-3, 2, 64)
    total = scale * np.tanh(x)
    edge = dict(i=i, o=o, x=x, total=total, base=0.1 * scale * x, fit=0.9 * total, formula='0.9*tanh(x)', r2=0.9993)
    return {
        **edge,
        'family': 'tanh',
        'counts': np.arange(40),
        'knots': np.linspace(-4, 3, 8),
        'grid': (-2, 1),
    } | changes


def odd_edges():
    constant = np.full(64, 2.0)
    return [
        make_edge(scale=1e-12),
        make_edge(scale=1e6, r2=math.nan),
        make_edge(3071, 767, total=constant, base=0 * constant, family='constant'),
        make_edge(total=0 * constant, base=0 * constant, fit=0 * constant, counts=np.zeros(40, int)),
        make_edge(x=constant, formula='x + ' * 40),
        make_edge(fit=np.full(64, math.nan), family='$a$'),
        make_edge(total=1e6 + 1e-9 * np.arange(64), grid=(5, 6)),
    ]


def make_growth(i, start=0):
    x = np.linspace(-3, 2, 64)
    curves = np.stack([x * n * i for n in range(6)])
    return dict(i=i, o=9, iterations=[start, 10, 100, 1000, 10000, 100000], x=x, curves=curves, counts=np.ones(40))


def make_r2(seed=0, n=100):
    return 1 - 10 ** -np.random.default_rng(seed).uniform(0, 5, n)


def make_prompt(tokens, rows, label='h.0.mlp.0 3 -> 17'):
    z = np.random.default_rng(0).normal(size=(rows, len(tokens)))
    return draw_prompt('A prompt', tokens, [(label, row) for row in z])


def loss_curve(factor):
    return 1.5 + factor * PER_CENT**3


ORDERS = ['least active first', 'at random (3 draws)']
CASES = {
    'an edge': lambda: draw_edges('An edge', [make_edge()]),
    '10 edges': lambda: draw_edges(
        '10 edges', [make_edge(3071, o, 1e-4, family='gaussian') for o in range(1000, 1010)]
    ),
    'odd edges': lambda: draw_edges(LONG, odd_edges()),
    'a map': lambda: draw_maps([('head', np.ones((65, 96)))]),
    '5 maps': lambda: draw_maps([(LONG, np.full((600, 300), 10.0**-n)) for n in range(5)]),
    'odd maps': lambda: draw_maps([('zero', np.zeros((2, 3))), ('one', np.full((1, 1), math.nan))]),
    '4 groups': lambda: draw_r2([(LONG, *map(make_r2, range(4)))] * 4),
    'a group': lambda: draw_r2([('MLP', np.full(9, math.nan), None, make_r2(), np.full(5, math.nan))]),
    'cuts': lambda: draw_pruning([(name, PER_CENT, loss_curve(2), 0.1 * PER_CENT) for name in ORDERS], 1.5),
    'flat cut': lambda: draw_pruning([(LONG, PER_CENT, np.full(11, 1.5), None)], 1.5),
    'large cut': lambda: draw_pruning([('all', PER_CENT, 1e-12 + 1e6 * PER_CENT, np.ones(11))], 1e-12),
    'broken cut': lambda: draw_pruning([('all', np.ones(1), np.full(1, math.inf), None)], 0.0),
    'a growth': lambda: draw_growth('Growth', [make_growth(1)]),
    '5 growths': lambda: draw_growth(LONG, [make_growth(1000 * i) for i in range(5)]),
    'a token': lambda: make_prompt(['a'], 1, LONG),
    '40 tokens': lambda: make_prompt(['\n', ' the', '$a$', 'x' * 50, '日'] * 8, 24),
}


def drawn_texts(figure):
    """(text, its box in pixels) of all that is drawn; a tick outside of the view is not."""
    unseen = set()
    for panel in figure.axes:
        for axis in panel.xaxis, panel.yaxis:
            low, high = sorted(axis.get_view_interval())
            axis.get_majorticklabels()
            unseen |= {label for tick in axis.majorTicks + axis.minorTicks for label in (tick.label1, tick.label2)}
            unseen -= {tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent()) for text in texts if text not in unseen]


def notes(panel):
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize('case', CASES)
def test_texts_can_be_read(case):
    figure = CASES[case]()
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01
    texts = drawn_texts(figure)
    assert len(texts) > 3
    assert min(text.get_fontsize() for text, _ in texts) >= 8
    assert not any(text.get_parse_math() for text, _ in texts if '$' in text.get_text())
    for n, (text, box) in enumerate(texts):
        for other, taken in texts[:n]:
            # boxes hold the space for letters that go lower
            apart = box.x0 + 1 > taken.x1 or box.x1 < taken.x0 + 1 or box.y0 + 2 > taken.y1 or box.y1 < taken.y0 + 2
            assert apart, (text, other)


def test_a_panel_has_the_curves_of_its_edge():
    edges = [make_edge(i, 20 + i, i + 1.0) for i in range(5)]
    figure = draw_edges('Five edges', edges)
    assert figure.get_suptitle() == 'Five edges'
    assert len(figure.axes) == 5
    for panel, edge in zip(figure.axes, edges):
        lines = {line.get_label(): line.get_ydata() for line in panel.lines}
        assert np.array_equal(lines['function'], edge['total'])
        assert np.array_equal(lines['its activation'], edge['base'])
        assert np.allclose(lines['its spline'] + edge['base'], edge['total'])
        assert np.array_equal(lines['formula'], edge['fit'])
        (knots,) = [line.get_xdata() for line in panel.lines if line.get_label() == 'knots']
        assert np.array_equal(knots, edge['knots'])
        assert panel.get_title() == f'{edge["i"]} -> {edge["o"]}  tanh, R² 0.999'
        assert notes(panel) == ['0.9*tanh(x)']
        assert panel.get_xlim() == (-3, 2)
        (histogram,) = [patch for patch in panel.patches if isinstance(patch, StepPatch)]
        heights, places, _ = histogram.get_data()
        assert np.allclose(heights, np.arange(40) / 39 / 5)
        assert places[0] == -3 and places[-1] == 2
        shaded = [patch.get_extents().transformed(panel.transData.inverted()) for patch in panel.patches]
        shaded = [box for box, patch in zip(shaded, panel.patches) if patch.get_label() == 'outside the grid']
        assert np.allclose([(box.x0, box.x1) for box in shaded], [(-3, -2), (1, 2)])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['function', 'its activation', 'its spline', 'formula', 'inputs', 'knots', 'outside the grid']


def test_an_edge_may_lack_a_formula_and_vary_in_nothing():
    figure = draw_edges('Odd edges', odd_edges())
    panels = figure.axes
    assert panels[1].get_title() == '3 -> 17  tanh, R² –'
    assert notes(panels[4]) == ['']  # too long to be read
    for panel, edge in zip(panels, odd_edges()):
        low, high = panel.get_ylim()
        assert low < edge['total'].min() <= edge['total'].max() < high
        assert (edge['total'].min() - low) / (high - low) > 0.2  # above the histogram
    low, high = panels[6].get_ylim()
    assert high - low > 1e3  # rounding is not drawn large


def test_parts_that_cancel_do_not_flatten_the_edge():
    (panel,) = draw_edges('An edge', [make_edge(base=1000 * np.linspace(-3, 2, 64))]).axes
    low, high = panel.get_ylim()
    assert high - low < 12


def test_a_map_has_the_activity_of_its_layer():
    layers = [('small', np.geomspace(1e-3, 1, 6).reshape(2, 3)), ('none', np.array([[0.0, 2.0], [1e-9, math.nan]]))]
    figure = draw_maps(layers)
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ['small', 'none']
    assert bar.get_ylabel() == 'standard deviation of what an edge adds'
    images = [panel.images[0] for panel in panels]
    for image, (_, activity) in zip(images, layers):
        assert np.array_equal(image.get_array(), np.nan_to_num(activity))
        assert isinstance(image.norm, LogNorm)
        assert image.get_clim() == (1e-3, 2)
    colors = images[1].to_rgba(images[1].get_array())
    assert np.array_equal(colors[0, 0], colors[1, 0]) and np.array_equal(colors[0, 0], images[1].cmap(0.0))
    assert panels[0].get_xlim() == (-0.5, 2.5) and panels[0].get_ylim() == (1.5, -0.5)
    (panel, _) = draw_maps([('one', np.ones((1, 1)))]).axes
    assert [tick for tick in panel.get_xticks() if -0.5 < tick < 0.5] == [0]


def test_a_large_map_has_the_maximum_of_every_block():
    activity = np.random.default_rng(0).uniform(size=(3072, 768))
    (panel, _) = draw_maps([('h.0.mlp.0', activity)]).axes
    assert panel.get_title() == 'h.0.mlp.0'
    assert notes(panel) == ['a dot: the largest of 6 × 2 edges']
    assert np.array_equal(panel.images[0].get_array(), activity.reshape(512, 6, 384, 2).max((1, 3)))
    assert panel.images[0].get_extent() == [-0.5, 767.5, 3071.5, -0.5]
    uneven = block_maximum(np.arange(15.0).reshape(3, 5), 2)
    assert np.array_equal(uneven, [[7, 9], [12, 14]])


def test_layers_of_one_model_keep_names_that_differ():
    names = [f'h.{n}.attn.c_attn.0' for n in (0, 10)]
    titles = {panel.get_title() for panel in draw_maps([(name, np.ones((2, 2))) for name in names * 4]).axes[:8]}
    assert titles == {*names}


def test_histograms_have_the_shares_of_edges():
    values = np.array([-0.1, 0, 0.5, 0.95, 0.995, 0.99999, 1.0, math.nan])
    groups = [('MLP in', values, values[3:5], make_r2(), None), ('head', values, None, np.full(3, math.nan), None)]
    panels = np.reshape(draw_r2(groups).axes, (2, 2))
    assert [panel.get_title() for panel in panels[0]] == ['MLP in', 'head']
    trained, random = panels[0, 0].patches
    heights, places, _ = trained.get_data()
    assert heights.sum() == pytest.approx(1) and random.get_data()[0].sum() == pytest.approx(1)
    assert heights[0] == pytest.approx(2 / 7)  # none at all, below zero too
    assert heights[-1] == pytest.approx(2 / 7)  # all above 0.9999
    assert places[0] == 0 and trained.get_fill() and not random.get_fill()
    assert notes(panels[0, 0]) == ['R² ≥ 0.99: 43% trained, 50% random']
    assert notes(panels[1, 1]) == ['no function varies']
    assert not panels[1, 1].patches
    assert [label.get_text() for label in panels[1, 0].get_xticklabels()] == ['0', '0.9', '0.99', '0.999', '0.9999']


def test_losses_are_drawn_as_they_are_and_above_the_full_loss():
    spread = np.full(11, 0.2)
    curves = [(name, PER_CENT, loss_curve(n), spread if n == 1 else None) for n, name in enumerate(ORDERS)]
    left, right = draw_pruning(curves, 1.5).axes
    for panel, zero in (left, 0), (right, 1.5):
        *lines, level = panel.lines
        for line, (_, _, losses, _) in zip(lines, curves):
            assert np.allclose(line.get_ydata(), losses - zero) and np.array_equal(line.get_xdata(), PER_CENT)
        assert set(level.get_ydata()) == {1.5 - zero}
        assert level.get_label() == 'nothing cut: 1.5'
        (band,) = panel.collections
        assert band.get_datalim(panel.transData).y1 == pytest.approx(2.5 + 0.2 - zero)
        assert lines[0].get_color() != lines[1].get_color()
    assert left.get_yscale() == 'linear' and right.get_yscale() == 'symlog'
    low, high = right.get_ylim()
    assert low < -0.2 and high > 2
    assert right.yaxis.get_transform().linthresh == 0.01
    left, _ = draw_pruning([('all', PER_CENT, loss_curve(100), None)], 1.5).axes
    assert left.get_yscale() == 'log'
    for noise in 0, 1e-9:
        for panel in draw_pruning([('all', PER_CENT, 1.5 + noise * PER_CENT, None)], 1.5).axes:
            low, high = panel.get_ylim()
            assert high - low > 1e-6
            assert len({compact(tick) for tick in panel.get_yticks() if low <= tick <= high}) >= 3


def test_growth_has_a_curve_for_each_iteration():
    edges = [make_growth(1), make_growth(2, start=5)]
    figure = draw_growth('Growth', edges)
    assert [panel.get_title() for panel in figure.axes] == ['1 -> 9', '2 -> 9']
    for panel, edge in zip(figure.axes, edges):
        assert np.array_equal([line.get_ydata() for line in panel.lines], edge['curves'])
    assert [len(panel.patches) for panel in figure.axes] == [1, 1]
    first, second = (panel.lines for panel in figure.axes)
    assert first[0].get_linestyle() == '--' and second[0].get_linestyle() == '-'
    assert np.array_equal(first[1].get_color(), second[1].get_color())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted(['iteration 0', '5', '10', '100', '1,000', '10,000', '100,000', 'inputs'])


@pytest.mark.parametrize('z, limit', [([0.0, 0.5, math.nan], 1), ([2.0, -3.0, 0.0], 3), ([-50.0, 1.0, math.inf], 4)])
def test_a_prompt_is_drawn_around_zero(z, limit):
    panel, _ = draw_prompt('A prompt', ['\n', ' the', '$x$'], [('h.0 3 -> 17', np.array(z))]).axes
    image = panel.images[0]
    assert image.get_clim() == (-limit, limit)
    assert np.array_equal(np.ma.getdata(image.get_array()), [z], equal_nan=True)
    assert [label.get_text() for label in panel.get_xticklabels()] == ['\\n', '·the', '$x$']
    assert [label.get_text() for label in panel.get_yticklabels()] == ['h.0 3 -> 17']


@pytest.mark.parametrize(
    'draw',
    [
        lambda: draw_edges('None', []),
        lambda: draw_edges('Many', [make_edge()] * 25),
        lambda: draw_maps([]),
        lambda: draw_r2([]),
        lambda: draw_pruning([], 1.5),
        lambda: draw_growth('None', []),
        lambda: draw_growth('None', [{**make_growth(1), 'iterations': []}]),
        lambda: draw_prompt('None', [], []),
        lambda: draw_prompt('None', ['a'], []),
    ],
)
def test_too_few_or_too_many_are_refused_in_a_line(draw):
    with pytest.raises(ValueError, match=r'^a figure draws 1 to \d+ \w+, got \d+$'):
        draw()


def test_long_texts_lose_their_middle():
    short = shorten(LONG, 2, 8)
    assert width(short, 8) <= 2 < width(LONG, 8)
    assert short.startswith('transformer.') and short.endswith('mlp.0') and short.count('…') == 1
    assert shorten('mlp.0', 2, 8) == 'mlp.0'


@pytest.mark.parametrize('value, text', [(0.25, '0.25'), (1e-12, '1e−12'), (-2e6, '−2e6'), (0, '0')])
def test_numbers_of_an_axis_are_short(value, text):
    assert compact(value) == text
