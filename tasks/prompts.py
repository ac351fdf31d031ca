"""
The four fine-tuning tasks of Stanford's course CS224N and of arXiv 2504.10490: sentiment of film reviews (SST in five classes, CFIMDB
in two), whether two questions are the same (Quora), and sonnets. What they are read from, the one prompt of each, and batches of it.
"""

import csv
import io
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

DATA = Path(__file__).resolve().parents[1] / 'data'
COLUMNS = {  # of a table: the columns of text, the column of the label, and how many labels there are
    'sst': (('sentence',), 'sentiment', 5),
    'cfimdb': (('sentence',), 'sentiment', 2),
    'quora': (('sentence1', 'sentence2'), 'is_duplicate', 2),
}
FAULTS = {  # why a row is left out
    'missing': 'without an id or a sentence',
    'malformed': 'of another number of columns than the first line',
    'unlabelled': 'without a label',
    'mislabelled': 'with a label other than 0 to {}',
}


# tables


def read_rows(task, path, labelled=True):
    """
    The rows of a file as (id, sentence, label), or (id, sentence, sentence, label) for pairs, sentences in lower case; the label is
    None where `labelled` is False. Rows that cannot be used are left out and named on stderr. ValueError if the file has another
    format or no row to use.
    """
    rows, left_out = parse_rows(task, Path(path).read_bytes(), path, labelled)
    for line in describe(task, left_out):
        print(f'{path}: {line}', file=sys.stderr)
    return rows


def parse_rows(task, content, name, labelled=True):
    """The rows in the bytes `content` of the file called `name`, and the numbers of the lines left out, by FAULTS."""
    texts, label, _ = COLUMNS[task]
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is not UTF-8 text: {error}') from None
    # a quotation mark is a character like any other: were it to open a field, an odd one would swallow the lines after it
    reader = csv.reader(io.StringIO(text, newline=''), delimiter='\t', quoting=csv.QUOTE_NONE)
    try:
        (_, columns), *lines = [(reader.line_num, row) for row in reader] or [(1, [])]
    except csv.Error as error:
        raise ValueError(f'{name} is not a tab-separated file: line {reader.line_num}: {error}') from None
    absent = [column for column in ('id', *texts, *[label] * labelled) if column not in columns]
    if absent:
        raise ValueError(f'{name} has no column {" or ".join(absent)}: its first line has {str(columns)[:80]}')
    rows, left_out = [], {fault: [] for fault in FAULTS}
    for number, row in lines:
        fields = {column: field.strip() for column, field in zip(columns, row)}
        fault = find_fault(task, row, columns, fields, labelled)
        if fault:
            left_out[fault].append(number)
        else:
            sentences = (fields[column].lower() for column in texts)
            rows.append((fields['id'], *sentences, int(float(fields[label])) if labelled else None))
    if not rows:
        raise ValueError('; '.join([f'{name} has no row that can be used', *describe(task, left_out)]))
    return rows, left_out


def find_fault(task, row, columns, fields, labelled):
    """The key in FAULTS of what keeps a row from use, or ''."""
    texts, label, n_labels = COLUMNS[task]
    if not any(fields.values()):  # an empty line
        return 'missing'
    if len(row) != len(columns):
        return 'malformed'
    if not all(fields[column] for column in ('id', *texts)):
        return 'missing'
    if labelled and not fields[label]:
        return 'unlabelled'
    if labelled and fields[label].removesuffix('.0') not in [str(i) for i in range(n_labels)]:
        return 'mislabelled'
    return ''


def describe(task, left_out):
    """A line for each kind of rows left out: how many, and the first of them."""
    for fault, lines in left_out.items():
        if lines:
            more = f' and {len(lines) - 5} more' if len(lines) > 5 else ''
            reason = FAULTS[fault].format(COLUMNS[task][2] - 1)
            yield f'{len(lines)} row(s) left out, {reason}: line {", ".join(map(str, lines[:5]))}{more}'


# sonnets

N_LINES, N_PROMPT_LINES = 14, 3


def parse_sonnets(content, name, prompts=False):
    """
    [(number, text)] of a file of sonnets: after a heading, each under its number on a line of its own. The text is its lines as they
    are, without empty ones. ValueError for a sonnet of fewer lines than N_PROMPT_LINES, or, unless they are `prompts`, than N_LINES - 2
    (the 126th has twelve), or where there is none.
    """
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is not UTF-8 text: {error}') from None
    parts = re.split(r'^\s*(\d+)\s*$', text, flags=re.MULTILINE)[1:]
    sonnets = [
        (number, '\n'.join(line.rstrip() for line in body.splitlines() if line.strip())) for number, body in zip(parts[::2], parts[1::2])
    ]
    fewest = N_PROMPT_LINES if prompts else N_LINES - 2
    short = next((number for number, body in sonnets if body.count('\n') + 1 < fewest), None)
    if short or not sonnets:
        found = f'sonnet {short} has fewer than {fewest} lines' if short else 'no line is the number of a sonnet'
        raise ValueError(f'{name} is no file of sonnets: {found}')
    return sonnets


def read_sonnets(path, prompts=False):
    return parse_sonnets(Path(path).read_bytes(), path, prompts)


# prompts


@dataclass(frozen=True)
class Task:
    """A task of labels: the text is followed by `question`, and the word that comes next is the answer."""

    name: str
    before: tuple  # what stands before each sentence
    question: str
    answers: tuple  # the words for the labels 0, 1, ...: one token each
    column: str  # of the course's files of predictions


TASKS = {
    'sst': Task('sst', ('',), '\nSentiment:', (' terrible', ' bad', ' okay', ' good', ' great'), 'Predicted_Sentiment'),
    'cfimdb': Task('cfimdb', ('',), '\nSentiment:', (' bad', ' good'), 'Predicted_Sentiment'),
    'quora': Task('quora', ('Question 1:', '\nQuestion 2:'), '\nThe same question:', (' no', ' yes'), 'Predicted_Is_Paraphrase'),
    'sonnets': None,  # no labels: the text itself is what is learned
}


@dataclass
class Example:
    id: str
    ids: list  # the tokens of the prompt, of a sonnet all of it
    label: int = None
    text: str = ''  # of a sonnet


def find_task(name):
    if name not in TASKS:
        raise ValueError(f'task={name!r}: expected one of {", ".join(TASKS)}')
    return TASKS[name]


def answer_ids(task, tokenizer):
    """The token of each label. ValueError for a tokenizer that has no single token for one of them."""
    tokens = [tokenizer.encode(answer) for answer in task.answers]
    long = next((answer for answer, ids in zip(task.answers, tokens) if len(ids) != 1), None)
    if long:
        raise ValueError(f'{long!r} is not a single token of this vocabulary: {task.name} wants a model with the tokens of GPT-2')
    return [ids[0] for ids in tokens]


def encode_prompt(task, sentences, tokenizer, block_size):
    """
    (token ids, whether a sentence was cut) of the prompt, the same for train, dev and test. What does not fit into block_size is cut from
    the end of the longest sentence, until two are as long as each other, then from both; the question always stands whole.
    """
    befores, question = [tokenizer.encode(text) if text else [] for text in task.before], tokenizer.encode(task.question)
    n_fixed = len(question) + sum(map(len, befores))
    room = block_size - n_fixed
    if room < len(sentences):
        raise ValueError(f'block_size={block_size} has no room for the prompt of {task.name}: it takes {n_fixed} tokens beside the text')
    # a word after others begins with a space, to GPT-2 a part of it
    parts = [tokenizer.encode_ordinary(f' {text}' if before else text) for before, text in zip(task.before, sentences)]
    longest = next(n for n in range(room, 0, -1) if sum(min(len(part), n) for part in parts) <= room)
    ids = [token for before, part in zip(befores, parts) for token in before + part[:longest]] + question
    return ids, any(len(part) > longest for part in parts)


def encode_sonnet(text, tokenizer, block_size):
    """(token ids, whether it was cut) of a sonnet and the end of text after it. ValueError where not even its prompt fits."""
    n_prompt = len(tokenizer.encode(prompt_of(text)))
    if n_prompt >= block_size:
        raise ValueError(f'block_size={block_size} has no room for a sonnet: its first {N_PROMPT_LINES} lines take {n_prompt} tokens')
    ids = tokenizer.encode_ordinary(text) + [tokenizer.end_of_text]
    return ids[: block_size + 1], len(ids) > block_size + 1  # the last token is a target only


def prompt_of(sonnet):
    """The first three lines of a sonnet, with the break after them: what is to be continued."""
    return '\n'.join(sonnet.split('\n')[:N_PROMPT_LINES]) + '\n'


def split_path(name, split):
    return DATA / name / f'{split}.{"txt" if name == "sonnets" else "csv"}'


def prepare_task(name):
    """Run data/<name>/prepare.py where its files are missing."""
    find_task(name)
    script = DATA / name / 'prepare.py'
    if (DATA / name / 'meta.json').exists():
        return
    with FileLock(DATA / name / 'prepare.lock'):
        if not (DATA / name / 'meta.json').exists():  # by another process, meanwhile
            print(f'task {name!r} has no data, preparing it: python {os.path.relpath(script)}', flush=True)
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise ValueError(f'preparing the data of {name!r} failed, see above; python {os.path.relpath(script)} --source=FOLDER')


def read_examples(name, split, tokenizer, block_size):
    """The examples of a split of data/<name>; says on stderr how many are cut to fit. ValueError where the files are not there."""
    task, path = find_task(name), split_path(name, split)
    if not path.exists():
        raise ValueError(f'{os.path.relpath(path)} is not there: python data/{name}/prepare.py writes it')
    if not hasattr(tokenizer, 'encode_ordinary'):
        raise ValueError(f'{name} is English text: it wants a model with the tokens of GPT-2, not one of {tokenizer.vocab_size} characters')
    if task:
        rows = read_rows(name, path, labelled=split != 'test')
        coded = [encode_prompt(task, sentences, tokenizer, block_size) for _, *sentences, _ in rows]
        examples = [Example(id, ids, label) for (id, *_, label), (ids, _) in zip(rows, coded)]
    else:
        sonnets = read_sonnets(path, prompts=split == 'test')
        coded = [encode_sonnet(text, tokenizer, block_size) for _, text in sonnets]
        examples = [Example(id, ids, text=text) for (id, text), (ids, _) in zip(sonnets, coded)]
    n_cut = sum(cut for _, cut in coded)
    if n_cut:
        print(f'{path.name} of {name}: {n_cut} of {len(examples)} texts are cut to fit into block_size={block_size}', file=sys.stderr)
    return examples


def hold_out(examples, fraction, seed=0):
    """(the examples to learn from, those to stop by), the same split for every run."""
    examples = list(examples)
    random.Random(seed).shuffle(examples)
    n = max(1, round(fraction * len(examples)))
    if n >= len(examples):
        raise ValueError(f'valid_fraction={fraction} of {len(examples)} examples leaves none to learn from')
    return examples[n:], examples[:n]


# batches


def make_batches(examples, batch_size, seed=None):
    """
    Batches (lists of examples) of about the same length. With a seed, a shuffle of it: batches of like lengths are cut out of every
    twenty batches' worth of examples and then shuffled. Without, in the order of length.
    """
    examples, shuffle = list(examples), random.Random(seed)
    if seed is not None:
        shuffle.shuffle(examples)
    pool = max(1, len(examples)) if seed is None else 20 * batch_size
    examples = [example for i in range(0, len(examples), pool) for example in sorted(examples[i : i + pool], key=lambda e: len(e.ids))]
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    if seed is not None:
        shuffle.shuffle(batches)
    return batches


def collate(batch, device):
    """
    Token ids (B, T), zeros after the end of each; lengths (B,); and what is to be predicted: labels (B,), -1 where there is
    none, or of sonnets the tokens that follow, (B, T), -1 after the end.
    """
    import torch  # not needed by those who prepare data

    is_text = bool(batch[0].text)
    rows = [torch.tensor(example.ids[:-1] if is_text else example.ids) for example in batch]
    pad = torch.nn.utils.rnn.pad_sequence
    idx, lengths = pad(rows, batch_first=True), torch.tensor([len(row) for row in rows])
    if is_text:
        targets = pad([torch.tensor(example.ids[1:]) for example in batch], batch_first=True, padding_value=-1)
    else:
        targets = torch.tensor([-1 if example.label is None else example.label for example in batch])
    return idx.to(device), lengths.to(device), targets.to(device)
