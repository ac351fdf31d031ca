"""The study of results/minilm: its runs on a small random BERT, and the page made from its records."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import ENV, ROOT, copy_code

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'good', 'bad', 'film', 'dull', 'fine', 'very']


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """The scripts beside a BERT of one layer and a treebank of 400 sentences."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp('clone')
    copy_code(folder)
    (folder / 'results/minilm').mkdir(parents=True)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder / 'data/minilm')
    (folder / 'data/minilm/vocab.txt').write_text('\n'.join(WORDS) + '\n')
    for split in 'train', 'dev':
        rows = [
            f'{i}\t{i}\t{" ".join(WORDS[5 + (i * 7 + j) % 7] for j in range(22 + i % 4))}\t{i % 5}' for i in range(400)
        ]
        (folder / f'data/sst/{split}.csv').write_text('\n'.join(['\tid\tsentence\tsentiment', *rows]) + '\n')
    (folder / 'data/sst/meta.json').write_text('{}')
    return folder


def run(clone, *args):
    env = {**ENV, 'HF_HUB_OFFLINE': '1'}
    return subprocess.run(
        [sys.executable, 'study/minilm.py', *args], cwd=clone, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    'one, found',
    [
        (['search', 'LoRA, rank 96', 1e-3, 0], dict(steps=5, trainable=2 * 96 * 16 + 45)),
        (['final', 'KAN-LoRA', 1e-3, 1], dict(steps=13, trainable=2 * 16 * 16 * 6 + 45)),
        (['time', 'kanified', 1e-3, 0], dict(trainable=2 * 8 * 8 * 5 + 45)),
        (['peft', 'DoRA', 0, 0], {}),
    ],
    ids=str,
)
def test_a_run_of_each_stage(clone, one, found):
    done = run(clone, f'--run={json.dumps(one)}')
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [record[key] for key in ('stage', 'method', 'lr', 'seed')] == one and found.items() <= record.items()
    if one[0] == 'peft':
        assert record['outputs'] < 1e-5 and record['gradients'] < 1e-5
    elif one[0] == 'time':
        assert record['seconds'] > 0 and record['bytes'] > 4 * record['trainable']
    else:
        assert 0 <= record['accuracy'] <= 1
    if one[0] == 'final':
        assert 0 <= record['linear_accuracy'] <= 1 and 0 < record['linear_error']


def test_the_page_comes_from_the_records(clone):
    shutil.copytree(ROOT / 'results/minilm/runs', clone / 'results/minilm/runs')
    done = run(clone, '--stages=')
    assert done.returncode == 0, done.stderr
    table = (ROOT / 'results/minilm/table.md').read_text()
    assert done.stdout == (clone / 'results/minilm/table.md').read_text() == table
    assert (clone / 'results/minilm/accuracy.png').stat().st_size > 10_000
    page, front = (ROOT / 'results/minilm/README.md').read_text(), (ROOT / 'README.md').read_text()
    assert all(line in page for line in table.splitlines())
    assert all(line in front for line in table.split('\n\n')[0].splitlines()[2:])


def test_a_stage_that_is_not_there(clone):
    done = run(clone, '--stages=all')
    assert (
        done.returncode == 1
        and done.stderr.startswith('error: stages: expected any of search, widen')
        and done.stderr.count('\n') == 1
    )
