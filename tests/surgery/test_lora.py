"""Adapters: what each kind computes, what trains, what merges, what a file brings back, and what is refused."""

import copy
import inspect
import json
import math
import os
import pickle
import shutil
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from kolmg_lora import KOLMGLoRAConfig, KOLMGLoRALinear
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from helpers import ROOT, run_forked, run_group
from kan import KAN, KANLinear
from layers.spline import plain_spline_linear
from model import GPT, GPTConfig
from surgery import adapters, lora
from surgery.adapters import Dropout, LoRALayer
from surgery.kanify import kanify
from surgery.lora import (
    LoRAConfig,
    add_lora,
    fit_linear,
    load_lora,
    lora_layers,
    lora_off,
    lora_param_groups,
    lora_report,
    merge_lora,
    remove_lora,
    save_lora,
    set_lora,
    unmerge_lora,
)

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

I, O, R = 6, 5, 3
LAYERS = {
    'Linear': lambda: nn.Linear(I, O),
    'Linear without bias': lambda: nn.Linear(I, O, bias=False),
    'Conv1D': lambda: Conv1D(O, I),
    'KANLinear': lambda: KANLinear(I, O, bias=True),
    'KANLinear without scaler': lambda: KANLinear(I, O, enable_standalone_scale_spline=False),
    'Embedding': lambda: nn.Embedding(I, O, padding_idx=0),
}
KINDS = {'Linear': ('lora', 'kan'), 'Conv1D': ('lora', 'kan'), 'KANLinear': ('kan', 'kan_base'), 'Embedding': ('lora',)}
CASES = [(kind, layer) for layer in LAYERS for kind in KINDS[layer.split()[0]]]
MERGING = [case for case in CASES if case[0] != 'kan']
OPTIONS = [
    dict(),
    dict(rs_lora=True),
    dict(use_dora=True),
    dict(lora_plus_ratio=8.0),
    dict(rs_lora=True, use_dora=True, lora_plus_ratio=8.0),
]
each_case = pytest.mark.parametrize('kind, layer', CASES)
each_merging_case = pytest.mark.parametrize('kind, layer', MERGING)
each_option = pytest.mark.parametrize('options', OPTIONS, ids=lambda options: ' '.join(options) or 'plain')


def make(layer, kind=None, dtype=torch.float32, **options):
    """A model of one layer, with an adapter, and inputs for it."""
    model = nn.ModuleDict({'layer': LAYERS[layer](), 'head': nn.Linear(O, 2)}).to(dtype)
    if 'Conv1D' in layer:
        nn.init.normal_(model.layer.weight)
    if kind:
        add_lora(model, LoRAConfig(kind=kind, rank=R, target_modules=('layer',), **{'dropout': 0.0, **options}))
    x = torch.randint(I, (4, 7)) if layer == 'Embedding' else torch.randn(4, 7, I, dtype=dtype)
    return model, x


def randomise(model):
    """Take an adapter away from its start, where it does nothing."""
    for layer in lora_layers(model).values():
        for p in layer.adapter.parameters():
            nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def train_steps(model, x, steps=3, lr=0.05):
    optimizer = torch.optim.SGD(lora_param_groups(model, lr, 0.0))
    for _ in range(steps):
        model.layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def base_state(model):
    return {
        name.replace('.base_layer', ''): p.clone() for name, p in model.state_dict().items() if '.adapters.' not in name
    }


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# the start, and what trains


@each_case
@each_option
def test_starts_as_the_base_trains_alone_and_leaves_the_base_as_it_was(kind, layer, options):
    model, x = make(layer)
    before, y = base_state(model), model.layer(x)
    add_lora(model, LoRAConfig(kind=kind, rank=R, target_modules='layer', dropout=0.0, **options))
    assert torch.equal(model.layer(x), y)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if '.adapters.' in name}
    start = {name: p.clone() for name, p in model.named_parameters()}
    train_steps(model, x)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == trainable
    assert not torch.allclose(model.layer(x), y, atol=1e-4)
    assert equal_states(base_state(model), before)
    with lora_off(model):
        assert torch.equal(model.layer(x), y)
    assert equal_states(remove_lora(model).state_dict(), before)


def test_parameters_are_found_by_type_and_not_by_name():
    model = nn.ModuleDict({'kan': nn.Linear(4, 4), 'lora_A': nn.Linear(4, 4), 'adapters': nn.Linear(4, 4)})
    add_lora(model, LoRAConfig(target_modules='adapters'))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        'adapters.adapters.default.lora_A.weight',
        'adapters.adapters.default.lora_B.weight',
    }


# what each kind computes, against its formula


def weight_of(layer):
    return layer.weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else layer.weight


@pytest.mark.parametrize('layer', [layer for kind, layer in CASES if kind == 'lora'])
@each_option
def test_lora_is_its_formula(layer, options):
    model, x = make(layer, 'lora', torch.float64, alpha=7.0, **options)
    randomise(model)
    base, adapter = model.layer.base_layer, model.layer.adapter
    s = 7.0 / (R**0.5 if options.get('rs_lora') else R)
    W = weight_of(base) + s * adapter.lora_B['weight'] @ adapter.lora_A['weight']
    if options.get('use_dora'):
        W = adapter.magnitude[:, None] * W / W.norm(dim=1, keepdim=True)
    rows = F.one_hot(x, I).double() if layer == 'Embedding' else x
    y = rows @ W.T + (0 if getattr(base, 'bias', None) is None else base.bias)
    assert torch.allclose(model.layer(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layer', [layer for kind, layer in CASES if kind == 'kan_base'])
@each_option
def test_kan_base_is_a_kan_layer_with_other_weights(layer, options):
    model, x = make(layer, 'kan_base', torch.float64, alpha=7.0, **options)
    randomise(model)
    base, adapter = model.layer.base_layer, model.layer.adapter
    s = 7.0 / (R**0.5 if options.get('rs_lora') else R)
    base_weight, spline_weight = (
        w.flatten(1) + s * adapter.lora_B[name] @ adapter.lora_A[name]
        for name, w in (('base_weight', base.base_weight), ('spline_weight', base.spline_weight))
    )
    if options.get('use_dora'):
        scale = adapter.magnitude / (base_weight.square().sum(1) + spline_weight.square().sum(1)).sqrt()
        base_weight, spline_weight = base_weight * scale[:, None], spline_weight * scale[:, None]
    splines = base.scale_splines(spline_weight.view_as(base.spline_weight))
    y = F.silu(x) @ base_weight.T + torch.einsum('...ik,oik->...o', base.b_splines(x), splines)
    assert torch.allclose(model.layer(x), y + (0 if base.bias is None else base.bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('layer', [layer for kind, layer in CASES if kind == 'kan'])
@pytest.mark.parametrize('squash', ['none', 'clamp', 'tanh', 'norm'])
@pytest.mark.parametrize('use_dora', [False, True])
def test_kan_is_two_kan_layers_beside_the_base(layer, squash, use_dora):
    model, x = make(layer, 'kan', torch.float64, alpha=7.0, squash=squash, grid_range=(-2.0, 3.0), use_dora=use_dora)
    randomise(model)
    base, adapter = model.layer.base_layer, model.layer.adapter
    formulas = {
        'none': lambda x: x,
        'clamp': lambda x: x.clamp(-2, 3),
        'tanh': lambda x: 0.5 + 2.5 * torch.tanh((x - 0.5) / 2.5),
        'norm': lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    }

    def phi(layer, x):
        rows = formulas[squash](x).reshape(-1, x.size(-1))
        return plain_spline_linear(rows, layer.packed_weight(), layer.grid, 1, nn.SiLU(), torch.float64).view(
            *x.shape[:-1], -1
        )

    y, bias = base(x), 0 if base.bias is None else base.bias
    if use_dora:
        weights = [
            p.flatten(1) for p in ((base.base_weight, base.spline_weight) if 'KAN' in layer else (weight_of(base),))
        ]
        y = bias + (y - bias) * adapter.magnitude / torch.cat(weights, 1).norm(dim=1)
    update = phi(adapter.bottleneck.phi_out, phi(adapter.bottleneck.phi_in, x))
    assert update.abs().max() > 0.1
    assert torch.allclose(model.layer(x), y + 7.0 / R * update, rtol=1e-10, atol=1e-10)


def as_kolmg(model, dora=False):
    """kolmg-lora's layer with the weights of our kan adapter."""
    base, adapter = model.layer.base_layer, model.layer.adapter
    theirs = KOLMGLoRALinear(
        copy.deepcopy(base), rank=R, alpha=adapter.config.alpha, grid_size=4, spline_order=adapter.config.spline_order
    )
    for name, phi in ('in', adapter.bottleneck.phi_in), ('out', adapter.bottleneck.phi_out):
        getattr(theirs.kan, f'{name}_base_weight').data = phi.base_weight.data
        getattr(theirs.kan, f'{name}_spline_weight').data = phi.spline_weight.data
    theirs.kan.double()
    return theirs


@pytest.mark.parametrize('spline_order', [1, 2, 3])
def test_kan_equals_kolmg_lora_inside_the_grid(spline_order):
    model, _ = make('Linear', 'kan', torch.float64, squash='none', spline_order=spline_order)
    randomise(model)
    model.layer.adapter.bottleneck.phi_in.base_weight.data.mul_(
        0.1
    )  # so that what lies between the two layers is on the grid, too
    model.layer.adapter.bottleneck.phi_in.spline_weight.data.mul_(0.1)
    x = torch.rand(50, I, dtype=torch.float64) * 2 - 1
    assert model.layer.adapter.bottleneck.phi_in(x).abs().max() < 1
    assert torch.allclose(model.layer(x), as_kolmg(model)(x), rtol=1e-6, atol=1e-6)  # its grid is rounded to float32


@pytest.mark.parametrize('squash, alive', [('none', False), ('clamp', True), ('tanh', True)])
def test_splines_of_inputs_far_outside_the_grid(squash, alive):
    model, _ = make('Linear', 'kan', torch.float64, squash=squash)
    randomise(model)
    x = torch.randn(20, I, dtype=torch.float64)
    x[:, 0] = 8.0
    phi_in = model.layer.adapter.bottleneck.phi_in
    model.layer(x).square().sum().backward()
    assert (phi_in.spline_weight.grad[:, 0].abs().sum() > 0) == alive and phi_in.spline_weight.grad[
        :, 1
    ].abs().sum() > 0


# convolutions

CONVOLUTIONS = {
    '1d': (lambda: nn.Conv1d(I, 4, 3, stride=2, padding=1), (2, I, 9)),
    '2d': (lambda: nn.Conv2d(I, 4, (3, 2), padding='same', dilation=2, bias=False), (2, I, 7, 8)),
    '3d': (lambda: nn.Conv3d(I, 4, 2, padding=1, padding_mode='circular'), (2, I, 4, 3, 5)),
    'of groups': (lambda: nn.Conv2d(I, 4, 3, groups=2), (2, I, 6, 5)),
    'of each channel': (lambda: nn.Conv1d(I, I, 3, groups=I), (2, I, 6)),
    'without a batch': (lambda: nn.Conv2d(I, 4, 3), (I, 6, 5)),
    'channels last': (lambda: nn.Conv2d(I, 4, 3).to(memory_format=torch.channels_last), (2, I, 6, 5)),
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
@each_option
def test_a_convolution_has_the_kernels_of_the_formula(name, options, tmp_path):
    make_layer, size = CONVOLUTIONS[name]
    model, x = nn.ModuleDict({'layer': make_layer().double()}), torch.randn(size, dtype=torch.float64)
    base, y = copy.deepcopy(model), model.layer(x)
    add_lora(model, LoRAConfig(rank=R, alpha=7.0, target_modules='layer', dropout=0.0, **options))
    assert torch.allclose(model.layer(x), y, rtol=1e-12)
    randomise(model)
    layer, adapter = model.layer.base_layer, model.layer.adapter
    s = 7.0 / (R**0.5 if options.get('rs_lora') else R)
    W = layer.weight.flatten(1) + s * adapter.lora_B['weight'] @ adapter.lora_A['weight']
    if options.get('use_dora'):
        W = adapter.magnitude[:, None] * W / W.norm(dim=1, keepdim=True)
    expected = layer._conv_forward(x, W.view_as(layer.weight), layer.bias)
    found = model.layer(x)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10) and not torch.allclose(found, y, atol=0.1)
    save_lora(model, tmp_path)
    again = load_lora(base, tmp_path)
    assert torch.equal(again.layer(x), found)
    plain = remove_lora(merge_lora(model))
    assert type(plain.layer) is type(layer) and torch.allclose(plain.layer(x), expected, rtol=1e-10, atol=1e-10)


def test_a_model_with_adapters_of_peft_is_refused():
    peft = pytest.importorskip('peft')
    theirs = peft.get_peft_model(tiny('GPT2', n_embd=16, n_layer=1, n_head=2, vocab_size=40), peft.LoraConfig(r=R))
    with pytest.raises(ValueError, match='has adapters of PEFT: merge_and_unload them first'):
        add_lora(theirs, LoRAConfig())
    add_lora(theirs.merge_and_unload(), LoRAConfig())


def test_a_convolution_is_that_of_peft():
    peft = pytest.importorskip('peft')
    ours = nn.Sequential(nn.Conv2d(I, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    theirs = peft.LoraConfig(r=R, lora_alpha=7, target_modules=['0', '2'])
    theirs = peft.inject_adapter_in_model(theirs, copy.deepcopy(ours))
    add_lora(ours, LoRAConfig(rank=R, alpha=7.0, target_modules=('0', '2'), dropout=0.0))
    randomise(ours)
    for mine, other in (ours[0], theirs[0]), (ours[2], theirs[2]):
        for name in 'lora_A', 'lora_B':
            w = getattr(other, name)['default'].weight
            w.data = getattr(mine.adapter, name)['weight'].data.view_as(w)
    x = torch.randn(2, I, 6, 5)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_a_network_of_convolutions_learns_what_another_adapter_gives():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    x, config = torch.randn(4, 1, 8, 8), LoRAConfig(rank=4, target_modules=('0', '3'), dropout=0.0)
    target = randomise(add_lora(copy.deepcopy(model), config))(x).detach()
    add_lora(model, config)
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-2, weight_decay=0.0))
    losses = []
    for _ in range(100):
        losses.append(F.mse_loss(model(x), target))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


# merging


@each_merging_case
@each_option
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(kind, layer, options, capsys):
    model, x = make(layer, kind, dropout=0.3, **options)
    randomise(model).eval()
    before, y = base_state(model), model.layer(x)
    with lora_off(model):
        base = model.layer(x)
    for _ in range(2):
        merge_lora(model)
        assert 'exact' in capsys.readouterr().out
        assert torch.allclose(model.layer(x), y, rtol=1e-5, atol=1e-5)
        with lora_off(model):
            assert torch.equal(model.layer(x), base)
        with pytest.raises(ValueError, match='is merged into the model: unmerge_lora'):
            merge_lora(model)
        assert torch.allclose(model.layer(x), y, rtol=1e-5, atol=1e-5)
        unmerge_lora(model)
        assert equal_states(base_state(model), before) and torch.equal(model.layer(x), y)
    with pytest.raises(ValueError, match='no adapter is merged'):
        unmerge_lora(model)
    plain = remove_lora(merge_lora(model))
    assert type(plain.layer) is type(LAYERS[layer]()) and torch.allclose(plain.layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'change',
    [
        lambda m: set_lora(m, None),
        lambda m: add_lora(m, LoRAConfig(target_modules='layer'), 'b'),
        lambda m: save_lora(m, 'x'),
    ],
)
def test_nothing_else_happens_to_a_merged_model(change):
    model, _ = make('Linear', 'lora')
    with pytest.raises(ValueError, match='unmerge_lora'):
        change(merge_lora(model))


@pytest.mark.parametrize('config', [dict(rank=4), 'kan', LoRAConfig, None])
def test_a_config_of_another_type_is_named(config):
    with pytest.raises(ValueError, match='expected a LoRAConfig, got'):
        add_lora(make('Linear')[0], config)


def test_kan_does_not_merge_and_nothing_is_half_merged():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'b': nn.Linear(4, 4)})
    add_lora(model, LoRAConfig(kind='kan', target_modules='a', modules_to_save='b'))
    before = base_state(model)
    with pytest.raises(ValueError, match=r'not linear .* fit_linear'):
        merge_lora(model)
    assert equal_states(base_state(model), before)


@pytest.mark.parametrize('kind, layer', [('lora', 'Linear'), ('kan_base', 'KANLinear'), ('lora', 'Embedding')])
def test_merges_below_a_forward_that_was_put_into_the_layer(kind, layer):
    """accelerate puts one there, bound to the layer, when a model is on several devices."""
    accelerate = pytest.importorskip('accelerate')
    model, x = make(layer)
    accelerate.dispatch_model(model, {'': 'cpu'}, main_device='cpu', force_hooks=True)
    assert any('forward' in vars(module) for module in model.modules())
    add_lora(model, LoRAConfig(kind=kind, rank=R, target_modules=('layer',)))
    randomise(model).eval()
    with torch.no_grad():
        with lora_off(model):
            base = model.layer(x)
        y = model.layer(x)
        merge_lora(model)
        torch.testing.assert_close(model.layer(x), y, rtol=1e-5, atol=1e-5)
        assert (y - base).abs().max() > 0.01
        unmerge_lora(model)
        assert torch.equal(model.layer(x), y)
        remove_lora(model)
        assert torch.equal(model.layer(x), base)


def test_a_function_in_place_of_forward_is_no_ground_to_merge_on():
    model, x = make('Linear')
    layer, forward = model.layer, model.layer.forward
    layer.forward = lambda x: 2 * forward(x)
    add_lora(model, LoRAConfig(rank=R, target_modules=('layer',)))
    y = randomise(model).eval().layer(x)
    with pytest.raises(ValueError, match='a Linear has a function as its forward'):
        merge_lora(model)
    assert torch.equal(model.layer(x), y)
    del layer.forward
    y = model.layer(x)
    merge_lora(model)
    torch.testing.assert_close(model.layer(x), y, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_block_that_stands_at_several_places_comes_back(tmp_path, capsys):
    block = nn.ModuleDict({'q_proj': nn.Linear(I, I), 'v_proj': nn.Linear(I, I)})
    model = nn.Module()
    model.h = nn.ModuleList([block] * 3)
    twin = copy.deepcopy(model)
    add_lora(model, LoRAConfig(rank=R))
    assert 'gets an adapter' not in capsys.readouterr().out
    randomise(model)
    save_lora(model, tmp_path)
    load_lora(twin, tmp_path)
    x = torch.randn(4, I)
    model.eval()
    twin.eval()
    assert torch.equal(twin.h[2].q_proj(x), model.h[0].q_proj(x))
    with torch.no_grad():
        model.h[1].q_proj.base_layer.weight[0, 0] += 1
    remove_lora(model)
    with pytest.raises(ValueError, match='belongs to another base'):
        load_lora(model, tmp_path)


def test_a_base_whose_state_is_not_of_tensors_alone(tmp_path):
    class Odd(nn.Linear):
        scale = 1.0

        def get_extra_state(self):
            return {'made by': object()}

        def set_extra_state(self, state):
            pass

        def _save_to_state_dict(self, destination, prefix, keep_vars):  # as the quantised layers of PyTorch
            super()._save_to_state_dict(destination, prefix, keep_vars)
            packed = torch.quantize_per_tensor(self.weight.detach(), self.scale, 0, torch.qint8), None
            destination.update({f'{prefix}packed': packed, f'{prefix}dtype': torch.qint8})

    model = nn.ModuleDict({'a': nn.Linear(I, I), 'b': Odd(I, I)})
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    add_lora(model, LoRAConfig(rank=R, target_modules=('a',)))
    save_lora(randomise(model), tmp_path)
    load_lora(twin, tmp_path)
    other.b.scale = 0.01
    with pytest.raises(ValueError, match='belongs to another base'):
        load_lora(other, tmp_path)


def test_merging_a_tied_layer_leaves_the_other_alone(capsys):
    model = make_gpt()
    add_lora(model, LoRAConfig(target_modules=('lm_head',)))
    assert 'lm_head gets an adapter, and not transformer.wte, which shares its weight' in capsys.readouterr().out
    wte = model.transformer.wte.weight
    before = wte.clone()
    randomise(model).eval()
    idx = torch.arange(8)[None]
    y = model(idx, idx)[0]
    merge_lora(model)
    assert torch.equal(model.transformer.wte.weight, before) and torch.allclose(model(idx, idx)[0], y, atol=1e-5)
    unmerge_lora(model)
    assert model.lm_head.base_layer.weight is model.transformer.wte.weight is wte


@pytest.mark.parametrize('target', ['lm_head', 'wte'])
def test_transformers_ties_a_layer_with_an_adapter_or_says_why_not(target):
    config = transformers.GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    model, idx = transformers.GPT2LMHeadModel(config).eval(), torch.arange(8)[None]
    randomise(add_lora(model, LoRAConfig(target_modules=(target,))))
    y = model(idx).logits
    model.tie_weights()
    assert torch.equal(model(idx).logits, y)
    if target == 'lm_head':
        merge_lora(model)
        with pytest.raises(ValueError, match='^the weight of a layer with an adapter cannot become another one'):
            model.tie_weights()
        assert torch.allclose(model(idx).logits, y, atol=1e-5)


def test_the_base_can_be_had_at_any_time():
    model, x = make('Linear')
    y = model.layer(x)
    for name in 'a', 'b':
        add_lora(model, LoRAConfig(rank=R, target_modules='layer'), name)
    randomise(model).eval()
    b = model.layer(x)
    with pytest.raises(KeyError), lora_off(model), lora_off(model):
        raise KeyError
    with lora_off(model):
        with lora_off(model):
            pass
        assert torch.equal(model.layer(x), y)
        merge_lora(model)
        assert torch.equal(model.layer(x), y)
    merged = model.layer(x)
    assert torch.allclose(merged, b, atol=1e-5)
    with lora_off(model):
        unmerge_lora(model)
        set_lora(model, 'a')
        assert torch.equal(model.layer(x), y)
    assert not torch.equal(model.layer(x), b)
    set_lora(model, 'b')
    assert torch.equal(model.layer(x), b)


def test_a_merged_model_moves_as_a_whole():
    model, x = make('Linear', 'lora')
    before = base_state(randomise(model))
    unmerge_lora(merge_lora(model).double())
    assert model.layer.base_layer.weight.dtype == torch.float64
    assert equal_states(base_state(model.float()), before)


# the linear map nearest to a kan adapter


@pytest.mark.parametrize('layer', ['Linear', 'Linear without bias'])
@pytest.mark.parametrize('shape', [(60,), (6, 10)])
@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: (x,), lambda x: dict(x=x), lambda x: UserDict(x=x)])
def test_fit_linear_is_the_least_squares_map_and_measures_what_is_lost(layer, shape, wrap):
    model, _ = make(layer, 'kan', torch.float64)
    randomise(model)
    model.forward = lambda x: model.layer(x)
    batches = [torch.randn(*shape, I, dtype=torch.float64) for _ in range(7)]
    x = torch.cat(batches).reshape(-1, I)
    d = (model.layer(x) - model.layer.base_layer(x)).detach().numpy()
    y = model.layer(x)
    errors = fit_linear(model, map(wrap, batches))
    held = np.arange(len(x)) // 60 == 4
    ones = np.concatenate([x.numpy(), np.ones((len(x), int(layer == 'Linear')))], 1)  # a column where there is a bias
    M = np.linalg.lstsq(ones[~held], d[~held], rcond=None)[0]
    left = d - ones @ M
    expected = np.linalg.norm(left[held]) / np.linalg.norm(d[held])
    assert errors.keys() == {'layer'} and 0.05 < errors['layer'] == pytest.approx(expected, rel=1e-6)
    assert np.allclose((model.layer(x) - y).detach().numpy(), -left, atol=1e-8) and model.training
    fitted = model.layer(x)
    assert torch.equal(merge_lora(model).layer(x), fitted)
    set_lora(unmerge_lora(model), 'default')
    assert torch.equal(model.layer(x), y)


def test_fit_linear_leaves_modes_and_other_adapters_as_they_are():
    model = nn.Sequential(nn.Linear(I, I), nn.BatchNorm1d(I).eval(), nn.Linear(I, O, bias=False))
    add_lora(model, LoRAConfig(kind='kan', target_modules='2', modules_to_save='0'))
    randomise(model)
    x = torch.randn(40, I)
    fit_linear(model, x.split(10))
    assert model.training and not model[1].training and torch.equal(model[0](x), model[0].adapters['default'](None, x))
    assert set(model[0].adapters) == {'default', 'linear'}


def test_fit_linear_refuses_what_it_cannot_fit():
    model, x = make('Linear', 'lora')
    with pytest.raises(ValueError, match='merge_lora'):
        fit_linear(model, [x])
    model, x = make('KANLinear', 'kan')
    with pytest.raises(ValueError, match='is a KAN layer'):
        fit_linear(model, [x])
    model, x = make('Linear', 'kan')
    model.forward = lambda x: model.layer(x)
    with pytest.raises(ValueError, match='at least two batches, .* got 1'):
        fit_linear(model, [x])
    model.forward = lambda x: x
    with pytest.raises(ValueError, match='layer is not called for the batches'):
        fit_linear(model, [x, x])


# several adapters, and modules that train in full


def test_several_adapters_take_turns():
    model, x = make('Linear')
    y = model.layer(x)
    outputs = {}
    for name, kind in ('a', 'lora'), ('b', 'kan'), ('c', 'lora'):
        add_lora(model, LoRAConfig(kind=kind, rank=R, target_modules='layer'), name)
        randomise(model).eval()
        outputs[name] = model.layer(x)
    for name in ('b', 'a', 'c'):
        set_lora(model, name)
        assert torch.equal(model.layer(x), outputs[name])
        assert all(p.requires_grad == (f'.{name}.' in key) for key, p in model.named_parameters())
    set_lora(model, None)
    assert torch.equal(model.layer(x), y)
    with pytest.raises(ValueError, match=r"no adapter named 'd', only a, b, c"):
        set_lora(model, 'd')
    with pytest.raises(ValueError, match="already has an adapter named 'a'"):
        add_lora(model, LoRAConfig(target_modules='layer'), 'a')
    for name in 'a.b', 'train':
        with pytest.raises(ValueError, match='Python name'):
            add_lora(model, LoRAConfig(target_modules='layer'), name)


def test_modules_to_save_train_in_a_copy():
    model, x = make('Linear')
    model.forward = lambda x: model.head(model.layer(x))
    y, before = model(x), base_state(model)
    add_lora(model, LoRAConfig(rank=R, target_modules='layer', modules_to_save='head', dropout=0.0))
    assert torch.equal(model(x), y)
    optimizer = torch.optim.SGD(lora_param_groups(model, 0.1, 0.0))
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.head.adapter.copy.weight, before['head.weight']) and equal_states(
        base_state(model), before
    )
    trained = model(x)
    with lora_off(model):
        assert torch.equal(model(x), y)
    assert torch.allclose(merge_lora(model)(x), trained, atol=1e-6)
    assert equal_states(base_state(unmerge_lora(model)), before)


def test_nothing_trains_while_an_adapter_is_merged():
    model, x = make('Linear')
    model.forward = lambda x: model.head(model.layer(x))
    add_lora(model, LoRAConfig(rank=R, target_modules='layer', modules_to_save='head'))
    trained = copy.deepcopy(model.state_dict())
    merge_lora(model)
    assert not model(x).requires_grad
    assert equal_states(unmerge_lora(model).state_dict(), trained)
    model(x).sum().backward()
    assert model.head.adapter.copy.weight.grad.abs().sum() > 0


def test_a_saved_module_that_cannot_be_copied_is_merged():
    """As one that holds a tensor with a gradient: the weight of spectral_norm after a pass."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4))), torch.randn(3, 4)
    add_lora(model, LoRAConfig(target_modules='0', modules_to_save='1', dropout=0.0))
    model(x).sum().backward()
    expected = model.eval()(x)
    torch.testing.assert_close(merge_lora(model)(x), expected)
    assert not any(p.requires_grad for p in model[1].acting.parameters())
    assert all(p.requires_grad for p in unmerge_lora(model)[1].acting.parameters())


def test_a_frozen_batch_norm_in_a_saved_module_stays_frozen():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'head': nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())})
    model.head[0].eval()
    add_lora(model, LoRAConfig(target_modules='a', modules_to_save='head'))
    for head in model.head.base_layer, model.head.adapter.copy:
        assert [head.training, head[0].training, head[1].training] == [True, False, True]
    assert model.a.adapter.training and model.head.adapter.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_modes_are_those_of_the_model():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'head': nn.Linear(4, 4)}).eval()
    add_lora(model, LoRAConfig(target_modules='a', modules_to_save='head'))
    assert not any(module.training for module in model.modules())


def test_a_target_within_a_saved_module_is_part_of_its_copy():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'head': nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))})
    add_lora(model, LoRAConfig(target_modules=('a', 'head'), modules_to_save='head'))
    assert list(lora_layers(model)) == ['a', 'head']


def test_a_module_within_a_saved_module_is_saved_once():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'head': nn.Sequential(nn.Linear(4, 4))})
    add_lora(model, LoRAConfig(target_modules='a', modules_to_save=('head.0', 'head')))
    assert list(lora_layers(model)) == ['a', 'head']


def test_a_module_with_adapters_inside_is_not_copied():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'head': nn.Sequential(nn.Linear(4, 4))})
    add_lora(model, LoRAConfig(target_modules='head'))
    with pytest.raises(ValueError, match='modules_to_save: 0 in Sequential.* has an adapter of its own'):
        add_lora(model, LoRAConfig(target_modules='a', modules_to_save='head'), 'other')


def test_dora_beside_a_row_of_zeros_stays_finite():
    for kind in 'lora', 'kan':
        model, x = make('Linear')
        model.layer.weight.data[1] = 0
        y = model.layer(x)
        add_lora(model, LoRAConfig(kind=kind, rank=R, target_modules='layer', use_dora=True, dropout=0.0))
        assert torch.equal(model.layer(x), y)
        train_steps(model, x)
        assert model.layer(x).isfinite().all()


# groups and report


def test_lora_plus_gives_the_second_factor_its_own_rate():
    for kind, slow, fast in ('lora', 'lora_A', 'lora_B'), ('kan', 'phi_in', 'phi_out'):
        model, _ = make('Linear', kind, lora_plus_ratio=16.0, use_dora=True)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = lora_param_groups(model, 1e-3, 0.1)
        rates = {
            names[id(p)]: (group['lr'], group['weight_decay'], group['lr_scale'])
            for group in groups
            for p in group['params']
        }
        assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, rate in rates.items():
            decay = 0.0 if 'magnitude' in name else 0.1
            assert rate == ((16e-3, decay, 16.0) if fast in name else (1e-3, decay, 1.0)), name
            assert fast in name or slow in name or 'magnitude' in name


EACH = 4 * (16 + 3 * 16)  # of an adapter of rank 4 on c_attn, 16 -> 48
KAN_EACH = 4 * 6 * (16 + 3 * 16)


@pytest.mark.parametrize(
    'settings, each',
    [
        (dict(), EACH),
        (dict(rs_lora=True), EACH),
        (dict(lora_plus_ratio=16.0), EACH),
        (dict(use_dora=True), EACH + 3 * 16),
        (dict(kind='kan'), KAN_EACH),
        (dict(kind='kan', use_dora=True), KAN_EACH + 3 * 16),
    ],
)
def test_report_counts_what_is_there(settings, each):
    model = make_gpt()
    add_lora(model, LoRAConfig(rank=4, **settings))
    first, second, last = lora_report(model).splitlines()
    total = sum(p.numel() for name, p in model.named_parameters() if '.adapters.' not in name)
    assert first.split() == ['transformer.h.0.attn.c_attn', settings.get('kind', 'lora'), f'{each:,}']
    assert second.split()[0] == 'transformer.h.1.attn.c_attn' and second.split()[1:] == first.split()[1:]
    share = f'{2 * each / total:.2%}'
    assert last == f'{2 * each:,} parameters train beside {total:,} of the base model: {share}'
    assert 2 * each == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_report_is_of_adapters_beside_their_base():
    model, _ = make('Linear', 'lora')
    merge_lora(model)
    with pytest.raises(ValueError, match='an adapter is merged into the model'):
        lora_report(model)


@pytest.mark.parametrize('method', ['update_grid', 'refine_grid'])
def test_splines_beneath_an_adapter_keep_their_grid(method):
    model, x = make('KANLinear', 'kan_base')
    with pytest.raises(AttributeError, match=f'{method} would change the splines beneath an adapter: remove_lora'):
        getattr(model.layer, method)
    before = randomise(model).layer(x)
    merge_lora(model)
    model.layer.base_layer.update_grid(x.flatten(0, 1))
    unmerge_lora(model)
    assert torch.equal(model.layer(x), before)


def test_layers_in_a_row_are_refined_all_or_none():
    model = nn.ModuleDict({'net': KAN([I, 4, O])})
    add_lora(model, LoRAConfig(kind='kan_base', target_modules=('net.layers.1',)))
    with pytest.raises(AttributeError, match='refine_grid would change the splines beneath an adapter'):
        model.net.refine_grid(8)
    assert model.net.layers[0].grid_size == 5
    add_lora(linear := nn.ModuleDict({'layer': nn.Linear(I, O)}), LoRAConfig(target_modules=('layer',)))
    assert not hasattr(linear.layer, 'update_grid')


def test_a_copy_of_one_of_two_tied_modules_is_told(capsys):
    add_lora(make_gpt(), LoRAConfig(modules_to_save=('lm_head',)))
    said = capsys.readouterr().out
    assert said == 'lm_head gets a copy that trains by itself, apart from transformer.wte, which shares its weight\n'


# which layers


def make_gpt(**options):
    return GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, **options))


def tiny(name, **sizes):
    """A transformers model with random weights."""
    import transformers

    return getattr(transformers, name + 'Model')(getattr(transformers, name + 'Config')(**sizes)).eval()


ENCODER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
MODELS = {
    'GPT': (make_gpt, ['attn.c_attn']),
    'KAN-GPT': (lambda: make_gpt(use_kan=True, kan_targets='attn,mlp'), ['attn.c_attn.layers.0']),
    'GPT2': (lambda: tiny('GPT2', n_embd=16, n_layer=2, n_head=2, vocab_size=40), ['attn.c_attn']),
    'BERT': (lambda: tiny('Bert', **ENCODER), ['attention.self.query', 'attention.self.value']),
    'RoBERTa': (lambda: tiny('Roberta', **ENCODER), ['attention.self.query', 'attention.self.value']),
    'DistilBERT': (
        lambda: tiny('DistilBert', dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40),
        ['attention.q_lin', 'attention.v_lin'],
    ),
    'Llama': (lambda: tiny('Llama', **ENCODER), ['self_attn.q_proj', 'self_attn.v_proj']),
    'GPT-NeoX': (lambda: tiny('GPTNeoX', **ENCODER), ['attention.query_key_value']),
    'Falcon': (lambda: tiny('Falcon', **ENCODER), ['self_attention.query_key_value']),
    'Phi-3': (lambda: tiny('Phi3', **ENCODER, pad_token_id=0), ['self_attn.qkv_proj']),
    'MPT': (lambda: tiny('Mpt', d_model=16, n_layers=2, n_heads=2, vocab_size=40), ['attn.Wqkv']),
    'T5': (
        lambda: tiny('T5', d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40),
        ['SelfAttention.q', 'SelfAttention.v'],
    ),
    'ViT': (
        lambda: tiny('ViT', **{**ENCODER, 'image_size': 16, 'patch_size': 8, 'vocab_size': None}),
        ['attention.q_proj', 'attention.v_proj'],
    ),
}


@pytest.mark.parametrize('name', MODELS)
def test_attention_projections_are_found_by_default(name):
    make_model, suffixes = MODELS[name]
    kind = 'kan_base' if name == 'KAN-GPT' else 'lora'
    model = add_lora(make_model(), LoRAConfig(kind=kind, rank=2))
    assert len(lora_layers(model)) == 2 * len(suffixes)
    assert all(any(path.endswith(suffix) for suffix in suffixes) for path in lora_layers(model))


@pytest.mark.parametrize(
    'target, number',
    [
        ('c_attn', 2),
        ('attn', 4),
        ('h.0', 4),
        ('transformer.h.1.mlp.c_fc', 1),
        ('attn.c_proj', 2),
        ('transformer', 8),
        ('wpe', 1),
    ],
)
def test_targets_name_layers_and_modules(target, number):
    layers = lora_layers(add_lora(make_gpt(), LoRAConfig(target_modules=(target,))))
    assert len(layers) == number and 'lm_head' not in layers


BAD_TARGETS = [
    (
        make_gpt,
        dict(target_modules=('c_atn',)),
        r"by the name 'c_atn'; there is .*c_attn \(2\), c_proj \(4\), c_fc \(2\)",
    ),
    (make_gpt, dict(target_modules=('c_attn', 'attn_')), "by the name 'attn_'"),
    (
        make_gpt,
        dict(kind='kan', target_modules=('wpe',)),
        "transformer.wpe is a Embedding: its adapters are of kind 'lora', not 'kan'",
    ),
    (
        lambda: tiny('GPT2', n_embd=16, n_layer=1, n_head=2, vocab_size=40),
        dict(kind='kan', target_modules=('wpe',)),
        "of kind 'lora'",
    ),
    (
        lambda: tiny('Bert', **ENCODER),
        dict(target_modules=('embeddings',)),
        'have to be named themselves: word_embeddings',
    ),
    (make_gpt, dict(kind='kan_base'), "c_attn is a Linear: its adapters are of kind 'lora' or 'kan'"),
    (
        make_gpt,
        dict(modules_to_save=('classifier',)),
        "no module 'classifier'; at the top there are transformer, lm_head",
    ),
    (lambda: nn.Sequential(nn.Linear(4, 4)), dict(), r'set target_modules; there is 0 \(1\)'),
    (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 1), nn.Linear(1, 1)),
        dict(target_modules=('0',)),
        r"'0' is a ConvTranspose2d, which cannot be replaced or adapted; there is 1 \(1\)",
    ),
    (
        lambda: nn.Sequential(weight_norm(nn.Conv1d(1, 1, 1))),
        dict(target_modules=('0',)),
        "'0' is a ParametrizedConv1d, which cannot be replaced or adapted; there is none",
    ),
    (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1)),
        dict(kind='kan', target_modules=('0',)),
        "0 is a Conv2d: its adapters are of kind 'lora', not 'kan'",
    ),
    (
        lambda: nn.TransformerEncoderLayer(8, 2),
        dict(target_modules=('out_proj',)),
        'out_proj is read by the module around it',
    ),
    (
        lambda: nn.TransformerEncoderLayer(8, 2),
        dict(target_modules=('linear1',)),
        'linear1 is read by the module around it',
    ),
]


def test_layers_that_are_read_get_no_adapter(tmp_path, capsys):
    """But may be trained as copies, which are read in their turn."""

    def mamba():
        torch.manual_seed(0)
        return tiny('Mamba', hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=20)

    idx, model = torch.arange(6)[None], mamba()
    with pytest.raises(ValueError, match=r'layers.0.mixer.dt_proj is read by the module around it'):
        add_lora(model, LoRAConfig(target_modules=('in_proj', 'dt_proj')))
    add_lora(model, LoRAConfig(target_modules=('mixer',), modules_to_save=('dt_proj', 'conv1d')))
    assert 'left out: conv1d (1), x_proj (1), dt_proj (1), out_proj (1), each of which is' in capsys.readouterr().out
    assert sorted(path.rpartition('.')[2] for path in lora_layers(model)) == ['conv1d', 'dt_proj', 'in_proj']
    before = model(idx)[0]
    before.sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                assert p.grad is not None
                p += 0.1 * torch.randn_like(p)
    save_lora(model, tmp_path)
    after = model(idx)[0]
    assert not torch.allclose(after, before) and torch.equal(load_lora(mamba(), tmp_path).eval()(idx)[0], after)


def test_a_convolution_that_a_kernel_reads_gets_no_adapter(capsys):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=20)
    model = tiny('Lfm2', **sizes, intermediate_size=16, layer_types=['conv'])
    with pytest.raises(ValueError, match='layers.0.conv.conv is read by the module around it'):
        add_lora(model, LoRAConfig(target_modules=('conv.conv',)))
    add_lora(model, LoRAConfig(target_modules=('layers.0',)))
    assert 'left out: conv (1), each of which is read' in capsys.readouterr().out
    assert 'layers.0.conv.in_proj' in lora_layers(model)


def test_other_depthwise_convolutions_get_one():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1d = nn.Conv1d(4, 4, 3, groups=4)

        def forward(self, x):
            return self.conv1d(x)

    model = add_lora(nn.Sequential(Mixer()), LoRAConfig(target_modules=('conv1d',)))
    assert list(lora_layers(model)) == ['0.conv1d']


@pytest.mark.parametrize('make_model, config, message', BAD_TARGETS)
def test_a_target_that_matches_nothing_says_what_is_there(make_model, config, message):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**config))
    assert equal_states(model.state_dict(), before) and all(p.requires_grad for p in model.parameters())


BAD_CONFIGS = [
    (dict(rank=0), 'rank must be at least 1, got 0'),
    (dict(rank=2.5), 'rank must be of type int, got 2.5'),
    (dict(alpha=float('nan')), 'alpha must be a positive number, got nan'),
    (dict(alpha=0), 'alpha must be a positive number'),
    (dict(dropout=1.0), 'dropout must be at least 0 and less than 1'),
    (dict(lora_plus_ratio=-1), 'lora_plus_ratio must be a positive number'),
    (dict(kind='kan-base'), "kind must be one of lora, kan, kan_base, got 'kan-base'"),
    (dict(squash='sigmoid'), 'squash must be one of none, clamp, tanh, norm'),
    (dict(rs_lora=1), 'rs_lora must be of type bool, got 1'),
    (dict(target_modules=5), 'target_modules must be a list of names, got 5'),
    (dict(grid_range=(1, -1)), 'low < high'),
    (dict(grid_range=('a', 'b')), 'grid_range must be two numbers'),
    (dict(grid_range=(0, 1, 2)), 'grid_range must be two numbers'),
    (dict(squash='norm', rank=1), 'rank must be at least 2'),
    (dict(grid_size=0), 'grid_size must be at least 1'),
    (dict(kan_scale_noise=-0.1), 'kan_scale_noise must be'),
]


@pytest.mark.parametrize('config, message', BAD_CONFIGS)
def test_a_config_that_cannot_be_says_so(config, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**config)


def test_a_config_draws_nothing():
    before = torch.get_rng_state()
    LoRAConfig(grid_size=9)
    assert torch.equal(torch.get_rng_state(), before)


class ScaledEmbedding(nn.Embedding):
    def forward(self, x):
        return 8 * super().forward(x)


OTHERS = [ScaledEmbedding(I, O), nn.utils.parametrizations.weight_norm(nn.Linear(I, O)), nn.LazyConv1d(O, 1)]
OTHERS += [nn.utils.weight_norm(layer) for layer in (nn.Linear(I, O), nn.Conv1d(I, O, 1))]
OTHERS.append(nn.Embedding(I, O, max_norm=1.0))  # whose forward pass changes its weight


@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated')
@pytest.mark.parametrize('layer', OTHERS, ids=lambda layer: type(layer).__name__)
def test_layers_that_compute_something_else_are_not_adapted(layer):
    with pytest.raises(ValueError, match="'layer' is a .*, which cannot be replaced or adapted; there is none"):
        add_lora(nn.ModuleDict({'layer': layer}), LoRAConfig(target_modules='layer'))


def test_a_module_at_two_places_is_left_alone():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({'a': nn.ModuleDict({'f': shared}), 'b': nn.ModuleDict({'f': shared, 'g': nn.Linear(4, 4)})})
    assert list(lora_layers(add_lora(model, LoRAConfig(target_modules=('a', 'b'))))) == ['b.g']


def test_defaults_are_those_of_kolmg_lora():
    theirs = inspect.signature(KOLMGLoRAConfig).parameters
    shared = theirs.keys() & vars(LoRAConfig()).keys() - {'target_modules'}
    assert theirs.keys() - shared == {'target_modules', 'train_ffn'}
    assert all(getattr(LoRAConfig(), name) == theirs[name].default for name in shared)


# files


def make_saved(folder, layer='Linear', kind='kan', **options):
    torch.manual_seed(1)
    model, x = make(layer, kind, modules_to_save=('head',), **options)
    randomise(model).eval()
    save_lora(model, folder)
    return model, x


def make_base(layer='Linear', kind=None, **options):
    torch.manual_seed(1)
    return make(layer, kind, **options)[0].eval()


@each_case
def test_what_is_saved_comes_back(kind, layer, tmp_path):
    model, x = make_saved(tmp_path, layer, kind, use_dora=True)
    fresh = load_lora(make_base(layer), tmp_path, 'mine')
    assert torch.equal(fresh.layer(x), model.layer(x))
    assert torch.equal(fresh.head(model.layer(x)), model.head(model.layer(x)))
    assert fresh.layer.adapter.config == model.layer.adapter.config
    assert all(p.requires_grad == ('.adapters.' in name) for name, p in fresh.named_parameters())
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['config']['kind'] == kind


def test_weights_in_another_order_are_saved(tmp_path):
    """As those of a convolutional network in channels_last."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 12, 3)), nn.Conv2d(12, 4, 3)).to(memory_format=torch.channels_last)
    fresh, x = copy.deepcopy(model), torch.randn(2, 8, 7, 7)
    add_lora(model, LoRAConfig(target_modules=('0',), modules_to_save=('1',), dropout=0.0))
    randomise(model)
    save_lora(model, str(tmp_path))
    torch.testing.assert_close(load_lora(fresh, str(tmp_path))(x), model(x))


def test_another_process_gets_the_same_outputs(tmp_path):
    model, x = make_saved(tmp_path)
    torch.save(dict(x=x, state=base_state(model)), tmp_path / 'base.pt')
    source = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT)!r})
from surgery.lora import load_lora
from torch import nn
folder = sys.argv[1]
base = torch.load(folder + '/base.pt')
model = nn.ModuleDict({{'layer': nn.Linear({I}, {O}), 'head': nn.Linear({O}, 2)}}).eval()
model.load_state_dict(base['state'])
torch.save(load_lora(model, folder).layer(base['x']), folder + '/y.pt')
"""
    (tmp_path / 'other.py').write_text(source)
    done = run_forked(tmp_path, tmp_path / 'other.py', tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / 'y.pt'), model.layer(x))


def rewrite(folder, change):
    """Change the tensors and the header of a saved adapter."""
    path = folder / 'adapter_model.safetensors'
    tensors, record = load_file(path), json.loads((folder / 'adapter_config.json').read_text())
    change(tensors, record)
    save_file(tensors, path, {'adapter': json.dumps(record)})


CHANGES = [
    (lambda t, r: t.pop('layer.magnitude'), r"missing \['layer.magnitude'\], not expected nothing"),
    (lambda t, r: t.update(other=torch.zeros(1)), r"missing nothing, not expected \['other'\]"),
    (lambda t, r: t.update({'layer.magnitude': torch.zeros(O + 1)}), r'layer.magnitude is \(6,\), expected \(5,\)'),
    (lambda t, r: r['config'].update(rank=R + 1), r'is \(3, 6\), expected \(4, 6\)'),
    (lambda t, r: r['config'].update(rank='3'), 'rank must be of type int'),
    (lambda t, r: r['config'].update(surprise=1), 'surprise'),
    (
        lambda t, r: r['layers'].update(there=['kan', 'Linear(weight 5x6, bias 5)']),
        'there was Linear.*; in this model it is not there',
    ),
    (lambda t, r: r['layers'].update(layer=['kan_base', 'Linear(weight 5x6, bias 5)']), "adapter of kind 'kan_base'"),
    (lambda t, r: r['base'].update(sha256='0' * 64), 'belongs to another base'),
    (lambda t, r: r.pop('layers'), 'is not what save_lora writes'),
    (lambda t, r: r.update(layers=['layer']), 'is not what save_lora writes'),
]


@pytest.mark.parametrize('change, message', CHANGES)
def test_a_file_that_does_not_fit_changes_nothing(change, message, tmp_path):
    make_saved(tmp_path, use_dora=True)
    rewrite(tmp_path, change)
    model = make_base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_lora(model, tmp_path)
    assert equal_states(model.state_dict(), before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), 'cut off or damaged'),
        (lambda path: path.write_bytes(b'\xff' * 200), 'cut off or damaged'),
        (lambda path: path.write_bytes(b''), 'cut off or damaged'),
        (lambda path: save_file({'a': torch.zeros(1)}, path), 'no header of save_lora'),
        (lambda path: path.unlink(), 'no adapter in'),
    ],
)
def test_a_damaged_file_is_one_clear_line(damage, message, tmp_path):
    make_saved(tmp_path)
    damage(tmp_path / 'adapter_model.safetensors')
    with pytest.raises(ValueError, match=message) as error:
        load_lora(make_base(), tmp_path)
    assert '\n' not in str(error.value)


def test_an_adapter_of_another_model_is_refused_unless_asked(tmp_path):
    saved, x = make_saved(tmp_path)
    model = make_base()
    with torch.no_grad():
        model.layer.weight[0, 0] += 1e-6
    with pytest.raises(
        ValueError, match=r'another base: ModuleDict of 35 numbers, sha256 \w{12}; this is ModuleDict of 35'
    ):
        load_lora(model, tmp_path)
    assert torch.allclose(load_lora(model, tmp_path, check_base=False).layer(x), saved.layer(x), atol=1e-4)
    with pytest.raises(
        ValueError, match=r'layer was Linear\(weight 5x6, bias 5\).*; in this model it is Linear\(weight 5x6\)'
    ):
        load_lora(make_base('Linear without bias'), tmp_path, check_base=False)


def test_a_saved_module_may_start_from_other_numbers(tmp_path):
    """A head is new, and random, in every process."""
    saved, x = make_saved(tmp_path)
    model = make_base()
    nn.init.normal_(model.head.weight)
    assert torch.equal(load_lora(model, tmp_path).head(saved.layer(x)), saved.head(saved.layer(x)))


def test_an_adapter_goes_onto_its_base_in_bfloat16_if_asked(tmp_path):
    saved, x = make_saved(tmp_path)
    model = load_lora(make_base().bfloat16(), tmp_path, check_base=False)
    assert model.head.adapter.copy.weight.dtype == torch.bfloat16
    assert torch.allclose(model.layer(x.bfloat16()).float(), saved.layer(x), rtol=0.05, atol=0.05)


def test_another_grid_is_another_base(tmp_path):
    make_saved(tmp_path, 'KANLinear', 'kan_base')
    model = make_base('KANLinear')
    model.layer.grid.mul_(3)
    with pytest.raises(ValueError, match='another base'):
        load_lora(model, tmp_path)


def test_a_saved_module_may_share_tensors_and_have_buffers(tmp_path):
    model = nn.ModuleDict(
        {'layer': nn.Linear(I, O), 'head': nn.Sequential(nn.Linear(O, O), nn.BatchNorm1d(O), nn.Linear(O, O))}
    )
    model.head[2].weight = model.head[0].weight
    before = copy.deepcopy(model)
    add_lora(model, LoRAConfig(target_modules='layer', modules_to_save='head'))
    randomise(model)
    x = torch.randn(20, O)
    model.head(x)  # statistics of the copy move
    model.eval()
    y = model.head(x)
    save_lora(model, tmp_path)
    assert torch.equal(load_lora(before.eval(), tmp_path).head(x), y)
    assert torch.equal(merge_lora(model).head(x), y)
    assert not torch.equal(unmerge_lora(model).head.base_layer(x), y)


@pytest.mark.parametrize('layer', ['Linear', 'KANLinear'])
def test_lengths_of_frozen_rows_are_measured_once_and_saved(layer, tmp_path, monkeypatch):
    saved, x = make_saved(tmp_path, layer, use_dora=True)
    y, lengths = saved.layer(x), adapters.row_norms(saved.layer.base_layer)
    assert torch.equal(load_file(tmp_path / 'adapter_model.safetensors')['layer.lengths'], lengths)
    other = load_lora(make_base(layer).bfloat16(), tmp_path, check_base=False)
    assert torch.equal(other.layer.adapter.lengths, lengths)
    assert not torch.equal(adapters.row_norms(other.layer.base_layer), lengths)
    monkeypatch.setattr(adapters, 'row_norms', lambda *arguments: pytest.fail('the rows were measured again'))
    assert torch.equal(saved.layer(x), y)
    saved.train().layer(x).sum().backward()


@pytest.mark.parametrize('layer', ['Linear', 'KANLinear'])
def test_a_file_without_lengths_has_those_of_the_base(layer, tmp_path):
    saved, x = make_saved(tmp_path, layer, use_dora=True)
    rewrite(tmp_path, lambda tensors, record: tensors.pop('layer.lengths'))
    model = load_lora(make_base(layer), tmp_path)
    assert torch.equal(model.layer.adapter.lengths, adapters.row_norms(model.layer.base_layer))
    assert torch.equal(model.layer(x), saved.layer(x))


def test_the_base_may_list_its_modules_in_another_order(tmp_path):
    saved, x = make('Linear', 'kan')
    base = remove_lora(copy.deepcopy(saved))
    save_lora(randomise(saved).eval(), tmp_path)
    reordered = nn.ModuleDict({'head': base.head, 'layer': base.layer})
    assert list(reordered.state_dict()) != list(base.state_dict())
    assert torch.equal(load_lora(reordered, tmp_path).layer(x), saved.layer(x))


def test_a_crash_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    lora.write_whole(str(path), b'old')
    lora.write_whole(str(path), b'older')
    monkeypatch.setattr(os, 'replace', lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.write_whole(str(path), b'new')
    assert path.read_bytes() == b'older' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))])
def test_an_adapter_is_saved_and_loaded_through_what_is_around_a_model(wrap, tmp_path):
    model, x = make('Linear', 'lora')
    base = base_state(model)
    train_steps(model, x, lr=0.5)
    save_lora(wrap(model), tmp_path)
    plain, _ = make('Linear')
    plain.load_state_dict(base)
    wrapped = wrap(plain)
    assert load_lora(wrapped, tmp_path) is wrapped
    assert torch.equal(plain.layer(x), model.layer(x))


def test_an_offloaded_base_is_refused(tmp_path):
    make_saved(tmp_path)
    config = LoRAConfig(target_modules=('layer',))
    for put in (
        lambda model: add_lora(model, config),
        lambda model: load_lora(model, tmp_path, check_base=False),
        lambda model: kanify(model, 'layer'),
        lambda model: kanify(model, 'layer', kind='channel', example=torch.ones(1, I)),
    ):
        model = make_base()
        model.head.to('meta')
        with pytest.raises(ValueError, match='^head.weight is on the meta device'):
            put(model)
        assert type(model.layer) is nn.Linear


@each_case
@pytest.mark.parametrize('use_dora', [False, True])
def test_adapters_of_layers_that_are_never_called_are_named(kind, layer, use_dora, tmp_path, capsys):
    model = nn.ModuleDict({'layer': LAYERS[layer](), 'unused': LAYERS[layer](), 'head': nn.Linear(O, 2)})
    config = LoRAConfig(kind=kind, target_modules=('layer', 'unused'), modules_to_save=('head',), use_dora=use_dora)
    add_lora(model, config)
    capsys.readouterr()
    save_lora(model, tmp_path)
    assert '2 of 3 adapters add nothing, such as that of layer: no step was taken' in capsys.readouterr().out
    train_steps(model, make(layer)[1], steps=1)
    save_lora(model, tmp_path)
    assert '1 of 3 adapters add nothing, such as that of unused' in capsys.readouterr().out


AROUND = {'compiled': lambda module: torch.compile(module, backend='eager'), 'checkpointed': checkpoint_wrapper}
each_around = pytest.mark.parametrize('around', AROUND.values(), ids=AROUND)


def block_model(around=lambda module: module):
    torch.manual_seed(3)
    model = nn.ModuleDict({'block': nn.Sequential(nn.Linear(I, O), nn.Linear(O, I)), 'head': nn.Linear(I, 2)})
    return nn.ModuleDict({name: around(module) for name, module in model.items()}), torch.randn(4, I)


def through_block(model, x):
    return model.head(model.block(x))


@each_around
@pytest.mark.parametrize('options', [dict(), dict(kind='kan', use_dora=True)])
def test_names_in_a_file_are_those_of_the_plain_model(around, options, tmp_path):
    config = LoRAConfig(target_modules=('block.0',), modules_to_save=('head',), dropout=0.0, **options)
    (wrapped, x), (plain, _) = block_model(around), block_model()
    randomise(add_lora(wrapped, config))
    save_lora(wrapped, tmp_path / 'wrapped')
    assert torch.allclose(through_block(load_lora(plain, tmp_path / 'wrapped'), x), through_block(wrapped, x))
    save_lora(plain, tmp_path / 'plain')
    files = [(tmp_path / name / 'adapter_config.json').read_text() for name in ('wrapped', 'plain')]
    assert files[0] == files[1]
    again = load_lora(block_model(around)[0], tmp_path / 'plain')
    assert torch.allclose(through_block(again, x), through_block(plain, x))
    with pytest.raises(ValueError, match='already has an adapter'):
        add_lora(again, config)


@each_around
def test_a_model_is_wrapped_after_its_adapters(around, tmp_path):
    model, x = block_model()
    randomise(add_lora(model, LoRAConfig(target_modules=('block',), modules_to_save=('head',), dropout=0.0)))
    y = through_block(model, x)
    model.block[0], model['head'] = around(model.block[0]), around(model.head)
    save_lora(model, tmp_path)
    assert torch.allclose(through_block(load_lora(block_model()[0], tmp_path), x), y)
    add_lora(model, LoRAConfig(target_modules=('block.0',)), 'second')
    assert [*model.block[0].adapters] == ['default', 'second']


def test_a_layer_that_is_compiled_by_itself_is_refused(tmp_path):
    """It goes on calling what it was given."""
    saved, config = block_model()[0], LoRAConfig(target_modules=('block',))
    save_lora(add_lora(saved, config), tmp_path)
    for put in lambda model: add_lora(model, config), lambda model: load_lora(model, tmp_path), kanify:
        model, _ = block_model()
        model.block[0] = torch.compile(model.block[0], backend='eager')
        with pytest.raises(ValueError, match='^block.0 is compiled by itself'):
            put(model, ('block',)) if put is kanify else put(model)
        assert not any(isinstance(module, (LoRALayer, KANLinear)) for module in model.modules())


def moving_model():
    """A base whose forward pass in training changes running statistics and the vectors of a spectral norm."""
    torch.manual_seed(3)
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(O, O))
    old = nn.utils.spectral_norm(nn.Linear(O, O))
    return nn.ModuleDict({'layer': nn.Linear(I, O), 'b': nn.BatchNorm1d(O), 'norm': norm, 'old': old})


def through(model, x):
    return model.old(model.norm(model.b(model.layer(x))))


def test_statistics_of_the_base_that_move_come_back_with_the_adapter(tmp_path):
    model, x = moving_model(), 3 + torch.randn(20, I)
    add_lora(model, LoRAConfig(target_modules='layer', dropout=0.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        through(model.train(), x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_lora(model.eval(), tmp_path)
    fresh = moving_model()
    assert not torch.allclose(fresh.b.running_mean, model.b.running_mean)
    load_lora(fresh, tmp_path)
    assert torch.equal(through(fresh.eval(), x), through(model, x))
    for name, buffer in lora.moving_buffers(model).items():
        assert torch.equal(lora.moving_buffers(fresh)[name], buffer), name
    assert len(lora.moving_buffers(model)) == 3 + 2 + 2


def test_statistics_of_another_base_are_refused(tmp_path):
    model = moving_model()
    add_lora(model, LoRAConfig(target_modules='layer'))
    save_lora(model, tmp_path)
    other = moving_model()
    other.b = nn.BatchNorm1d(O, track_running_stats=False)
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(ValueError, match="the running statistics 'b.num_batches_tracked' do not fit"):
        load_lora(other, tmp_path, check_base=False)
    assert equal_states(other.state_dict(), before)


def test_what_is_asked_of_a_layer_is_answered_by_what_acts():
    model, _ = make('Linear', 'lora')
    assert model.layer.in_features == I and model.layer.out_features == O
    with pytest.raises(AttributeError, match='no_such_thing'):
        _ = model.layer.no_such_thing
    twin = copy.deepcopy(model)
    assert twin.layer.in_features == I


def test_what_would_leave_an_adapter_out_is_refused():
    model = KAN([4, 5, 3])
    plain = model.regularization_loss()
    add_lora(model, LoRAConfig(kind='kan_base', rank=2, target_modules='layers', dropout=0.0))
    with pytest.raises(AttributeError, match='regularization_loss would leave the adapter out: merge it first'):
        model.regularization_loss()
    with lora_off(model):
        assert model.regularization_loss() == plain
    randomise(model)
    merge_lora(model)
    assert model.regularization_loss() > plain
    with lora_off(model), pytest.raises(AttributeError, match='update_grid would change the splines beneath'):
        model.layers[0].update_grid(torch.randn(9, 4))


def test_a_merged_model_is_the_base_without_its_adapter_and_stays_frozen():
    model, _ = make('Linear', 'lora', modules_to_save='head')
    before = model.layer.weight.clone()
    randomise(model)
    merge_lora(model)
    assert not torch.equal(model.layer.weight, before)
    with lora_off(model):
        assert torch.equal(model.layer.weight, before)
    remove_lora(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_no_adapter_reaches_is_said(capsys):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.weight = nn.Linear(I, O), nn.Parameter(torch.zeros(3, O, I))

    model = nn.ModuleDict({'kans': nn.ModuleList([KANLinear(I, O)]), 'mlp': Experts()})
    add_lora(model, LoRAConfig(target_modules=('kans', 'mlp'), kind='lora'))
    said = capsys.readouterr().out
    assert "'kans' gets no adapter: none of its layers takes kind 'lora'" in said
    assert 'no adapter reaches 1 tensors, such as mlp.weight' in said


def test_what_trains_in_full_is_not_said_to_be_left_out(capsys):
    model = nn.ModuleDict({'block': nn.ModuleDict({'layer': nn.Linear(I, O), 'norm': nn.BatchNorm1d(O)})})
    model.block.norm.table = nn.Parameter(torch.zeros(2, 2))
    add_lora(model, LoRAConfig(target_modules='block', modules_to_save='norm'))
    assert 'no adapter' not in capsys.readouterr().out


def test_the_copy_answers_for_a_module_that_trains_in_full():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj = nn.Linear(O, 2)

        def forward(self, x):
            return self.out_proj(x)

    model = nn.ModuleDict({'layer': nn.Linear(I, O), 'head': Head()})
    add_lora(model, LoRAConfig(target_modules='layer', modules_to_save='head'))
    assert model.head.out_proj is model.head.adapter.copy.out_proj
    with lora_off(model):
        assert model.head.out_proj is model.head.base_layer.out_proj


@pytest.mark.parametrize('group', [nn.ModuleList([nn.Linear(O, 2)]), nn.ModuleDict({'a': nn.Linear(O, 2)})])
def test_a_group_of_modules_cannot_train_in_full(group):
    model = nn.ModuleDict({'layer': nn.Linear(I, O), 'heads': group})
    with pytest.raises(ValueError, match=r'modules_to_save: heads is a Module(List|Dict), which is never called'):
        add_lora(model, LoRAConfig(target_modules='layer', modules_to_save='heads'))
    assert not lora_layers(model)


def test_what_trains_beside_the_adapter_is_not_lost(tmp_path):
    model, _ = make('Linear', 'lora')
    model.head.requires_grad_(True)
    with pytest.raises(ValueError, match='head.weight trains but is not part of the adapter .* modules_to_save'):
        save_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match='no active adapter'):
        save_lora(make('Linear')[0], tmp_path)


ALONE = """
import sys
import torch
from torch import nn
from surgery.lora import *
from surgery.kanify import kanify
from kan import KANLinear
model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 6)
state, y = model.state_dict(), model(x)
config = LoRAConfig(kind='kan', rank=2, target_modules='0', dropout=0.0)
nn.init.normal_(add_lora(model, config)[0].adapter.bottleneck.phi_out.base_weight)
save_lora(model, 'adapter')
other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
other.load_state_dict(state)
assert torch.allclose(kanify(other, ('0', '2'))(x), y, atol=1e-5) and isinstance(other[0], KANLinear)
other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
other.load_state_dict(state)
assert torch.equal(load_lora(other, 'adapter')(x), model(x)) and not torch.equal(model(x), y)
assert not {'run', 'data', 'tasks', 'model', 'configurator'} & sys.modules.keys()
"""


def test_layers_and_surgery_work_in_a_folder_of_their_own(tmp_path):
    shutil.copy(ROOT / 'kan.py', tmp_path)
    for room in 'layers', 'surgery':
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'alone.py').write_text(ALONE)
    done = run_forked(tmp_path, tmp_path / 'alone.py')
    assert done.returncode == 0, done.stderr


# precision, compilers, processes


@each_case
@pytest.mark.parametrize('use_dora', [False, True])
def test_a_base_in_bfloat16_has_adapters_in_float32(kind, layer, use_dora, tmp_path):
    model, x = make(layer, kind, torch.bfloat16, use_dora=use_dora)
    y = model.layer(x)
    assert y.dtype == torch.bfloat16
    with lora_off(model):
        assert torch.equal(model.layer(x), y)
    assert {p.dtype for p in model.layer.adapter.parameters()} == {torch.float32}
    before = base_state(model)
    train_steps(model, x, lr=0.5)
    assert equal_states(base_state(model), before) and not torch.equal(model.layer(x), y)
    if kind != 'kan':
        y = model.layer(x)
        assert (merge_lora(model).layer(x) - y).norm() < 0.05 * y.norm()
        unmerge_lora(model)
    save_lora(model, tmp_path)


@each_case
def test_autocast(kind, layer):
    model, x = make(layer, kind, use_dora=True)
    randomise(model)
    y = model.layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        half = model.layer(x)
    assert torch.allclose(half.float(), y, rtol=0.05, atol=0.1)
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.layer.adapter.parameters())


@pytest.mark.parametrize(
    'kind, layer', [('lora', 'Linear'), ('kan', 'Linear'), ('kan_base', 'KANLinear'), ('lora', 'Embedding')]
)
def test_compiled_equals_eager(kind, layer):
    model, x = make(layer, kind, use_dora=True)
    randomise(model)
    y = model.layer(x)
    y.square().mean().backward()
    grads = [p.grad.clone() for p in model.layer.adapter.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model.layer, fullgraph=True, backend='aot_eager')(x)
    compiled.square().mean().backward()
    assert torch.allclose(compiled, y, atol=1e-5)
    assert all(
        torch.allclose(p.grad, grad, atol=1e-5) for p, grad in zip(model.layer.adapter.parameters(), grads, strict=True)
    )


@pytest.mark.parametrize('kind', ['lora', 'kan'])
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_gradient_checkpointing(kind, use_reentrant):
    model = tiny('GPT2', n_embd=16, n_layer=2, n_head=2, vocab_size=40, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    add_lora(model, LoRAConfig(kind=kind, rank=R, dropout=0.0))
    randomise(model).train()
    ids, grads = torch.randint(40, (2, 9)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
            model.enable_input_require_grads()
        model(ids, use_cache=False).last_hidden_state.square().mean().backward()
        grads.append([p.grad.clone() for layer in lora_layers(model).values() for p in layer.adapter.parameters()])
        model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
sys.path[:0] = sys.argv[1:4]
from surgery.lora import LoRAConfig, add_lora, lora_layers, lora_param_groups
from test_lora import make_gpt
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group('gloo')
rank, kind = dist.get_rank(), sys.argv[4]
torch.manual_seed(0)
model = make_gpt(use_kan=kind == 'kan_base', kan_targets='attn')
add_lora(model, LoRAConfig(kind=kind, rank=3, dropout=0.0, use_dora=True))
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(lora_param_groups(model, 0.5, 0.0))
idx = torch.randint(32, (4, 8))
for _ in range(3):
    rows = idx[2 * rank : 2 * rank + 2]
    wrapped(rows, rows)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    torch.save([p.detach() for p in model.parameters()], sys.argv[5])
dist.barrier()
sys.stdout.flush()
os._exit(0)  # the threads of gloo may abort a Python that shuts down
"""


@pytest.mark.parametrize('kind', ['lora', 'kan', 'kan_base'])
def test_two_processes_equal_one(kind, tmp_path):
    script = tmp_path / 'two.py'
    script.write_text(DISTRIBUTED)
    folders = ROOT, ROOT / 'tests', Path(__file__).parent
    done = run_group(tmp_path, script, *folders, kind, tmp_path / 'two.pt')
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    torch.manual_seed(0)
    model = make_gpt(use_kan=kind == 'kan_base', kan_targets='attn')
    add_lora(model, LoRAConfig(kind=kind, rank=3, dropout=0.0, use_dora=True))
    optimizer = torch.optim.SGD(lora_param_groups(model, 0.5, 0.0))
    idx = torch.randint(32, (4, 8))
    for _ in range(3):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    two = torch.load(tmp_path / 'two.pt')
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), two, strict=True))


def test_generation_goes_through_the_adapter():
    for kind, options in ('lora', {}), ('kan', {}), ('kan_base', dict(use_kan=True, kan_targets='attn')):
        model = make_gpt(**options)
        add_lora(model, LoRAConfig(kind=kind, rank=3))
        randomise(model).eval()
        idx = torch.zeros(1, 1, dtype=torch.long)
        cached, uncached = (model.generate(idx, 6, temperature=0, use_cache=use_cache) for use_cache in (True, False))
        steps = idx
        for _ in range(6):
            steps = torch.cat([steps, model(steps)[0].argmax(-1)], 1)
        assert torch.equal(cached, uncached) and torch.equal(cached, steps)
        with lora_off(model):
            assert not torch.equal(model.generate(idx, 6, temperature=0), cached)


def test_models_with_adapters_are_copied_and_pickled():
    for kind, layer in CASES:
        model, x = make(layer, kind)
        randomise(model).eval()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.layer(x), model.layer(x))


def test_dropout_of_kan_base_leaves_out_features():
    model, _ = make('KANLinear', 'kan_base', dropout=0.5)
    randomise(model)
    kept = torch.tensor([0.0, 2, 0, 2, 2, 0])
    updates = model.layer.adapter.updates(kept)
    for name, whole in model.layer.adapter.updates().items():
        whole, part = whole.view(O, I, -1), updates[name].view(O, I, -1)
        assert torch.allclose(part, whole * kept[:, None], atol=1e-6) and not part[:, 0].any() and part[:, 1].all()


@pytest.mark.parametrize('p', [1e-9, 0.05, 0.5, 0.999999])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_its_share_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(333, 1001, dtype=dtype, requires_grad=True)
    y = dropout(x)
    share, rounded = (y == 0).double().mean().item(), min(round(p * 2**16), 2**16 - 1) / 2**16
    assert abs(share - rounded) <= 5 * math.sqrt(rounded * (1 - rounded) / x.numel())
    assert y[y != 0].unique().tolist() in ([], torch.tensor([1 / (1 - rounded)], dtype=dtype).tolist())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.equal(y), 'the gradient goes where the numbers went'


def test_dropout_draws_every_number_by_itself():
    torch.manual_seed(0)
    dropout = Dropout(0.25)
    first, second = dropout(torch.ones(2**20)) == 0, dropout(torch.ones(2**20)) == 0
    for other in (second, *(first.roll(shift) for shift in range(1, 9))):
        assert abs((first & other).double().mean().item() - 0.25**2) < 0.002
    shares = (first.view(-1, 4).double().mean(0) - 0.25).abs().max()  # of the four parts of a random number of 64 bits
    assert shares < 0.005


def test_dropout_repeats_by_seed_and_compiled_is_the_same():
    x, dropout = torch.randn(5, 7), Dropout(0.5)
    torch.manual_seed(3)
    expected = dropout(x)
    torch.manual_seed(3)
    assert dropout(x).equal(expected)
    torch.manual_seed(3)
    assert torch.compile(dropout, backend='eager')(x).equal(expected)
    assert dropout.eval()(x) is x and Dropout(0.0)(x).equal(x)


def test_dropout_acts_in_training_alone():
    for kind, layer in CASES:
        if layer == 'Embedding':
            continue
        model, x = make(layer, kind, dropout=0.5)
        randomise(model)
        assert not torch.equal(model.layer(x), model.layer(x))
        model.eval()
        assert torch.equal(model.layer(x), model.layer(x))


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    rank=st.integers(1, 9),
    options=st.fixed_dictionaries(dict(use_dora=st.booleans(), rs_lora=st.booleans())),
    grid=st.fixed_dictionaries(dict(grid_size=st.integers(1, 6), spline_order=st.integers(0, 4))),
)
def test_any_shape(case, shape, rank, options, grid):
    kind, layer = case
    model, _ = make(layer)
    add_lora(model, LoRAConfig(kind=kind, rank=rank, target_modules='layer', dropout=0.0, **options, **grid))
    x = torch.randint(I, shape) if layer == 'Embedding' else torch.randn(*shape, I)
    y = randomise(model).layer(x)
    assert y.shape == (*shape, O) and y.isfinite().all()
    y.sum().backward()
    if kind != 'kan':
        assert torch.allclose(merge_lora(model).layer(x), y, rtol=1e-4, atol=1e-4)


def test_kan_adapters_begin_as_those_of_kolmg_lora():
    def phi_in(**scales):
        config = LoRAConfig(kind='kan', rank=50, target_modules='layer', **scales)
        return add_lora(nn.ModuleDict({'layer': nn.Linear(400, O)}), config).layer.adapter.bottleneck.phi_in

    theirs = KOLMGLoRALinear(nn.Linear(400, O), rank=50, alpha=32.0, grid_size=4, spline_order=1).kan
    ours, larger = phi_in(), phi_in(kan_scale_base=2.0, kan_scale_noise=0.3)
    for name, times in ('base_weight', 2), ('spline_weight', 3):
        std = getattr(ours, name).std().item()
        assert std == pytest.approx(getattr(theirs, f'in_{name}').std().item(), rel=0.05)
        assert getattr(larger, name).std().item() == pytest.approx(times * std, rel=0.05)


def test_adapters_begin_as_those_of_peft():
    model = add_lora(nn.ModuleDict({'layer': nn.Linear(400, O)}), LoRAConfig(rank=50, target_modules='layer'))
    A = model.layer.adapter.lora_A['weight']
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


def test_fit_linear_measures_two_batches_by_the_last():
    model, _ = make('Linear without bias', 'kan', torch.float64)
    randomise(model).forward = lambda x: model.layer(x)
    first, last = torch.randn(2, 60, I, dtype=torch.float64)
    d, held = ((model.layer(x) - model.layer.base_layer(x)).detach() for x in (first, last))
    missed = held - last @ torch.linalg.lstsq(first, d).solution
    error = fit_linear(model, [first, last])['layer']
    assert error == pytest.approx((missed.norm() / held.norm()).item(), rel=1e-6)


def test_inputs_of_a_kan_adapter_are_brought_onto_its_grid_by_default():
    model = nn.ModuleDict({'layer': nn.Linear(6, 5)})
    add_lora(model, LoRAConfig(kind='kan', rank=3, target_modules='layer', dropout=0.0))
    bottleneck, x = model.layer.adapter.bottleneck, 5 * torch.randn(20, 6)
    for p in bottleneck.parameters():
        nn.init.normal_(p, std=0.3)
    phi_in, phi_out = bottleneck.phi_in, bottleneck.phi_out
    expected = 32.0 / 3 * phi_out(torch.tanh(phi_in(torch.tanh(x))))
    torch.testing.assert_close(model.layer(x) - model.layer.base_layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_dropout_before_a_convolution_acts_in_training_alone(name):
    make_layer, size = CONVOLUTIONS[name]
    model, x = nn.ModuleDict({'layer': make_layer()}), torch.randn(size)
    randomise(add_lora(model, LoRAConfig(rank=R, target_modules='layer', dropout=0.5)))
    assert not torch.equal(model.layer(x), model.layer(x))
    model.eval()
    assert torch.equal(model.layer(x), model.layer(x))


def test_the_padding_of_an_embedding_learns_nothing():
    model, x = make('Embedding', 'lora')
    nn.init.ones_(model.layer.weight)  # PyTorch has zeros for padding at first, a trained model need not
    padding = torch.zeros_like(x)
    before = model.layer(padding)
    train_steps(model, torch.cat([x, padding]))
    assert torch.equal(model.layer(padding), before)


@pytest.mark.parametrize('kind, layer', [('lora', 'Linear'), ('kan_base', 'KANLinear')])
def test_dora_takes_the_lengths_of_rows_for_constants(kind, layer):
    """Section 4.3 of its paper: no gradient goes through them."""
    model, x = make(layer, kind, torch.float64, use_dora=True)
    base, adapter = model.layer.base_layer, randomise(model).layer.adapter
    adapter.magnitude.requires_grad_(False)
    scale = (adapter.magnitude / adapters.row_norms(base, adapter.updates()).detach())[:, None]
    weights = {name: w + adapter.updates()[name] for name, w in adapters.weights(base).items()}
    scaled = {name: (w * scale).view_as(getattr(base, name)) for name, w in weights.items()}
    learned = [p for p in adapter.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(y.square().sum(), learned)
        for y in (model.layer(x), torch.func.functional_call(base, scaled, (x,)))
    )
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected, strict=True))
