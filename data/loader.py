"""Tokens from data/<name>: train.bin and val.bin (uint16, no header, as in nanoGPT); meta.json says what they are.

The batch of (seed, iteration, index) is a pure function of the three: to resume takes the iteration number alone,
evaluation does not disturb training, and one global batch is the same tokens on any number of processes.
"""

import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from data.tokenizer import (
    TINYSHAKESPEARE_CHARS,
    CharTokenizer,
    GPT2Tokenizer,
    measure_text,
    same_vocabulary,
    tokenizer_from_dict,
)
from run.files import sha256_of, write_file

DATA = os.path.dirname(os.path.abspath(__file__))
HELD = 'KAN_GPT_PREPARES'  # in the environment of a prepare.py: the folder whose lock its parent holds
DTYPE = np.dtype('<u2')  # two bytes a token hold GPT-2's 50257
TOKENS = ('train.bin', 'val.bin')
TEST = 'test.bin'  # beside them, in some


def write_split(folder, split, ids):
    """Write token ids (a list or array) as <split>.bin.part; write_meta makes it <split>.bin."""
    ids = np.asarray(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
        raise ValueError(f'{split}: token ids must fit in 16 bits, got {ids.min()} to {ids.max()}')
    write_file(os.path.join(folder, f'{split}.bin.part'), ids.astype(DTYPE).tobytes())


def write_meta(folder, tokenizer, source, names=TOKENS):
    """Describe the splits, the files `names`, in meta.json (`source` says in one line where the text came from) and
    then give them their names: where train.bin and val.bin are, a preparation was not cut off.
    """
    meta = {'source': source, 'splits': {}}
    for name in names:
        meta['splits'][name.removesuffix('.bin')] = describe_split(os.path.join(folder, f'{name}.part'))
    val_ids = np.fromfile(os.path.join(folder, 'val.bin.part'), dtype=DTYPE)
    meta['val_chars'] = measure_text(tokenizer, val_ids)[0]  # what bits per character want
    meta.update(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.to_dict())
    write_file(os.path.join(folder, 'meta.json'), json.dumps(meta, indent=1))
    if TEST not in names and os.path.exists(os.path.join(folder, TEST)):
        os.remove(os.path.join(folder, TEST))  # of another text
    for name in names:
        os.replace(os.path.join(folder, f'{name}.part'), os.path.join(folder, name))


def describe_split(path):
    """What meta.json says of a file of tokens."""
    return {'tokens': os.path.getsize(path) // DTYPE.itemsize, 'sha256': sha256_of(path)}


def dataset_folder(dataset):
    """data/<dataset>, or a folder of your own given by a path with a slash in it."""
    return os.path.join(DATA, name_from_anywhere(dataset))


def name_from_anywhere(dataset):
    """The name of a data set, with which a process in another folder finds it, too."""
    return os.path.abspath(dataset) if os.path.dirname(dataset) else dataset


def is_prepared(dataset, made=TOKENS):
    return all(os.path.exists(os.path.join(dataset_folder(dataset), name)) for name in made)


def prepare_dataset(dataset, made=TOKENS):
    """Run data/<dataset>/prepare.py where one of the files that it makes is missing. Every process of a run may ask:
    the first of a node runs it, the others wait for that one, and where it fails, all of them say so.
    """
    if is_prepared(dataset, made):
        return
    script = find_script(dataset, made)
    command = command_of(script)
    lock = FileLock(os.path.join(dataset_folder(dataset), 'prepare.lock'))
    try:
        with lock.acquire(blocking=False):
            # another process may have done it since
            works = is_prepared(dataset, made) or run_prepare(dataset, script, command)
    except Timeout:  # another process is at it
        with lock:
            works = is_prepared(dataset, made)
    except OSError as error:
        raise ValueError(f'data set {dataset!r} cannot be prepared where it would lie: {error}') from None
    if not works:
        advice = f'{command} --source=... takes files of your own'
        raise ValueError(f'preparing data set {dataset!r} failed, see above; {advice}')
    if not is_prepared(dataset, made):
        missing = ' and '.join(made)
        raise ValueError(f'data set {dataset!r} is not what is wanted here: its prepare.py writes no {missing}')


def find_script(dataset, made):
    """The path of a data set's prepare.py. ValueError where there is none, with those that write these files."""
    folder = dataset_folder(dataset)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        known = sorted(script.parent.name for script in Path(DATA).glob('*/prepare.py') if speaks_of(script, made))
        known = f'; known: {", ".join(known)}' if known else ''
        raise ValueError(f'no data set {dataset!r}: {folder} has no {" and ".join(made)}{known}')
    return script


def command_of(script):
    """What starts a prepare.py in a shell: one that lies elsewhere does not find this repository by itself."""
    is_here = Path(script).resolve().is_relative_to(DATA)
    return f'{"" if is_here else f"PYTHONPATH={shlex.quote(os.path.dirname(DATA))} "}python {os.path.relpath(script)}'


def run_prepare(dataset, script, command):
    """Whether the script came to its end well."""
    print(f'data set {dataset!r} is missing, preparing it: {command}', flush=True)
    # a folder that is a link to another place has no modules above it
    paths = os.pathsep.join(filter(None, [os.path.dirname(DATA), os.environ.get('PYTHONPATH')]))
    env = {**os.environ, 'PYTHONPATH': paths, HELD: os.path.dirname(os.path.realpath(script))}
    return subprocess.run([sys.executable, script], env=env).returncode == 0


def speaks_of(script, names):
    """Whether a prepare.py names these files, as those in data/ do in their first lines."""
    return all(name in script.read_text(encoding='utf-8', errors='replace') for name in names)


def read_meta(dataset):
    """The contents of meta.json, completed where one of your own says no more than vocab_size; or what stands for it in
    a folder of nanoGPT: the characters of its meta.pkl, or {} where it has none, because its tokens are GPT-2's.
    """
    folder = dataset_folder(dataset)
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8-sig') as f:
            meta = dict(json.load(f))
        is_own = 'vocab_size' in meta and 'splits' not in meta
        if not is_own:
            check_meta(meta)
    except FileNotFoundError:
        return read_pickled_meta(folder)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({error!r}): prepare the data set again') from None
    return complete_meta(folder, meta) if is_own else meta


def check_meta(meta):
    """KeyError, TypeError or ValueError where a meta.json lacks what those of prepare.py say."""
    parts = [(meta, ('vocab_size', 'source')), (meta['tokenizer'], ('kind',))]
    parts += [(meta['splits'][split], ('tokens', 'sha256')) for split in ('train', 'val')]
    for part, names in parts:
        if not isinstance(part, dict):
            raise TypeError(f'{part!r:.80} is no dict')
        absent = [name for name in names if name not in part]
        if absent:
            raise KeyError(absent[0])
    if type(meta['vocab_size']) is not int:
        raise TypeError(f'vocab_size={meta["vocab_size"]!r}')


def complete_meta(folder, meta):
    """A meta.json of your own, with what those of prepare.py say, but for the splits: the files would have to be read.
    Without a tokenizer its tokens are numbers.
    """
    n = meta['vocab_size']
    if type(n) is not int or not 1 <= n <= 2**16:
        raise ValueError(f'{folder}/meta.json: vocab_size must be a number from 1 to {2**16}, got {n!r}')
    state = meta.get('tokenizer', {'kind': 'ids', 'vocab_size': n})
    try:  # GPT-2's is not made here: its files may have to be fetched
        known = GPT2Tokenizer.vocab_size if state == {'kind': 'gpt2'} else tokenizer_from_dict(state).vocab_size
    except ValueError as error:
        raise ValueError(f'{folder}/meta.json: tokenizer: {error}') from None
    if known > n or (state == {'kind': 'gpt2'} and n > known):
        raise ValueError(f'{folder}/meta.json: vocab_size is {n}, and its tokenizer has {known} tokens')
    return with_characters({'source': 'files of your own', **meta, 'tokenizer': state}, folder)


class PlainUnpickler(pickle.Unpickler):
    """Of dictionaries, strings and numbers; whatever has to be imported, and could run, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it holds {module}.{name}, which is more than data')


def read_pickled_meta(folder):
    """meta.pkl of a data set by character, as nanoGPT's prepare.py writes it, in the form of meta.json; {} where there
    is none. ValueError where it is anything else.
    """
    path = os.path.join(folder, 'meta.pkl')
    try:
        with open(path, 'rb') as f:
            itos = PlainUnpickler(f).load()['itos']
        tokenizer = CharTokenizer(''.join(itos[i] for i in range(len(itos))))
        if tokenizer.vocab_size != len(itos):
            raise ValueError('a token is more than a character')
    except FileNotFoundError:
        return {}
    except Exception as error:  # what a pickle raises on other bytes has no type in common
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        advice = 'expected that of a data set by character of nanoGPT; a meta.json beside it is read in its place'
        raise ValueError(f'{path} cannot be used ({reason}): {advice}') from None
    meta = {'source': 'files of nanoGPT', 'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.to_dict()}
    return with_characters(meta, folder)


def with_characters(meta, folder):
    """A meta.json with the number of characters of val, where each is a token."""
    path = os.path.join(folder, 'val.bin')
    if meta['tokenizer']['kind'] != 'char' or not os.path.exists(path):
        return meta
    return {**meta, 'val_chars': os.path.getsize(path) // DTYPE.itemsize}


def splits_of(dataset, meta):
    """{split: its tokens and sha256} as its meta says; where it does not, from the files, which takes a while."""
    paths = {name.removesuffix('.bin'): os.path.join(dataset_folder(dataset), name) for name in TOKENS}
    return meta.get('splits') or {split: describe_split(path) for split, path in paths.items()}


def model_vocab_size(meta):
    """Rows of a new model's embedding: the tokens of a data set, or GPT-2's 50257, padded to a multiple of 64."""
    return 50304 if meta.get('tokenizer', {'kind': 'gpt2'})['kind'] == 'gpt2' else meta['vocab_size']


def load_tokenizer(checkpoint, vocab_size, dataset=''):
    """The tokenizer of `dataset` if named, else that in the checkpoint; nanoGPT's have none, and their size tells."""
    if dataset:
        tokenizer = tokenizer_of_dataset(dataset, vocab_size)
        if not same_vocabulary(checkpoint.get('tokenizer', tokenizer.to_dict()), tokenizer.to_dict()):
            advice = "leave it out, or encode its text with the model's"
            raise ValueError(f'data set {dataset!r} has another vocabulary than the model: {advice}')
        return tokenizer
    if 'tokenizer' in checkpoint:
        return tokenizer_from_dict(checkpoint['tokenizer'])
    if vocab_size in (50257, 50304):
        print("the model comes without a vocabulary; taking GPT-2's", file=sys.stderr)
        return GPT2Tokenizer()
    if vocab_size == len(TINYSHAKESPEARE_CHARS):
        print('the checkpoint holds no vocabulary; taking the 65 characters of tinyshakespeare', file=sys.stderr)
        return CharTokenizer(TINYSHAKESPEARE_CHARS)
    advice = 'name a data set that has it by --dataset'
    raise ValueError(f'the checkpoint holds no vocabulary for its {vocab_size} tokens: {advice}')


def tokenizer_of_dataset(dataset, vocab_size):
    """The tokenizer of a data set; ValueError where it is not that of a model with vocab_size rows."""
    meta = read_meta(dataset)
    if not meta:
        folder = dataset_folder(dataset)
        if not is_prepared(dataset):
            raise ValueError(f'data set {dataset!r} is not prepared: {command_of(find_script(dataset, TOKENS))}')
        raise ValueError(f'{folder} has no meta.json to say what its tokens are: its prepare.py writes one')
    check_vocab_size(dataset, meta, vocab_size)
    return tokenizer_from_dict(meta['tokenizer'])


def check_vocab_size(dataset, meta, vocab_size):
    """ValueError where a data set has another number of tokens than a model with vocab_size rows."""
    n = meta['vocab_size']
    if vocab_size not in (n, model_vocab_size(meta)):
        raise ValueError(
            f'data set {dataset!r} has {n} different tokens, the model {vocab_size}: name one with its vocabulary'
        )


def open_text(checkpoint, dataset, split, vocab_size):
    """(name, meta, tokenizer, tokens) of a split of `dataset`, by default that of the checkpoint, for its model with
    vocab_size rows; prepared where it is missing, but of a checkpoint by the scripts in data/ alone. ValueError where
    there is none, or one of another vocabulary. A line tells where it is another text than the checkpoint was trained
    on under this name.
    """
    name = dataset or checkpoint.get('config', {}).get('dataset', '')
    if not name:
        raise ValueError('which data? name it by --dataset, e.g. --dataset=shakespeare_char')
    if not dataset and name not in os.listdir(DATA) and not is_prepared(name):  # a checkpoint may not choose what runs
        raise ValueError(f'the model was trained on {name!r}, which is not prepared: name its data by --dataset')
    prepare_dataset(name)
    if split not in ('train', 'val') and not os.path.exists(os.path.join(dataset_folder(name), f'{split}.bin')):
        raise ValueError(f'data set {name!r} has the splits train and val, and no {split}')
    meta = read_meta(name)
    tokenizer = load_tokenizer(checkpoint, vocab_size, name if meta else '')
    data = open_split(name, split)
    if name_from_anywhere(name) == name_from_anywhere(checkpoint.get('config', {}).get('dataset', '')):
        before = checkpoint.get('data', {}).get(split)
        if before and before != (meta.get('splits', {}).get(split) or describe_split(data.filename)):
            print(f'warning: {split} of {name!r} is another text by now than that of the run', file=sys.stderr)
    return name, meta, tokenizer, data


def open_split(dataset, split):
    """The tokens of a split, (n,) uint16, mapped from disk."""
    path = os.path.join(dataset_folder(dataset), f'{split}.bin')
    if not os.path.exists(path) or os.path.getsize(path) == 0 or os.path.getsize(path) % DTYPE.itemsize:
        raise ValueError(f'{path} is missing, empty or cut off: prepare the data set again')
    with open(path, 'rb') as f:
        return np.memmap(f, dtype=DTYPE, mode='r')


def check_dataset(dataset, block_size, vocab_size, splits=('train', 'val')):
    """Read the files once: against the checksums in meta.json, if any, and for ids that the model does not know."""
    meta = read_meta(dataset)
    warn_of_text(dataset)
    for split in splits:
        data = open_split(dataset, split)
        path, n = data.filename, len(data)
        known = meta.get('splits', {}).get(split, {})
        if known and known['tokens'] != n:
            raise ValueError(f'{path} has {n} tokens, meta.json says {known["tokens"]}: prepare the data set again')
        if known and known['sha256'] != sha256_of(path):
            raise ValueError(f'{path} does not match its checksum in meta.json: prepare the data set again')
        largest = max(int(data[i : i + 2**24].max()) for i in range(0, n, 2**24))
        if largest >= vocab_size:
            raise ValueError(f'{path} holds token id {largest}, but the vocabulary ends at {vocab_size - 1}')
        if n <= block_size:
            raise ValueError(f'block_size={block_size} needs more than {block_size} tokens, {path} has {n}')


def warn_of_text(dataset):
    """A line where a text for prepare.py was put beside the tokens after these had been made."""
    names = 'input.txt', 'train.bin', 'prepare.py'
    own, made, script = (os.path.join(dataset_folder(dataset), name) for name in names)
    if all(map(os.path.exists, (own, made, script))) and os.path.getmtime(own) > os.path.getmtime(made):
        advice = 'delete train.bin, and the next run prepares it anew'
        print(f'warning: {own} is younger than train.bin, which may be of another text: {advice}', file=sys.stderr)


def random_starts(data, block_size, batch_size, seed, iteration, index):
    """Where the sequences of a micro-batch begin; `index` counts those of an iteration, over all processes."""
    return np.random.default_rng([seed, iteration, index]).integers(len(data) - block_size, size=batch_size)


def fixed_starts(data, block_size, n_windows):
    """Evenly spaced windows that do not overlap, the same for every model and run: at most n_windows of them."""
    room = (len(data) - 1) // block_size  # the last token is a target only
    n_windows = min(n_windows, room)
    return np.arange(n_windows) * room // n_windows * block_size


def get_batch(data, block_size, starts, device):
    """Inputs and the tokens that follow them, (len(starts), block_size) int64 each."""
    import torch  # here alone: data is prepared without it

    rows = torch.from_numpy(np.stack([data[i : i + block_size + 1] for i in starts]).astype(np.int64))
    if device.startswith('cuda'):
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
