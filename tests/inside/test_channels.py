"""Learned activations looked into: one function a channel, whose sum nobody takes."""

import pytest
import torch
import torch.nn as nn

from inside.edges import kan_layers, measure, watch
from inside.faithful import by_formula, edited, measure_losses, without
from inside.report import draw, facts, look, page, summarize, write_formulas
from kan import ChannelSpline
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

C = 5


def make_layer(**settings):
    phi = ChannelSpline(C, **settings)
    nn.init.normal_(phi.spline_weight)
    return phi


def inputs(gated=False):
    return 2 * torch.randn(1500, (1 + gated) * C) + torch.linspace(-1, 1, (1 + gated) * C)


@pytest.mark.parametrize('gated', [False, True])
def test_statistics_are_those_of_samples(gated):
    phi, x = make_layer(), inputs(gated)
    ((seen),) = watch(phi, lambda: phi(x, gated=gated)).values()
    edges, gate = measure(seen), x[:, :C]
    with torch.no_grad():
        g = phi(gate).double()
    assert torch.equal(seen.x, gate) and edges.activity.shape == (1, C)
    assert torch.allclose(edges.activity[0].double(), g.std(0, correction=0), rtol=1e-4)
    assert torch.allclose(edges.mean[0].double(), g.mean(0), atol=1e-4)
    assert torch.allclose(edges.share[0].double(), g.var(0) / g.var(0).sum(), rtol=1e-4)
    line = gate.double() - gate.double().mean(0)
    slope = (line * g).mean(0) / line.square().mean(0)
    left = (g - g.mean(0) - slope * line).var(0) / g.var(0)
    assert torch.allclose(1 - edges.affine_r2[0].double(), left, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('gated', [False, True])
def test_cut_and_replaced(gated):
    phi, x = make_layer(grid_size=2), inputs(gated)
    (found,) = look(phi, lambda: phi(x, gated=gated), n_edges=C)
    value = x[:, C:] if gated else 1
    keep = torch.tensor([[True, False, True, True, False]])
    before, alone = phi(x, gated=gated), phi(x[:, :C])
    with edited([(found.seen, without(found, keep))]):
        cut = phi(x, gated=gated)
    assert torch.allclose(cut, torch.where(keep, alone, alone.mean(0)) * value, atol=1e-4)
    with edited([(found.seen, by_formula(found, ~keep))]):
        replaced = phi(x, gated=gated)
    assert torch.allclose(replaced[:, keep[0]], before[:, keep[0]], atol=1e-5)
    error = (replaced - before)[:, ~keep[0]] / (value[:, ~keep[0]] if gated else 1)
    assert torch.allclose(error.square().mean(0), ((1 - found.r2) * found.edges.activity.square())[~keep], rtol=0.02)
    assert torch.equal(phi(x, gated=gated), before)


@pytest.fixture(scope='module')
def model():
    """A gated GPT with functions on channels before its attention, too."""
    sizes = dict(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=12, grid_min=-4.0, grid_max=4.0, grid_size=4)
    gpt = GPT(GPTConfig(**sizes, mlp='swiglu', use_kan=True, kan_kind='channel', kan_targets='attn,mlp')).eval()
    for layer in kan_layers(gpt).values():
        nn.init.normal_(layer.spline_weight, std=0.3)
    return gpt


def test_a_model_is_explained(model, tmp_path):
    x = torch.randint(20, (30, 8))
    layers = look(model, lambda: model(x), n_edges=3)
    assert [layer.name for layer in layers[:3]] == ['h.0.attn.c_attn.0', 'h.0.attn.c_proj.0', 'h.0.mlp.act']
    assert summarize(layers[2])['edges'] == 48
    losses = measure_losses(layers, lambda: model(x, x)[1].item())
    assert losses['by_activity'][-1] == pytest.approx(losses['at_random'][-1], rel=1e-5)
    assert len({round(loss, 6) for loss in losses['by_activity']}) == len(losses['by_activity'])
    drawn = dict(draw(layers, None, 3, [(0, model), (5, model)]))
    assert set(drawn) == {'r2', 'growth', *(f'edges-{layer.name}' for layer in layers)}
    assert drawn['edges-h.0.mlp.act'].axes[0].get_title().startswith('channel ')
    write_formulas(tmp_path, layers)
    text = (tmp_path / 'formulas.txt').read_text()
    assert '->' not in text and 'sums of edges' not in text and text.count('R²') == 3 * len(layers)
    shown = page('x', '', layers, None)['layers'][2]
    assert shown['outputs'] is None and {edge['o'] for edge in shown['edges']} == {None}
    assert facts(layers, None)[-1]['layer'] == 'all'


def test_new_functions_are_their_activations():
    phi = ChannelSpline(3)
    (found,) = look(phi, lambda: phi(2 * torch.randn(500, 3)), n_edges=3)
    assert all(formula.family == 'silu' and formula.r2 > 0.9999 for formula in found.formulas)
