"""How good a fine-tuned model is: what it predicts, scores of labels and of sonnets, and files of both in the format of
Stanford's course CS224N. sklearn and sacrebleu are needed by the scores alone.
"""

import importlib.util
import math
import os
import random
import statistics

import torch

from data.course import N_PROMPT_LINES
from run.device import autocast
from run.files import write_file
from run.session import progress
from tasks.model import sum_losses
from tasks.prompts import collate, find_task, make_batches, prompt_of, split_sonnet
from tasks.sonnets import write_sonnet

COURSE_LABELS = {'Predicted_Is_Paraphrase': {0: 3919, 1: 8505}}  # there a label is the token of GPT-2: no, yes


@torch.no_grad()
def predict(model, examples, batch_size, device, dtype, stop=()):
    """(sum of the losses, the label given to each example; of sonnets none). None once `stop` holds something."""
    model.eval()
    total, labels = 0.0, {}
    for batch in progress(make_batches(examples, batch_size), 'batch'):
        if stop:
            break
        idx, lengths, targets = collate(batch, device)
        with autocast(device, dtype):
            logits = model(idx, lengths)
        is_finite = logits.amax(-1).isfinite().all()
        total += float(sum_losses(logits, targets)) if is_finite else math.nan
        if model.answers:
            labels.update(zip(map(id, batch), logits.argmax(-1).tolist()))
    model.train()
    return None if stop else (total, [labels.get(id(example)) for example in examples])


def score(model, tokenizer, name, examples, batch_size, device, dtype, sampling, stop=()):
    """(scores, predictions) on examples of the task `name`, None once `stop` holds something. Of labels: loss, accuracy
    and macro F1 ({} where the examples have none), and the labels. Of sonnets see `score_written`.
    """
    if not find_task(name).answers:
        return score_written(model, tokenizer, examples, device, dtype, sampling, stop)
    found = predict(model, examples, batch_size, device, dtype, stop)
    if found is None:
        return None
    total, predictions = found
    if not math.isfinite(total):
        raise ValueError(
            f'{name}: the logits are not finite: the weights have diverged, or {dtype} is too small for them'
        )
    labels = [example.label for example in examples]
    scores = {} if None in labels else {'loss': total / len(labels), **score_labels(labels, predictions)}
    return scores, predictions


def score_written(model, tokenizer, examples, device, dtype, sampling, stop=()):
    """(scores, sonnets) of sonnets written on from their prompts by the settings `sampling` of sonnets.continue_lines:
    those of `score_sonnets`, {} where the prompt is all there is. None once `stop` holds something.
    """
    model.eval()
    with autocast(device, dtype):
        written = [
            write_sonnet(model.gpt, tokenizer, prompt_of(example.text), **sampling)
            for example in progress(examples, 'sonnet')
            if not stop
        ]
    if stop:
        return None
    whole = all(example.text.count('\n') >= N_PROMPT_LINES for example in examples)
    return score_sonnets(written, [example.text for example in examples]) if whole else {}, written


# scores


def text_of(scores):
    return ', '.join(f'{name} {value:.4f}' for name, value in scores.items())


def check_packages(name):
    """ValueError where a package is missing that scores the task `name`, before anything has been trained."""
    package = find_task(name).scored_by
    if importlib.util.find_spec(package) is None:
        raise ValueError(f'the scores of {name} need {package}: pip install -r requirements-all.txt')


def check_pairs(name, one, other):
    if len(one) == 0 or len(one) != len(other):
        raise ValueError(f'expected as many {name}, at least one, got {len(one)} and {len(other)}')


def score_labels(labels, predictions):
    """{'accuracy', 'macro_f1'} from 0 to 1; the F1 of every label that occurs in either counts the same."""
    from sklearn.metrics import accuracy_score, f1_score

    check_pairs('labels as predictions', labels, predictions)
    f1 = f1_score(labels, predictions, average='macro')
    return {'accuracy': float(accuracy_score(labels, predictions)), 'macro_f1': float(f1)}


def chrf(written, sonnets):
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(written, [sonnets]).score


def score_sonnets(written, sonnets):
    """CHRF (chrF2, of the corpus, 0 to 100) of whole texts against the true ones: {'chrf'} of all lines, which the
    given ones raise, and {'chrf_continuation'} of those after them.
    """
    check_pairs('written sonnets as true ones', written, sonnets)
    continuations = [[split_sonnet(text)[1] for text in texts] for texts in (written, sonnets)]
    return {'chrf': chrf(written, sonnets), 'chrf_continuation': chrf(*continuations)}


def sonnet_baselines(train, sonnets, seeds=range(10)):
    """Scores of the texts `sonnets` without a model: 'prompt' is that of the given lines alone; 'random' and
    'random_continuation' those of the given lines with what follows in a sonnet drawn from `train`, as means over
    seeds, and with '_std' their standard deviations (of one seed: NaN).
    """
    scores, others = [], [[text for text in train if text != sonnet] for sonnet in sonnets]
    if not all(others):
        raise ValueError('the scores of random sonnets want another one in train than that which is scored')
    for seed in seeds:
        draw = random.Random(seed)
        drawn = [draw.choice(texts) for texts in others]
        written = [f'{split_sonnet(text)[0]}\n{split_sonnet(other)[1]}' for text, other in zip(sonnets, drawn)]
        scores.append(score_sonnets(written, sonnets))
    baselines = {'prompt': chrf([split_sonnet(text)[0] for text in sonnets], sonnets)}
    for name, key in ('random', 'chrf'), ('random_continuation', 'chrf_continuation'):
        values = [score[key] for score in scores]
        baselines[name] = statistics.mean(values)
        baselines[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else float('nan')
    return baselines


# files


def write_predictions(folder, name, split, examples, predictions):
    """The course's file of predictions: folder/<task>-<split>-out.csv, of sonnets a .txt."""
    os.makedirs(folder, exist_ok=True)
    task, ids = find_task(name), [example.id for example in examples]
    path = os.path.join(folder, f'{name}-{split}-out.{task.suffix}')
    if task.answers:
        write_labels(path, task, ids, predictions)
    else:
        write_sonnets(path, ids, predictions)


def write_labels(path, task, ids, predictions):
    """The course's file of labels (0, 1, ...) for a Task of prompts.py, whose `column` says what they are."""
    check_pairs('ids as predictions', ids, predictions)
    names = COURSE_LABELS.get(task.column, {})
    lines = [f'{i}, {names.get(label, label)} \n' for i, label in zip(ids, map(int, predictions))]
    write_file(path, ''.join([f'id \t {task.column} \n', *lines]))


def write_sonnets(path, numbers, texts):
    """The course's file of sonnets, each under its number."""
    check_pairs('numbers as texts', numbers, texts)
    parts = [f'\n{number}\n{text}\n\n' for number, text in zip(numbers, texts)]
    write_file(path, ''.join(['--Generated Sonnets-- \n\n', *parts]))
