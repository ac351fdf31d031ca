"""The study of results/minilm: its runs on a small random BERT, and the page made from its records."""

import copy
import json
import random
import shutil

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from helpers import ROOT, copy_code, run_forked
from study import minilm
from study.runner import read_runs
from surgery.lora import LoRAConfig, add_lora, lora_layers, lora_off
from tasks.prompts import Example

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'good', 'bad', 'film', 'dull', 'fine', 'very']


def make_bert():
    """A BERT of one layer and 8 features, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertModel(BertConfig(vocab_size=len(WORDS), **sizes))


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """The scripts beside a small BERT and a treebank of 400 sentences."""
    folder = tmp_path_factory.mktemp('clone')
    copy_code(folder)
    (folder / 'results/minilm').mkdir(parents=True)
    make_bert().save_pretrained(folder / 'data/minilm')
    (folder / 'data/minilm/vocab.txt').write_text('\n'.join(WORDS) + '\n')
    for split in 'train', 'dev':
        words = [' '.join(WORDS[5 + (i * 7 + j) % 7] for j in range(22 + i % 4)) for i in range(400)]
        rows = [f'{i}\t{i}\t{sentence}\t{i % 5}' for i, sentence in enumerate(words)]
        (folder / f'data/sst/{split}.csv').write_text('\n'.join(['\tid\tsentence\tsentiment', *rows]) + '\n')
    (folder / 'data/sst/meta.json').write_text('{}')
    return folder


def run(clone, *args):
    return run_forked(clone, clone / 'study/minilm.py', *args)


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
    assert found.items() <= record.items()
    if one[0] == 'peft':
        assert record['seconds'] > 0 and record['peft_seconds'] > 0
    elif one[0] == 'time':
        assert record['seconds'] > 0 and record['bytes'] > 4 * record['trainable']
    else:
        assert 0 <= record['accuracy'] <= 1
    if one[0] == 'final':
        assert 0 <= record['linear_accuracy'] <= 1 and 0 < record['linear_error']


@pytest.mark.parametrize(
    'stage, learned, judged',
    [('search', 16, ('train', 6)), ('squash', 16, ('train', 6)), ('final', 48, ('dev', 20))],
)
def test_accuracy_is_that_on_rows_that_were_not_learned_from(monkeypatch, stage, learned, judged):
    def load_split(split):
        return [Example(f'{split} {i}', [5 + i % 7] * (3 + i % 4), i % 5) for i in range(dict(train=48, dev=20)[split])]

    def load_batches(rows, seed=None):
        met.append([row.id for row in rows])
        return plain(rows, seed)

    met, plain = [], minilm.load_batches
    monkeypatch.setattr(minilm, 'load_split', load_split)
    monkeypatch.setattr(minilm, 'load_model', lambda: minilm.Classifier(make_bert()))
    monkeypatch.setattr(minilm, 'load_batches', load_batches)
    monkeypatch.setattr(minilm, 'keep_memory', lambda: None)
    found = minilm.train(stage, 'LoRA', 1e-3, 1)
    rows, others = map(set, met)
    assert (len(rows), len(others)) == (learned, judged[1]) and not rows & others
    assert {row.split()[0] for row in rows} == {'train'} and {row.split()[0] for row in others} == {judged[0]}
    assert found['accuracy'] * judged[1] == pytest.approx(round(found['accuracy'] * judged[1]))


def test_the_nearest_linear_map_is_measured_when_it_is_fitted(monkeypatch):
    fitted = []
    monkeypatch.setattr(minilm, 'load_split', lambda split: [Example(str(i), [5] * 3, i % 5) for i in range(40)])
    monkeypatch.setattr(minilm, 'load_model', lambda: minilm.Classifier(make_bert()))
    monkeypatch.setattr(minilm, 'keep_memory', lambda: None)
    monkeypatch.setattr(minilm, 'count_right', lambda model, rows: 0.25 if fitted else 0.5)
    monkeypatch.setattr(minilm, 'fit_linear', lambda model, batches: fitted.append(model) or {'a': 0.1, 'b': 0.3})
    found = minilm.train('final', 'KAN-LoRA', 1e-3, 1)
    assert (found['accuracy'], found['linear_accuracy']) == (0.5, 0.25)
    assert found['linear_error'] == pytest.approx(0.2)


def test_the_search_goes_on_beyond_the_end_where_the_best_rate_lies(monkeypatch):
    for accuracies, beyond in ((1, 2, 3), 0.027), ((3, 2, 1), 0.00033), ((1, 3, 2), None):
        monkeypatch.setattr(minilm, 'searched', lambda method, found=accuracies: dict(zip((1e-3, 3e-3, 9e-3), found)))
        assert minilm.next_rate('LoRA') == beyond


def test_seconds_are_those_of_ours_and_of_peft(monkeypatch):
    """On a clock that a forward pass of PEFT's layers moves by 3 seconds, one of ours by 1."""
    now = [0.0]

    def load_model():
        model = minilm.Classifier(make_bert())
        model.register_forward_hook(lambda model, *_: now.append(now[-1] + (1 if lora_layers(model) else 3)))
        return model

    rows = [Example(str(i), [5 + i % 7] * 26, i % 5) for i in range(32)]
    monkeypatch.setattr(minilm, 'load_split', lambda split: rows)
    monkeypatch.setattr(minilm, 'load_model', load_model)
    monkeypatch.setattr(minilm, 'keep_memory', lambda: None)
    monkeypatch.setattr(minilm.time, 'perf_counter', lambda: now[-1])
    assert minilm.time_beside_peft('LoRA') == dict(seconds=1.0, peft_seconds=3.0)


def test_a_record_says_which_run_it_is(monkeypatch):
    def run_json(script, run):
        assert script == 'study/minilm.py'
        return {'accuracy': 0.5, 'run': json.loads(run)}

    monkeypatch.setattr(minilm, 'run_json', run_json)
    one = ('final', 'KAN-LoRA', 1e-3, 1)
    record = minilm.make('any', one, None)
    assert [record.pop(key) for key in ('stage', 'method', 'lr', 'seed')] == list(one) and record.pop('device')
    assert record == {'accuracy': 0.5, 'run': list(one)}


def test_runs_of_results_have_the_names_that_the_study_gives_them():
    for name, run in read_runs(ROOT / 'results/minilm/runs.jsonl').items():
        assert name == minilm.NAME.format(run['stage'], run['method'], run['lr'], run['seed'])
    wanted = [minilm.list_runs(stage) for stage in ('search', 'widen', 'final', 'squash', 'time', 'peft')]
    assert {minilm.NAME.format(*one) for runs in wanted for one in runs} <= minilm.STUDY.read().keys()
    assert wanted[1] == []  # no learning rate at an end of what was searched is the best


@pytest.mark.parametrize('seed', [None, 0, 3])
@pytest.mark.parametrize('n', [1300, 40, 1])
def test_batches_are_cut_and_shuffled_in_the_order_of_the_records(n, seed):
    """Ids, mask and labels, beside the plain algorithm: a pool of 20 batches sorted by length, batches shuffled."""
    draw = random.Random(n)
    rows = [([draw.randrange(1, 99) for _ in range(draw.randrange(3, 40))], draw.randrange(5)) for _ in range(n)]
    examples, order = [Example(i, ids, label) for i, (ids, label) in enumerate(rows)], list(rows)
    shuffle = None if seed is None else random.Random(seed)
    if shuffle:
        shuffle.shuffle(order)
    pool = 20 * 32 if shuffle else n
    order = [row for i in range(0, n, pool) for row in sorted(order[i : i + pool], key=lambda row: len(row[0]))]
    batches = [order[i : i + 32] for i in range(0, n, 32)]
    if shuffle:
        shuffle.shuffle(batches)
    found = minilm.load_batches(examples, seed)
    assert len(found) == len(batches)
    for (idx, lengths, labels), batch in zip(found, batches):
        T = max(len(ids) for ids, _ in batch)
        assert idx.tolist() == [ids + [0] * (T - len(ids)) for ids, _ in batch]
        mask = torch.arange(T) < lengths.unsqueeze(1)
        assert mask.tolist() == [[j < len(ids) for j in range(T)] for ids, _ in batch]
        assert labels.tolist() == [label for _, label in batch]


def test_a_batch_is_as_good_as_its_sentences_one_by_one():
    """Padding changes no output: the mean is over a sentence's own tokens."""
    model, rows = minilm.Classifier(make_bert()).eval(), [[5, 6, 7], [8, 9], [5, 10, 11, 6, 7, 7]]
    (idx, lengths, _), *_ = minilm.load_batches([Example(i, ids, 0) for i, ids in enumerate(rows)])
    alone = [model(torch.tensor([ids]), torch.tensor([len(ids)])) for ids in sorted(rows, key=len)]
    assert torch.allclose(model(idx, lengths), torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize('method', minilm.PEFT)
def test_adapters_have_the_outputs_and_gradients_of_peft(method):
    """With the same weights, relative to the largest value."""
    from peft import LoraConfig, get_peft_model

    settings, _ = minilm.METHODS[method]
    ours = minilm.Classifier(make_bert()).eval()
    theirs = copy.deepcopy(ours)
    add_lora(ours, LoRAConfig(**settings))
    theirs.head.requires_grad_(False)
    options = dict(use_dora=settings.get('use_dora', False), use_rslora=settings.get('rs_lora', False))
    get_peft_model(theirs.encoder, LoraConfig(target_modules=['query', 'value'], r=16, lora_alpha=32, **options))
    pairs = []
    for path, layer in lora_layers(ours).items():
        adapter, other = layer.adapter, theirs.get_submodule(path)
        pairs.append((adapter.lora_A['weight'], other.lora_A['default'].weight))
        pairs.append((adapter.lora_B['weight'], other.lora_B['default'].weight))
        if adapter.magnitude is not None:
            pairs.append((adapter.magnitude, other.lora_magnitude_vector['default'].weight))
    assert len(pairs) == 2 * (3 if settings.get('use_dora') else 2)
    for p, other in pairs:
        if p.dim() == 2:
            nn.init.normal_(p, std=0.5)  # large enough to be seen in the outputs
        other.data.copy_(p.data)
    idx, lengths = torch.randint(1, len(WORDS), (4, 9)), torch.tensor([9, 7, 9, 3])
    with lora_off(ours):
        base = ours(idx, lengths)
    outputs = [model(idx, lengths) for model in (ours, theirs)]
    assert difference(base, outputs[1]) > 1e-3 and difference(*outputs) < 1e-5
    for y in outputs:
        F.cross_entropy(y, torch.tensor([0, 1, 2, 3])).backward()
    assert all(difference(p.grad, other.grad) < 1e-5 for p, other in pairs)
    assert all(other.grad.abs().max() > 0 for _, other in pairs)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_page_comes_from_the_records(clone):
    shutil.copy(ROOT / 'results/minilm/runs.jsonl', clone / 'results/minilm')
    done = run(clone, '--stages=')
    assert done.returncode == 0, done.stderr
    table = (ROOT / 'results/minilm/table.md').read_text()
    assert done.stdout == (clone / 'results/minilm/table.md').read_text() == table
    assert (clone / 'results/minilm/accuracy.png').stat().st_size > 10_000
    page, guide = (ROOT / 'results/minilm/README.md').read_text(), (ROOT / 'docs/adapters.md').read_text()
    assert all(line in page for line in table.splitlines())
    rows = [[cell.strip() for cell in line.split('|')] for line in table.split('\n\n')[0].splitlines()]
    accuracies = {name: accuracy for _, name, _, accuracy, *_ in rows}
    assert all(accuracies[method] in guide for method in ('LoRA', 'full', 'head only', 'KAN-LoRA'))
    (clone / 'results/minilm/runs.jsonl').unlink()
    done = run(clone, '--stages=')
    assert done.returncode == 1 and 'the search of full is not finished: ' in done.stderr


def test_a_stage_that_is_not_there(clone):
    done = run(clone, '--stages=all')
    assert done.returncode == 1 and done.stderr.startswith('error: stages: expected any of search, widen')
    assert done.stderr.count('\n') == 1
