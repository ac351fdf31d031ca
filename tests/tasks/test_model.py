"""A GPT made ready for a task: the function it keeps, what it sees, what trains, what a checkpoint brings back."""

import copy
import json
import re
from dataclasses import asdict

import pytest
import torch

from configurator import settings_of
from data.loader import load_tokenizer
from data.tokenizer import PretrainedTokenizer
from helpers import Words, byte_pairs, flags
from kan import KANLinear
from model import GPT, GPTConfig
from run.checkpoint import save_checkpoint
from surgery.adapters import LoRALayer
from surgery.causal_lm import CausalLM
from surgery.lora import digest_of, load_lora, lora_off, save_lora
from tasks import model as task_model
from tasks import prompts
from tasks.model import load_base, load_task_model, make_task_model, param_groups, sum_losses, trained_report

pytestmark = pytest.mark.usefixtures('one_thread', 'seed', 'vocabulary')

FULL, HEAD = (dict(finetune_mode=mode, use_lora=False) for mode in ('full', 'head'))
VARIANTS = {
    'full': FULL,
    'head': HEAD,
    'lora': {},
    'dora': dict(use_dora=True, rs_lora=True),
    'kan': dict(FULL, use_kan=True),
    'kan_single_layer': dict(FULL, use_kan=True, kan_single_layer=1),
    'kan-lora': dict(lora_kind='kan'),
    'kan-base': dict(use_kan=True, lora_kind='kan_base', lora_targets='mlp'),
    'graph-lora': dict(use_graph=True),
    'graph-lora-last': dict(use_graph=True, graph_last=1),
    'sparse-graph-lora': dict(use_graph=True, graph_edges='window,topk,same', graph_window=2, graph_topk=2),
}
HEADS = {'cloze': dict(form='cloze'), 'linear': dict(form='linear'), 'sonnets': dict(task='sonnets', batch_size=8)}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
every_head = pytest.mark.parametrize('head', HEADS)
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=True, dropout=0.1)
N_LAYER, C = SIZES['n_layer'], SIZES['n_embd']


TOKENIZER = Words()
ANSWERS = prompts.answer_ids(prompts.TASKS['sst'], TOKENIZER)


@pytest.fixture
def vocabulary(monkeypatch):
    """These words for every checkpoint."""
    monkeypatch.setattr(task_model, 'load_tokenizer', lambda checkpoint, vocab_size: TOKENIZER)


def stir(model, scale=0.3, trained=False):
    """Weights large enough that every path matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad or not trained:
                p.add_(torch.randn_like(p), alpha=scale)
    return model


def make_base(**model_args):
    """With rows beyond the vocabulary, as nanoGPT pads it."""
    return stir(GPT(GPTConfig(**{**SIZES, 'vocab_size': TOKENIZER.vocab_size + 3, **model_args}))).eval()


@pytest.mark.parametrize('targets', ['attn', 'attn,lm_head'])
def test_answers_are_read_off_in_float32(targets):
    model = make_task_model(make_base(), TOKENIZER, settings_for('lora', lora_targets=targets)).eval()
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(torch.randint(TOKENIZER.vocab_size, (3, 5)), torch.tensor([5, 5, 5]))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def settings_for(variant, head='cloze', **more):
    if 'graph' in variant:
        pytest.importorskip('torch_geometric')
    small = dict(lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, graph_heads=2)
    return settings_of('finetune.py', []) | small | HEADS[head] | VARIANTS[variant] | more


def make(variant, head, base=None, **more):
    settings = settings_for(variant, head, **more)
    return make_task_model(base or make_base(), TOKENIZER, settings).eval(), settings


def tokens(B=3, T=9):
    return torch.randint(TOKENIZER.vocab_size, (B, T)), torch.tensor([T, T - 4, 2][:B])


def train(model, settings, n_steps=3, lr=1e-2):
    """Steps on one random batch; returns the losses."""
    optimizer, losses = torch.optim.AdamW(param_groups(model, settings | dict(learning_rate=lr)), lr=lr), []
    idx, lengths = tokens()
    labels = torch.tensor([3, 0, 4]) if model.answers else torch.where(idx % 3 == 0, -1, idx)
    for _ in range(n_steps):
        losses.append(sum_losses(model(idx, lengths), labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# the function that is kept, and what it sees


@every_variant
@every_head
@torch.no_grad()
def test_answers_are_at_first_those_of_the_gpt(variant, head):
    base = make_base()
    idx, lengths = tokens()
    x = base.features(idx)
    logits, last = base(idx, idx)[0], x[torch.arange(3), lengths - 1]
    assert logits.std() > 0.5
    model, _ = make(variant, head, base)
    found = model(idx, lengths)
    if head == 'sonnets':
        expected = logits
        real = torch.arange(9) < lengths[:, None]
        found, expected = found[real], expected[real]
    elif head == 'cloze':
        expected = torch.stack([row[n - 1, ANSWERS] for row, n in zip(logits, lengths)])
    else:
        layer = model.head.adapters['default'].copy if isinstance(model.head, LoRALayer) else model.head
        assert not layer.bias.any() and 0.01 < layer.weight.std() < 0.03
        expected = last @ layer.weight.T
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_variant
@every_head
def test_no_token_sees_what_comes_after_it(variant, head):
    """By the gradient of one place's output with respect to all embeddings; adapters and gates are far from zero."""
    model, _ = make(variant, head)
    stir(model, trained=True)
    inputs = []
    model.gpt.transformer.wpe.register_forward_hook(
        lambda module, args, out: inputs.append(out.detach().expand(3, -1, -1).requires_grad_()) or inputs[-1]
    )
    idx, lengths = tokens()
    out = model(idx, lengths)
    (x,) = inputs
    if head == 'sonnets':
        for t in range(2):
            (grad,) = torch.autograd.grad(out[:, t].square().sum(), x, retain_graph=True)
            assert grad[:, : t + 1].abs().amin((0, 2)).gt(0).all() and not grad[:, t + 1 :].any()
    else:
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        for row, n in zip(grad, lengths):
            assert row[:n].any(-1).all() and not row[n:].any()


@every_variant
@every_head
@torch.no_grad()
def test_a_row_alone_is_a_row_among_longer_ones(variant, head):
    model, _ = make(variant, head)
    stir(model, trained=True).double()
    idx, lengths = tokens()
    together, other = model(idx, lengths), model(idx.where(torch.arange(9) < lengths[:, None], 0), lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = model(idx[i : i + 1, :n], lengths[i : i + 1])[0]
        for rows in together, other:  # whatever stands in the padding
            row = rows[i, :n] if head == 'sonnets' else rows[i]
            torch.testing.assert_close(row, alone, atol=1e-8, rtol=1e-8)
    assert (together[0, -1] - together[1, -1]).abs().max() > 0.01


@pytest.mark.parametrize('variant, head', [('lora', 'cloze'), ('head', 'cloze')])
def test_answers_are_read_off_in_single_precision(variant, head):
    model, _ = make(variant, head)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert model(*tokens()).dtype == torch.float32


@every_variant
@pytest.mark.parametrize('head, dtype', [('linear', torch.float16), ('sonnets', torch.bfloat16)], ids=str)
def test_half_precision_is_near_single_precision(variant, head, dtype):
    """And the gradients are single."""
    model, _ = make(variant, head)
    stir(model, 0.05, trained=True)
    idx, lengths = tokens()
    expected = model(idx, lengths).detach()
    with torch.autocast('cpu', dtype):
        found = model(idx, lengths)
        loss = sum_losses(found, torch.tensor([3, 0, 4]) if head == 'linear' else idx)
    loss.backward()
    assert found.dtype == (torch.float32 if head == 'linear' else dtype) and loss.dtype == torch.float32
    rows = torch.arange(9) < lengths[:, None] if head == 'sonnets' else slice(None)
    assert (found - expected)[rows].abs().mean() < 0.1 * expected[rows].std()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# what trains

LINEAR = {'attn.c_attn': (C, 3 * C), 'attn.c_proj': (C, C), 'mlp.c_fc': (C, 4 * C), 'mlp.c_proj': (4 * C, C)}


def adapters_of(*names):
    return [
        f'gpt.transformer.h.{i}.{layer}.adapters.default.{name}'
        for i in range(N_LAYER)
        for layer in LINEAR
        for name in names
    ]


def expected_names(variant, head, base):
    if variant == 'head':
        return (
            ['gpt.lm_head.weight'] if head == 'sonnets' else ['head.weight', 'head.bias'][: 1 if head == 'cloze' else 2]
        )
    copied = ['weight', 'bias'] if head == 'linear' else []
    if VARIANTS[variant].get('finetune_mode') == 'full':
        names = ['gpt.' + name for name, _ in base.named_parameters()] + [f'head.{name}' for name in copied]
        blocks = {'kan': [0, 1], 'kan_single_layer': [1]}.get(variant, [])
        return names + [
            f'gpt.transformer.h.{i}.mlp.{layer}.{name}'
            for i in blocks
            for layer in ('c_fc', 'c_proj')
            for name in ('base_weight', 'spline_weight')
        ]
    names = {
        'lora': adapters_of('lora_A.weight', 'lora_B.weight'),
        'dora': adapters_of('lora_A.weight', 'lora_B.weight', 'magnitude'),
        'kan-lora': adapters_of(
            *(f'bottleneck.phi_{end}.{kind}_weight' for end in ('in', 'out') for kind in ('base', 'spline'))
        ),
        'kan-base': [
            name
            for name in adapters_of(*(f'lora_{half}.{kind}_weight' for half in 'AB' for kind in ('base', 'spline')))
            if '.mlp.' in name
        ],
    }
    graph_names = [
        f'gpt.transformer.h.{i}.{layer}'
        for i in range(N_LAYER)
        for layer in (
            *(f'ln_3.adapters.default.copy.{name}' for name in ('weight', 'bias')),
            *(
                f'graph.adapters.default.copy.{name}'
                for name in ('gate', 'conv.att_src', 'conv.att_dst', 'conv.bias', 'conv.lin.weight')
            ),
        )
    ]
    names['graph-lora'] = names['sparse-graph-lora'] = names['lora'] + graph_names
    names['graph-lora-last'] = names['lora'] + [name for name in graph_names if f'.h.{N_LAYER - 1}.' in name]
    return names[variant] + [f'head.adapters.default.copy.{name}' for name in copied]


@every_variant
@every_head
def test_what_trains_is_what_the_settings_say(variant, head):
    base = make_base()
    plain = copy.deepcopy(base)
    model, settings = make(variant, head, base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = expected_names(variant, head, plain)
    replaced = [
        name for name in expected if name not in trained and re.search(r'mlp\.c_\w+\.weight', name)
    ]  # by KAN layers
    assert len(replaced) == {'kan': 4, 'kan_single_layer': 2}.get(variant, 0)
    assert sorted(trained) == sorted({*expected} - {*replaced})
    n = sum(p.numel() for p in trained.values())
    if variant == 'lora':
        assert n == N_LAYER * sum(2 * (I + O) for I, O in LINEAR.values()) + (5 * C + 5) * (head == 'linear')
    whole = make_task_model(plain, TOKENIZER, settings | FULL) if settings['use_lora'] else model
    total = sum(p.numel() for p in whole.parameters())
    total += sum(p.numel() for name, p in trained.items() if '.adapters.' in name and '.copy.' not in name)
    report = trained_report(model, settings)
    assert report.startswith(f'{n:,} of {total:,} parameters train:\n')
    assert sum(int(line.split()[0].replace(',', '')) for line in report.splitlines()[1:]) == n


def test_report_refuses_what_must_not_train():
    model, settings = make('lora', 'cloze')
    model.gpt.transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="gpt.transformer.ln_f.weight must not train with finetune_mode='adapter'"):
        trained_report(model, settings)
    model, settings = make('head', 'linear')
    model.head.bias.requires_grad_(False)
    with pytest.raises(AssertionError, match="head.bias must train with finetune_mode='head'"):
        trained_report(model, settings)


@every_variant
@pytest.mark.parametrize('ratio', [1.0, 8.0])
def test_groups_of_the_optimizer_hold_each_parameter_once(variant, ratio):
    model, settings = make(variant, 'linear', weight_decay=0.2, learning_rate=0.01, lora_plus_ratio=ratio)
    groups = param_groups(model, settings)
    ids = [id(p) for group in groups for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group['weight_decay'] == (0.2 if p.dim() >= 2 else 0.0) for group in groups for p in group['params'])
    fast = {id(p) for name, p in model.named_parameters() if re.search('lora_B|phi_out', name) and ratio > 1}
    for group in groups:
        assert {id(p) in fast for p in group['params']} == {group.get('lr_scale', 1.0) == 8.0}
        assert group.get('lr', 0.01) == 0.01 * group.get('lr_scale', 1.0)


@every_variant
@every_head
def test_the_rest_stays_bit_for_bit_while_what_trains_moves(variant, head):
    model, settings = make(variant, head)
    before = copy.deepcopy(model.state_dict())
    trains = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    losses = train(model, settings)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert after.keys() == before.keys() and trains <= after.keys()
    assert [name for name in after if torch.equal(before[name], after[name]) != (name not in trains)] == []
    embedding, read_off = model.gpt.transformer.wte.weight, model.gpt.lm_head.weight
    assert (embedding is read_off) == (variant != 'head' or head != 'sonnets')


@pytest.mark.parametrize('variant', ['lora', 'kan-lora', 'kan-base', 'graph-lora'])
@pytest.mark.parametrize('head', ['cloze', 'sonnets'])
def test_without_its_adapter_it_is_the_gpt_it_was(variant, head):
    base = make_base()
    idx, lengths = tokens()
    with torch.no_grad():
        logits = base(idx, idx)[0]
    model, settings = make(variant, head, base)
    train(model, settings)
    with torch.no_grad(), lora_off(model):
        found = model(idx, lengths)
    expected = logits if head == 'sonnets' else logits[torch.arange(3), lengths - 1][:, ANSWERS]
    rows = torch.arange(9) < lengths[:, None] if head == 'sonnets' else slice(None)
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (model(idx, lengths) - found)[rows].abs().max() > 0.01


# checkpoints and adapters


def to_checkpoint(model, settings, base_config):
    return {'model': model.state_dict(), 'model_args': asdict(base_config), 'finetune': settings}


@every_variant
@every_head
def test_checkpoint_gives_the_same_model(variant, head, tmp_path):
    base = make_base()
    config = base.config
    model, settings = make(variant, head, base)
    train(model, settings)
    torch.save(to_checkpoint(model, settings, config), tmp_path / 'a.pt')
    torch.manual_seed(9)
    again, tokenizer = load_task_model(torch.load(tmp_path / 'a.pt', weights_only=True))
    idx, lengths = tokens()
    with torch.no_grad():
        assert torch.equal(again.eval()(idx, lengths), model(idx, lengths))
    assert tokenizer is TOKENIZER and again.gpt.config == model.gpt.config
    names = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, again)]
    assert names[0] == names[1]


@every_variant
def test_checkpoint_without_the_base_gives_the_same_model(variant, tmp_path):
    base = make_base()
    whole = {'model': base.state_dict(), 'model_args': asdict(base.config), 'tokenizer': TOKENIZER.to_dict()}
    save_checkpoint(str(tmp_path), whole, is_best=False)
    model_args = asdict(base.config)
    model, settings = make(variant, 'cloze', base, init_from=str(tmp_path), block_size=0)
    train(model, settings)
    digest = digest_of(task_model.frozen_weights(model).items())
    checkpoint = {**task_model.state_of(model, digest), 'finetune': settings, 'model_args': model_args}
    torch.manual_seed(9)
    again, _ = load_task_model(checkpoint, dropout=0.0)
    idx, lengths = tokens()
    with torch.no_grad():
        assert torch.equal(again.eval()(idx, lengths), model.eval()(idx, lengths))
    of_base = {name.replace('.base_layer', '') for name in model.state_dict().keys() - checkpoint['model'].keys()}
    made_of_it = {name for name in of_base if name.endswith(('base_weight', 'spline_weight'))}  # KAN layers
    assert of_base - made_of_it <= {f'gpt.{name}' for name in whole['model']}
    assert bool(made_of_it) == (variant == 'kan-base')
    assert (len(of_base) > 20) == (settings['finetune_mode'] != 'full')
    if of_base:
        whole['model']['transformer.wpe.weight'] += 1
        save_checkpoint(str(tmp_path), whole, is_best=False)
        with pytest.raises(ValueError, match='the weights at init_from are not those that the checkpoint was'):
            load_task_model(checkpoint)
        whole['model_args']['n_head'] = 4
        save_checkpoint(str(tmp_path), whole, is_best=False)
        with pytest.raises(ValueError, match='the model at init_from=.* is made otherwise than that of the checkpoint'):
            load_task_model(checkpoint)
    for path in tmp_path.iterdir():
        path.unlink()
    if of_base:
        with pytest.raises(ValueError, match='was saved without its base, init_from=.*: .* holds no model'):
            load_task_model(checkpoint)
    else:  # it holds all of it
        load_task_model(checkpoint)


@pytest.mark.parametrize('variant', ['full', 'graph-lora'])
def test_checkpoint_gives_a_model_without_dropout(variant):
    base = make_base()
    config = base.config
    model, settings = make(variant, 'linear', base)
    stir(model, trained=True)
    calm, _ = load_task_model(to_checkpoint(model, settings, config), dropout=0.0)
    idx, lengths = tokens()
    with torch.no_grad():
        torch.testing.assert_close(calm.train()(idx, lengths), model(idx, lengths))
        assert not torch.allclose(model.train()(idx, lengths), calm(idx, lengths))


@pytest.mark.parametrize('harm', ['settings', 'sizes', 'weights'])
def test_checkpoint_that_does_not_fit_itself_is_one_line(harm):
    base = make_base()
    model, settings = make('lora', 'linear', base)
    checkpoint = copy.deepcopy(to_checkpoint(model, settings, base.config))
    if harm == 'settings':
        del checkpoint['finetune']['lora_rank']
    elif harm == 'sizes':
        checkpoint['model_args']['n_embd'] = 8
    else:
        del checkpoint['model']['gpt.transformer.wpe.weight']
    with pytest.raises(ValueError, match='the checkpoint does not fit its own settings: ') as error:
        load_task_model(checkpoint)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('variant', ['lora', 'dora', 'kan-lora', 'kan-base', 'graph-lora'])
@pytest.mark.parametrize('head', ['cloze', 'linear'])
def test_adapter_alone_makes_the_model_of_its_base(variant, head, tmp_path):
    base = make_base()
    model, settings = make(variant, head, copy.deepcopy(base))
    train(model, settings)
    save_lora(model, tmp_path)
    torch.manual_seed(9)  # and the new head is another one
    plain = make_task_model(base, TOKENIZER, settings | FULL).eval()
    idx, lengths = tokens()
    with torch.no_grad():
        assert torch.equal(load_lora(plain, tmp_path)(idx, lengths), model(idx, lengths))


# bases


def test_base_is_that_of_a_checkpoint(tmp_path):
    base = make_base(use_kan=True, gelu='tanh')
    checkpoint = {'model': base.state_dict(), 'model_args': asdict(base.config), 'tokenizer': TOKENIZER.to_dict()}
    save_checkpoint(str(tmp_path), checkpoint, is_best=False)
    model, tokenizer = load_base(str(tmp_path), dropout=0.3)
    assert model.config.dropout == 0.3 and tokenizer is TOKENIZER
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    'variant', [dict(FULL), dict(HEAD), {}, dict(lora_kind='kan'), dict(lora_kind='kan_base')], ids=str
)
@pytest.mark.parametrize('head', HEADS)
def test_base_with_kan_layers(variant, head):
    """They are adapted as they are."""
    base = make_base(use_kan=True, kan_targets='mlp,head')
    idx, lengths = tokens()
    with torch.no_grad():
        logits = base(idx, idx)[0]
    model, settings = make('lora', head, base, **variant)
    trained_report(model, settings)
    if head != 'linear':
        expected = logits if head == 'sonnets' else logits[torch.arange(3), lengths - 1][:, ANSWERS]
        with torch.no_grad():
            found = model(idx, lengths)
        rows = torch.arange(9) < lengths[:, None] if head == 'sonnets' else slice(None)
        torch.testing.assert_close(found[rows], expected[rows], atol=1e-4, rtol=1e-4)
    losses = train(model, settings)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('mlp', ['mlp', 'swiglu'])
@pytest.mark.parametrize('bias', [True, False])
def test_kan_surgery_on_other_mlps(mlp, bias):
    base = make_base(mlp=mlp, bias=bias)
    idx, lengths = tokens()
    with torch.no_grad():
        logits = base(idx, idx)[0]
        model, _ = make('kan', 'sonnets', base)
        found = model(idx, lengths)
    torch.testing.assert_close(found[0], logits[0], atol=1e-4, rtol=1e-4)
    assert sum(isinstance(module, KANLinear) for module in model.modules()) == 2 * N_LAYER
    for block in model.gpt.transformer.h:  # the splines of the second layer lie beside the activation, not behind it
        assert isinstance(block.mlp.c_proj.base_activation, torch.nn.GELU if mlp == 'mlp' else torch.nn.Identity)
        assert mlp == 'swiglu' or isinstance(block.mlp.act, torch.nn.Identity)


@pytest.mark.parametrize('variant', ['full', 'lora', 'kan', 'kan-base', 'graph-lora'])
def test_gpt2_of_transformers_gives_what_it_gave(variant, tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=TOKENIZER.vocab_size, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    peer = stir(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), 0.1).eval()
    peer.save_pretrained(tmp_path)
    base, tokenizer = load_base(str(tmp_path), dropout=0.2)
    assert base.config.dropout == 0.2 and tokenizer is TOKENIZER
    idx, lengths = tokens(T=16)
    with torch.no_grad():
        expected = peer(idx).logits
        torch.testing.assert_close(base.eval()(idx, idx)[0], expected, atol=1e-4, rtol=1e-4)
        model, _ = make(variant, 'cloze', base)
        found = model(idx, lengths)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected[torch.arange(3), lengths - 1][:, ANSWERS], atol=1e-4, rtol=1e-4)


def test_gpt2_with_other_tokens_is_refused(tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=52000, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    monkeypatch.setattr(task_model, 'load_tokenizer', load_tokenizer)
    with pytest.raises(ValueError, match='has 52000 tokens and no tokenizer: those of GPT-2 are 50257$'):
        load_base(str(tmp_path), 0.0)


def test_gpt2_with_vocab_json_brings_its_own_tokens(tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=byte_pairs().get_vocab_size(), n_positions=16, n_embd=8, n_layer=1, n_head=1)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_pairs().model.save(str(tmp_path))  # vocab.json and merges.txt
    end = next(token for token, i in byte_pairs().get_vocab().items() if i == 0)
    said = {'tokenizer_class': 'GPT2Tokenizer', **dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), end)}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
    tokenizer = load_base(str(tmp_path), 0.0)[1]
    assert tokenizer.encode_ordinary('and so on') == byte_pairs().encode('and so on').ids


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_base_with_fewer_rows_than_tokens_is_refused(family, tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.AutoConfig.for_model(family, vocab_size=100, max_position_embeddings=16, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_pairs()).save_pretrained(tmp_path)
    n = byte_pairs().get_vocab_size()
    with pytest.raises(ValueError, match=f'has tokens up to {n - 1}, the model 100 rows: not its own'):
        load_base(str(tmp_path), 0.0)


def test_base_that_is_none(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(
        ValueError, match='empty holds no model: expected best.pt or ckpt.pt of train.py, or a model of transformers$'
    ):
        load_base(str(tmp_path / 'empty'), 0.0)
    base = make_base()
    model, settings = make('lora', 'cloze', base)
    save_checkpoint(str(tmp_path), to_checkpoint(model, settings, base.config), is_best=True)
    with pytest.raises(
        ValueError, match='holds a fine-tuned model: init_from wants one of train.py or of transformers$'
    ):
        load_base(str(tmp_path), 0.0)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(task='imdb'), "task='imdb': expected one of sst, cfimdb, quora, sonnets"),
        (dict(form='head'), "form='head': expected cloze, linear"),
        (dict(finetune_mode='lora'), "finetune_mode='lora': expected full, head, adapter"),
        (dict(finetune_mode='full'), "use_lora=True with finetune_mode='full': adapters train alone"),
        (dict(finetune_mode='head'), "use_lora=True with finetune_mode='head': adapters train alone"),
        (dict(use_lora=False), "use_lora=False with finetune_mode='adapter': adapters train alone"),
        (dict(lora_kind='kan_base'), "lora_kind='kan_base' adapts KAN layers: it wants use_kan=True"),
        (
            dict(lora_kind='kan_base', use_kan=True, lora_targets='attn'),
            "adapters are of kind 'lora' or 'kan', not 'kan_base'",
        ),
        (dict(task='sonnets', form='linear'), "form='linear' reads labels off, and sonnets have none"),
        (dict(use_kan=True), 'no adapter is on gpt.transformer.h.0.mlp.c_fc, and untrained it does nothing'),
        (dict(use_kan=True, lora_kind='kan_base', lora_targets='h.0'), 'no adapter is on gpt.transformer.h.1.mlp.c_fc'),
        (dict(lora_targets='lm_head', weights='bfloat16'), "not with weights='bfloat16'"),
        (
            dict(form='linear', lora_targets='lm_head'),
            "lora_targets names lm_head, which takes no part with form='linear'",
        ),
        (dict(lora_kind='vera'), 'kind must be one of lora, kan, kan_base'),
        (dict(lora_rank=0), 'rank must be at least 1, got 0'),
        (dict(lora_targets='attention'), "no layer to replace or adapt by the name 'attention'"),
        (dict(use_kan=True, kan_single_layer=2), 'kan_single_layer=2: the model has blocks 0 to 1; -1 means all'),
        (dict(use_kan=True, kan_single_layer=-2), 'kan_single_layer=-2: the model has blocks'),
        (dict(kan_single_layer=1), 'kan_single_layer=1 .* use_kan=True'),
        (dict(use_kan=True, grid_min=2.0), 'grid_range'),
        (dict(use_graph=True, graph_last=3), 'graph_last=3: expected how many are the last of 2 blocks that get graph'),
        (dict(graph_last=1), 'graph_last=1: expected .* by use_graph=True; 0 means all'),
        (dict(use_graph=True, graph_heads=3), 'n_embd=16 is not divisible by graph_heads=3'),
        (dict(use_graph=True, graph_edges='future'), "graph_edges='future': expected any of"),
        (dict(HEAD, use_graph=True), "use_graph=True with finetune_mode='head': these layers would not train"),
        (dict(HEAD, use_kan=True), "use_kan=True with finetune_mode='head': these layers would not train"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(settings, message):
    if 'use_graph' in settings:
        pytest.importorskip('torch_geometric')
    with pytest.raises(ValueError, match=message) as error:
        make('lora', 'cloze', **settings)
    assert '\n' not in str(error.value)


def test_settings_that_contradict_the_base():
    with pytest.raises(ValueError, match='this model has KAN layers already: leave use_kan out'):
        make('kan', 'cloze', make_base(use_kan=True))
    pytest.importorskip('torch_geometric')
    with pytest.raises(ValueError, match='this model has some already: leave use_graph out'):
        make('graph-lora', 'cloze', make_base(use_graph=True, graph_heads=2))


def test_a_head_behind_functions_shares_its_weight_with_the_embeddings():
    functions = dict(use_kan=True, kan_kind='channel', kan_targets='head')
    model, _ = make('full', 'linear', make_base(**functions))
    assert (
        model.gpt.transformer.wte.weight.requires_grad
        and model.gpt.transformer.wte.weight is model.gpt.lm_head[1].weight
    )
    model, _ = make('head', 'sonnets', make_base(**functions))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {'gpt.lm_head.0.spline_weight', 'gpt.lm_head.1.weight'}


# other models of transformers

FAMILIES = {
    'llama': dict(num_key_value_heads=1, tie_word_embeddings=True),
    'gpt_neox': dict(tie_word_embeddings=False),
    'phi': dict(num_key_value_heads=2, tie_word_embeddings=False),  # its head has a bias
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def make_other(family):
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=C, intermediate_size=24, num_hidden_layers=N_LAYER, num_attention_heads=2)
    sizes.update(vocab_size=TOKENIZER.vocab_size + 3, max_position_embeddings=12, bos_token_id=None, eos_token_id=None)
    config = transformers.AutoConfig.for_model(family, **sizes, **FAMILIES[family], pad_token_id=None)
    return CausalLM(stir(transformers.AutoModelForCausalLM.from_config(config))).eval()


@every_family
@every_variant
@every_head
def test_other_models_keep_their_function_then_what_should_train_does(family, variant, head):
    """And a checkpoint gives the same model again."""
    base = make_other(family)
    described, untouched = task_model.describe(base), copy.deepcopy(base)
    idx, lengths = tokens()
    with torch.no_grad():
        logits = base(idx, idx)[0]
    model, settings = make(variant, head, base)
    rows = torch.arange(9) < lengths[:, None] if head == 'sonnets' else slice(None)
    with torch.no_grad():
        found = model(idx, lengths)
    if head != 'linear':
        expected = logits if head == 'sonnets' else logits[torch.arange(3), lengths - 1][:, ANSWERS]
        torch.testing.assert_close(found[rows], expected[rows], atol=1e-4, rtol=1e-4)
    trained_report(model, settings)
    losses = train(model, settings)
    assert losses[-1] < losses[0]
    if settings['finetune_mode'] == 'adapter':
        kept = {name.replace('.base_layer.', '.'): p for name, p in model.gpt.state_dict().items()}
        names = untouched.state_dict().items()
        same = [torch.equal(kept[name], p) for name, p in names if name in kept]
        assert all(same) and len(same) > 10
    torch.manual_seed(9)
    again, _ = load_task_model(dict(model=model.state_dict(), model_args=described, finetune=settings))
    with torch.no_grad():
        assert torch.equal(again.eval()(idx, lengths)[rows], model(idx, lengths)[rows])


@pytest.mark.parametrize(
    'settings', [dict(form='linear', lora_targets='attn'), dict(finetune_mode='head', use_lora=False)], ids=str
)
def test_a_head_narrower_than_its_model(settings, monkeypatch):
    """As that of OPT-350m."""
    monkeypatch.setitem(FAMILIES, 'opt', dict(ffn_dim=24, word_embed_proj_dim=C // 2))
    settings = settings_of('finetune.py', flags(**settings))
    model = make_task_model(make_other('opt'), TOKENIZER, settings)
    assert model(*tokens()).shape == (3, len(ANSWERS))


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(lora_kind='kan', lora_targets='mlp'),
        dict(use_kan=True, lora_kind='kan_base', lora_targets='mlp'),
        dict(use_kan=True, kan_single_layer=1, finetune_mode='full', use_lora=False),
    ],
    ids=str,
)
def test_a_model_whose_mlps_are_two_layers_of_its_blocks(settings, monkeypatch):
    monkeypatch.setitem(FAMILIES, 'opt', dict(ffn_dim=24, word_embed_proj_dim=C))
    base, (idx, lengths) = make_other('opt'), tokens()
    with torch.no_grad():
        before = base(idx, idx)[0][torch.arange(3), lengths - 1][:, ANSWERS]
        model = make_task_model(base, TOKENIZER, settings_of('finetune.py', flags(dropout=0.0, **settings)))
        torch.testing.assert_close(model.eval()(idx, lengths), before, atol=1e-4, rtol=1e-4)
    kinds = [type(block.fc1).__name__ for block in base.blocks]
    changed = {-1: [0, 1], 1: [1]}[settings.get('kan_single_layer', -1)]
    assert len(kinds) == 2 and all((kind != 'Linear') == (i in changed) for i, kind in enumerate(kinds))


def test_a_first_token_beyond_the_rows_of_the_model_is_refused():
    base, tokenizer = make_base(), PretrainedTokenizer(byte_pairs().to_str(), None)
    base.config.vocab_size, tokenizer.start = 290, [290]
    with pytest.raises(ValueError, match='the tokenizer of x has tokens up to 290, the model 290 rows'):
        task_model.check_vocabulary('x', tokenizer, base)


@pytest.mark.parametrize('family', [None, 'llama'])
@pytest.mark.parametrize('variant', ['full', 'kan-lora', 'sparse-graph-lora'])
def test_blocks_computed_twice_give_the_same_gradients(family, variant):
    base, (idx, lengths), found = make_other(family) if family else make_base(), tokens(), []
    for again in False, True:
        torch.manual_seed(1)
        model, _ = make(variant, 'cloze', copy.deepcopy(base), gradient_checkpointing=again)
        passes = [0]
        block = model.gpt.get_submodule(model.gpt.blocks_path)[1]
        block.get_submodule('mlp').register_forward_pre_hook(lambda *args, passes=passes: passes.append(1))
        model.train()
        torch.manual_seed(2)
        model(idx, lengths).square().sum().backward()
        found.append((sum(passes), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (once, plain), (twice, recomputed) = found
    assert (once, twice) == (1, 2) and plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    'family, variant', [(None, 'lora'), (None, 'kan-lora'), ('llama', 'lora'), ('llama', 'graph-lora')]
)
@pytest.mark.parametrize('head', ['cloze', 'linear'])
def test_adapters_are_in_single_precision_on_weights_in_half(family, variant, head):
    base = make_other(family) if family else make_base()
    kept = {name: b for name, b in base.named_buffers() if b.is_floating_point()}
    model, settings = make(variant, head, task_model.cast(base, torch.bfloat16), weights='bfloat16')
    assert all(torch.equal(b, kept[name]) for name, b in base.named_buffers() if name in kept)
    assert all(b.dtype == torch.float32 for b in kept.values()) and (len(kept) > 0) == (family == 'llama')
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) or '.base_layer.' in name, name
    losses = train(model, settings)
    assert losses[-1] < losses[0]
    for refused in FULL, dict(use_kan=True, lora_kind='kan_base', lora_targets='mlp'):
        with pytest.raises(ValueError, match="weights='bfloat16' is for weights that stay as they are: not with"):
            make('lora', head, make_base().bfloat16(), weights='bfloat16', **refused)
