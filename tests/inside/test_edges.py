"""Statistics of edges, against what sampling every edge gives."""

import copy
import math

import pytest
import torch
import torch.nn as nn

from inside.edges import CHUNK, CURVE, NODES, curves, kan_layers, measure, values, watch
from kan import KAN, KANLinear
from layers import spline
from model import GPT, GPTConfig
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

N, I, O = 2 * CHUNK + 300, 3, 4
LAYERS = {  # one of each order
    'steps': dict(spline_order=0, base_activation=nn.Identity),
    'lines': dict(spline_order=1, bias=True),
    'parabolas': dict(spline_order=2, enable_standalone_scale_spline=False),
    'cubics': dict(spline_order=3, bias=True, base_activation=nn.Identity, enable_standalone_scale_spline=False),
    'wide': dict(spline_order=3, grid_size=8, grid_range=(-2.0, 1.0)),
}


def make_inputs(n=N, features=I):
    """Of another place and another width in each feature, and none of them symmetric."""
    x = torch.randn(n, features)
    return (x + 0.3 * x.square()) * torch.linspace(0.3, 1.2, features) + torch.linspace(-0.5, 0.4, features)


def make_layer(name='wide', new_grid=False, x=None):
    layer = KANLinear(I, O, **LAYERS[name])
    with torch.no_grad():
        layer.spline_weight.normal_()
        if layer.bias is not None:
            layer.bias.normal_(std=3)
    if new_grid:
        layer.update_grid(x)
        assert not spline.are_uniform(layer.grid)
    return layer


def look(layer, x):
    """The Seen and the Edges of one layer."""
    (seen,) = watch(layer, lambda: layer(x)).values()
    return seen, measure(seen)


@torch.no_grad()
def sample(layer, x):
    """What each edge adds for each row, (N, O, I) in float64, by the layer itself: one feature at a time, and less what
    the layer gives without any of its edges.
    """
    layer = copy.deepcopy(layer).double()
    alone = copy.deepcopy(layer)
    parts = []
    for i in range(layer.in_features):
        only = torch.zeros(layer.in_features, dtype=torch.bool)
        only[i] = True
        alone.base_weight.copy_(layer.base_weight * only)
        alone.spline_weight.copy_(layer.spline_weight * only.unsqueeze(1))
        y = alone(x.double())
        parts.append(y if layer.bias is None else y - layer.bias)
    return torch.stack(parts, 2)


def close(found, expected, tolerance=1e-4):
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# against samples


@pytest.mark.parametrize('new_grid', [False, True], ids=['even grid', 'uneven grid'])
@pytest.mark.parametrize('name', LAYERS)
def test_statistics_are_those_of_samples(name, new_grid):
    x = make_inputs()
    layer = make_layer(name, new_grid, x)
    _, edges = look(layer, x)
    g = sample(layer, x)
    y, wide = g.sum(2), x.double()
    apart, y_apart, x_apart = g - g.mean(0), y - y.mean(0), wide - wide.mean(0)
    slope = (apart * x_apart.unsqueeze(1)).mean(0) / x_apart.square().mean(0)
    left = apart - slope * x_apart.unsqueeze(1)
    assert close(edges.mean, g.mean(0)) and close(edges.activity, g.std(0, correction=0))
    assert close(edges.output_sd, y.std(0, correction=0))
    assert close(edges.share, (apart * y_apart.unsqueeze(2)).mean(0) / y_apart.square().mean(0).unsqueeze(1))
    assert close(edges.share.sum(1), torch.ones(O)) and edges.share.min() < edges.share.max() - 0.1
    assert close(edges.slope, slope) and edges.slope.min() < 0 < edges.slope.max()
    assert close(edges.affine_r2, 1 - left.var(0) / g.var(0))
    assert close(edges.centre, wide.mean(0))
    assert torch.equal(edges.low, x.amin(0)) and torch.equal(edges.high, x.amax(0))


def test_the_mean_of_an_output_is_that_of_its_edges_and_the_bias():
    x = make_inputs()
    layer = make_layer('cubics')
    _, edges = look(layer, x)
    assert close(edges.mean.sum(1) + layer.bias, layer(x).mean(0))


@pytest.mark.parametrize('name', ['steps', 'wide'])
def test_inputs_outside_the_grid_are_counted(name):
    low, high = LAYERS[name].get('grid_range', (-1.0, 1.0))
    x = torch.tensor([low - 0.1, low + 0.1, 0.0, high - 0.1, high + 0.1, high + 9, high + 0.1, 0.5]).view(-1, 1)
    x = torch.cat([x, 0 * x, 0 * x + high + 1], 1)
    assert look(make_layer(name), x)[1].outside.tolist() == [0.5, 0.0, 1.0]


def test_inputs_outside_an_uneven_grid_are_counted():
    x = make_inputs()
    layer = make_layer('cubics', True, x)
    far = torch.cat([x[:30] + 100, x[:70]])
    assert close(look(layer, far)[1].outside, torch.full((I,), 0.3), 1e-6)


@torch.no_grad()
def plant(layer, i, o, y):
    """Make an edge the spline nearest to the function y over its grid, and nothing else."""
    knots, k = layer.grid[0], layer.spline_order
    x = torch.linspace(knots[k], knots[-1 - k], 4001)[:-1].unsqueeze(1)
    layer.base_weight[o, i] = 0
    coefficients = layer.curve2coeff(
        x.expand(-1, layer.in_features), y(x).unsqueeze(2).expand(-1, layer.in_features, 1)
    )
    layer.spline_weight[o, i] = coefficients[0, i]


def test_roughness_of_known_functions():
    """In domains and activities: of z^2 over [0, 1] it is 2 over sqrt(4 / 45), of a whole sine 4 pi^2."""
    layer = KANLinear(2, 3, grid_size=40, enable_standalone_scale_spline=False, base_activation=nn.Identity)
    for i, scale in (0, 1.0), (1, -3.0):
        plant(layer, i, 0, lambda x, scale=scale: scale * x.add(1).div(2).square())
        plant(layer, i, 1, lambda x, scale=scale: scale * torch.sin(math.pi * x))
        plant(layer, i, 2, lambda x, scale=scale: scale * x + 2)
    x = torch.linspace(-0.999, 0.999, 5000).unsqueeze(1).expand(-1, 2)
    roughness = look(layer, x)[1].roughness
    assert roughness[0] == pytest.approx([3 * math.sqrt(5)] * 2, rel=0.02)
    assert roughness[1] == pytest.approx([4 * math.pi**2] * 2, rel=0.02)
    assert roughness[2].max() < 1  # rounding of float32


@pytest.mark.parametrize('width', [1.0, 1e-3])
def test_roughness_is_that_of_second_differences(width):
    """Of narrow inputs, too, over which an edge is hardly bent."""
    x = width * make_inputs() + 0.3
    layer = make_layer('cubics')
    seen, edges = look(layer, x)
    t = torch.linspace(0, 1, CURVE, dtype=torch.float64).unsqueeze(1)
    g = sample(layer, torch.lerp(edges.low.double(), edges.high.double(), t))
    second = (g[2:] - 2 * g[1:-1] + g[:-2]) * (CURVE - 1) ** 2
    expected = second.square().mean(0).sqrt() / sample(layer, x).std(0, correction=0)
    assert close(edges.roughness, expected, 0.02)


def test_what_the_nodes_hold_gives_moments_of_any_broken_line():
    """Mean, variance and covariance with an edge of a function that is a line between the nodes."""
    x = make_inputs()
    layer = make_layer('wide')
    seen, edges = look(layer, x)
    h = torch.randn(NODES, dtype=torch.float64)
    place = ((x.double() - edges.low) / (edges.high - edges.low) * (NODES - 1)).clamp(0, NODES - 1)
    left = place.long().clamp(max=NODES - 2)
    sampled = torch.lerp(h[left], h[left + 1], place - left)  # (N, I)
    assert close(edges.mass @ h, sampled.mean(0))
    squares = edges.overlap[0] @ h.square() + 2 * edges.overlap[1][:, :-1] @ (h[:-1] * h[1:])
    assert close(squares, sampled.square().mean(0))
    g = sample(layer, x)
    covariance = ((g - g.mean(0)) * (sampled - sampled.mean(0)).unsqueeze(1)).mean(0)  # (O, I)
    with_phi = (edges.cross.double() * h.view(1, -1, 1)).sum(1)  # (I, P)
    assert close((seen.weights.double() * with_phi.t()).sum(1), covariance, 1e-3)


def test_curves_and_values_of_edges():
    x = make_inputs()
    layer = make_layer('parabolas', True, x)
    seen, edges = look(layer, x)
    pairs = [(3, 0), (0, 2), (1, 1)]
    outputs, features = zip(*pairs)
    assert close(values(seen, pairs), sample(layer, x)[:, outputs, features])
    places, total, base = curves(seen, edges, pairs, n=20)
    assert torch.equal(places[:, 0], edges.low[list(features)]) and close(places[:, -1], edges.high[list(features)])
    for e, (o, i) in enumerate(pairs):
        everywhere = torch.zeros(20, I)
        everywhere[:, i] = places[e]
        assert close(total[e], sample(layer, everywhere)[:, o, i])
        assert close(base[e], nn.functional.silu(places[e]) * layer.base_weight[o, i])


@torch.no_grad()
def test_edges_of_a_layer_in_bfloat16_are_what_it_computes():
    """On the even grid that it was given, which bfloat16 rounds."""
    layer, x = KANLinear(1, O).bfloat16(), torch.linspace(-1, 1, 300).bfloat16().unsqueeze(1)
    nn.init.zeros_(layer.base_weight)
    nn.init.normal_(layer.spline_weight)
    nn.init.ones_(layer.spline_scaler)
    seen, _ = look(layer, x)
    y = spline.spline_linear(x.float(), layer.packed_weight(), layer.grid, 3, layer.base_activation, torch.float32)
    assert torch.allclose(values(seen, [(o, 0) for o in range(O)]), y, atol=1e-5)


def test_edges_of_a_mask_are_dead():
    layer = KANLinear(I, O, mask=True)
    layer.mask[1, 2] = False
    _, edges = look(layer, make_inputs())
    assert edges.activity[1, 2] == 0 and edges.mean[1, 2] == 0 and not edges.alive[1, 2]
    assert edges.affine_r2[1, 2].isnan() and edges.alive.sum() == I * O - 1


def test_a_dead_feature_and_a_zero_edge_are_not_alive():
    layer = make_layer('wide')
    with torch.no_grad():
        layer.base_weight[2, 0] = 0
        layer.spline_weight[2, 0] = 0
    x = make_inputs()
    x[:, 1] = 0.7
    _, edges = look(layer, x)
    expected = torch.ones(O, I, dtype=torch.bool)
    expected[:, 1] = expected[2, 0] = False
    assert torch.equal(edges.alive, expected) and torch.equal(edges.affine_r2.isnan(), ~expected)
    assert close(edges.mean[:, 1], sample(layer, x)[0, :, 1])
    assert all(tensor.isfinite().all() for tensor in (edges.share, edges.slope, edges.roughness, edges.cross))


# what is watched


def test_rows_of_several_calls_up_to_a_number():
    layer, x = KANLinear(I, O), make_inputs(40)
    seen = watch(layer, lambda: [layer(x[:8].view(2, 4, I)), layer(x[8:20]), layer(x[20:])], rows=25)['']
    assert torch.equal(seen.x, x[:25]) and seen.layer is layer
    layer(x * torch.nan)  # and nobody watches any more


def test_layers_by_name_and_those_that_were_not_called():
    model = nn.ModuleDict({name: KAN([I, 5, O]) for name in ('one', 'two', 'three')})
    x = make_inputs(20)
    run = lambda: (model['one'](x), model['two'](x))  # noqa: E731
    assert list(kan_layers(model)) == [f'{name}.layers.{n}' for name in model for n in (0, 1)]
    assert list(watch(model, run)) == ['one.layers.0', 'one.layers.1', 'two.layers.0', 'two.layers.1']
    assert list(watch(model, run, ['three.layers.0', 'two.layers.1'])) == ['two.layers.1']
    hidden = watch(model, run, ['two.layers.1'])['two.layers.1'].x
    with torch.no_grad():
        assert torch.equal(hidden, model['two'].layers[0](x))


def test_the_hooks_go_when_a_run_fails():
    layer = KANLinear(I, O)
    with pytest.raises(ZeroDivisionError):
        watch(layer, lambda: 1 / 0)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(value):
    model = KAN([I, O])
    x = make_inputs(50)
    x[3, 2] = x[4, 2] = value
    with pytest.raises(ValueError, match=r'^layers\.0: 2 inputs are NaN or infinite, the first in feature 2$'):
        watch(model, lambda: model(x))


@pytest.mark.parametrize('n', [0, 1])
def test_too_few_rows(n):
    model = KAN([I, O])
    with pytest.raises(ValueError, match=rf'^layers\.0 saw {n} rows of data, and statistics want two at least$'):
        watch(model, lambda: model(make_inputs(n)))


def test_inputs_of_another_width_are_the_error_of_the_layer():
    model = KAN([I, O])
    with pytest.raises(ValueError, match='expected 3 features'):
        watch(model, lambda: model(torch.zeros(9, 7)))


# models with KAN layers of other kinds

TINY = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=20, dropout=0.0)
IDS = torch.arange(96).remainder(20).view(6, 16)


def test_of_an_adapter_the_scaled_weights_act():
    """phi_out is called with s times its weights, and its activity is that of what it adds."""
    model = GPT(GPTConfig(**TINY)).eval()
    add_lora(model, LoRAConfig(kind='kan', rank=3, alpha=21.0, dropout=0.0, target_modules=('c_fc',)))
    out = model.get_submodule('transformer.h.0.mlp.c_fc').adapter.bottleneck.phi_out
    nn.init.normal_(out.base_weight)
    nn.init.normal_(out.spline_weight)
    met = []
    handle = out.register_forward_hook(lambda layer, args, y: met.append((args[0], y)))
    seen = watch(model, lambda: model(IDS))
    handle.remove()
    (name,) = (name for name in seen if name.endswith('phi_out'))
    edges, ((x, y),) = measure(seen[name]), met
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    assert torch.equal(seen[name].x, x)
    assert close(edges.activity, 7 * sample(out, x).std(0, correction=0))
    assert close(edges.output_sd, y.std(0, correction=0)) and close(edges.mean.sum(1), y.mean(0))


def test_a_kanified_model():
    """Its layers are straight lines whose slopes are the weights, and their biases are not of the edges."""
    model = GPT(GPTConfig(**TINY)).eval()
    weight, bias = model.transformer.h[0].mlp.c_fc.weight.detach(), model.transformer.h[0].mlp.c_fc.bias
    nn.init.normal_(bias)
    kanify(model, 'mlp', grid_size=3)
    seen = watch(model, lambda: model(IDS))
    edges = measure(seen['transformer.h.0.mlp.c_fc'])
    assert len(seen) == 2 and close(edges.slope, weight)
    inputs = seen['transformer.h.0.mlp.c_fc'].x
    assert close(edges.affine_r2, torch.ones(32, 8))
    assert close(edges.activity, weight.abs() * inputs.std(0, correction=0))
    assert close(edges.mean, weight * edges.centre)


def test_a_model_without_kan_layers():
    model = GPT(GPTConfig(**TINY))
    assert kan_layers(model) == watch(model, lambda: model(IDS)) == {}
