import math

import pytest
import torch
import torch.nn as nn

from inside.edges import kan_layers, watch
from inside.report import look
from inside.shapes import count_turns, shapes_of
from kan import KAN, ChannelSpline


def curve(function, low=-4.0, high=4.0):
    return function(torch.linspace(low, high, 201)).unsqueeze(0)


@pytest.mark.parametrize(
    'function, turns',
    [
        (torch.zeros_like, 0),
        (lambda x: x, 0),
        (lambda x: -(x**3), 0),
        (torch.square, 1),
        (lambda x: -x.square(), 1),
        (lambda x: x**3 - 4 * x, 2),
        (lambda x: torch.sin(2 * math.pi * x / 2), 8),  # four periods
        (lambda x: x + 0.01 * torch.sin(40 * x), 0),  # ripples
        (nn.functional.silu, 0),  # its dip is less than a twentieth of its span
    ],
)
def test_turns_are_counted(function, turns):
    assert count_turns(curve(function)).tolist() == [turns]


def test_curves_are_counted_each_by_itself():
    curves = torch.cat([curve(torch.sin, 0, 20), curve(torch.square), curve(torch.exp)])
    assert count_turns(curves).tolist() == [6, 1, 0]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing_that_is_measured(dtype):
    torch.manual_seed(0)
    channels, edges, x = ChannelSpline(3), KAN([3, 2, 1]), torch.randn(300, 3)
    expected = [shapes_of(watch(channels, lambda: channels(x))[''])]
    expected += [layer.formulas for layer in look(edges, lambda: edges(x), [*kan_layers(edges)], 300, 2)]
    torch.set_default_dtype(dtype)
    try:
        found = [shapes_of(watch(channels, lambda: channels(x))[''])]
        found += [layer.formulas for layer in look(edges, lambda: edges(x), [*kan_layers(edges)], 300, 2)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0].learned, expected[0].learned) and found[1:] == expected[1:]


def test_shapes_of_a_layer():
    """Channel 0 stays SiLU, 1 loses nearly all of it, 2 becomes a wave."""
    torch.manual_seed(0)
    layer = ChannelSpline(3, grid_size=24, spline_order=3)
    x = torch.randn(2000, 3)
    with torch.no_grad():
        wave = torch.sin(3 * x[:, 2])
        wanted = torch.stack([torch.zeros(2000), -nn.functional.silu(x[:, 1]), wave - nn.functional.silu(x[:, 2])], 1)
        layer.spline_weight.copy_(layer.curve2coeff(x, wanted.unsqueeze(-1))[0])
    shapes = shapes_of(watch(layer, lambda: layer(x))[''])
    assert shapes.flat.tolist() == [False, True, False]
    assert shapes.change[0] < 1e-6
    with torch.no_grad():
        apart = (layer(x) - nn.functional.silu(x)).square().mean(0).sqrt()
    assert torch.allclose(shapes.change, apart / nn.functional.silu(x).std(0), atol=1e-5)
    turns, before = shapes.turns()
    assert turns[0] == before[0] and turns[2] >= 4 and before[2] <= 1
    assert shapes.x.shape == shapes.learned.shape == (3, 201)
    low, high = torch.quantile(x, 0.005, 0).tolist(), torch.quantile(x, 0.995, 0).tolist()
    assert torch.allclose(shapes.x[:, 0], torch.tensor(low)) and torch.allclose(shapes.x[:, -1], torch.tensor(high))
    assert torch.allclose(shapes.plain, nn.functional.silu(shapes.x))
