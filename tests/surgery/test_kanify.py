"""KAN layers in models made of others: a pretrained model that still works, and trains on."""

import copy
import functools
import importlib
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import transformers
from transformers.pytorch_utils import Conv1D

from helpers import TINY
from kan import ChannelSpline, KANLinear, broken_rule
from layers import spline
from model import GPT, GPTConfig
from surgery.kanify import as_torch, kanify, kanify_activations
from surgery.lora import LoRAConfig, add_lora

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

ENCODER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
MODELS = {  # class, sizes, layers in blocks
    'BertForSequenceClassification': ('BertConfig', ENCODER, 12),
    'RobertaForSequenceClassification': ('RobertaConfig', ENCODER, 12),
    'DistilBertForSequenceClassification': (
        'DistilBertConfig',
        dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40),
        12,
    ),
    'BartForConditionalGeneration': (
        'BartConfig',
        dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40)
        | dict(encoder_attention_heads=2, decoder_attention_heads=2),
        16,
    ),
    'GPT2LMHeadModel': ('GPT2Config', dict(n_embd=16, n_layer=2, n_head=2, vocab_size=40, eos_token_id=2), 8),
    'LlamaForCausalLM': ('LlamaConfig', ENCODER, 14),
    'FalconForCausalLM': ('FalconConfig', ENCODER, 8),
    'T5ForConditionalGeneration': (
        'T5Config',
        dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0),
        16,
    ),
}


def make(name):
    config, sizes, _ = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    for p in model.parameters():  # biases and heads that start at zero would hide what becomes of them
        nn.init.normal_(p, std=0.3) if p.dim() == 1 else None
    return model


IDS = torch.arange(3, 21).view(2, 9)


def run(model):
    labels = dict(labels=IDS) if 'Conditional' in type(model).__name__ else {}
    return model(input_ids=IDS, **labels).logits


def kans(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, KANLinear)}


@pytest.mark.parametrize('name', MODELS)
def test_a_pretrained_model_gives_what_it_gave_and_trains_on(name):
    model = make(name)
    heads = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and 'layer' not in path
    ]
    kept = {path: model.get_submodule(path) for path in heads if '.h.' not in path and '.block.' not in path}
    logits = run(model)
    assert kanify(model, grid_size=3) is model
    assert len(kans(model)) == MODELS[name][2] and not any(type(module) is Conv1D for module in model.modules())
    assert torch.allclose(run(model), logits, rtol=1e-4, atol=1e-5)
    assert kept and all(model.get_submodule(path) is module for path, module in kept.items())
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(4):
        losses.append(run(model).logsumexp(-1).square().mean())
        losses[-1].backward()
        moved = {path: layer.spline_weight.grad.abs().sum() > 0 for path, layer in kans(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and sum(moved.values()) > len(moved) / 2


@pytest.mark.parametrize(
    'name, absorb, activation',
    [
        ('GPT2LMHeadModel', {'mlp.c_proj': 'mlp.act'}, 'transformer.h.{}.mlp.act'),
        (
            'BertForSequenceClassification',
            {'output.dense': 'intermediate.intermediate_act_fn'},
            'bert.encoder.layer.{}.intermediate.intermediate_act_fn',
        ),
    ],
)
def test_an_activation_moves_into_the_layer_after_it(name, absorb, activation):
    model = make(name)
    logits = run(model)
    before = model.get_submodule(activation.format(1))
    kanify(model, absorb=absorb)
    assert torch.allclose(run(model), logits, rtol=1e-4, atol=1e-5)
    assert all(type(model.get_submodule(activation.format(i))) is nn.Identity for i in range(2))
    layers = kans(model)
    absorbed = [path for path, layer in layers.items() if not isinstance(layer.base_activation, nn.Identity)]
    assert len(absorbed) == 2 and layers[absorbed[1]].base_activation is before


def test_layers_share_the_passes_that_are_compiled(monkeypatch):
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, eos_token_id=2)
    model = kanify(transformers.GPT2LMHeadModel(config), 'mlp', absorb={'mlp.c_proj': 'mlp.act'})
    monkeypatch.setattr(spline, 'BACKEND', 'compiled')
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    spline.compiled.cache_clear()
    run(model).square().sum().backward()
    made = spline.compiled.cache_info().currsize
    spline.compiled.cache_clear()
    assert len(kans(model)) == 6 and made == 2 * 2  # forward and backward, of the identity and of the activation


def test_our_gpt_becomes_two_kan_layers_per_mlp():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=32, gelu='tanh', **{name: TINY[name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size')}
        )
    )
    idx = torch.arange(8)[None]
    logits = model(idx, idx)[0]
    kanify(model, 'mlp', absorb={'mlp.c_proj': 'mlp.act'})
    assert torch.allclose(model(idx, idx)[0], logits, atol=1e-5)
    assert list(kans(model)) == ['transformer.h.0.mlp.c_fc', 'transformer.h.0.mlp.c_proj']
    assert isinstance(model.transformer.h[0].mlp.c_proj.base_activation, nn.GELU)


@pytest.mark.parametrize('layer', [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), Conv1D(3, 5)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('settings', [{}, dict(grid_size=2, spline_order=1, grid_range=(-3, 3)), dict(spline_order=0)])
def test_one_layer(layer, dtype, settings):
    model = nn.ModuleDict({'layer': copy.deepcopy(layer)}).to(dtype)
    x = torch.randn(4, 2, 5, dtype=dtype) * 3
    y = model.layer(x)
    kanify(model, 'layer', **settings)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert model.layer(x).dtype == dtype and torch.allclose(model.layer(x), y, rtol=tolerance, atol=tolerance)
    assert (model.layer.bias is None) == (layer.bias is None)


def test_fresh_layers_start_as_kan_layers_do():
    model = make('GPT2LMHeadModel')
    logits = run(model)
    kanify(model, init='fresh', grid_size=2)
    assert not torch.allclose(run(model), logits, atol=0.1)
    assert all(
        layer.spline_weight.abs().sum() > 0 and isinstance(layer.base_activation, nn.SiLU)
        for layer in kans(model).values()
    )


def test_splines_alone_can_train(capsys):
    model = make('BertForSequenceClassification')
    before = {name: p.clone() for name, p in model.named_parameters()}
    kanify(model, ('query', 'value'), train='splines', grid_size=4, spline_order=1)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [
        f'bert.encoder.layer.{i}.attention.self.{which}.spline_weight' for i in range(2) for which in ('query', 'value')
    ]
    old, splines = sum(p.numel() for p in before.values()), 4 * 16 * 16 * 5
    assert (
        capsys.readouterr().out
        == f'4 layers became KAN layers: {old:,} -> {old + splines:,} parameters, {splines:,} of them train\n'
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits = run(model)
    logits.square().sum().backward()
    optimizer.step()
    after = {name.replace('base_weight', 'weight'): p for name, p in model.named_parameters() if 'spline' not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert not torch.allclose(run(model), logits, atol=1e-3)


def test_frozen_layers_stay_frozen():
    model = make('GPT2LMHeadModel').requires_grad_(False)
    model.transformer.h[0].requires_grad_(True)
    kanify(model)
    assert all(p.requires_grad == ('h.0.' in name) for name, p in model.named_parameters())


def test_tied_weights_are_left_alone_unless_named():
    model = make('GPT2LMHeadModel')
    assert 'lm_head' not in kans(kanify(model, ('h', 'transformer')))
    model = make('GPT2LMHeadModel')
    logits = run(model)
    assert list(kans(kanify(model, 'lm_head'))) == ['lm_head']
    assert torch.allclose(run(model), logits, rtol=1e-4, atol=1e-5)


def test_a_module_of_tied_layers_alone_is_named_as_such():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({'a': nn.ModuleDict({'f': shared}), 'b': nn.ModuleDict({'f': shared})})
    for replace in (lambda: kanify(model, 'a'), lambda: add_lora(model, LoRAConfig(target_modules='a'))):
        with pytest.raises(ValueError, match='a.f shares its weight with b.f: it is left alone unless named itself'):
            replace()


def test_a_layer_with_hooks_is_refused_and_a_bias_trains_as_before():
    model = make('GPT2LMHeadModel')
    name, layer = next((name, module) for name, module in model.named_modules() if name.endswith('c_fc'))
    layer.bias.requires_grad_(False)
    handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=f'{name} has hooks, which would be lost'):
        kanify(model, 'c_fc')
    assert model.get_submodule(name) is layer
    handle.remove()
    kanify(model, 'c_fc')
    made = model.get_submodule(name)
    assert made.base_weight.requires_grad and not made.bias.requires_grad


def test_a_forward_put_on_a_layer_is_not_lost():
    """accelerate puts its hooks there."""
    model = make('GPT2LMHeadModel')
    layer = model.transformer.h[0].mlp.c_fc
    layer.forward = functools.partial(type(layer).forward, layer)
    with pytest.raises(ValueError, match='h.0.mlp.c_fc has a forward of its own'):
        kanify(model, 'c_fc')


def test_an_activation_of_a_block_at_two_places_moves_once():
    model = make('GPT2LMHeadModel')
    model.transformer.h[1] = model.transformer.h[0]
    before = run(model)
    kanify(model, 'mlp.c_proj', absorb={'mlp.c_proj': 'mlp.act'})
    assert torch.allclose(run(model), before, rtol=1e-4, atol=1e-5)


def test_an_activation_of_a_compiled_block_is_found_by_its_path():
    blocks = [nn.ModuleDict(dict(act=nn.GELU(), fc2=nn.Linear(6, 4))) for _ in range(2)]
    model = nn.ModuleDict(dict(h=nn.ModuleList(blocks)))
    model.h[0] = torch.compile(model.h[0])
    kanify(model, ['h.0'], absorb={'h.0.fc2': 'h.0.act'})
    assert type(blocks[0].fc2.base_activation) is nn.GELU and type(blocks[0].act) is nn.Identity


def test_it_comes_before_adapters():
    with pytest.raises(ValueError, match='kanify comes before'):
        kanify(add_lora(make('GPT2LMHeadModel'), LoRAConfig()))


BAD = [
    (dict(targets='c_atn'), r"by the name 'c_atn'; there is c_attn \(2\), c_proj \(4\), c_fc \(2\), lm_head \(1\)"),
    (dict(init='keep'), "expected init 'preserve' or 'fresh'"),
    (dict(train='spline'), "train 'all' or 'splines'"),
    (dict(absorb={'c_proj': 'gelu'}), "no layer 'c_proj' among the targets with 'gelu' beside it"),
    (dict(absorb={'c_proj': 'dropout'}), 'must act on each number by itself, always alike, got Dropout'),
    (dict(base_activation=nn.SiLU), 'has the identity as base_activation; absorb takes an activation in'),
    (dict(grid_size=0), 'grid_size must be at least 1'),
    (dict(bias=True), 'has a bias where the layer it replaces has one'),
]


@pytest.mark.parametrize('arguments, message', BAD)
def test_what_cannot_be_done_says_so_and_changes_nothing(arguments, message):
    model = make('GPT2LMHeadModel')
    with pytest.raises(ValueError, match=message):
        kanify(model, **arguments)
    assert not kans(model)


def test_a_model_without_blocks_wants_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r'no linear layers within blocks: name some in targets; there is 0 \(1\), 2 \(1\)'
    ):
        kanify(model)
    assert list(kans(kanify(model, ('0',)))) == ['0']


def test_matrices_of_experts_are_told(capsys):
    import transformers

    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    sizes.update(num_key_value_heads=1, num_local_experts=2)
    kanify(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))
    said = capsys.readouterr().out
    assert 'tensors stay as they are, such as model.layers.0.mlp.experts.' in said
    block = nn.ModuleDict({'a': nn.Linear(4, 4), 'b': nn.Conv1d(4, 4, 3)})
    kanify(nn.ModuleDict({'h': nn.ModuleList([block])}))
    assert 'stay as they are' not in capsys.readouterr().out


def test_layers_that_are_read_and_not_always_called_are_left_alone():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8))
    for name in ('out_proj', 'linear1'):
        with pytest.raises(ValueError, match=rf'{name} is read by the module around it'):
            kanify(model, name)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, activation=nn.GELU()), 1)
    with pytest.raises(ValueError, match='activation is read by the module around it'):
        kanify(encoder, kind='channel', example=torch.randn(3, 8))


@pytest.mark.parametrize(
    'name, sizes, path',
    [
        ('MobileBert', dict(embedding_size=8, intra_bottleneck_size=8, num_feedforward_networks=1), 'dense'),
        ('LayoutLMv3', dict(coordinate_size=2, shape_size=2, visual_embed=False), 'rel_pos_bias'),
    ],
)
def test_layers_whose_weights_other_models_read_are_refused(name, sizes, path):
    sizes.update(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    make = getattr(transformers, {'MobileBert': 'MobileBertForMaskedLM', 'LayoutLMv3': 'LayoutLMv3Model'}[name])
    model = make(getattr(transformers, f'{name}Config')(**sizes))
    named = [
        found for found, layer in model.named_modules() if found.endswith(f'.{path}') and isinstance(layer, nn.Linear)
    ]
    read = named[-1]
    with pytest.raises(ValueError, match=rf'{read} is read by the module around it'):
        kanify(model, read)


def test_layers_whose_weights_a_mamba_reads_are_left_out(capsys):
    sizes = dict(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=20)
    model, idx = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval(), torch.arange(6)[None]
    before = model(idx).logits
    kanify(model)
    assert [path.rpartition('.')[2] for path in kans(model)] == ['in_proj']
    assert 'left out: x_proj (1), dt_proj (1), out_proj (1), each of which is read' in capsys.readouterr().out
    torch.testing.assert_close(model(idx).logits, before)
    with pytest.raises(ValueError, match='mixer.out_proj is read by the module around it'):
        kanify(model, 'out_proj')


def test_a_module_whose_layers_are_all_read_is_refused():
    tdnn = transformers.models.wav2vec2.modeling_wav2vec2.TDNNLayer(transformers.Wav2Vec2Config())
    for change in kanify, lambda model, target: add_lora(model, LoRAConfig(target_modules=(target,))):
        with pytest.raises(ValueError, match='0.kernel is read by the module around it'):
            change(nn.Sequential(tdnn), '0')


def test_layers_whose_weights_another_attention_reads_are_left_out():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    layer = transformers.models.wavlm.modeling_wavlm.WavLMEncoderLayer(transformers.WavLMConfig(**sizes))
    kanify(layer, ('attention', 'feed_forward'))
    found = [path.rpartition('.')[2] for path in kans(layer)]
    assert found == ['gru_rel_pos_linear', 'intermediate_dense', 'output_dense']


@pytest.mark.parametrize('name', ['Detr', 'ConditionalDetr', 'MaskFormerDetr'])
def test_keys_that_a_map_of_attention_reads_are_left_out(name):
    folder = {'Detr': 'detr', 'ConditionalDetr': 'conditional_detr', 'MaskFormerDetr': 'maskformer'}[name]
    module = importlib.import_module(f'transformers.models.{folder}.modeling_{folder}')
    attention = nn.Sequential(getattr(module, f'{name}MHAttentionMap')(8, 2))
    kanify(attention, '0')
    assert list(kans(attention)) == ['0.q_proj']
    with pytest.raises(ValueError, match='0.k_proj is read by the module around it'):
        kanify(attention, 'k_proj')


# activations


def make_block_model(activation=nn.SiLU):
    blocks = [nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 4)) for _ in range(2)]
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), last=nn.Softmax(-1)))


def test_activations_become_functions_that_give_the_same(capsys):
    model, x = make_block_model(), torch.randn(3, 4)
    before = model(x)
    kanify_activations(model, x, grid_size=5)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert [type(block[1]) for block in model.blocks] == [ChannelSpline] * 2 and type(model.last) is nn.Softmax
    assert model.blocks[0][1].spline_weight.shape == (6, 8)
    n = sum(p.numel() for p in make_block_model().parameters())
    assert (
        f'2 activations became learned functions: {n} -> {n + 96} parameters, {n + 96} of them train'
        in capsys.readouterr().out
    )
    model(x).square().sum().backward()
    assert model.blocks[0][1].spline_weight.grad.abs().sum() > 0


def test_functions_alone_train():
    model = kanify_activations(make_block_model(nn.GELU), torch.randn(3, 4), '1.1', train='splines')
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ['blocks.1.1.spline_weight']
    assert type(model.blocks[0][1]) is nn.GELU


def test_the_gate_of_a_llama():
    """Its SiLU, with the same logits and cached generation."""
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    tokens = torch.randint(40, (2, 7))
    before = llama(tokens).logits
    kanify(llama, kind='channel', example=dict(input_ids=tokens), train='splines')
    assert torch.allclose(llama(tokens).logits, before, atol=1e-5)
    functions = [layer.mlp.act_fn for layer in llama.model.layers]
    assert all(isinstance(phi, ChannelSpline) and phi.in_features == 24 for phi in functions)
    assert all(type(phi.base_activation) is nn.SiLU for phi in functions)
    assert sum(p.numel() for p in llama.parameters() if p.requires_grad) == 2 * 24 * 11
    assert llama.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 10)


def test_activations_of_other_libraries_that_are_pytorchs():
    """By what they compute: the fast passes know PyTorch's."""
    activations = pytest.importorskip('transformers').activations.ACT2FN
    same = dict(silu='SiLU()', gelu="GELU(approximate='none')", gelu_new="GELU(approximate='tanh')", relu='ReLU()')
    same.update(gelu_pytorch_tanh="GELU(approximate='tanh')", gelu_python="GELU(approximate='none')", swish='SiLU()')
    for name, plain in same.items():
        assert repr(as_torch(activations[name])) == plain, name
    for name in 'quick_gelu', 'gelu_10', 'relu2', 'mish':
        activation = activations[name]
        assert as_torch(activation) is activation
    for clipped in nn.Hardtanh(0, 20), nn.Hardtanh(0, 1e6), nn.Hardtanh(-50, 1e9):
        assert as_torch(clipped) is clipped


class Square(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


def test_other_activations_are_named_and_those_of_our_gpt_are_known():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match='found no activations within blocks'):
        kanify_activations(make_block_model(Square), x)
    model = make_block_model(Square)
    before = model(x)
    kanify_activations(model, x, ('0.1', '1.1'))
    assert type(model.blocks[0][1]) is ChannelSpline and torch.allclose(model(x), before, atol=1e-6)
    with pytest.raises(ValueError, match="'0.0' is a Linear, which cannot be replaced"):
        kanify_activations(make_block_model(Square), x, '0.0')
    ours = GPT(GPTConfig(vocab_size=8, n_layer=2, n_head=2, n_embd=8, block_size=4, activation='relu2'))
    kanify_activations(ours, torch.zeros(1, 4, dtype=torch.long))
    assert [type(block.mlp.act).__name__ for block in ours.transformer.h] == ['ChannelSpline'] * 2


def test_activations_that_cannot_be_replaced():
    x, shared = torch.randn(3, 4), nn.SiLU()
    twice = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)))
    for model, targets, message in (
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))), None, 'found no activations within blocks'),
        (make_block_model(), 'act', "no layer to replace or adapt by the name 'act'"),
        (twice, None, 'was called 2 times on the example'),
        (make_block_model(nn.PReLU), None, 'found no activations'),
    ):
        with pytest.raises(ValueError, match=message):
            kanify_activations(model, x, targets)
    with pytest.raises(ValueError, match="expected train 'all' or 'splines'"):
        kanify_activations(make_block_model(), x, train='functions')


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(init='fresh'), "init and absorb are for kind 'edge'"),
        (dict(absorb={'a': 'b'}), "init and absorb are for kind 'edge'"),
        (dict(base_activation=nn.ReLU), 'begins as the activation that it replaces: leave base_activation out'),
    ],
)
def test_what_activations_have_no_use_for(settings, message):
    with pytest.raises(ValueError, match=message):
        kanify(make_block_model(), kind='channel', example=torch.randn(3, 4), **settings)


def test_seeing_the_example_leaves_the_model_as_it_was():
    blocks = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.SiLU()))
    model = nn.Sequential(OrderedDict(blocks=blocks)).train()
    model.blocks[0][2].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kanify_activations(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.blocks[0][1].training and not model.blocks[0][2].training


def test_images_and_what_is_not_elementwise_are_refused():
    convolutions = nn.Sequential(OrderedDict(blocks=nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))))
    with pytest.raises(ValueError, match='expected \\(..., channels\\), three dimensions at most'):
        kanify_activations(convolutions, torch.randn(1, 3, 5, 5))
    for layers in [nn.Conv1d(3, 4, 1)], [nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)]:
        in_one_dimension = nn.Sequential(OrderedDict(blocks=nn.Sequential(nn.Sequential(*layers, nn.ReLU()))))
        with pytest.raises(ValueError, match='follows a convolution'):
            kanify_activations(in_one_dimension, torch.randn(2, 3, 5))
    for activation in nn.GLU(), nn.Softmax(0), nn.Softmax(-1):
        assert broken_rule(activation)
    with pytest.raises(ValueError, match='found no activations'):
        kanify_activations(make_block_model(nn.RReLU), torch.randn(3, 4))


def test_an_example_of_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.SiLU()))

        def forward(self, x, y):
            return self.blocks(x + y)

    assert type(kanify_activations(Sum(), (torch.ones(2, 4), torch.ones(2, 4))).blocks[0][1]) is ChannelSpline


@pytest.mark.parametrize('settings', [dict(kind='channel'), dict(kind='neuron'), dict(example=torch.ones(1))])
def test_a_kind_and_its_example(settings):
    with pytest.raises(ValueError, match="expected kind 'edge', or 'channel' and an example"):
        kanify(make_block_model(), **settings)


def test_a_model_with_convolutions_wants_names():
    def make_one():
        block = nn.Sequential(nn.Conv1d(3, 4, 1), nn.LayerNorm(5), nn.ReLU())
        return nn.Sequential(nn.Sequential(block)), torch.randn(2, 3, 5)

    with pytest.raises(ValueError, match='the model has convolutions, .* name in targets'):
        kanify_activations(*make_one())
    assert type(kanify_activations(*make_one(), '2')[0][0][2]) is ChannelSpline  # whoever names it knows


@pytest.mark.parametrize('way', ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'])
def test_hooks_of_any_kind_are_not_lost(way):
    model = nn.ModuleDict({'layer': nn.Linear(4, 4)})
    getattr(model.layer, f'register_{way}')(lambda *arguments: None)
    with pytest.raises(ValueError, match='layer has hooks, which would be lost'):
        kanify(model, 'layer')


class Scaled(nn.Linear):
    """As quantised layers have it, a forward of its own."""

    def forward(self, x):
        return 8 * super().forward(x)


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone():
    model = nn.ModuleDict({'layer': Scaled(4, 4)})
    for replace in (lambda: kanify(model, 'layer'), lambda: add_lora(model, LoRAConfig(target_modules='layer'))):
        with pytest.raises(ValueError, match="'layer' is a Scaled, which cannot be replaced or adapted; there is none"):
            replace()
