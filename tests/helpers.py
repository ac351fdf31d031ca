"""What the tests of the scripts share: a small data set, small models, and scripts run as a user runs them."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from configurator import flags_of
from data.loader import write_meta, write_split
from data.tokenizer import CharTokenizer
from forked import ROOMS, ROOT, Forked
from model import GPT, GPTConfig
from run.checkpoint import save_checkpoint

PATIENCE = 300  # seconds for a script: one that hangs is ended, one on a busy machine is not
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'HF_HUB_OFFLINE': '1'}
TOKENIZER = CharTokenizer('\n !:EMORabcdefghijklmnopqrstuvwxyz')

SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)
BATCHES = dict(batch_size=2, gradient_accumulation_steps=2, eval_iters=2, eval_interval=2, log_interval=1)
SCHEDULE = dict(max_iters=4, lr_decay_iters=100, warmup_iters=1, learning_rate=1e-2, min_lr=1e-3)
TINY = dict(device='cpu', dropout=0.2, **SHAPE, **BATCHES, **SCHEDULE)
KAN = dict(use_kan=True, kan_targets='attn,mlp,head', kan_hidden=1.0)

HEADERS = {  # the first line of the tables of the course
    'sst': '\tid\tsentence\tsentiment\n',
    'cfimdb': '\tid\tsentence\tsentiment\n',
    'quora': '\tid\tsentence1\tsentence2\tis_duplicate\n',
}
TITLE = 'Sonnets\nby William Shakespeare\nCreated on Jul 31, 2015, from FDT version 0.9.0.1\n\n\n'


class Words:
    """In place of GPT-2's tokenizer: a token for each answer and question of the tasks, and each plain character."""

    answers = [' terrible', ' bad', ' okay', ' good', ' great', ' no', ' yes']
    questions = ['\nSentiment:', 'Question 1:', '\nQuestion 2:', '\nThe same question:']
    pieces = [*answers, *questions, *string.printable, '<|endoftext|>']
    vocab_size, end_of_text = len(pieces), len(pieces) - 1

    def encode(self, text):
        return [self.pieces.index(piece) for piece in re.findall('|'.join(map(re.escape, self.pieces)), text)]

    def encode_ordinary(self, text):
        return self.encode(text.replace('<|endoftext|>', ''))

    encode_next = encode_ordinary

    def decode_bytes(self, ids):
        return ''.join(self.pieces[i] for i in ids).encode()

    def decode(self, ids):
        return self.decode_bytes(ids).decode()

    def to_dict(self):
        return {'kind': 'gpt2'}


FUNCTIONS = {  # the families of inside/formulas.py, by numpy in float64
    'x^2': lambda z: z**2,
    'x^3': lambda z: z**3,
    'x^4': lambda z: z**4,
    'abs': np.abs,
    'relu': lambda z: np.maximum(z, 0),
    'sqrt': np.sqrt,
    '1/x': lambda z: 1 / z,
    '1/x^2': lambda z: z**-2.0,
    'log': np.log,
    'exp': np.exp,
    'sin': np.sin,
    'tanh': np.tanh,
    'atanh': np.arctanh,
    'gaussian': lambda z: np.exp(-z * z),
    'silu': lambda z: z / (1 + np.exp(-z)),
    'affine': lambda z: z,
}

# in place of wandb: a module that prints what it is told
FAKE_WANDB = """
from types import SimpleNamespace

run = None

def init(id=None, resume=None, **settings):
    global run
    run = SimpleNamespace(id=id or 'abc')
    print('wandb run', id, resume)

def log(line):
    print('logged', line['iter'])

class Artifact:
    def __init__(self, name, type):
        print('artifact', name, type)

    def add_file(self, path):
        print('with', path)

def log_artifact(artifact):
    print('uploaded')
"""


def copy_code(folder):
    """The code of the repository, without data, configs, results and tests, in another folder."""
    folder.mkdir(exist_ok=True)
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    for room in ROOMS:
        data = '*.bin *.csv *.gguf *.json *.lock *.safetensors *.txt'.split()
        others = shutil.ignore_patterns(*data, '__pycache__')
        shutil.copytree(ROOT / room, folder / room, ignore=others)
    return folder


def flags(**settings):
    return flags_of(settings)


def keep_figures(monkeypatch):
    """A list that gets every figure of matplotlib that is saved from now on."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **how):
        figures.append(figure)
        save(figure, *args, **how)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    return figures


def write_dataset(folder, n_train=4000, n_val=800, tokenizer=TOKENIZER):
    """Random characters as train.bin, val.bin and meta.json; returns the folder's path."""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', n_train), ('val', n_val):
        write_split(folder, split, rng.integers(tokenizer.vocab_size, size=n))
    write_meta(folder, tokenizer, 'random characters')
    return str(folder)


def byte_pairs():
    """A tokenizer of the library `tokenizers` as GPT-2's, with 290 tokens, and a test's own."""
    return tokenizers.Tokenizer.from_str(trained_byte_pairs())


@functools.cache
def trained_byte_pairs():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(['and so on and on again, the longer the better, as one would have it'] * 4, trainer)
    return tokenizer.to_str()


def answer_pairs():
    """The same with tokens for the answers of the tasks, and one that ends a text: a fast tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_pairs()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>'],
        show_progress=False,
    )
    tokenizer.train_from_iterator([''.join(Words.answers)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|end|>')


def byte_fallback():
    """Another one, as Llama's: its tokens are letters, and bytes of what it has no letter for."""
    vocabulary = [f'<0x{i:02X}>' for i in range(256)] + [*'abc\u2581', '<unk>']
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True, unk_token='<unk>'))
    tokenizer.normalizer = tokenizers.normalizers.Replace(' ', '\u2581')
    steps = tokenizers.decoders.Replace('\u2581', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence(list(steps))
    return tokenizer


def word_pieces():
    """Another one, as BERT's: it frames a text, and writes a space between words that is in no token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=['[UNK]', '[CLS]', '[SEP]'])
    tokenizer.train_from_iterator(['and so on and on again'] * 4, trainer)
    tokenizer.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 2), ('[CLS]', 1))
    return tokenizer


def write_file(folder, text, name='a.csv'):
    """Write a text with the ends of its lines as they are; returns its path."""
    (folder / name).write_bytes(text.encode())
    return folder / name


def sonnet(n_lines=14):
    return '\n'.join(f'  Line {i}, of it' if i > 12 else f'Line {i}' for i in range(1, n_lines + 1))


def book(lengths, first=1, title=TITLE):
    """A file of sonnets of so many lines each, numbered from `first`."""
    return title + ''.join(f'{first + i}\n\n{sonnet(n)}\n\n' for i, n in enumerate(lengths))


def write_wheel(folder, package='tiny_text', version='1.0'):
    """A wheel that holds one text, and a module that must not be imported."""
    path = folder / f'{package}-{version}-py3-none-any.whl'
    info = f'{package}-{version}.dist-info'
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(f'{package}/__init__.py', 'raise SystemExit("imported")')
        wheel.writestr(f'{package}/a.txt', 'text a')
        wheel.writestr(f'{package}/b.txt', 'text b')
        wheel.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: absent-package\n',
        )
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')
    return path


def make_checkpoint(out_dir, **model_args):
    """Save a checkpoint of a model with random weights, large enough that samples differ; returns its contents."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, 'vocab_size': TOKENIZER.vocab_size, **model_args}))
    checkpoint = {
        'model': {name: p * 5 for name, p in model.state_dict().items()},
        'optimizer': model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu').state_dict(),
        'model_args': asdict(model.config),
        'iter_num': 3,
        'best_val_loss': 1.5,
        'config': {'dataset': 'somewhere'},
        'rng': [{'cpu': torch.get_rng_state()}],
        'tokenizer': TOKENIZER.to_dict(),
    }
    os.makedirs(out_dir, exist_ok=True)
    save_checkpoint(str(out_dir), checkpoint, is_best=False)
    return checkpoint


def join_processes(n=2, per_node=2):
    """The environment of each process of a group, as torchrun sets it on nodes with so many of them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    both = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [dict(both, RANK=str(rank), LOCAL_RANK=str(rank % per_node)) for rank in range(n)]


def start(folder, script, *args):
    """A script that runs in `folder` beside the test; its lines can be read as they come."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=ENV, start_new_session=True, **pipes)


def start_forked(folder, script, *args, processes=1, env=(), **how):
    """The same in a fork; see there. Several processes are started by torchrun."""
    launcher = [ROOT / 'tests/torchrun.py', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
    return Forked(command, cwd=str(folder), env={**ENV, **dict(env)}, **how)


def finish(process):
    """A script that has ended: its args, returncode, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would slow down all other tests
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(folder, script, *args):
    return finish(start(folder, script, *args))


def run_forked(folder, script, *args, **how):
    return finish(start_forked(folder, script, *args, **how))


def run_group(folder, script, *args, n=2, per_node=2, **how):
    """The same as a group of n processes: the end of each, process 0 first."""
    ranks = join_processes(n, per_node)
    return [finish(process) for process in [start_forked(folder, script, *args, env=env, **how) for env in ranks]]


def train(folder, dataset, out_dir='out', processes=1, **settings):
    """A run of train.py that has to end well."""
    args = flags(**{**TINY, 'dataset': dataset, 'out_dir': out_dir, **settings})
    done = (
        run_group(folder, 'train.py', *args, n=processes) if processes > 1 else [run_forked(folder, 'train.py', *args)]
    )
    assert all(process.returncode == 0 for process in done), done[0].stderr
    return done[0]


def together(*calls):
    """The results of several calls that wait for processes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def read_until(stream, text):
    """The lines of a stream up to the first that holds `text`."""
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return ''.join(lines)
    pytest.fail(f'no {text!r} in {"".join(lines)!r}')


def complaint(folder, script, *args, **options):
    """The one line on stderr with which a script gives up."""
    done = run_forked(folder, script, *args, **options)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    return done.stderr


def load(folder, name='ckpt.pt'):
    return torch.load(Path(folder, name), weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]


def read_points(folder):
    """{name: [(step, value)]}: what TensorBoard shows of the run in a folder."""
    module = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = module.EventAccumulator(str(Path(folder, 'tensorboard')), {'scalars': 0}).Reload()
    return {name: [(point.step, point.value) for point in found.Scalars(name)] for name in found.Tags()['scalars']}


def same_state(a, b):
    """Whether two checkpoints hold bit-equal weights and optimizer states."""
    a, b = ([checkpoint['model'], *checkpoint['optimizer']['state'].values()] for checkpoint in (a, b))
    pairs = [(tensors[name], others[name]) for tensors, others in zip(a, b, strict=True) for name in tensors | others]
    return all(torch.equal(x, y) for x, y in pairs)


def same_run(a, b):
    """Whether two folders hold the same training: weights, optimizer and every evaluation, bit for bit."""
    keys = ('iter', 'tokens', 'train_loss', 'val_loss', 'lr')
    logs = [[[line[key] for key in keys] for line in read_log(folder)] for folder in (a, b)]
    return same_state(load(a), load(b)) and logs[0] == logs[1]
