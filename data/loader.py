"""
Tokens from data/<name>: train.bin and val.bin (uint16, no header, as in nanoGPT) beside meta.json (vocabulary, source, checksums).

The batch of (seed, iteration, index) is a pure function of the three: to resume takes the iteration number alone, evaluation
does not disturb training, and one global batch is the same tokens on any number of processes.
"""

import json
import os
import subprocess
import sys

import numpy as np
import torch
from filelock import FileLock

from data.tokenizer import (
    TINYSHAKESPEARE_CHARS,
    CharTokenizer,
    GPT2Tokenizer,
    measure_text,
    tokenizer_from_dict,
)
from run.files import sha256_of, write_atomically

DATA = os.path.dirname(os.path.abspath(__file__))
DTYPE = np.dtype('<u2')  # two bytes a token hold GPT-2's 50257
TOKENS = ('train.bin', 'val.bin')


def write_split(folder, split, ids):
    """Write token ids (a list or array) as <split>.bin.part; write_meta makes it <split>.bin."""
    ids = np.asarray(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
        raise ValueError(f'{split}: token ids must fit in 16 bits, got {ids.min()} to {ids.max()}')
    with write_atomically(os.path.join(folder, f'{split}.bin.part')) as f:
        f.write(ids.astype(DTYPE).tobytes())


def write_meta(folder, tokenizer, source):
    """
    Describe both splits in meta.json (`source` says in one line where the text came from) and then give them their names:
    where train.bin and val.bin are, a preparation was not cut off.
    """
    paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    splits = {}
    for split, path in paths.items():
        part = path + '.part'
        splits[split] = {'tokens': os.path.getsize(part) // DTYPE.itemsize, 'sha256': sha256_of(part)}
    val_chars, _ = measure_text(
        tokenizer, np.fromfile(paths['val'] + '.part', dtype=DTYPE)
    )  # what bits per character want
    meta = dict(
        source=source,
        splits=splits,
        val_chars=val_chars,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.to_dict(),
    )
    with write_atomically(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    for path in paths.values():
        os.replace(path + '.part', path)


def dataset_folder(dataset):
    """data/<dataset>, or a folder of your own given by a path with a slash in it."""
    return os.path.abspath(dataset) if os.path.dirname(dataset) else os.path.join(DATA, dataset)


def is_prepared(dataset, made=TOKENS):
    folder = dataset_folder(dataset)
    return all(os.path.exists(os.path.join(folder, name)) for name in made)


def prepare_dataset(dataset, made=TOKENS):
    """
    Run data/<dataset>/prepare.py where one of the files that it makes is missing. Processes that ask at once wait for the
    first of them, so every process of a run may ask; each node of several makes its own files.
    """
    folder = dataset_folder(dataset)
    if is_prepared(dataset, made):
        return
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        known = sorted(name for name in os.listdir(DATA) if os.path.exists(os.path.join(DATA, name, 'prepare.py')))
        raise ValueError(f'no data set {dataset!r}: {folder} has no {" and ".join(made)}; known: {", ".join(known)}')
    with FileLock(os.path.join(folder, 'prepare.lock')):
        if is_prepared(dataset, made):  # by another process, meanwhile
            return
        command = f'python {os.path.relpath(script)}'
        print(f'data set {dataset!r} is missing, preparing it: {command}', flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise ValueError(
                f'preparing data set {dataset!r} failed, see above; {command} --source=... takes files of your own'
            )
        if not is_prepared(dataset, made):
            raise ValueError(
                f'data set {dataset!r} is not what is wanted here: its prepare.py writes no {" and ".join(made)}'
            )


def read_meta(dataset):
    """The contents of meta.json, or {} for files made by nanoGPT, which have none."""
    path = os.path.join(dataset_folder(dataset), 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        for split in ('train', 'val'):
            meta['splits'][split]['tokens'], meta['splits'][split]['sha256']
        meta['vocab_size'], meta['source'], meta['tokenizer']['kind']
        return meta
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error!r}): prepare the data set again') from None


def model_vocab_size(meta):
    """Rows of a new model's embedding: the characters of a data set, or GPT-2's 50257 tokens padded to a multiple of 64."""
    return meta['vocab_size'] if meta.get('tokenizer', {}).get('kind') == 'char' else 50304


def load_tokenizer(checkpoint, vocab_size, dataset=''):
    """The tokenizer of `dataset` if named, else the one in the checkpoint; for nanoGPT's, which has none, the one its size tells."""
    if 'tokenizer' in checkpoint and not dataset:
        return tokenizer_from_dict(checkpoint['tokenizer'])
    if dataset:
        meta = read_meta(dataset)
        if not meta:
            raise ValueError(f'data set {dataset!r} has no meta.json: python data/{dataset}/prepare.py writes it')
        tokenizer = tokenizer_from_dict(meta['tokenizer'])
        if vocab_size not in (tokenizer.vocab_size, model_vocab_size(meta)):
            raise ValueError(
                f'data set {dataset!r} has {tokenizer.vocab_size} different tokens, the model {vocab_size}: not its vocabulary'
            )
        return tokenizer
    if vocab_size in (50257, 50304):
        return GPT2Tokenizer()
    if vocab_size == len(TINYSHAKESPEARE_CHARS):
        print('the checkpoint holds no vocabulary; taking the 65 characters of tinyshakespeare', file=sys.stderr)
        return CharTokenizer(TINYSHAKESPEARE_CHARS)
    raise ValueError(
        f'the checkpoint holds no vocabulary for its {vocab_size} tokens: name a data set that has it by --dataset'
    )


def open_split(dataset, split):
    """The tokens of a split, (n,) uint16, mapped from disk."""
    path = os.path.join(dataset_folder(dataset), f'{split}.bin')
    if not os.path.exists(path) or os.path.getsize(path) == 0 or os.path.getsize(path) % DTYPE.itemsize:
        raise ValueError(f'{path} is missing, empty or cut off: prepare the data set again')
    return np.memmap(path, dtype=DTYPE, mode='r')


def check_dataset(dataset, block_size, vocab_size):
    """Read both files once: against their checksums where meta.json has them, and for ids that the model does not know."""
    meta = read_meta(dataset)
    for split in ('train', 'val'):
        data = open_split(dataset, split)
        known = meta.get('splits', {}).get(split)
        if known and known['tokens'] != len(data):
            raise ValueError(
                f'{data.filename} has {len(data)} tokens, meta.json says {known["tokens"]}: prepare the data set again'
            )
        if known and known['sha256'] != sha256_of(data.filename):
            raise ValueError(f'{data.filename} does not match its checksum in meta.json: prepare the data set again')
        largest = max(int(data[i : i + 2**24].max()) for i in range(0, len(data), 2**24))
        if largest >= vocab_size:
            raise ValueError(f'{data.filename} holds token id {largest}, but the vocabulary ends at {vocab_size - 1}')
        if len(data) <= block_size:
            raise ValueError(
                f'block_size={block_size} needs more than {block_size} tokens, {data.filename} has {len(data)}'
            )


def random_starts(data, block_size, batch_size, seed, iteration, index):
    """Where the sequences of micro-batch `index` of an iteration begin. Over all processes the indices of an iteration are 0, 1, ..."""
    return np.random.default_rng([seed, iteration, index]).integers(len(data) - block_size, size=batch_size)


def fixed_starts(data, block_size, n_windows):
    """Evenly spaced windows that do not overlap, the same for every model and run: at most n_windows of them."""
    room = (len(data) - 1) // block_size  # the last token is a target only
    n_windows = min(n_windows, room)
    return np.arange(n_windows) * room // n_windows * block_size


def get_batch(data, block_size, starts, device):
    """Inputs and the tokens that follow them, (len(starts), block_size) int64 each."""
    rows = torch.from_numpy(np.stack([data[i : i + block_size + 1] for i in starts]).astype(np.int64))
    if device.startswith('cuda'):
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
