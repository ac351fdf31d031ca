"""eval.py against losses computed token by token."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.loader import open_split, write_meta, write_split
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from helpers import (
    SHAPE,
    TINY,
    TOKENIZER,
    complaint,
    flags,
    make_checkpoint,
    read_log,
    run_forked,
    train,
    write_dataset,
)
from run.checkpoint import build_model
from run.cost import count_flops
from run.files import sha256_of

T = SHAPE['block_size']


def evaluate(folder, *args):
    done = run_forked(folder, 'eval.py', '--device=cpu', *args)
    assert done.returncode == 0, done.stderr
    *text, line = done.stdout.strip().split('\n')
    return json.loads(line)


@pytest.fixture(scope='module')
def model_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    dataset = write_dataset(folder / 'data', n_val=3 * T + 6)
    return folder, dataset, make_checkpoint(folder / 'out')


@pytest.mark.parametrize('stride', [1, 3, T // 2, T])
@torch.no_grad()
def test_every_token_counts_once_after_the_context_its_stride_leaves(model_and_data, stride):
    folder, dataset, checkpoint = model_and_data
    result = evaluate(folder, f'--dataset={dataset}', f'--stride={stride}', '--batch_size=3')
    model, data = build_model(checkpoint).eval(), torch.from_numpy(open_split(dataset, 'val').astype(np.int64))
    losses, start = [], 0
    for i in range(1, len(data)):  # the loss of token i, in the first window that reaches it
        while start + T < i:
            start = min(start + stride, len(data) - 1 - T)
        logits, _ = model(data[None, start:i])
        losses.append(F.cross_entropy(logits[0, -1], data[i]).item())
    assert result['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (result['tokens'], result['stride'], result['block_size']) == (len(data) - 1, stride, T)


def test_a_loss_that_is_no_number_is_an_error(tmp_path):
    dataset = write_dataset(tmp_path / 'data', n_val=3 * T)
    state = make_checkpoint(tmp_path / 'out')
    state['model']['transformer.ln_f.weight'][0] = math.nan
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    for script, args in ('eval.py', [f'--dataset={dataset}']), ('sample.py', []), ('sample.py', ['--temperature=0']):
        assert 'the weights have diverged' in complaint(tmp_path, script, '--device=cpu', *args)


def test_a_loss_beyond_all_perplexities(tmp_path):
    """Of a model that is sure of the wrong thing."""
    dataset = write_dataset(tmp_path / 'data', n_val=3 * T)
    state = make_checkpoint(tmp_path / 'out')
    state['model']['lm_head.weight'] *= 1e6
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    done = run_forked(tmp_path, 'eval.py', '--device=cpu', f'--dataset={dataset}')
    assert done.returncode == 0 and 'perplexity inf' in done.stdout, done.stderr

    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    result = json.loads(done.stdout.splitlines()[-1], parse_constant=refuse)
    assert result['loss'] > 709 and result['perplexity'] is None and result['bits_per_char'] > 1000


def test_batch_size_changes_nothing(model_and_data):
    folder, dataset, _ = model_and_data
    one, many = (evaluate(folder, f'--dataset={dataset}', f'--batch_size={n}')['loss'] for n in (1, 64))
    assert one == pytest.approx(many, rel=1e-6)
    assert evaluate(folder, '--init_from=out', f'--dataset={dataset}', '--batch_size=1')['loss'] == one


def test_agrees_with_training_on_the_same_windows(tmp_path):
    dataset = write_dataset(tmp_path / 'data', n_val=20 * T + 1)
    train(tmp_path, dataset, eval_iters=20, **{'use_kan': True})
    result = evaluate(tmp_path, f'--stride={T}')
    log = read_log(tmp_path / 'out')
    assert result['loss'] == pytest.approx(min(line['val_loss'] for line in log[1:]), rel=1e-6)
    assert result['dataset'] == dataset and result['iter_num'] <= TINY['max_iters']


def test_another_text_under_the_name_of_that_trained_on_is_told(tmp_path):
    dataset = write_dataset(tmp_path / 'data', n_val=3 * T)
    train(tmp_path, dataset)
    for n_val in 3 * T, 4 * T:
        write_dataset(tmp_path / 'data', n_val=n_val)
        for name in dataset, './data', '':
            said = run_forked(tmp_path, 'eval.py', '--device=cpu', *flags(dataset=name) if name else []).stderr
            warning = f'warning: val of {name or dataset!r} is another text by now than that of the run'
            assert said.startswith(warning) if n_val > 3 * T else not said
    other = write_dataset(tmp_path / 'other', n_val=3 * T)
    assert not run_forked(tmp_path, 'eval.py', '--device=cpu', f'--dataset={other}').stderr


def test_bits_are_per_character_and_per_byte(tmp_path):
    tokenizer = CharTokenizer('aé€😀')
    dataset = write_dataset(tmp_path / 'data', tokenizer=tokenizer, n_val=300)
    train(tmp_path, dataset)
    result = evaluate(tmp_path)
    text = tokenizer.decode(open_split(dataset, 'val')[1:])
    assert (result['chars'], result['bytes']) == (299, len(text.encode()))
    nats = result['loss'] * 299
    assert result['bits_per_char'] == pytest.approx(nats / math.log(2) / 299)
    assert result['bits_per_byte'] == pytest.approx(nats / math.log(2) / len(text.encode()))


def test_split_shorter_than_the_context(model_and_data, tmp_path):
    folder, _, _ = model_and_data
    dataset = write_dataset(tmp_path / 'short', n_val=T - 3)
    assert evaluate(folder, f'--dataset={dataset}')['tokens'] == T - 4


def test_checkpoint_of_nanogpt(model_and_data, tmp_path):
    """Without a vocabulary and with the prefix of torch.compile: that of the data set, and the same loss."""
    folder, dataset, checkpoint = model_and_data
    ours = evaluate(folder, f'--dataset={dataset}')
    model_args = {
        name: checkpoint['model_args'][name]
        for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    }
    state = {f'_orig_mod.{name}': p for name, p in checkpoint['model'].items()}
    torch.save({'model': state, 'model_args': model_args, 'config': {'dataset': dataset}}, tmp_path / 'ckpt.pt')
    theirs = evaluate(tmp_path, '--out_dir=.')
    assert theirs['loss'] == ours['loss'] and theirs['bits_per_byte'] == ours['bits_per_byte']


def test_another_vocabulary_is_refused_where_the_checkpoint_holds_none(model_and_data, tmp_path):
    _, _, checkpoint = model_and_data
    torch.save({'model': checkpoint['model'], 'model_args': checkpoint['model_args']}, tmp_path / 'ckpt.pt')
    other = write_dataset(tmp_path / 'few', tokenizer=CharTokenizer('abcdef'))
    words = complaint(tmp_path, 'eval.py', '--out_dir=.', f'--dataset={other}')
    assert f'has 6 different tokens, the model {TOKENIZER.vocab_size}: name one with its vocabulary' in words


def test_weights_of_gpt2_on_byte_pairs(tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=50257)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / 'gpt2')
    tokenizer = GPT2Tokenizer()
    text = 'A rose is a rose — is a rosé. ' * 9
    for split in ('train', 'val'):
        write_split(tmp_path, split, tokenizer.encode_ordinary(text))
    write_meta(tmp_path, tokenizer, 'a poem')
    result = evaluate(tmp_path, f'--init_from={tmp_path}/gpt2', f'--dataset={tmp_path}')
    first = len(tokenizer.decode_bytes(tokenizer.encode_ordinary(text)[:1]))
    assert result['bytes'] == len(text.encode()) - first and result['chars'] == len(text) - first
    assert result['loss'] == pytest.approx(math.log(50257), abs=0.3)


def test_a_third_part_of_a_text(model_and_data, tmp_path):
    ids = dict(train=torch.arange(200) % 8, val=torch.arange(100) % 7, test=torch.arange(60) % 5)
    for split, tokens in ids.items():
        write_split(tmp_path, split, tokens)
    write_meta(tmp_path, TOKENIZER, 'three parts', ('train.bin', 'val.bin', 'test.bin'))
    found = evaluate(model_and_data[0], f'--dataset={tmp_path}', '--split=test')
    assert (found['tokens'], found['split']) == (59, 'test')
    assert found['sha256'] == sha256_of(tmp_path / 'test.bin')
    (tmp_path / 'test.bin').write_bytes(b'\0\0' * 60)
    flags = f'--dataset={tmp_path}', '--split=test'
    assert 'test.bin does not match its checksum' in complaint(model_and_data[0], 'eval.py', *flags)


def test_mistakes_are_named(model_and_data, tmp_path):
    folder, dataset, checkpoint = model_and_data
    assert 'no checkpoint' in complaint(tmp_path, 'eval.py', f'--dataset={dataset}')
    assert "split='all': expected train, val, test or dev" in complaint(
        folder, 'eval.py', f'--dataset={dataset}', '--split=all'
    )
    for split in 'test', 'dev':
        found = complaint(folder, 'eval.py', f'--dataset={dataset}', f'--split={split}')
        assert f'has the splits train and val, and no {split}' in found
    other = write_dataset(tmp_path / 'other', tokenizer=CharTokenizer(TOKENIZER.chars[::-1]))
    assert 'another vocabulary' in complaint(folder, 'eval.py', f'--dataset={other}')
    torch.save({'model': checkpoint['model'], 'model_args': checkpoint['model_args']}, tmp_path / 'ckpt.pt')
    assert 'name it by --dataset' in complaint(tmp_path, 'eval.py', '--out_dir=.')


def test_stride_of_half_a_block_and_costs(model_and_data):
    folder, dataset, checkpoint = model_and_data
    found = evaluate(folder, f'--dataset={dataset}')
    assert (found['stride'], found['block_size']) == (T // 2, T)
    assert found['parameters'] == sum(p.numel() for p in build_model(checkpoint).parameters())
    assert found['flops_per_token'] == count_flops(checkpoint['model_args'])


def test_a_split_that_is_not_scored_is_not_read(tmp_path, model_and_data):
    folder, dataset, _ = model_and_data
    shutil.copytree(dataset, tmp_path / 'data')
    (tmp_path / 'data/train.bin').write_bytes(b'damaged ')
    found = evaluate(folder, f'--dataset={tmp_path}/data')
    assert found['loss'] == evaluate(folder, f'--dataset={dataset}')['loss']
