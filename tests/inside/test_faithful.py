"""Losses with edges cut or replaced: what an edited layer gives, against sums over its edges by hand."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from helpers import FUNCTIONS
from inside import faithful
from inside.edges import CHUNK, values, watch
from inside.faithful import at_random, by_formula, edited, measure_losses, most_active, prune_curve, table, without
from inside.formulas import NAMES
from inside.report import look
from kan import KAN, KANLinear
from model import GPT, GPTConfig
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora
from surgery.prune import mask_edges

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

I, O = 4, 6


def make_layer(**settings):
    """With wild edges, two straight ones, and a dead one."""
    layer = KANLinear(I, O, bias=True, **settings)
    with torch.no_grad():
        layer.spline_weight.normal_()
        layer.bias.normal_(std=2)
        layer.base_weight[1, 3] = layer.spline_weight[1, 3] = 0
        if isinstance(layer.base_activation, nn.Identity):
            layer.spline_weight[0, 0] = layer.spline_weight[2, 1] = 0
    return layer


def study(model, x, n_edges=1, names=None):
    return look(model, lambda: model(x), names, n_edges=n_edges)


@pytest.fixture
def layer_and_inputs():
    """A layer looked into, and the inputs it was looked at with."""
    layer, x = make_layer(base_activation=nn.Identity), 0.7 * torch.randn(CHUNK + 200, I)
    (found,) = study(layer, x)
    return found, x


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, torch.as_tensor(b).to(a), rtol=tolerance, atol=tolerance)


def edges_by_hand(found, x):
    """(N, O, I) what each edge adds."""
    (seen,) = watch(found.seen.layer, lambda: found.seen.layer(x)).values()
    return values(seen, [(o, i) for o in range(O) for i in range(I)]).view(len(x), O, I)


def give(found, edit, x):
    with edited([(found.seen, edit)]):
        return found.seen.layer(x)


# edges cut


@torch.no_grad()
def test_with_all_edges_kept_nothing_changes(layer_and_inputs):
    found, x = layer_and_inputs
    keep = torch.ones(O, I, dtype=torch.bool)
    assert close(give(found, without(found, keep), x), found.seen.layer(x))
    assert close(give(found, by_formula(found, ~keep), x), found.seen.layer(x))


@torch.no_grad()
def test_afterwards_the_layer_is_as_before(layer_and_inputs):
    found, x = layer_and_inputs
    layer = found.seen.layer
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    nothing = torch.zeros(O, I, dtype=torch.bool)
    assert not close(give(found, without(found, nothing), x), before, 1e-2)
    with pytest.raises(ZeroDivisionError), edited([(found.seen, without(found, nothing))]):
        1 / 0  # noqa: B018
    assert torch.equal(layer(x), before) and 'forward' not in vars(layer)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@torch.no_grad()
def test_a_forward_that_a_library_has_put_in_place_comes_back(layer_and_inputs):
    found, x = layer_and_inputs
    layer = found.seen.layer
    layer.forward = lambda rows: type(layer).forward(layer, rows) + 1
    before = layer(x)
    assert not close(give(found, without(found, torch.zeros(O, I, dtype=torch.bool)), x), before, 1e-2)
    assert torch.equal(layer(x), before)


def test_gradients_are_off_within_and_on_again_after(layer_and_inputs):
    found, x = layer_and_inputs
    assert not give(found, without(found, torch.ones(O, I, dtype=torch.bool)), x).requires_grad
    assert found.seen.layer(x).requires_grad


@torch.no_grad()
def test_without_any_edge_the_mean_is_left(layer_and_inputs):
    found, x = layer_and_inputs
    mean = found.seen.layer(x).mean(0)
    y = give(found, without(found, torch.zeros(O, I, dtype=torch.bool)), x[:9])
    assert close(y, mean.expand(9, -1), 1e-4) and mean.abs().max() > 0.5


@torch.no_grad()
def test_a_cut_edge_gives_its_mean(layer_and_inputs):
    found, x = layer_and_inputs
    keep = torch.rand(O, I) < 0.5
    g = edges_by_hand(found, x)
    expected = torch.where(keep, g, g.mean(0)).sum(2) + found.seen.layer.bias
    assert close(give(found, without(found, keep), x), expected, 1e-4)
    assert close(faithful.lost(found, keep), (g.mean(0) * ~keep).sum(1), 1e-4)


@torch.no_grad()
def test_cutting_is_what_a_mask_does():
    """Whatever the shape of the inputs, with scalers too."""
    layer, x = make_layer(), torch.randn(3, 50, I)
    (found,) = study(layer, x)
    keep = torch.rand(O, I) < 0.5
    y = give(found, without(found, keep), x)
    mask_edges(layer, keep, faithful.lost(found, keep))
    assert y.shape == (3, 50, O) and close(y, layer(x), 1e-4)


@torch.no_grad()
def test_of_a_masked_layer_the_mask_stays():
    layer, x = make_layer(mask=True), torch.randn(300, I)
    layer.mask[2] = False
    (found,) = study(layer, x)
    y = give(found, without(found, torch.ones(O, I, dtype=torch.bool)), x)
    assert close(y, layer(x)) and y[:, 2].std() < 1e-6


@torch.no_grad()
def test_dtypes_stay(layer_and_inputs):
    found, x = layer_and_inputs
    edit = without(found, torch.ones(O, I, dtype=torch.bool))
    with torch.autocast('cpu', torch.bfloat16):
        assert give(found, edit, x).dtype == found.seen.layer(x).dtype == torch.bfloat16
    assert give(found, edit, x).dtype == torch.float32


@torch.no_grad()
def test_the_strongest_stay(layer_and_inputs):
    found, _ = layer_and_inputs
    keep, activity = most_active(found, 0.25), found.edges.activity
    assert keep.sum() == 6 and activity[keep].min() >= activity[~keep].max()
    assert most_active(found, 0).sum() == 0 and most_active(found, 1).all()


def test_what_is_drawn_is_drawn_again(layer_and_inputs):
    found, _ = layer_and_inputs
    first, again, other = (at_random(draw)(found, 0.5) for draw in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.sum() == other.sum() == 12


# formulas in the place of edges


def formula_by_hand(found, o, i, x):
    """What an edge is replaced by, in float64: its formula within the domain, or its best straight line."""
    edges, x = found.edges, x.double().numpy()
    if not edges.alive[o, i]:
        return np.full(len(x), edges.mean[o, i].item())
    if found.found.best[o, i] - edges.affine_r2[o, i] <= 0.01:
        return edges.mean[o, i].item() + edges.slope[o, i].item() * (x - edges.centre[i].item())
    a, b, c, d = (getattr(found.found, name)[o, i].item() for name in 'abcd')
    x = x.clip(edges.low[i].item(), edges.high[i].item())
    return c * FUNCTIONS[NAMES[found.found.family[o, i]]](a * x + b) + d


@torch.no_grad()
@pytest.mark.parametrize('share', [0.5, 1.0])
def test_formulas_add_up(layer_and_inputs, share):
    """On the data, and far beyond them."""
    found, x = layer_and_inputs
    x = torch.cat([x[:100], 3 * x[:100]])
    chosen = torch.rand(O, I) < share
    g = edges_by_hand(found, x)
    formulas = np.stack([[formula_by_hand(found, o, i, x[:, i]) for i in range(I)] for o in range(O)])  # (O, I, N)
    mixed = torch.where(chosen, torch.from_numpy(formulas).permute(2, 0, 1), g.double())
    kinds = {(bool(found.edges.alive[o, i]), bool(found.affine[o, i])) for o in range(O) for i in range(I)}
    assert kinds == {(True, False), (True, True), (False, False)}  # curved, straight, dead
    y = give(found, by_formula(found, chosen), x)
    assert close(y, mixed.sum(2) + found.seen.layer.bias, 1e-3)


@torch.no_grad()
def test_good_formulas_are_near_the_edges(layer_and_inputs):
    found, x = layer_and_inputs
    chosen = found.r2 > 0.9
    y, before = give(found, by_formula(found, chosen), x), found.seen.layer(x)
    left = (y - before).var(0) / before.var(0)
    assert 0 < chosen.sum() < O * I and left.max() < 0.2
    assert close(y.mean(0), before.mean(0), 1e-2)


@torch.no_grad()
def test_formulas_are_finite_at_the_ends_of_a_narrow_domain_far_from_zero():
    """Where roots and logarithms are near their ends."""
    layer = KANLinear(1, 8, grid_range=(50.0, 50.5))
    layer.spline_weight.normal_()
    x = 50 + 0.5 * torch.rand(500, 1).square()
    (found,) = study(layer, x)
    y = give(found, by_formula(found, torch.ones(8, 1, dtype=torch.bool)), torch.cat([x, x - 9, x + 9]))
    assert y.isfinite().all()


# whole models

TINY = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=20, dropout=0.0)
IDS = torch.arange(96).remainder(20).view(6, 16)


def keep_all(layers):
    return [(layer.seen, without(layer, torch.ones_like(layer.edges.alive))) for layer in layers]


def adapted():
    model = GPT(GPTConfig(**TINY))
    add_lora(model, LoRAConfig(kind='kan', rank=3, alpha=21.0, dropout=0.0, target_modules=('c_fc',)))
    bottleneck = model.get_submodule('transformer.h.0.mlp.c_fc').adapter.bottleneck
    nn.init.normal_(bottleneck.phi_out.base_weight)
    nn.init.normal_(bottleneck.phi_out.spline_weight)
    return model


MODELS = {
    'KAN-GPT': lambda: GPT(GPTConfig(**TINY, use_kan=True, kan_targets='attn,mlp,head', kan_hidden=1.0)),
    'adapter': adapted,
    'kanified': lambda: kanify(GPT(GPTConfig(**TINY)), 'mlp', grid_size=3),
    'two layers': lambda: nn.Sequential(nn.Embedding(20, 5), KAN([5, 4, 20])),
}


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_a_model_with_all_edges_kept(name):
    model = MODELS[name]().eval()
    before = model(IDS)
    layers = study(model, IDS)
    with edited(keep_all(layers)):
        kept = model(IDS)
    whole, again = (output[0] if isinstance(output, tuple) else output for output in (before, kept))
    assert close(again, whole, 1e-4)
    after = model(IDS)
    assert torch.equal(after[0] if isinstance(after, tuple) else after, whole)


@torch.no_grad()
def test_an_adapter_without_edges_adds_the_mean_of_what_it_added():
    """Its scaling is part of that."""
    model, met = adapted().eval(), []
    bottleneck = model.get_submodule('transformer.h.0.mlp.c_fc').adapter.bottleneck
    bottleneck.register_forward_hook(lambda layer, args, y: met.append(y.flatten(0, 1)))
    (found,) = (layer for layer in study(model, IDS) if layer.name.endswith('phi_out'))
    with edited([(found.seen, without(found, torch.zeros_like(found.edges.alive)))]):
        model(IDS)
    usual, cut = met
    assert close(cut, usual.mean(0).expand_as(cut), 1e-4) and usual.mean(0).abs().max() > 0.1


def test_losses():
    model, x = KAN([I, 5, O]), torch.randn(200, I)
    y = torch.randn(200, O)
    nn.init.normal_(model.layers[0].spline_weight)
    nn.init.normal_(model.layers[1].spline_weight)
    layers = study(model, x)

    def loss():
        return (model(x) - y).square().mean().item()

    found = measure_losses(layers, loss)
    assert found['full'] == loss() and len(found['shares']) == len(found['by_activity']) == len(found['at_random'])
    nothing = [(layer.seen, without(layer, torch.zeros_like(layer.edges.alive))) for layer in layers]
    with edited(nothing):
        empty = loss()
    constant = layers[1].edges.mean.sum(1)
    assert empty == pytest.approx((constant - y).square().mean().item(), rel=1e-4)
    assert found['by_activity'][-1] == found['at_random'][-1] == empty and found['at_random_std'][-1] == 0
    assert found['shares'][-1] == 1 and found['at_random_std'][0] > 0
    drawn = [prune_curve(layers, loss, at_random(draw)) for draw in range(2)]
    assert found['at_random'] == pytest.approx(np.mean(drawn, 0))
    assert found['at_random_std'] == pytest.approx(np.std(drawn, 0, ddof=1), abs=1e-9)
    with edited([(layer.seen, without(layer, most_active(layer, 1 - found['shares'][0]))) for layer in layers]):
        assert found['by_activity'][0] == loss()
    with edited([(layer.seen, by_formula(layer, torch.ones_like(layer.edges.alive))) for layer in layers]):
        everything = loss()
    names, parts, losses = zip(*found['formulas'])
    assert names[-2] == 'the strongest 100%' and parts[-2] == 1 and losses[-2] == everything
    assert names[-1] == 'R² above 0.99' and parts[-1] == pytest.approx(
        sum((layer.r2 > 0.99).sum().item() for layer in layers) / (I * 5 + 5 * O)
    )
    assert 'at_random' not in measure_losses(layers, loss, draws=0)
    assert loss() == found['full']


def test_losses_as_a_table():
    now = dict(full=1.5, shares=[0.5, 1.0], by_activity=[2.0, 4.0], at_random=[3.0, 4.0], formulas=[('all', 1.0, 1.7)])
    before = dict(full=5.0, shares=[0.5, 1.0], by_activity=[5.1, 5.2], formulas=[('all', 1.0, 5.3)])
    alone, beside = table(now, None), table(now, before)
    assert '| none | 1.5000 |  |' in alone and '| 50% | 2.0000 | 3.0000 |' in alone and 'random weights' not in alone
    assert '| none | 1.5000 (random weights: 5.000) |  |' in beside
    assert '| 100% | 4.0000 (random weights: 5.200) | 4.0000 |' in beside
    assert '| all | 100.0% (random weights: 100.0%) | 1.7000 (random weights: 5.300) |' in beside
    for text in alone, beside:
        for block in text.strip().split('\n\n'):
            assert len({line.count('|') for line in block.split('\n')}) == 1
    lost = dict(now, by_activity=[None, math.nan], at_random=[3.0, None])  # a record has None for NaN
    assert '| 50% | not finite | 3.0000 |\n| 100% | not finite | not finite |' in table(lost, None)
