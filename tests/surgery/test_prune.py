"""Edges and neurons cut out of KAN layers: what is left computes what a sum over the rest gives, and trains on so."""

import copy
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn

from kan import KAN, KANLinear
from layers import spline
from model import GPT, GPTConfig
from surgery.lora import LoRAConfig, add_lora
from surgery.prune import complete, mask_edges, remove_hidden, remove_inputs, remove_outputs, strongest

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

I, O = 4, 6
SETTINGS = {
    'plain': {},
    'bias': dict(bias=True),
    'no scaler': dict(enable_standalone_scale_spline=False),
    'mask': dict(mask=True, bias=True),
    'lines': dict(spline_order=1, base_activation=nn.Identity),
}


def make_layer(name='plain'):
    layer = KANLinear(I, O, **SETTINGS[name])
    nn.init.normal_(layer.spline_weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def random_keep(*shape):
    keep = torch.rand(*shape) < 0.5
    keep.view(-1)[:2] = torch.tensor([True, False])
    return keep


@torch.no_grad()
def zeroed(layer, keep):
    """A copy of a layer whose cut edges are zero, and which knows no mask."""
    copied = copy.deepcopy(layer)
    copied.base_weight.copy_(torch.where(keep, layer.base_weight, 0))
    copied.spline_weight.copy_(torch.where(keep.unsqueeze(2), layer.spline_weight, 0))
    return copied


# what stays


def test_the_strongest_of_some_numbers():
    numbers = torch.tensor([[0.3, 0.9, 0.1], [0.5, 0.2, 0.7]])
    assert strongest(numbers, 0.5).tolist() == [[False, True, False], [True, False, True]]
    assert strongest(numbers, 1).all() and not strongest(numbers, 0).any()
    assert strongest(numbers, 0.01).tolist() == [[False, True, False], [False, False, False]]
    assert [strongest(torch.ones(10), share).sum().item() for share in (0.24, 0.26, 0.8, 1 - 0.2)] == [2, 3, 8, 8]
    assert strongest(torch.zeros(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize('share', [-0.1, 1.1, float('nan')])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match='a share to keep must be between 0 and 1, got'):
        strongest(torch.ones(3), share)


# masks


@torch.no_grad()
@pytest.mark.parametrize('name', SETTINGS)
def test_cutting_nothing_changes_nothing(name):
    layer, x = make_layer(name), torch.randn(50, I)
    before = layer(x)
    mask_edges(layer, torch.ones(O, I, dtype=torch.bool), torch.zeros(O))
    assert torch.equal(layer(x), before) and layer.mask.all()


@torch.no_grad()
@pytest.mark.parametrize('name', SETTINGS)
def test_cutting_everything_leaves_the_bias(name):
    layer, x, lost = make_layer(name), torch.randn(50, I), torch.randn(O)
    bias = 0 if layer.bias is None else layer.bias.clone()
    mask_edges(layer, torch.zeros(O, I, dtype=torch.bool), lost)
    assert close(layer(x), (lost + bias).expand(50, O))


@torch.no_grad()
@pytest.mark.parametrize('name', SETTINGS)
def test_cut_edges_give_nothing(name):
    layer, x, keep, lost = make_layer(name), torch.randn(50, I), random_keep(O, I), torch.randn(O)
    expected = zeroed(layer, keep)(x) + lost
    mask_edges(layer, keep, lost)
    assert close(layer(x), expected) and torch.equal(layer.mask, keep)
    keep[:] = True
    assert not layer.mask.all()  # a copy of its own


@torch.no_grad()
def test_cuts_add_up():
    layer, x = make_layer('bias'), torch.randn(50, I)
    first, second = random_keep(O, I), random_keep(O, I).flip(0)
    expected = zeroed(layer, first & second)(x) + 3
    mask_edges(layer, first, torch.ones(O))
    mask_edges(layer, second, 2 * torch.ones(O))
    assert torch.equal(layer.mask, first & second) and close(layer(x), expected)


@torch.no_grad()
def test_a_mask_hides_weights_that_are_not_zero():
    """As an adapter would add them."""
    layer, x, keep = KANLinear(I, O, mask=True), torch.randn(50, I), random_keep(O, I)
    layer.mask.copy_(keep)
    base, splines = torch.randn(O, I), torch.randn(O, I, 8)
    given = layer(x, base, splines)
    assert close(given, zeroed_given(layer, keep, base, splines)(x)) and close(layer(x), zeroed(layer, keep)(x))


@torch.no_grad()
def zeroed_given(layer, keep, base, splines):
    copied = copy.deepcopy(layer)
    copied.mask = None
    copied.base_weight.copy_(base)
    copied.spline_weight.copy_(splines)
    return zeroed(copied, keep)


@pytest.mark.parametrize('backend', ['auto', 'plain'])
@pytest.mark.parametrize('name', SETTINGS)
def test_cut_edges_get_no_gradient_and_stay_zero(name, backend, monkeypatch):
    monkeypatch.setattr(spline, 'BACKEND', backend)  # auto is the plain formula, the other the operator
    layer, x, keep = make_layer(name), torch.randn(50, I), random_keep(O, I)
    mask_edges(layer, keep, torch.zeros(O))
    before = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        assert not layer.base_weight.grad[~keep].any() and not layer.spline_weight.grad[~keep].any()
        if layer.enable_standalone_scale_spline:
            assert not layer.spline_scaler.grad[~keep].any()
        optimizer.step()
    assert not layer.base_weight[~keep].any() and not layer.spline_weight[~keep].any()
    assert (layer.base_weight != before.base_weight)[keep].all() and (layer.bias != before.bias).all()
    assert torch.equal(layer.mask, keep)


def test_other_ways_to_train_leave_cut_edges_zero():
    """The penalty of a KAN layer, grids that move, and grids that become finer."""
    layer, x, keep = make_layer(), torch.randn(200, I), random_keep(O, I)
    mask_edges(layer, keep, torch.zeros(O))
    layer.regularization_loss().backward()
    assert not layer.spline_weight.grad[~keep].any() and layer.spline_weight.grad[keep].any()
    layer.update_grid(x)
    layer.refine_grid(7)
    assert not layer.spline_weight[~keep].any() and layer.spline_weight[keep].any()
    assert close(layer(x), zeroed(layer, keep)(x))


@torch.no_grad()
def test_frozen_layers_stay_frozen():
    layer = make_layer().requires_grad_(False)
    mask_edges(layer, random_keep(O, I), torch.ones(O))
    assert not any(p.requires_grad for p in layer.parameters()) and layer.bias is not None
    remove_outputs(layer, random_keep(O))
    remove_inputs(layer, random_keep(I), torch.ones(layer.out_features))
    assert not any(p.requires_grad for p in layer.parameters())


def test_an_adapter_does_not_bring_edges_back():
    model = nn.Sequential(nn.Sequential(make_layer()))
    keep, x = random_keep(O, I), torch.randn(50, I)
    mask_edges(model[0][0], keep, torch.zeros(O))
    add_lora(model, LoRAConfig(kind='kan_base', rank=2, dropout=0.0, target_modules=('0.0',)))
    layer = model[0][0]
    for p in layer.adapter.parameters():
        nn.init.normal_(p)
    moved = x.clone()
    o, i = (~keep).nonzero()[0].tolist()
    moved[:, i] += 1
    others = [p for p in range(O) if keep[p, i]]
    changed = (model(moved) - model(x)).abs().amax(0)
    assert changed[o] < 1e-6 and all(changed[other] > 1e-3 for other in others)


# neurons


@torch.no_grad()
@pytest.mark.parametrize('bias', [False, True])
def test_removed_neurons_are_masked_ones_in_smaller_tensors(bias):
    model, x, lost = KAN([I, 5, O], bias=bias), torch.randn(50, I), torch.randn(O)
    for p in model.parameters():
        nn.init.normal_(p)
    model.layers[1].update_grid(model.layers[0](x))  # grids of their own for each neuron
    keep = torch.tensor([True, False, True, True, False])
    masked = copy.deepcopy(model)
    mask_edges(masked.layers[1], keep.expand(O, 5), lost)
    before = {name: p.shape for name, p in model.state_dict().items()}
    first, second = model.layers
    remove_outputs(first, keep)
    remove_inputs(second, keep, lost)
    assert close(model(x), masked(x))
    assert (first.out_features, second.in_features) == (3, 3)
    after = {name: p.shape for name, p in model.state_dict().items()}
    assert after['layers.0.spline_weight'] == (3, I, 8) and after['layers.1.spline_weight'] == (O, 3, 8)
    assert after['layers.1.grid'][0] == 3 and after['layers.0.grid'] == before['layers.0.grid']
    assert after.get('layers.0.bias') == ((3,) if bias else None) and after['layers.1.bias'] == (O,)
    built = KAN([I, 3, O], bias=True)
    complete(model.layers)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(x), model(x))


@torch.no_grad()
def test_masks_shrink_with_neurons():
    layer, keep = make_layer('mask'), random_keep(O, I)
    mask_edges(layer, keep, torch.zeros(O))
    outputs, inputs = torch.tensor([1, 4]), torch.tensor([0, 3])
    remove_outputs(layer, torch.isin(torch.arange(O), outputs))
    assert torch.equal(layer.mask, keep[outputs])
    remove_inputs(layer, torch.isin(torch.arange(I), inputs), torch.zeros(2))
    assert torch.equal(layer.mask, keep[outputs][:, inputs]) and layer(torch.randn(7, 2)).shape == (7, 2)


def test_smaller_layers_train():
    model, x = KAN([I, 5, O]), torch.randn(50, I)
    keep = torch.tensor([True, False, True, True, False])
    remove_outputs(model.layers[0], keep)
    remove_inputs(model.layers[1], keep, torch.zeros(O))
    model(x).square().sum().backward()
    assert all(p.grad.shape == p.shape and p.grad.any() for p in model.parameters())


# one description of all layers


@torch.no_grad()
def test_all_layers_get_what_one_has():
    layers, x = [make_layer('no scaler'), make_layer('bias')], torch.randn(50, I)
    before = [layer(x) for layer in layers]
    assert complete(layers) is False
    assert all(layer.mask is None and layer.bias is not None for layer in layers)
    layers.append(make_layer('mask'))
    before.append(layers[2](x))
    assert complete(layers) is True
    assert all(layer.mask.all() and layer.mask.shape == (O, I) for layer in layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, before))


# GPTs

TINY = dict(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=20, use_kan=True, kan_hidden=1.0)
IDS = torch.arange(32).remainder(20).view(2, 16)


def pruned_gpt():
    model = GPT(GPTConfig(**TINY, kan_targets='attn,mlp,head')).eval()
    for name, p in model.named_parameters():
        if name.endswith('spline_weight'):
            nn.init.normal_(p)
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    for layer in layers[::2]:
        mask_edges(layer, random_keep(*layer.base_weight.shape), 0.1 * torch.randn(layer.out_features))
    assert complete(layers)
    return model


@torch.no_grad()
def test_a_pruned_gpt_comes_back_by_its_config():
    model = pruned_gpt()
    args = {**asdict(model.config), 'kan_bias': True, 'kan_mask': True}
    built = GPT(GPTConfig(**args)).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(IDS, IDS)[0], model(IDS, IDS)[0])
    assert built.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match='mask'):
        GPT(GPTConfig(**{**args, 'kan_mask': False})).load_state_dict(model.state_dict())


@torch.no_grad()
def test_a_pruned_gpt_writes_what_its_logits_say():
    """With packed weights and a cache."""
    model = pruned_gpt()
    idx = IDS[:1, :4]
    written = model.generate(idx, 8, temperature=0.0)
    for _ in range(8):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, idx)


def test_a_fresh_gpt_with_masks_starts_as_one_without():
    """kan_bias and kan_mask change neither the random numbers nor what is computed."""
    models = []
    for more in ({}, dict(kan_bias=True, kan_mask=True)):
        torch.manual_seed(3)
        models.append(GPT(GPTConfig(**TINY, **more)).eval())
    plain, masked = models
    assert torch.equal(plain(IDS, IDS)[0], masked(IDS, IDS)[0])
    ours, theirs = plain.state_dict(), masked.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(theirs[name].all() for name in theirs if name.endswith('.mask'))
    assert {name.rpartition('.')[2] for name in theirs.keys() - ours.keys()} == {'mask', 'bias'}


def test_masks_do_not_train_and_move_with_the_model():
    model = pruned_gpt()
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.endswith('mask') for name in names)
    assert all(tensor.dtype == torch.bool for name, tensor in model.half().state_dict().items() if 'mask' in name)
    assert all(tensor.is_meta for name, tensor in model.to('meta').state_dict().items() if 'mask' in name)


# hidden channels between linear layers


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('mlp', ['mlp', 'swiglu'])
@pytest.mark.parametrize('use_kan', [False, True])
def test_hidden_channels_are_removed(mlp, use_kan, bias):
    """What is left is the MLP with the others silenced, and another bias where there is one."""
    config = GPTConfig(n_embd=6, n_head=2, vocab_size=5, block_size=4, n_layer=1, bias=bias, mlp=mlp, mlp_hidden=2)
    config.use_kan, config.kan_kind = use_kan, 'channel'
    model = GPT(config)
    block, x = model.transformer.h[0].mlp, torch.randn(7, 6)
    if use_kan:
        nn.init.normal_(block.act.spline_weight)
    keep, lost = random_keep(12), torch.randn(6)
    silenced = copy.deepcopy(block)
    with torch.no_grad():
        silenced.c_proj.weight *= keep
        expected = silenced(x) + (lost if bias else 0)
        remove_hidden(block, keep, lost)
        assert close(block(x), expected)
    smaller = GPT(GPTConfig(**{**asdict(config), 'mlp_hidden': keep.sum().item() / 6}))
    smaller.load_state_dict(model.state_dict())
    assert close(smaller.transformer.h[0].mlp(x), expected)
