"""The GPT against transformers' GPT-2, nanoGPT's names and counts, and what sampling and causality promise."""

import itertools
import json
import math
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.nn import functional as F

from configurator import settings_of
from kan import KAN, ChannelSpline, KANLinear
from layers.generation import sample_token, stream
from model import GPT, GPTConfig, rotate
from run.checkpoint import build_model
from surgery.kanify import kanify
from surgery.lora import LoRAConfig

TARGETS = [','.join(t) for n in (1, 2, 3) for t in itertools.combinations(('attn', 'mlp', 'head'), n)]
SLOTS = [
    dict(),
    dict(mlp='swiglu'),
    dict(rotary=True),
    dict(use_kan=True, kan_targets='mlp', kan_norm=True),
    *(dict(use_kan=True, kan_targets=targets) for targets in TARGETS),
]


def name_of_slots(slots):
    return ' '.join(name if value is True else value for name, value in slots.items() if name != 'use_kan') or 'vanilla'


pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


def make(**kwargs):
    sizes = dict(block_size=12, vocab_size=20, n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=False)
    return GPT(GPTConfig(**{**sizes, **kwargs})).eval()


def stir(model, std=0.3):
    """Weights large enough that every path matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model


def tokens(*shape, vocab_size=20):
    return torch.randint(vocab_size, shape)


# the network


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_logits_are_those_of_transformers(tmp_path, activation):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=97, n_positions=16, n_embd=48, n_layer=2, n_head=3)
    peer = stir(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, activation_function=activation)), 0.1
    ).eval()
    peer.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), dict(dropout=0.1)).eval()
    assert (model.config.block_size, model.config.dropout, model.config.bias) == (16, 0.1, True)
    idx = tokens(3, 16, vocab_size=97)
    logits, loss = model(idx, idx)
    expected = peer(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.flatten()), atol=1e-5, rtol=1e-5)


def save_gpt2(folder, **settings):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=97, n_positions=16, n_embd=48, n_layer=2, n_head=3)
    peer = stir(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **settings)), 0.1).eval()
    peer.save_pretrained(folder)
    return peer


def test_width_of_the_mlp_is_that_of_the_config(tmp_path):
    peer, idx = save_gpt2(tmp_path, n_inner=72), tokens(3, 16, vocab_size=97)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    assert model.config.mlp_hidden == 1.5
    torch.testing.assert_close(model(idx, idx)[0], peer(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'settings',
    [
        dict(tie_word_embeddings=False),
        dict(layer_norm_epsilon=0.1),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
    ],
    ids=str,
)
def test_a_gpt2_of_other_settings_is_refused(tmp_path, settings):
    save_gpt2(tmp_path, **settings)
    with pytest.raises(ValueError, match='is no GPT-2 as OpenAI made it'):
        GPT.from_pretrained(str(tmp_path))


def test_a_gpt2_brings_no_code_of_the_hub_and_no_adapter(tmp_path):
    peft = pytest.importorskip('peft')
    model = save_gpt2(tmp_path)
    config = tmp_path / 'config.json'
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), '_attn_implementation': 'kernels-community/flash-attn'}))
    with pytest.raises(ValueError, match="its attention is 'kernels-community/flash-attn', code of the hub, which is"):
        GPT.from_pretrained(str(tmp_path))
    config.write_text(plain)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=['c_attn'])).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match='holds an adapter of PEFT: merge it first, or move its adapter_config.json away'
    ):
        GPT.from_pretrained(str(tmp_path))


def test_what_is_no_whole_gpt2_is_refused_in_one_line(tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=72)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / 'llama')
    with pytest.raises(ValueError, match="llama' is a llama, expected a GPT-2"):
        GPT.from_pretrained(str(tmp_path / 'llama'))
    weights = save_gpt2(tmp_path / 'part').state_dict()
    file = tmp_path / 'part/model.safetensors'
    save_file({name: p.clone() for name, p in weights.items() if 'h.1' not in name and 'lm_head' not in name}, file)
    with pytest.raises(ValueError, match=r'no weights that fit for transformer.h.1.'):
        GPT.from_pretrained(str(tmp_path / 'part'))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='cannot load .*SafetensorError') as error:
        GPT.from_pretrained(str(tmp_path / 'part'))
    assert '\n' not in str(error.value)


def test_pretrained_takes_known_names_and_overrides_only():
    with pytest.raises(ValueError, match="gpt2-xl or a folder, got 'gpt3'"):
        GPT.from_pretrained('gpt3')
    with pytest.raises(ValueError, match='only dropout'):
        GPT.from_pretrained('gpt2', dict(n_layer=3))


@pytest.mark.parametrize('slots', SLOTS, ids=name_of_slots)
def test_no_position_sees_the_tokens_after_it(slots):
    """By gradient: exactly zero from every later position, not zero from every earlier one."""
    model = stir(make(**slots))
    embeddings = []

    def leaf(module, args, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    model.transformer.drop.register_forward_hook(leaf)
    idx = tokens(2, 12)
    logits, _ = model(idx, idx)
    for t in range(12):
        (grad,) = torch.autograd.grad(logits[:, t].pow(2).sum(), embeddings[0], retain_graph=True)
        reach = grad.abs().amax(-1)  # (B, T)
        assert (reach[:, : t + 1] > 1e-6).all() and (reach[:, t + 1 :] == 0).all()


def test_positions_are_told_apart():
    model = stir(make())
    logits, _ = model(torch.zeros(1, 12, dtype=torch.long), tokens(1, 12))
    assert torch.pdist(logits[0]).min() > 1e-3


def test_rotary_positions_are_turns_of_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turns = torch.arange(4, 9)[:, None] / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * turns)
    torch.testing.assert_close(rotate(x, 4), torch.cat((turned.real, turned.imag), -1), rtol=1e-6, atol=1e-6)


def test_rotary_positions_do_not_depend_on_the_default_dtype():
    x = torch.randn(2, 3, 5, 8)
    expected = rotate(x, 1000)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = rotate(x, 1000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_caches_of_another_model_are_refused():
    caches = make(n_layer=1).new_caches()
    with pytest.raises(ValueError, match='expected a cache for each of 2 blocks, got 1'):
        make()(tokens(1, 3), caches=caches)


def test_rotary_positions_tell_how_far_tokens_are_apart_alone():
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    near, far = (rotate(q, 3 + start) @ rotate(k, start).mT for start in (0, 50))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, rotate(q, 4) @ rotate(k, 0).mT, atol=1e-2)


def test_rotary_positions_take_the_place_of_embeddings():
    plain, rotary = make(), make(rotary=True)
    assert rotary.transformer.wpe is None
    assert plain.state_dict().keys() - rotary.state_dict().keys() == {'transformer.wpe.weight'}
    assert rotary.get_num_params() == rotary.get_num_params(non_embedding=False) == plain.get_num_params()
    same = torch.full((1, 6), 3)  # of one token, which has nothing to tell apart but its places
    logits = stir(rotary)(torch.cat((torch.tensor([[1]]), same), 1), torch.zeros(1, 7, dtype=torch.long))[0][0]
    assert (logits[2:] - logits[1:-1]).abs().amax(-1).min() > 1e-3


def test_loss_leaves_out_targets_of_minus_one():
    model, idx, targets = stir(make()), tokens(3, 12), tokens(3, 12)
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[:, 1::2].reshape(-1, 20), targets[:, 1::2].reshape(-1))
    torch.testing.assert_close(loss, expected)


def test_without_targets_there_is_the_last_position_alone():
    model, idx = stir(make()), tokens(3, 9)
    logits, loss = model(idx)
    assert logits.shape == (3, 1, 20) and loss is None
    torch.testing.assert_close(logits[:, 0], model(idx, idx)[0][:, -1])


@pytest.mark.parametrize('slots', SLOTS, ids=name_of_slots)
def test_first_loss_is_that_of_a_guess(slots):
    model, idx = make(vocab_size=65, n_embd=64, **slots), tokens(40, 13, vocab_size=65)
    assert model(idx[:, :-1], idx[:, 1:].contiguous())[1].item() == pytest.approx(
        math.log(65), abs=0.2 if 'head' in slots.get('kan_targets', '') else 0.05
    )


# names, counts, initial weights


@pytest.mark.parametrize('bias', [True, False])
def test_names_are_those_of_nanogpt(bias):
    names = """transformer.wte.weight transformer.wpe.weight
        transformer.h.0.ln_1.weight transformer.h.0.ln_1.bias
        transformer.h.0.attn.c_attn.weight transformer.h.0.attn.c_attn.bias
        transformer.h.0.attn.c_proj.weight transformer.h.0.attn.c_proj.bias
        transformer.h.0.ln_2.weight transformer.h.0.ln_2.bias
        transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_fc.bias
        transformer.h.0.mlp.c_proj.weight transformer.h.0.mlp.c_proj.bias
        transformer.ln_f.weight transformer.ln_f.bias lm_head.weight""".split()
    model = make(n_layer=1, bias=bias)
    names = [name for name in names if bias or not name.endswith('.bias')]
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names[:-1]


def test_names_are_those_of_nanogpkant():
    names = ['transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.0.ln_1.weight']
    kans = ['attn.c_attn.layers.0', 'attn.c_proj.layers.0', 'mlp.kan.layers.0', 'mlp.kan.layers.1']
    for module in kans:
        names += ['transformer.h.0.ln_2.weight'] if module == 'mlp.kan.layers.0' else []
        names += [
            f'transformer.h.0.{module}.{name}' for name in ('base_weight', 'spline_weight', 'spline_scaler', 'grid')
        ]
    state = make(n_layer=1, use_kan=True, kan_targets='attn,mlp').state_dict()
    assert list(state) == [*names, 'transformer.ln_f.weight', 'lm_head.weight']
    shapes = [tuple(state[f'transformer.h.0.{module}.spline_weight'].shape) for module in kans]
    assert shapes == [(48, 16, 8), (16, 16, 8), (64, 16, 8), (16, 64, 8)]


@pytest.mark.parametrize('slots', SLOTS, ids=name_of_slots)
def test_targets_become_kan_layers_and_nothing_else_does(slots):
    model = make(n_layer=1, grid_size=4, spline_order=2, grid_min=-3.0, grid_max=2.0, kan_hidden=1.5, **slots)
    targets = slots.get('kan_targets', '').split(',')
    block = model.transformer.h[0]
    assert isinstance(block.attn.c_attn, KAN) == isinstance(block.attn.c_proj, KAN) == ('attn' in targets)
    assert isinstance(block.mlp.c_proj, KANLinear) == ('mlp' in targets)
    assert isinstance(model.lm_head, KAN) == ('head' in targets)
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    assert len(layers) == sum({'attn': 2, 'mlp': 2, 'head': 1}.get(target, 0) for target in targets)
    for layer in layers:
        torch.testing.assert_close(layer.grid[0], -3 + 1.25 * torch.arange(-2.0, 7.0))
    if 'mlp' in targets:
        assert block.mlp.c_proj.in_features == 24


@pytest.mark.parametrize(
    'size, slots',
    [
        ('0.90', dict(n_layer=2)),
        ('8.86', dict(n_layer=2, use_kan=True)),
        ('7.10', dict(n_layer=16)),
        ('8.87', dict(n_layer=20)),
    ],
)
def test_parameters_of_the_micro_models(size, slots):
    model = GPT(
        GPTConfig(block_size=256, vocab_size=65, n_head=6, n_embd=192, bias=False, kan_targets='attn,mlp', **slots)
    )
    assert f'{model.get_num_params() / 1e6:.2f}' == size
    assert model.get_num_params(non_embedding=False) - model.get_num_params() == 256 * 192


def test_swiglu_is_its_formula_with_as_many_parameters_as_the_mlp():
    mlp, swiglu = (
        make(n_embd=48, bias=True, **slots).transformer.h[0].mlp for slots in ({}, dict(mlp='swiglu', mlp_hidden=8 / 3))
    )
    assert sum(p.numel() for p in swiglu.parameters() if p.dim() > 1) == sum(
        p.numel() for p in mlp.parameters() if p.dim() > 1
    )
    x, (W, V), (b, c) = torch.randn(5, 48), stir(swiglu).c_fc.weight.chunk(2), swiglu.c_fc.bias.chunk(2)
    gate = x @ W.t() + b
    hidden = gate / (1 + torch.exp(-gate)) * (x @ V.t() + c)
    torch.testing.assert_close(swiglu(x), hidden @ swiglu.c_proj.weight.t() + swiglu.c_proj.bias)


def test_kan_norm_normalises_what_the_second_kan_layer_gets():
    plain, normed = (stir(make(use_kan=True, kan_norm=norm), 0.5).transformer.h[0].mlp for norm in (False, True))
    normed.load_state_dict(plain.state_dict())
    seen, x = [], torch.randn(5, 16)
    normed.c_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    y = normed(x)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].var(-1, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(y, plain.kan.layers[1](F.layer_norm(plain.kan.layers[0](x), (64,))))
    assert not torch.allclose(y, plain(x))


def test_mlp_that_is_none_is_refused():
    with pytest.raises(ValueError, match="mlp='gelu': expected 'mlp' or 'swiglu'"):
        make(mlp='gelu')
    with pytest.raises(ValueError, match='mlp_hidden'):
        make(mlp_hidden=0.01)
    with pytest.raises(ValueError, match='init_std'):
        make(init_std=0.0)


def test_head_shares_the_token_embeddings_unless_it_is_a_kan():
    model = make()
    assert model.lm_head.weight is model.transformer.wte.weight
    model = make(use_kan=True, kan_targets='head')
    assert [p.shape[:2] for p in model.lm_head.parameters()] == [(20, 16)] * 3
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_initial_weights_of_linear_layers():
    model = make(n_layer=3, n_embd=96, bias=True)
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert not p.any()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(6) if 'c_proj' in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05) and abs(p.mean().item()) < 0.1 * expected


@pytest.mark.parametrize(
    'module', ['attn.c_attn.layers.0', 'attn.c_proj.layers.0', 'mlp.kan.layers.0', 'mlp.kan.layers.1']
)
def test_initial_weights_of_kan_layers(module):
    """Those of a layer by itself; base and spline weights of the residual projections divided by sqrt(2 * n_layer)."""
    layer = make(n_layer=3, n_embd=96, use_kan=True, kan_targets='attn,mlp').get_submodule(f'transformer.h.1.{module}')
    alone = KANLinear(layer.in_features, layer.out_features)
    residual = module in ('attn.c_proj.layers.0', 'mlp.kan.layers.1')
    for name, expected in (('base_weight', 6), ('spline_weight', 6), ('spline_scaler', 1)):
        ratio = getattr(alone, name).std() / getattr(layer, name).std()
        assert ratio.item() == pytest.approx(math.sqrt(expected) if residual else 1, rel=0.05)


@pytest.mark.parametrize('slots', SLOTS, ids=name_of_slots)
def test_init_std_scales_all_initial_weights(slots):
    sizes = dict(n_embd=64, vocab_size=64, block_size=64, bias=True, **slots)
    torch.manual_seed(0)
    small = dict(make(**sizes).named_parameters())
    torch.manual_seed(0)
    for name, p in make(**sizes, init_std=0.06).named_parameters():
        scaled = name.endswith('weight') and '.ln_' not in name  # not biases, LayerNorms and spline_scaler
        torch.testing.assert_close(p, small[name] * (3 if scaled else 1))


def test_splines_have_a_learning_rate_and_a_decay_of_their_own():
    model = make(use_kan=True)
    names = {p: name for name, p in model.named_parameters()}
    *others, splines = model.configure_optimizers(0.3, 0.01, (0.8, 0.9), 'cpu', 3.0, 0.0).param_groups
    assert (splines['lr'], splines['lr_scale'], splines['weight_decay']) == (pytest.approx(0.03), 3.0, 0.0)
    assert {names[p].rsplit('.')[-1] for p in splines['params']} == {'spline_weight', 'spline_scaler'}
    assert not any('spline' in names[p] for group in others for p in group['params'])
    assert sum(len(group['params']) for group in (*others, splines)) == len(names)
    assert len(model.configure_optimizers(0.3, 0.01, (0.8, 0.9), 'cpu', 1.0, 0.3).param_groups) == 2  # as without


def test_optimizer_decays_tensors_of_two_or_more_dimensions():
    model = make(bias=True, use_kan=True)
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.3, 0.01, (0.8, 0.9), 'cpu')
    decay, rest = optimizer.param_groups
    assert (decay['weight_decay'], rest['weight_decay'], decay['lr'], rest['betas']) == (0.3, 0.0, 0.01, (0.8, 0.9))
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    expected = [name for name in names.values() if not name.endswith('bias') and '.ln_' not in name]
    assert [names[p] for p in decay['params']] == expected and any('spline_weight' in name for name in expected)
    assert [names[p] for p in rest['params']] == [name for name in names.values() if name not in expected]


@pytest.mark.parametrize('muon', [False, True])
@pytest.mark.parametrize('kan_targets', ['attn,mlp,head', 'mlp'])
def test_an_optimizer_step_moves_every_parameter(kan_targets, muon):
    model, idx = make(bias=True, use_kan=True, kan_targets=kan_targets).train(), tokens(4, 13)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.0, 0.01, (0.9, 0.95), 'cpu', muon=muon)
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:].contiguous())[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    'settings, names',
    [
        (dict(mlp='swiglu'), {'attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'}),
        (
            dict(use_kan=True),
            {
                'attn.c_attn.weight',
                'attn.c_proj.weight',
                'mlp.kan.layers.0.base_weight',
                'mlp.kan.layers.1.base_weight',
            },
        ),
        (
            dict(use_kan=True, kan_kind='channel', kan_targets='attn'),
            {'attn.c_attn.1.weight', 'attn.c_proj.1.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'},
        ),
    ],
)
def test_muon_has_the_matrices_of_the_blocks(settings, names):
    model = make(bias=True, **settings)
    optimizer = model.configure_optimizers(0.3, 0.01, (0.8, 0.9), 'cpu', 3.0, 0.0, muon=True)
    by_name = {p: name for name, p in model.named_parameters()}
    *others, matrices = optimizer.param_groups
    assert {by_name[p] for p in matrices['params']} == {f'transformer.h.{i}.{name}' for i in (0, 1) for name in names}
    assert (matrices['lr'], matrices['weight_decay'], matrices['momentum']) == (0.01, 0.3, 0.95)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(by_name)


# sizes that do not fit


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match='length 13, block_size is only 12'):
        make()(tokens(1, 13))


def test_cropped_model_gives_the_same_logits():
    model, idx = stir(make()), tokens(2, 5)
    expected = model(idx, idx)[0]
    model.crop_block_size(5)
    assert torch.equal(model(idx, idx)[0], expected)
    assert model.config.block_size == 5 and model.transformer.wpe.weight.shape == (5, 16)
    with pytest.raises(ValueError, match='length 6'):
        model(tokens(1, 6))
    for n in 6, 0, -3:
        with pytest.raises(ValueError, match=f'block_size={n}, the model has 5'):
            model.crop_block_size(n)


def test_what_was_cropped_is_gone_and_what_was_frozen_stays_so():
    model = make()
    model.transformer.wpe.weight.requires_grad_(False)
    model.crop_block_size(5)
    weight = model.transformer.wpe.weight
    assert not weight.requires_grad
    assert weight.untyped_storage().nbytes() == weight.nbytes  # a file has all of a storage


@pytest.mark.parametrize(
    'n_embd, n_head, nearest',
    [(50, 6, '48 or 54, or n_head=5'), (5, 6, '6, or n_head=5'), (47, 6, '42 or 48, or n_head=1')],
)
def test_width_that_heads_cannot_share_names_the_nearest(n_embd, n_head, nearest):
    with pytest.raises(
        ValueError, match=f'n_embd={n_embd} is not divisible by n_head={n_head}; nearest: n_embd={nearest}$'
    ):
        GPTConfig(n_embd=n_embd, n_head=n_head)


@pytest.mark.parametrize(
    'n_embd, n_head, nearest', [(48, 5, '40 or 50, or n_head=4'), (30, 8, '16 or 32, or n_head=5'), (9, 3, '6 or 12')]
)
def test_rotary_advises_heads_of_an_even_width_alone(n_embd, n_head, nearest):
    with pytest.raises(ValueError, match=f'nearest: n_embd={nearest}$'):
        GPTConfig(n_embd=n_embd, n_head=n_head, rotary=True)
    for width in nearest.split(', or ')[0].split(' or '):
        GPTConfig(n_embd=int(width), n_head=n_head, rotary=True)
    for heads in nearest.split('n_head=')[1:]:
        GPTConfig(n_embd=n_embd, n_head=int(heads), rotary=True)


@pytest.mark.parametrize('sizes', [dict(n_head=0), dict(n_head=-2), dict(kan_hidden=0.0)], ids=str)
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        make(use_kan=True, **sizes)


@pytest.mark.parametrize('targets', ['', 'mpl', 'mlp,', 'attn mlp', 'mlp,heads'])
def test_unknown_kan_targets_are_refused(targets):
    with pytest.raises(ValueError, match='any of attn, mlp, head joined by commas'):
        GPTConfig(use_kan=True, kan_targets=targets)


# sampling


def greedy(model, idx, n, vocab_size=None):
    for _ in range(n):
        logits = model(idx[:, -12:], idx[:, -12:].contiguous())[0][:, -1, :vocab_size]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize(
    'options',
    [
        dict(temperature=0),
        dict(temperature=1e-50),
        dict(top_k=1),
        dict(top_p=1e-9),
        dict(temperature=0, top_k=5, top_p=0.5),
    ],
)
def test_greedy_takes_the_most_likely_token_also_beyond_the_block(options):
    model, idx = stir(make()), tokens(3, 4)
    out = model.generate(idx, 15, **options)
    assert out.shape == (3, 19) and torch.equal(out, greedy(model, idx, 15))
    assert len(out[:, 4:].unique()) > 2


@pytest.mark.parametrize('slots', SLOTS, ids=str)
@pytest.mark.parametrize('T', [1, 5, 12, 20])
def test_greedy_with_the_cache_equals_greedy_without_it_also_beyond_the_block(slots, T):
    model, idx = stir(make(**slots)), tokens(3, T)
    without = model.generate(idx, 16, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 16, temperature=0), without)
    assert len(without[:, T:].unique()) > 1


def test_sampling_with_the_cache_draws_the_same_tokens():
    model, idx, outs = stir(make(), 0.1), tokens(2, 3), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outs.append(model.generate(idx, 30, use_cache=use_cache))
    assert torch.equal(*outs)


@pytest.mark.parametrize('slots', SLOTS, ids=str)
def test_logits_of_each_token_are_those_of_the_whole_sequence(slots):
    model, idx = stir(make(**slots)), tokens(2, 12)
    expected = model(idx, idx)[0]
    caches = model.new_caches()
    parts = [model(idx[:, :4], caches=caches)[0], *(model(idx[:, [t]], caches=caches)[0] for t in range(4, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 3:], rtol=1e-4, atol=1e-4)


def test_with_the_cache_each_token_is_computed_once_while_the_window_stands(monkeypatch):
    model, lengths = make(), []
    forward = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **options: lengths.append(idx.size(1)) or forward(idx, **options))
    model.generate(tokens(2, 5), 11)
    assert lengths == [5, 1, 1, 1, 1, 1, 1, 1, 12, 12, 12]


def test_tokens_beyond_the_caches_are_refused():
    model, caches = make(), make().new_caches()
    model(tokens(1, 4), caches=caches)
    with pytest.raises(ValueError, match='one more at a time, got 2'):
        model(tokens(1, 2), caches=caches)
    for _ in range(8):
        model(tokens(1, 1), caches=caches)
    with pytest.raises(ValueError, match='length 13, block_size is only 12'):
        model(tokens(1, 1), caches=caches)


def test_generated_tokens_follow_the_prompt_and_the_seed():
    model, idx = stir(make()), tokens(2, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(idx, 20))
    assert all(torch.equal(out[:, :4], idx) and out.shape == (2, 24) for out in outs)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    torch.manual_seed(1)
    assert torch.equal(torch.cat(list(stream(model, idx, 20)), 1), outs[0][:, 4:])


@pytest.mark.parametrize('temperature', [0, 1.0, 100.0])
def test_padding_of_the_head_is_never_drawn(temperature):
    model, idx = stir(make(), 0.01), tokens(50, 1, vocab_size=7)
    out = model.generate(idx, 10, temperature, vocab_size=7)
    assert out.max() < 7
    assert model.generate(idx, 10, 100.0).max() >= 7


PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def frequencies(n=20000, **options):
    logits = (PROBS.log() + 3).expand(n, -1)
    return torch.bincount(sample_token(logits, **options)[:, 0], minlength=5) / n


@pytest.mark.parametrize(
    'options, kept',
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(top_p=0.39), [1]),
        (dict(top_p=0.41), [1, 3]),
        (dict(top_p=0.64), [1, 3]),
        (dict(top_p=0.66), [1, 3, 4]),
        (dict(top_p=0.84), [1, 3, 4]),
        (dict(top_p=0.86), [0, 1, 3, 4]),
        (dict(top_k=2), [1, 3]),
        (dict(top_k=4), [0, 1, 3, 4]),
        (dict(top_k=9), [0, 1, 2, 3, 4]),
        (dict(top_k=3, top_p=0.46), [1]),  # of the three kept the first has 0.4 / 0.85
        (dict(top_k=3, top_p=0.48), [1, 3]),
        (dict(temperature=0.5), [0, 1, 2, 3, 4]),
        (dict(temperature=2.0, top_k=2), [1, 3]),
    ],
    ids=str,
)
def test_sampling_keeps_exactly_the_tokens_asked_for(options, kept):
    expected = torch.zeros(5)
    expected[kept] = PROBS[kept] ** (1 / options.get('temperature', 1))
    actual = frequencies(**options)
    assert actual.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(actual, expected / expected.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize('options', [dict(top_k=3), dict(top_p=0.3), dict(top_k=6, top_p=0.5)])
def test_ties_do_not_add_tokens(options):
    """Half precision makes many of them."""
    assert len(sample_token(torch.zeros(1, 10).expand(2000, -1), **options).unique()) == 3


@pytest.mark.parametrize(
    'options', [dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0), dict(top_p=1.1)]
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ValueError, match='expected temperature >= 0, top_k >= 1, 0 < top_p <= 1'):
        sample_token(torch.zeros(1, 5), **options)


@pytest.mark.parametrize('temperature', [0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    """But for some that are never to be drawn."""
    for logits in [0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3:
        with pytest.raises(ValueError, match='the logits are not finite: the weights have diverged'):
            sample_token(torch.tensor([[0.0, 1.0, 2.0], logits]), temperature)
    assert sample_token(torch.tensor([[-math.inf, 1.0, -math.inf]]), temperature) == 1


def test_a_temperature_near_zero_overflows_nothing():
    assert sample_token(torch.tensor([[30.0, 90.0, 60.0]]), temperature=2e-38) == 1


def test_logits_in_half_precision_are_drawn_by_as_their_numbers_in_float32():
    logits, drawn = (0.3 * torch.randn(5000, 100)).bfloat16(), []
    for given in logits, logits.float():
        torch.manual_seed(0)
        drawn.append(sample_token(given, temperature=0.7, top_p=0.9))
    assert torch.equal(*drawn)


def test_utilisation_counts_flops_per_second():
    """6 per parameter and token, 12 per layer, width and position for attention; of splines, scalers and functions of
    channels are no part of a matrix.
    """
    vanilla, kan = make(), make(use_kan=True)
    channel = make(use_kan=True, kan_kind='channel')
    expected = (6 * vanilla.get_num_params() + 12 * 2 * 16 * 12) * 12 * 40 / 0.5 / 312e12
    assert vanilla.estimate_mfu(40, 0.5) == pytest.approx(expected)
    assert vanilla.estimate_mfu(80, 0.25, 156e12) == pytest.approx(8 * expected)
    scalers = 2 * 2 * 64 * 16
    assert (kan.estimate_mfu(1, 1) - vanilla.estimate_mfu(1, 1)) * 312e12 == pytest.approx(
        6 * 12 * (kan.get_num_params() - scalers - vanilla.get_num_params())
    )
    assert channel.get_num_params() > vanilla.get_num_params()
    assert channel.estimate_mfu(1, 1) == pytest.approx(vanilla.estimate_mfu(1, 1))
    assert kanify(make()).estimate_mfu(1, 1) > vanilla.estimate_mfu(1, 1)  # its layers have no scalers


# the scripts' settings of models

ELSEWHERE = {'vocab_size': 50304, 'gelu': 'none'}  # of GPTConfig: from the data set, and from GPT-2's weights
ELSEWHERE |= {'kan_bias': False, 'kan_mask': False}  # from pruning
DIFFERENT = {'bias': (True, False)}  # GPT-2 has it, training from scratch does without
UNSET = {'modules_to_save', 'grid_range', 'kan_scale_noise', 'kan_scale_base', 'squash'}  # of LoRAConfig


def test_defaults_of_train_are_those_of_the_model():
    settings, defaults = settings_of('train.py', []), asdict(GPTConfig())
    assert {name: defaults[name] for name in defaults.keys() - settings.keys()} == ELSEWHERE
    shared = {name: (defaults[name], settings[name]) for name in defaults.keys() & settings.keys()}
    assert {name: pair for name, pair in shared.items() if pair[0] != pair[1]} == DIFFERENT
    assert all(type(default) is type(setting) for default, setting in shared.values())


def test_settings_of_finetune_are_those_of_the_parts_it_adds():
    settings, defaults = settings_of('finetune.py', []), asdict(GPTConfig())
    graph = {name: value for name, value in settings.items() if name.startswith('graph_') and name != 'graph_last'}
    assert graph == {name: defaults[name] for name in defaults if name.startswith('graph_') and name != 'graph_place'}
    fields = asdict(LoRAConfig()).keys() - UNSET - {'target_modules'}
    names = {name if re.search('lora|dora', name) else f'lora_{name}' for name in fields} | {'lora_targets'}
    assert names == {name for name in settings if re.search('lora|dora', name)} - {'use_lora'}


# checkpoints of others


def disguise(model, drop=()):
    """`model` as its predecessor would have saved it: compiled, with model_args that know of no KAN."""
    args = {
        name: getattr(model.config, name)
        for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    }
    return {'model': {f'_orig_mod.{name}': p for name, p in model.state_dict().items()}, 'model_args': args}


def test_checkpoint_of_nanogpt_is_the_same_model():
    model, idx = stir(make(bias=True)), tokens(2, 12)
    checkpoint = disguise(model)
    for i in range(2):
        checkpoint['model'][f'_orig_mod.transformer.h.{i}.attn.bias'] = torch.ones(12, 12).tril().view(1, 1, 12, 12)
    rebuilt = build_model(checkpoint, dropout=0.1)
    assert torch.equal(rebuilt.eval()(idx, idx)[0], model(idx, idx)[0])
    assert not rebuilt.config.use_kan and rebuilt.config.dropout == 0.1
    assert rebuilt.lm_head.weight is rebuilt.transformer.wte.weight


@pytest.mark.parametrize(
    'sizes',
    [dict(), dict(grid_size=3, spline_order=2), dict(grid_size=8, spline_order=1), dict(grid_min=-2.0, grid_max=4.0)],
)
def test_checkpoint_of_nanogpkant_is_the_same_model(sizes):
    model, idx = stir(make(use_kan=True, kan_targets='attn,mlp', **sizes)), tokens(2, 12)
    rebuilt = build_model(disguise(model))
    assert torch.equal(rebuilt.eval()(idx, idx)[0], model(idx, idx)[0])
    assert (rebuilt.config.grid_size, rebuilt.config.spline_order) == (
        model.config.grid_size,
        model.config.spline_order,
    )


def test_checkpoint_that_contradicts_itself_is_refused():
    checkpoint = disguise(make())
    checkpoint['model_args']['n_embd'] = 32
    with pytest.raises(ValueError, match='does not fit its own model_args'):
        build_model(checkpoint)


def test_code_written_for_nanogpt_finds_its_attributes():
    model = make()
    assert isinstance(model.transformer.h, nn.ModuleList) and model.transformer.wte.num_embeddings == 20
    assert model.config.n_layer == len(model.transformer.h)


# functions on channels


CHANNEL = dict(use_kan=True, kan_kind='channel', grid_min=-4.0, grid_max=4.0, grid_size=8)


@pytest.mark.parametrize('mlp, activation', [('mlp', ''), ('mlp', 'silu'), ('swiglu', ''), ('swiglu', 'gelu')])
def test_a_model_of_channel_functions_begins_as_the_plain_one(mlp, activation):
    """With the same random numbers: the functions are the activations until they have learned."""
    outcomes = []
    for kan in {}, CHANNEL, dict(CHANNEL, kan_targets='attn,mlp,head'):
        torch.manual_seed(1)
        model = make(mlp=mlp, activation=activation, **kan)
        x = torch.randint(model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
        outcomes.append(model(x, x)[0])
    assert torch.allclose(outcomes[1], outcomes[0], atol=1e-5) and torch.allclose(outcomes[2], outcomes[0], atol=1e-5)


@pytest.mark.parametrize('settings, name', [(CHANNEL, 'spline_weight'), (dict(activation='swish'), 'slope')])
def test_learned_activations_learn_and_are_in_a_group_of_their_own(settings, name):
    model = make(mlp='swiglu', **settings)
    x = torch.randint(model.config.vocab_size, (2, 6))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', spline_lr_scale=4, spline_weight_decay=0.0)
    functions = [getattr(block.mlp.act, name) for block in model.transformer.h]
    before = [p.detach().clone() for p in functions]
    (group,) = [group for group in optimizer.param_groups if group.get('lr_scale') == 4]
    assert {id(p) for p in group['params']} == {id(p) for p in functions} and group['weight_decay'] == 0
    (group,) = [
        group
        for group in model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', spline_lr_scale=4).param_groups
        if group.get('lr_scale') == 4
    ]
    assert group['weight_decay'] == (0.1 if name == 'spline_weight' else 0)  # slopes never decay
    model(x, x)[1].backward()
    optimizer.step()
    assert all((p - then).abs().max() > 1e-3 for p, then in zip(functions, before))


def test_random_functions_at_first():
    model = make(mlp='swiglu', spline_init_std=0.5, **CHANNEL)
    functions = torch.cat([block.mlp.act.spline_weight.flatten() for block in model.transformer.h])
    assert functions.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(activation='tanhh'), "activation='tanhh': expected one of gelu, silu"),
        (dict(use_kan=True, kan_kind='neuron'), "kan_kind='neuron': expected 'edge' or 'channel'"),
        (dict(gelu='exact'), "gelu='exact': expected 'none' or 'tanh'"),
        (dict(CHANNEL, activation='swish'), "activation='swish' learns a slope"),
        (dict(CHANNEL, kan_norm=True), 'kan_hidden, kan_norm, kan_bias and kan_mask are for functions on edges'),
        (dict(CHANNEL, kan_hidden=2.0), 'where mlp_hidden is the width'),
        (dict(use_kan=True, activation='relu2'), "activation='relu2': between KAN layers in the MLP there is none"),
        (dict(CHANNEL, spline_init_std=-0.1), 'spline_init_std must not be negative'),
        (dict(use_kan=True, spline_init_std=0.1), 'spline_init_std must not be negative, and wants'),
        (dict(CHANNEL, mlp_hidden=0.0), 'mlp_hidden'),
        (
            dict(rotary=True, n_embd=6),
            'into heads of an even width, as rotary wants; nearest: n_embd=4 or 8, or n_head=1$',
        ),
        (dict(rotary=True, use_graph=True, graph_place='attention'), 'rotary turns queries and keys'),
    ],
)
def test_families_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(mlp='swiglu'), 'mlp and mlp_hidden are of MLPs without KAN layers on edges'),
        (dict(mlp_hidden=2.0), 'whose width is kan_hidden'),
        (dict(kan_targets='attn', kan_norm=True), "kan_norm and kan_hidden are of .*kan_targets='attn'"),
        (dict(kan_targets='attn,head', kan_hidden=2.0), 'kan_norm and kan_hidden are of KAN layers in'),
    ],
)
def test_idle_settings_are_refused_of_new_models_alone(settings, message):
    config = make(use_kan=True, **settings).config
    with pytest.raises(ValueError, match=message):
        config.refuse_idle()


def test_activations_of_the_mlp():
    """Against their formulas."""
    x = torch.linspace(-3, 3, 12).view(1, 12)
    forms = dict(gelu=F.gelu(x), silu=F.silu(x), relu2=F.relu(x).square(), identity=x, swish=F.silu(x))
    for name, expected in forms.items():
        mlp = make(activation=name, n_embd=12, mlp_hidden=1.0).transformer.h[0].mlp
        assert torch.allclose(mlp.act(x), expected, atol=1e-6) and mlp.gelu is mlp.act
    mlp.act.slope.data.fill_(2.0)
    assert torch.allclose(mlp.act(x), x * torch.sigmoid(2 * x))


@pytest.mark.parametrize('targets', ['mlp', 'attn,mlp,head'])
def test_channel_functions_generate_with_and_without_a_cache(targets):
    model = make(mlp='swiglu', kan_targets=targets, spline_init_std=0.3, **{**CHANNEL}).eval()
    x = torch.randint(model.config.vocab_size, (2, 3))
    cached, plain = (model.generate(x, 4, temperature=0, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 7)


def test_residual_projections_leave_the_functions_before_them():
    model = make(n_layer=3, kan_targets='attn', spline_init_std=1.0, **CHANNEL)
    first, last = (
        torch.cat([getattr(block.attn, name)[0].spline_weight for block in model.transformer.h])
        for name in ('c_attn', 'c_proj')
    )
    assert first.std().item() == pytest.approx(1, rel=0.15) and last.std().item() == pytest.approx(1, rel=0.15)


FORMS = [{}, dict(mlp='swiglu'), dict(use_kan=True)]
FORMS += [dict(use_kan=True, kan_kind='channel', mlp=mlp) for mlp in ('mlp', 'swiglu')]


@pytest.mark.parametrize('slots', FORMS, ids=str)
def test_dropout_acts_on_what_a_block_adds_and_on_the_weights_of_attention(slots):
    block, x = make(dropout=0.5, **slots).train().transformer.h[0], torch.randn(4, 12, 16)
    for module in block.attn, block.mlp:
        assert 0.3 < (module(x) == 0).float().mean() < 0.7
    block.attn.resid_dropout.eval()
    assert not torch.equal(block.attn(x), block.attn(x))
    block.eval()
    assert all(torch.equal(module(x), module(x)) for module in (block.attn, block.mlp))


def test_functions_of_channels_have_the_grid_of_the_config():
    grid = dict(grid_size=4, spline_order=2, grid_min=-3.0, grid_max=2.0)
    model = make(n_layer=1, use_kan=True, kan_kind='channel', kan_targets='attn,mlp,head', **grid)
    functions = [module for module in model.modules() if isinstance(module, ChannelSpline)]
    assert len(functions) == 4
    for phi in functions:
        torch.testing.assert_close(phi.grid[0], -3 + 1.25 * torch.arange(-2.0, 7.0))


def test_utilisation_of_a_head_of_splines():
    vanilla, head = make(), make(use_kan=True, kan_targets='head')
    more = (head.estimate_mfu(1, 1) - vanilla.estimate_mfu(1, 1)) * 312e12
    assert more == pytest.approx(6 * 12 * 8 * 20 * 16)  # eight bases; its token embeddings are looked up only


def test_each_channel_has_a_slope_of_its_own():
    assert make(activation='swish', n_embd=12, mlp_hidden=1.0).transformer.h[0].mlp.act.slope.shape == (12,)
