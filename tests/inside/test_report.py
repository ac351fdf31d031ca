"""What report.py makes of layers: figures of all their edges, and what the page and the figures get of each."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from inside.edges import kan_layers, measure, watch
from inside.report import (
    draw_losses,
    drive,
    facts,
    growth_of,
    inputs_of,
    look,
    most_driven,
    page,
    r2_groups,
    summarize,
    total_of,
)
from kan import KAN

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


@pytest.fixture
def model():
    """Two layers of 20 and of 10 edges, wild ones and straight ones, and seven dead ones in the first."""
    model = KAN([4, 5, 2], base_activation=nn.Identity)
    first, second = model.layers
    with torch.no_grad():
        first.spline_weight.normal_()
        first.spline_weight[0] = 0
        first.spline_weight[1:3, :3] = first.base_weight[1:3, :3] = 0
        first.spline_weight[4, 3] = first.base_weight[4, 3] = 0
        second.spline_weight.normal_()
        second.spline_weight[0, :4] = 0
    return model


INPUTS = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.3, 1.0, 2.0, 0.1])


def study(model, n_edges=4):
    return look(model, lambda: model(INPUTS), n_edges=n_edges)


def test_shares_are_those_among_edges_that_vary(model):
    for layer in (layers := study(model)):
        edges, summary = layer.edges, summarize(layer)
        alive, variance = edges.activity > 0, edges.activity.square()
        assert summary['dead'] == pytest.approx(1 - alive.float().mean().item())
        assert summary['straight'] == pytest.approx((edges.affine_r2[alive] > 0.99).float().mean().item())
        bent = (variance * (1 - edges.affine_r2))[alive].sum() / variance.sum()
        assert summary['curved_variance'] == pytest.approx(bent.item(), rel=1e-5)
    assert summarize(layers[0])['dead'] == pytest.approx(7 / 20) and summarize(layers[1])['dead'] == 0


def test_all_layers_together_are_means_over_edges(model):
    layers = study(model)
    whole, summaries = total_of(layers), [summarize(layer) for layer in layers]
    activity, r2, alive = (
        torch.cat([getattr(layer.edges, name).flatten() for layer in layers])
        for name in ('activity', 'affine_r2', 'alive')
    )
    assert whole['edges'] == 30 and whole['dead'] == pytest.approx(7 / 30)
    assert whole['activity'] == pytest.approx(activity.mean().item())
    assert whole['straight'] == pytest.approx((r2[alive] > 0.99).float().mean().item())
    assert whole['outside'] == pytest.approx((20 * summaries[0]['outside'] + 10 * summaries[1]['outside']) / 30)


def test_random_weights_are_told_beside_those_that_learned(model):
    torch.manual_seed(3)
    layers, fresh = study(model), study(KAN([4, 5, 2], base_activation=nn.Identity), n_edges=1)
    rows = facts(layers, fresh)
    assert [row['trained'] for row in rows] == [*map(summarize, layers), total_of(layers)]
    assert [row['random'] for row in rows] == [*map(summarize, fresh), total_of(fresh)]
    headlines = [layer['summary'] for layer in page('x', '', layers, fresh)['layers']]
    assert [line['random_straight'] for line in headlines] == [summarize(layer)['straight'] for layer in fresh]
    assert [line['straight'] for line in headlines] == [summarize(layer)['straight'] for layer in layers]
    groups = {name: r2 for name, *r2 in r2_groups(layers, fresh)}
    assert list(groups) == [layer.name for layer in layers]
    for layer, before in zip(layers, fresh):
        found = groups[layer.name]
        assert np.array_equal(found[0], layer.edges.affine_r2.flatten(), equal_nan=True)
        assert np.array_equal(found[1], before.edges.affine_r2.flatten(), equal_nan=True)
        assert np.array_equal(np.nan_to_num(found[2]), layer.r2.flatten())
        assert np.array_equal(np.nan_to_num(found[3]), before.r2.flatten())


def test_histograms_are_of_the_inputs_of_one_feature(model):
    layer = study(model)[0]
    for i in range(4):
        found = inputs_of(layer, i)
        counts, _ = np.histogram(INPUTS[:, i], 40, (found['low'], found['high']))
        assert sum(found['counts']) == 400 and np.abs(np.subtract(found['counts'], counts)).sum() < 5


@torch.no_grad()
def test_growth_is_that_of_the_weights_of_each_time(model):
    """Over the inputs that the layer sees at last."""
    before = copy.deepcopy(model)
    for layer in kan_layers(before).values():
        layer.spline_weight *= 0.5
        layer.base_weight *= 0.5
    layer = study(model)[0]
    for edge in growth_of(layer, [(0, before), (7, model)]):
        assert edge['iterations'] == [0, 7] and np.abs(edge['curves'][1]).max() > 0.01
        assert np.allclose(edge['curves'][0], 0.5 * edge['curves'][1], atol=1e-5)


def test_what_drives_a_prompt_is_drawn_against_the_means(model):
    known = {name: measure(one) for name, one in watch(model, lambda: model(INPUTS)).items()}
    met = watch(model, lambda: model(INPUTS[:3]))
    driven = drive(known, met, n=30)
    expected = {(edge['layer'], edge['o'], edge['i'], t): edge['z'] for t, some in enumerate(driven) for edge in some}
    rows = most_driven(known, met, driven, 6)
    assert len(rows) == 6
    for label, z in rows:
        name, i, _, o = label.split()
        assert z.tolist() == pytest.approx([expected[name, int(o), int(i), t] for t in range(3)], abs=1e-3)


def test_losses_at_random_are_drawn_with_their_deviations():
    found = dict(full=1.0, shares=[0.5, 1.0], by_activity=[1.5, 4.0], at_random=[2.0, 4.0], at_random_std=[0.3, 0.0])
    panel = draw_losses(found).axes[0]
    active, random, _ = panel.lines
    assert active.get_xydata().tolist() == [[0, 1], [0.5, 1.5], [1, 4]]
    assert random.get_xydata().tolist() == [[0, 1], [0.5, 2], [1, 4]]
    band = panel.collections[0].get_paths()[0].vertices
    assert sorted({round(y, 6) for x, y in band if x == 0.5}) == [1.7, 2.3]
