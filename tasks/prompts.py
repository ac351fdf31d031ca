"""The four fine-tuning tasks of Stanford's course CS224N and of arXiv 2504.10490: sentiment of film reviews (SST in
five classes, CFIMDB in two), whether two questions are the same (Quora), and sonnets. The one prompt of each, and
batches.
"""

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data import loader
from data.course import N_PROMPT_LINES, check_file, read_rows, read_sonnets


@dataclass
class Example:
    id: str
    ids: list  # the tokens of the prompt, of a sonnet all of it
    label: int = None
    text: str = ''  # of a sonnet


@dataclass(frozen=True)
class Task:
    """A task of labels: the text is followed by `question`, and the word that comes next is the answer."""

    name: str
    before: tuple  # what stands before each sentence
    question: str
    answers: tuple  # the words for the labels 0, 1, ...: the first token of each tells them apart
    column: str  # of the course's files of predictions

    suffix = 'csv'  # of its files in data/<name>
    scored_by = 'sklearn'  # the package that its scores need

    def path(self, split):
        return Path(loader.dataset_folder(self.name), f'{split}.{self.suffix}')

    def read(self, split):
        """The rows of a split, [(id, text, ..., label)]. Of test the label is None."""
        return read_rows(self.name, self.path(split), labelled=split != 'test')

    def encode(self, row, tokenizer, block_size, shots=()):
        """(Example, whether a text was cut) of a row."""
        id, *sentences, label = row
        ids, cut = encode_prompt(self, sentences, tokenizer, block_size, shots)
        return Example(id, ids, label), cut


class Sonnets(Task):
    """The task without answers: the text itself is what is learned."""

    suffix = 'txt'
    scored_by = 'sacrebleu'

    def read(self, split):
        return [(number, text, None) for number, text in read_sonnets(self.path(split), prompts=split == 'test')]

    def encode(self, row, tokenizer, block_size, shots=()):
        id, text, _ = row
        ids, cut = encode_sonnet(text, tokenizer, block_size)
        return Example(id, ids, text=text), cut


QUESTIONS = ('Question 1:', '\nQuestion 2:')
TASKS = {
    task.name: task
    for task in [
        Task('sst', ('',), '\nSentiment:', (' terrible', ' bad', ' okay', ' good', ' great'), 'Predicted_Sentiment'),
        Task('cfimdb', ('',), '\nSentiment:', (' bad', ' good'), 'Predicted_Sentiment'),
        Task('quora', QUESTIONS, '\nThe same question:', (' no', ' yes'), 'Predicted_Is_Paraphrase'),
        Sonnets('sonnets', before=(), question='', answers=(), column=''),
    ]
}


def find_task(name):
    if name not in TASKS:
        raise ValueError(f'task={name!r}: expected one of {", ".join(TASKS)}')
    return TASKS[name]


def prepare_task(name):
    """Run data/<name>/prepare.py where its files are missing."""
    find_task(name)  # which checks it
    loader.prepare_dataset(name, made=['meta.json'])


def read_examples(name, split, tokenizer, block_size, shots=()):
    """The examples of a split of data/<name>; stderr says how many are cut to fit. ValueError without the split. Of
    labels each prompt stands behind the `shots` of encode_shots.
    """
    task = find_task(name)
    path = task.path(split)
    if not path.exists():
        raise ValueError(f'{os.path.relpath(path)} is not there: python data/{name}/prepare.py writes it')
    check_file(path)
    check_english(task, tokenizer)
    coded = [task.encode(row, tokenizer, block_size, shots) for row in task.read(split)]
    n_cut = sum(cut for _, cut in coded)
    if n_cut:
        what = f'{n_cut} of {len(coded)} texts are cut to fit into block_size={block_size}'
        print(f'{path.name} of {name}: {what}', file=sys.stderr)
    return [example for example, _ in coded]


# prompts


def check_english(task, tokenizer):
    """ValueError for a vocabulary of another kind than that of a language model."""
    if not hasattr(tokenizer, 'encode_next'):
        found = f'a vocabulary of {tokenizer.vocab_size}'
        raise ValueError(
            f'{task.name} is English text: it wants the tokens of GPT-2 or of a model of transformers, not {found}'
        )


def answer_ids(task, tokenizer):
    """The token of each label: the first of its word. ValueError where two words have the same first token."""
    check_english(task, tokenizer)
    tokens = {answer: tokenizer.encode_next(answer) for answer in task.answers}
    firsts = [ids[0] for ids in tokens.values()]
    several = ', '.join(repr(answer) for answer, ids in tokens.items() if len(ids) > 1)
    if len(set(firsts)) < len(firsts):
        advice = 'finetune.py --form=linear reads its labels off a layer of its own'
        raise ValueError(f'{task.name}: {several} have no first token of their own in this vocabulary: {advice}')
    if several:
        print(f'{task.name}: the first token stands for the label of {several}', file=sys.stderr)
    return firsts


def encode_prompt(task, sentences, tokenizer, block_size, shots=()):
    """(token ids, whether a sentence was cut) of the prompt, the same for train, dev and test. What does not fit into
    block_size is cut from the end of the longest sentence, until two are as long as each other, then from both; the
    question always stands whole. `shots` are the token ids of answered prompts that stand before it.
    """
    # a text that follows another begins with a space or a break, to most vocabularies a part of its first token
    pieces = []
    for before, text in zip(task.before, sentences):
        pieces += [before, f' {text}' if before else text]
    if shots:
        first = 0 if pieces[0] else 1
        pieces[first] = f'\n\n{pieces[first]}'
    *coded, question = encode_in_a_row([*pieces, task.question], tokenizer, bool(shots))
    befores, texts = coded[::2], coded[1::2]
    n_fixed = len(shots) + len(question) + sum(map(len, befores))
    room = block_size - n_fixed
    if room < len(sentences):
        prompt = f'the prompt of {task.name}: it takes {n_fixed} tokens beside the text'
        advice = f', {len(shots)} of them for the shots: give fewer' if room + len(shots) >= len(sentences) else ''
        raise ValueError(f'block_size={block_size} has no room for {prompt}{advice}')
    longest = next(n for n in range(room, 0, -1) if sum(min(len(text), n) for text in texts) <= room)
    ids = [token for before, text in zip(befores, texts) for token in before + text[:longest]]
    return [*shots, *ids, *question], any(len(text) > longest for text in texts)


def encode_in_a_row(pieces, tokenizer, follows):
    """The token ids of each of the texts, which stand behind one another, and if `follows` behind others."""
    coded = []
    for piece in pieces:
        encode = tokenizer.encode_next if follows else tokenizer.encode_ordinary
        coded.append(encode(piece) if piece else [])
        follows = follows or bool(piece)
    return coded


def encode_shots(name, tokenizer, n, seed, longest=100):
    """The token ids of n examples of train, drawn by a seed, each with its answer: of each label as many, if n allows.
    Their prompts have `longest` tokens at most; stderr says how many are cut.
    """
    task, ids, n_cut = find_task(name), [], 0
    if not task.answers:
        raise ValueError(f'shots are answered examples, and {name} has no answers')
    rows = task.read('train')
    if n > len(rows):
        raise ValueError(f'{n} shots of {name} are more than the {len(rows)} examples of train')
    for _, *sentences, label in draw_evenly(rows, n, random.Random(seed)):
        ids, cut = encode_prompt(task, sentences, tokenizer, len(ids) + longest, ids)
        ids += tokenizer.encode_next(task.answers[label])
        n_cut += cut
    if n_cut:
        print(f'{n_cut} of {n} shots of {name} are cut to {longest} tokens', file=sys.stderr)
    return ids


def encode_sonnet(text, tokenizer, block_size):
    """(token ids, whether it was cut) of a sonnet and the end of text. ValueError where not even its prompt fits."""
    n_prompt = len(tokenizer.encode(prompt_of(text)))
    if n_prompt >= block_size:
        prompt = f'its first {N_PROMPT_LINES} lines take {n_prompt} tokens'
        raise ValueError(f'block_size={block_size} has no room for a sonnet: {prompt}')
    if tokenizer.end_of_text is None:
        raise ValueError('the tokenizer of this model has no token that ends a text, as a sonnet wants one')
    ids = tokenizer.encode_ordinary(text) + [tokenizer.end_of_text]
    return ids[: block_size + 1], len(ids) > block_size + 1  # the last token is a target only


def split_sonnet(text):
    """The lines that are given, and those that follow."""
    lines = text.split('\n')
    return '\n'.join(lines[:N_PROMPT_LINES]), '\n'.join(lines[N_PROMPT_LINES:])


def prompt_of(sonnet):
    """The lines that are given, with the break after them: what is to be continued."""
    return split_sonnet(sonnet)[0] + '\n'


def draw_evenly(rows, n, draw):
    """n of the rows in any order, of each label (their last entry) as many as of the others, if there are as many."""
    seen, ranked = Counter(), []
    for row in draw.sample(rows, len(rows)):
        ranked.append((seen[row[-1]], row))
        seen[row[-1]] += 1
    first = [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:n]]
    return draw.sample(first, n)


# what is held out, and batches


def hold_out(examples, fraction):
    """(the examples to learn from, those to stop by), the same split for every run."""
    examples = list(examples)
    random.Random(0).shuffle(examples)
    n = max(1, round(fraction * len(examples)))
    if n >= len(examples):
        raise ValueError(f'valid_fraction={fraction} of {len(examples)} examples leaves none to learn from')
    return examples[n:], examples[:n]


def draw_some(examples, n):
    """n of the examples, the same in every run, in their order; all of them where n is 0. The first n would not do: the
    files of the tasks are sorted here and there, that of SST by sentiment.
    """
    if not n or n >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), n))]


def make_batches(examples, batch_size, seed=None):
    """Batches (lists of examples) of about the same length. Without a seed in the order of length; with one shuffled by
    it: batches of like lengths are cut out of every twenty batches' worth of examples, and shuffled again.
    """
    if seed is None:
        return chunks(sort_by_length(examples), batch_size)
    examples, draw = list(examples), random.Random(seed)
    draw.shuffle(examples)
    pools = map(sort_by_length, chunks(examples, 20 * batch_size))
    batches = chunks([example for pool in pools for example in pool], batch_size)
    draw.shuffle(batches)
    return batches


def sort_by_length(examples):
    return sorted(examples, key=lambda example: len(example.ids))


def chunks(examples, n):
    """The examples in lists of n."""
    return [examples[i : i + n] for i in range(0, len(examples), n)]


def collate(batch, device):
    """Token ids (B, T), zeros after the end of each; lengths (B,); and what is to be predicted: labels (B,), -1 where
    there is none, or of sonnets the tokens that follow, (B, T), -1 after the end.
    """
    is_text = bool(batch[0].text)
    rows = [torch.tensor(example.ids[:-1] if is_text else example.ids) for example in batch]
    pad = torch.nn.utils.rnn.pad_sequence
    idx, lengths = pad(rows, batch_first=True), torch.tensor([len(row) for row in rows])
    if is_text:
        targets = pad([torch.tensor(example.ids[1:]) for example in batch], batch_first=True, padding_value=-1)
    else:
        targets = torch.tensor([-1 if example.label is None else example.label for example in batch])
    return idx.to(device), lengths.to(device), targets.to(device)
