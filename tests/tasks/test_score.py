"""Predictions against one example at a time, scores against numbers by hand, files byte for byte."""

import importlib.util
import math
import os
import re
import statistics

import pytest
import torch
from torch.nn import functional as F

from configurator import settings_of
from data import course
from helpers import Words, flags
from model import GPT, GPTConfig
from tasks import prompts, score
from tasks.model import count_targets, make_task_model
from tasks.prompts import Example, collate
from tasks.score import (
    predict,
    score_labels,
    score_sonnets,
    sonnet_baselines,
    write_labels,
    write_predictions,
    write_sonnets,
)

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

TOKENIZER = Words()
HEADS = {'cloze': dict(form='cloze'), 'linear': dict(form='linear'), 'sonnets': dict(task='sonnets')}
GREEDY = dict(temperature=0.0)
SONNETS = [
    '\n'.join(f'{word} line {i} of {poem}' for i in range(14)) for poem, word in enumerate(('rose', 'thorn', 'summer'))
]


def make_model(head, **sizes):
    """A GPT with adapters and graph layers, far from silent."""
    pytest.importorskip('torch_geometric')
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=True, dropout=0.1) | sizes
    gpt = GPT(GPTConfig(**sizes, vocab_size=TOKENIZER.vocab_size + 3))
    adapters = dict(lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, use_graph=True, graph_heads=2)
    model = make_task_model(gpt, TOKENIZER, settings_of('finetune.py', flags(**adapters, **HEADS[head])))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


# predictions


def draw_examples(n, head):
    examples = []
    for i in range(n):
        ids = torch.randint(TOKENIZER.vocab_size, (2 + (5 * i) % 9,)).tolist()
        examples.append(
            Example(str(i), ids, text='x' if head == 'sonnets' else '', label=None if head == 'sonnets' else i % 5)
        )
    return examples


@pytest.mark.parametrize('head', HEADS)
def test_loss_and_predictions_are_those_of_one_example_at_a_time(head):
    model = make_model(head)
    examples = draw_examples(7, head)
    total, predictions = predict(model, examples, 3, 'cpu', 'float32')
    losses, labels = [], []
    with torch.no_grad():
        model.eval()
        for example in examples:
            if head == 'sonnets':
                logits, _ = model.gpt(torch.tensor([example.ids[:-1]]), torch.tensor([example.ids[1:]]))
                losses += [-logits[0, t].log_softmax(-1)[i].item() for t, i in enumerate(example.ids[1:])]
            else:
                logits = model(torch.tensor([example.ids]), torch.tensor([len(example.ids)]))[0]
                losses.append(-logits.log_softmax(-1)[example.label].item())
                labels.append(logits.argmax().item())
    assert total == pytest.approx(sum(losses), rel=1e-5)
    assert count_targets(examples) == len(losses)
    assert predictions == (labels or [None] * 7)
    assert predict(model, examples, 3, 'cpu', 'float32', stop=[1.0]) is None and model.training
    idx, lengths, targets = collate(examples, 'cpu')
    with torch.no_grad():
        whole = F.cross_entropy(model.eval()(idx, lengths).flatten(0, -2), targets.flatten(), ignore_index=-1)
    assert total / len(losses) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize('head', ['cloze', 'linear'])
def test_scores_of_labels_are_those_of_the_predictions(head):
    model, examples = make_model(head), draw_examples(7, head)
    total, predictions = predict(model, examples, 3, 'cpu', 'float32')
    scores, found = score.score(model, TOKENIZER, 'sst', examples, 3, 'cpu', 'float32', {})
    labels = [example.label for example in examples]
    assert found == predictions and scores == {'loss': total / 7, **score_labels(labels, predictions)}
    for example in examples:
        example.label = None  # as in test
    assert score.score(model, TOKENIZER, 'sst', examples, 3, 'cpu', 'float32', {}) == ({}, predictions)
    assert score.score(model, TOKENIZER, 'sst', examples, 3, 'cpu', 'float32', {}, stop=[1.0]) is None


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_logits_that_are_no_numbers_have_no_scores(number):
    model, examples = make_model('linear'), draw_examples(4, 'linear')
    next(model.gpt.transformer.ln_f.parameters()).data[0] = number
    for example in examples[::3]:
        example.label = None
    with pytest.raises(ValueError, match='sst: the logits are not finite: the weights have diverged'):
        score.score(model, TOKENIZER, 'sst', examples, 3, 'cpu', 'float32', {})


def test_scores_of_sonnets_are_those_of_what_is_written():
    """Of prompts alone there are none."""
    model = make_model('sonnets', block_size=300)
    texts = [f'{text[:20]}\nb\nc\n{text[20:60]}' for text in SONNETS]
    examples = [Example(str(i), [], text=text) for i, text in enumerate(texts)]
    scores, written = score.score(model, TOKENIZER, 'sonnets', examples, 3, 'cpu', 'float32', GREEDY)
    assert all(poem.startswith(prompts.prompt_of(text).rstrip('\n')) for poem, text in zip(written, texts))
    assert scores == score_sonnets(written, texts)
    for example in examples:
        example.text = prompts.prompt_of(example.text).rstrip('\n')
    assert score.score(model, TOKENIZER, 'sonnets', examples, 3, 'cpu', 'float32', GREEDY) == ({}, written)
    assert score.score(model, TOKENIZER, 'sonnets', examples, 3, 'cpu', 'float32', GREEDY, stop=[1.0]) is None


@pytest.mark.parametrize('name', prompts.TASKS)
def test_missing_package_is_named_beforehand(name, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, 'find_spec', asked.append)
    package = 'sacrebleu' if name == 'sonnets' else 'sklearn'
    with pytest.raises(ValueError, match=f'the scores of {name} need {package}: pip install -r '):
        score.check_packages(name)
    assert asked == [package]
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: object())
    score.check_packages(name)


# scores


def test_accuracy_and_macro_f1_by_hand():
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    # label 0: 2 right of 3 predicted and 3 true, F1 2/3; label 1: 1 of 3 and 2, F1 2/5; label 2: never predicted, 0
    scores = score_labels(labels, predictions)
    assert scores == pytest.approx({'accuracy': 3 / 6, 'macro_f1': (2 / 3 + 2 / 5) / 3})
    assert all(type(value) is float for value in scores.values())
    assert score_labels(labels, labels) == {'accuracy': 1.0, 'macro_f1': 1.0}
    with pytest.raises(ValueError, match='got 2 and 1'):
        score_labels([0, 1], [0])
    with pytest.raises(ValueError, match='at least one'):
        score_labels([], [])


def test_chrf_by_hand():
    """
    The text 'abcdxf' shares n-grams with 'abcdef': 5, 3, 2, 1 of the 6, 5, 4, 3 of n = 1 to 4; none of n = 5 and 6.
    Precision and recall are the same, and with them their F-score; sacrebleu takes their mean over n.
    """
    expected = 100 * (5 / 6 + 3 / 5 + 2 / 4 + 1 / 3) / 6
    given = 'x\ny\nz\n'
    assert score_sonnets([given + 'abcdxf'], [given + 'abcdef'])['chrf_continuation'] == pytest.approx(expected)


def test_chrf_is_that_of_sacrebleu_and_of_the_lines_said():
    import sacrebleu

    written = [SONNETS[0][:-20] + 'something else', SONNETS[2]]
    scores = score_sonnets(written, SONNETS[:2])
    assert scores['chrf'] == pytest.approx(sacrebleu.corpus_chrf(written, [SONNETS[:2]]).score)
    rest = [[''.join(text.splitlines(keepends=True)[3:]) for text in texts] for texts in (written, SONNETS[:2])]
    assert scores['chrf_continuation'] == pytest.approx(sacrebleu.corpus_chrf(rest[0], [rest[1]]).score)
    assert 20 < scores['chrf_continuation'] < scores['chrf'] + 20 < 110
    assert score_sonnets(SONNETS, SONNETS) == pytest.approx({'chrf': 100.0, 'chrf_continuation': 100.0})


def test_a_sonnet_without_continuation_scores_zero():
    given = ['\n'.join(text.split('\n')[:3]) for text in SONNETS]
    scores = score_sonnets(given, SONNETS)
    assert scores['chrf_continuation'] == 0 < scores['chrf'] == sonnet_baselines(SONNETS, SONNETS, [0])['prompt']


def test_baselines():
    train = ['\n'.join(f'{letter}{i}' * 9 for i in range(14)) for letter in 'uvw']
    scores = sonnet_baselines(train, SONNETS, range(4))
    assert scores.keys() == {'prompt', 'random', 'random_std', 'random_continuation', 'random_continuation_std'}
    assert scores == sonnet_baselines(train, SONNETS, range(4)) != sonnet_baselines(train, SONNETS, range(4, 8))
    singles = [sonnet_baselines(train, SONNETS, [seed]) for seed in range(4)]
    assert all(math.isnan(single['random_std']) for single in singles)
    for name in 'random', 'random_continuation':
        values = [single[name] for single in singles]
        assert scores[name] == pytest.approx(statistics.mean(values)) and len(set(values)) > 1
        assert scores[name + '_std'] == pytest.approx(statistics.stdev(values))
    others = sonnet_baselines([*SONNETS[:1], *train[:1]], SONNETS[:1], range(9))  # never the one that is scored
    assert others['random_continuation'] < 5 and others['random_std'] == 0
    with pytest.raises(ValueError, match='want another one in train'):
        sonnet_baselines(SONNETS[:1], SONNETS[:1], [0])


def test_sonnets_are_as_long_here_as_in_tasks():
    assert all(score.split_sonnet(text)[0] + '\n' == prompts.prompt_of(text) for text in SONNETS)


# files


def test_labels_of_the_course(tmp_path):
    path = tmp_path / 'out.csv'
    for name in 'sst', 'cfimdb':
        write_labels(path, prompts.TASKS[name], ['d1', 'd2'], [1, torch.tensor(0)])
        assert path.read_bytes() == b'id \t Predicted_Sentiment \nd1, 1 \nd2, 0 \n'
    write_labels(path, prompts.TASKS['quora'], ['7 x-1', '8 y-2'], [torch.tensor(1), 0])
    assert path.read_bytes() == b'id \t Predicted_Is_Paraphrase \n7 x-1, 8505 \n8 y-2, 3919 \n'
    with pytest.raises(ValueError, match='got 2 and 1'):
        write_labels(path, prompts.TASKS['sst'], ['d1', 'd2'], [1])
    assert len(path.read_bytes().splitlines()) == 3  # the file before it stays


def test_sonnets_of_the_course(tmp_path):
    path = tmp_path / 'sonnets.txt'
    write_sonnets(path, [0, 1], ['a\nb', 'c é'])
    assert path.read_bytes() == '--Generated Sonnets-- \n\n\n0\na\nb\n\n\n1\nc é\n\n'.encode()
    write_sonnets(path, ['132', '133', '134'], SONNETS)
    assert course.read_sonnets(path) == list(zip(['132', '133', '134'], SONNETS))


def test_file_of_predictions_is_named_by_task_and_split(tmp_path):
    examples = [Example('d1', [], 1), Example('d2', [], 0)]
    folder = tmp_path / 'new' / 'predictions'
    write_predictions(folder, 'sst', 'dev', examples, [1, 0])
    write_predictions(folder, 'sonnets', 'test', examples, SONNETS[:2])
    assert sorted(os.listdir(folder)) == ['sonnets-test-out.txt', 'sst-dev-out.csv']
    assert (folder / 'sst-dev-out.csv').read_text() == 'id \t Predicted_Sentiment \nd1, 1 \nd2, 0 \n'
    assert re.findall(r'\n(d\d)\n', (folder / 'sonnets-test-out.txt').read_text()) == ['d1', 'd2']
