"""What is kept of frozen blocks: the same features and gradients, no block run twice, and no file of other blocks."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file

from configurator import settings_of
from helpers import Words, together
from model import GPT, GPTConfig
from surgery.causal_lm import CausalLM
from tasks.frozen import FrozenBlocks
from tasks.model import cast, make_task_model
from tasks.prompts import Example, collate

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')
SIZES = dict(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=Words.vocab_size)
LAST_BLOCK = dict(lora_rank=2, lora_dropout=0.0)
ABOUT = ('float32',)
EXAMPLES = [Example(str(i), list(range(i, 2 * i + 3)), label=i % 5) for i in range(6)]  # of 3 to 8 tokens


def gpt(**more):
    return GPT(GPTConfig(**{**SIZES, 'dropout': 0.0, **more}))


def causal_lm(family, **more):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=Words.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    sizes.update(num_attention_heads=2, max_position_embeddings=12, pad_token_id=None, bos_token_id=None)
    config = transformers.AutoConfig.for_model(family, **sizes, **more)
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config))


BASES = {
    'gpt': (gpt, 'transformer.h.2'),
    'dropout': (lambda: gpt(dropout=0.1), 'transformer.h.2'),
    'llama': (lambda: causal_lm('llama'), 'layers.2'),
    'gpt_neox': (lambda: causal_lm('gpt_neox', attention_dropout=0.0, hidden_dropout=0.0), 'layers.2'),
    'bloom': (lambda: causal_lm('bloom'), 'h.2'),
}
every_base = pytest.mark.parametrize('base', [base for base in BASES if base != 'dropout'])


def tuned(base, targets=None, **more):
    """A TaskModel whose last block alone has adapters, which are at work."""
    make, last = BASES[base]
    settings = settings_of('finetune.py', ['--task=sst'])
    model = make_task_model(make(), Words(), {**settings, **LAST_BLOCK, 'lora_targets': targets or last, **more})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def keep(model, path=None):
    frozen = FrozenBlocks(model.gpt)
    if path is not None:
        frozen.load(path)
    frozen.read(EXAMPLES, 2, 'cpu', 'float32')
    return frozen


def loss_and_gradients(model, batch):
    idx, lengths, labels = collate(batch, 'cpu')
    loss = torch.nn.functional.cross_entropy(model(idx, lengths), labels)
    names, trained = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad])
    return {'loss': loss, **dict(zip(names, torch.autograd.grad(loss, trained)))}


@every_base
def test_kept_texts_give_the_same_and_run_no_frozen_block(base):
    model = tuned(base).double()
    batch = [EXAMPLES[i] for i in (4, 0, 5)]  # no batch of `read`: others pad these texts
    expected = loss_and_gradients(model, batch)
    frozen, ran = keep(model), []
    assert (frozen.n, len(frozen.kept)) == (2, len(EXAMPLES))
    for block in model.gpt.get_submodule(model.gpt.blocks_path):
        part = next(iter(block.children()))
        part.register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(loss_and_gradients(model, batch), expected, atol=1e-9, rtol=1e-9)
    assert len(ran) == 1
    loss_and_gradients(model, [*batch, Example('', [3, 1, 4], label=0)])  # one text that is not kept: all blocks run
    assert len(ran) == 1 + 3


@every_base
def test_sonnets_are_written_as_before(base):
    model, idx = tuned(base).eval(), torch.tensor([EXAMPLES[3].ids])
    before = model.gpt.generate(idx, 4, temperature=0)
    keep(model)
    assert torch.equal(model.gpt.generate(idx, 4, temperature=0), before)


def test_a_file_takes_the_place_of_the_blocks(tmp_path):
    model = tuned('llama')
    other = copy.deepcopy(model)
    idx, lengths, _ = collate(EXAMPLES, 'cpu')
    frozen = keep(model)
    path = frozen.path_in(tmp_path / 'kept', ABOUT)
    frozen.save(path)
    expected = model(idx, lengths)
    again = FrozenBlocks(other.gpt)
    again.load(path)
    assert again.read(EXAMPLES, 2, 'cpu', 'float32') == 0
    assert torch.equal(other(idx, lengths), expected)


@pytest.mark.parametrize('weights, dtype', [('bfloat16', 'float32'), ('float32', 'bfloat16'), ('float32', 'float32')])
def test_rounding_is_no_other_file(tmp_path, monkeypatch, weights, dtype):
    """Texts that come twice, in batches of other sizes, and then from a file; of blocks wide enough for rounding."""
    wide = gpt(n_embd=128, block_size=64)
    monkeypatch.setitem(BASES, 'wide', (lambda: cast(wide, getattr(torch, weights)), 'transformer.h.2'))
    model, path = tuned('wide', weights=weights), tmp_path / 'kept'
    texts = [[(7 * i + 3 * j + i * j) % 60 for j in range(5 + 4 * (i % 14))] for i in range(28)]
    examples = [Example(str(i), ids, label=0) for i, ids in enumerate(texts)]
    for batch_size in 28, 3, 1:
        frozen = FrozenBlocks(copy.deepcopy(model).gpt)
        frozen.load(path)
        frozen.read(examples + examples, batch_size, 'cpu', dtype)
        frozen.save(path)
    assert len(load_file(path)) == len(examples)
    with torch.no_grad():
        model.gpt.transformer.h[0].mlp.c_fc.weight.add_(1)
    frozen = FrozenBlocks(model.gpt)
    frozen.load(path)
    with pytest.raises(ValueError, match='not of these blocks'):
        frozen.read(examples, 28, 'cpu', dtype)


def test_what_a_file_has_stays(tmp_path):
    """A run that was first goes on with its own numbers."""
    model, path = tuned('gpt'), tmp_path / 'kept'
    first, second = (FrozenBlocks(copy.deepcopy(model).gpt) for _ in range(2))
    first.kept, second.kept = {'a': torch.zeros(2)}, {'a': torch.ones(2), 'b': torch.ones(2)}
    first.save(path)
    second.save(path)
    second.load(path)
    assert load_file(path).keys() == {'a', 'b'} and not load_file(path)['a'].any()
    assert not second.kept['a'].any() and second.kept['b'].all()


def test_two_that_save_at_once_lose_nothing(tmp_path):
    path, parts = tmp_path / 'kept', [keep(tuned('gpt')) for _ in range(3)]
    for i, frozen in enumerate(parts):
        frozen.kept = {f'{i} {name}': torch.randn(300, 400) for name in frozen.kept}
    together(*(functools.partial(frozen.save, path) for frozen in parts))
    assert load_file(path).keys() == set().union(*(frozen.kept for frozen in parts))


def test_the_name_of_the_file_is_that_of_the_frozen_weights(tmp_path):
    model = tuned('gpt')
    frozen = FrozenBlocks(model.gpt)
    path = frozen.path_in(tmp_path, ABOUT)
    blocks = model.gpt.transformer.h
    with torch.no_grad():
        blocks[2].mlp.c_fc.base_layer.weight.add_(1)  # behind the frozen ones
    assert frozen.path_in(tmp_path, ABOUT) == path
    for p in blocks[1].mlp.c_fc.weight, model.gpt.transformer.wpe.weight:
        with torch.no_grad():
            p[0, 0] += 1
        assert frozen.path_in(tmp_path, ABOUT) != path
        path = frozen.path_in(tmp_path, ABOUT)
    assert frozen.path_in(tmp_path, ('bfloat16',)) != path
    assert FrozenBlocks(tuned('gpt', 'transformer.h.1').gpt).n == 1


def test_a_file_of_other_blocks_is_told(tmp_path):
    path = tmp_path / 'kept'
    keep(tuned('gpt')).save(path)
    with pytest.raises(ValueError, match='the file of frozen_cache is not of these blocks: delete it'):
        keep(tuned('gpt'), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='kept is damaged .*: delete it'):
        keep(tuned('gpt'), path)


def test_says_where_there_is_nothing_to_keep():
    with pytest.raises(ValueError, match='wants frozen blocks below those that train'):
        FrozenBlocks(tuned('gpt', 'transformer.h.0,transformer.h.2').gpt)
    with pytest.raises(ValueError, match='wants frozen blocks below those that train'):
        FrozenBlocks(tuned('llama', finetune_mode='full', use_lora=False).gpt)
    with pytest.raises(ValueError, match='it wants dropout=0'):
        FrozenBlocks(tuned('dropout').gpt)


def test_all_blocks_are_kept_where_the_head_alone_trains():
    model = tuned('llama', finetune_mode='head', use_lora=False)
    idx, lengths, _ = collate(EXAMPLES, 'cpu')
    expected = model(idx, lengths)
    assert keep(model).n == 3
    torch.testing.assert_close(model(idx, lengths), expected, atol=1e-5, rtol=1e-4)
