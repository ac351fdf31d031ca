"""What a run leaves behind, and how it is read back.

    ckpt.pt        the latest state, from which a run is resumed: nanoGPT's keys + rng, scaler, tokenizer, versions
    ckpt_prev.pt   the state saved before it
    best.pt        the state with the lowest validation loss after the first step, what sample.py reads
    run.json, log.jsonl   what records.py writes
    history/       the weights of every evaluation, a file each by iteration, where keep_history asks for them
    interpret/     what interpret.py writes
    tensorboard/   the points of log.jsonl for TensorBoard, where log_to asks for them
    metrics.json, predictions, adapter   what finetune.py adds at the end of a run

A folder of export.py is read like that of a run: gpt.json says what model.safetensors holds.

Checkpoints hold plain tensors, numbers and strings, and are read as such: nothing in them is run. Two names in them may
be opened: that of the data set, and of a run of finetune.py without its base `init_from`.
"""

import contextlib
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import zipfile
from pathlib import Path

import numpy
import torch

from layers.muon import is_muons
from model import CONV1D, GPT, GPTConfig
from run.files import sync_folder, write_atomically

MODELS = ('best.pt', 'ckpt.pt')  # what a model is loaded from, the first that is there
STATES = ('ckpt.pt', 'ckpt_prev.pt', 'best.pt')
# in a folder of export.py: model_args, tokenizer, config, iter_num, best_val_loss; gpt2: whether it is one; tied: the
# names that have the weight of the token embeddings
EXPORT = 'gpt.json'
LEFT = (*STATES, 'run.json', 'log.jsonl', 'history', 'interpret')  # all that a run leaves behind
LEFT += ('metrics.json', 'predictions', 'adapter', 'tensorboard')


def save_checkpoint(out_dir, checkpoint, is_best, again=False):
    """Write ckpt.pt and keep the one before it, unless that is the same state saved `again`; the best is best.pt, too.
    OSError leaves the older files whole.
    """
    latest, previous, best = (os.path.join(out_dir, name) for name in STATES)
    with write_atomically(best if is_best else latest) as f:
        write_state(checkpoint, f)
        if os.path.exists(latest) and not again:
            link(latest, previous)
    if is_best:  # after best.pt: with a crash in between, the run goes on from the state before and gets here again
        try:
            copy(best, latest)  # two files: whoever writes another state into one of them keeps the other
        except OSError:
            link(best, latest)  # there is room for one


def save_weights(out_dir, weights):
    """Write the weights of an iteration into history/, beside those of the others."""
    folder = os.path.join(out_dir, 'history')
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)  # and not an out_dir that was moved away
    with write_atomically(os.path.join(folder, f'{weights["iter_num"]:08d}.pt')) as f:
        write_state(weights, f)


def saved_after(out_dir, iteration):
    """The files of later iterations, best.pt and those in history/: a run that goes on from this one makes new ones. A
    best.pt that cannot be read is among them.
    """
    names = sorted(path.name for path in Path(out_dir, 'history').glob('*.pt'))
    later = [f'history/{name}' for name in names if name > f'{iteration:08d}.pt']
    path = os.path.join(out_dir, 'best.pt')
    try:
        best = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        is_usable = best['iter_num'] <= iteration and not find_damage(path)
    except Exception:  # what torch raises on damaged files has no type in common
        is_usable = not os.path.exists(path)
    return later + ['best.pt'] * (not is_usable)


def write_state(state, f):
    try:
        torch.save(state, f)
    except RuntimeError as error:  # how torch reports a failed write
        raise OSError(f'cannot write {f.name.removesuffix(".tmp")}: {error}'.splitlines()[0]) from None


def link(path, name):
    """Give a file a second name, in place of what had it; a copy where the file system has no links."""
    if os.path.exists(name) and os.path.samefile(path, name):
        return
    temporary = name + '.link'  # not .tmp: what write_atomically empties must not be a name of this file
    try:
        if os.path.exists(temporary):
            os.remove(temporary)
        os.link(path, temporary)
        os.replace(temporary, name)
        sync_folder(os.path.dirname(name) or '.')
    except OSError:
        copy(path, name)


def copy(path, name):
    with open(path, 'rb') as source, write_atomically(name) as target:
        shutil.copyfileobj(source, target)


def set_aside(out_dir, names=LEFT):
    """Move the files of an earlier run into a new folder in out_dir; returns that, or None where there was none."""
    names = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return None
    folders = (os.path.join(out_dir, f'earlier-{i}') for i in itertools.count(1))
    folder = next(folder for folder in folders if not os.path.exists(folder))
    os.mkdir(folder)
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def load_checkpoint(out_dir, names=MODELS):
    """The first of the files `names` in out_dir. ValueError where there is none, or one damaged or not plain data."""
    paths = [os.path.join(out_dir, name) for name in names]
    path = next(filter(os.path.exists, paths), None)
    if path is None and is_export(out_dir):
        return read_export(out_dir)
    others = [name for name in STATES if os.path.exists(os.path.join(out_dir, name))]
    others = [name for name in others if not path or not os.path.samefile(os.path.join(out_dir, name), path)]
    advice = f'; to use another in its place, copy it there: {", ".join(others)}' if others else ''
    if path is None and others:
        raise ValueError(f'no {" or ".join(names)} in {out_dir!r}: copy {" or ".join(others)} to {names[0]} to use it')
    if path is None:
        raise ValueError(f'no checkpoint in {out_dir!r}: expected {" or ".join(names)}, as train.py writes them')
    try:
        damaged = find_damage(path)
        if damaged:
            raise ValueError(f'damage in {damaged}')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f'{path} is refused: it holds more than data, and loading it could run code') from None
    except Exception as error:  # what the readers raise on damaged bytes has no type in common
        what = f'{type(error).__name__} {error}'.splitlines()[0]
        raise ValueError(
            f'{path} is cut off, damaged, older than torch 1.6 or no checkpoint ({what}){advice}'
        ) from None
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of train.py or nanoGPT: 'model' and 'model_args' are missing")
    return checkpoint


def find_damage(path):
    """The part of a checkpoint that is damaged, or None. torch.load does not look at the checksums of tensors, and
    leaves one marked as a folder (0x10) unread.
    """
    with zipfile.ZipFile(path) as archive:
        folder = next((entry.filename for entry in archive.infolist() if entry.external_attr & 0x10), None)
        return folder or archive.testzip()


def is_export(folder):
    return os.path.exists(os.path.join(folder, EXPORT))


def holds_model(folder):
    """Whether train.py, finetune.py or export.py has left a model there."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (*MODELS, EXPORT))


def read_export(folder):
    """The checkpoint that export.py took there, less the state of its training."""
    from safetensors.torch import load_file

    try:
        with open(os.path.join(folder, EXPORT), encoding='utf-8') as f:
            checkpoint = json.load(f)
        weights = load_file(os.path.join(folder, 'model.safetensors'))
        state = {name.removeprefix('gpt.'): p for name, p in weights.items()}
        for name in checkpoint.pop('tied'):
            shared = state['transformer.wte.weight']
            found = state.setdefault(name, shared)
            if found is not shared and not torch.equal(found, shared):
                raise ValueError(f'{name} is no longer what transformer.wte.weight is')
        if checkpoint.pop('gpt2'):
            state = {name: p.t() if name.endswith(CONV1D) else p for name, p in state.items()}
            biases = {name: p for name, p in state.items() if name.endswith('.bias')}
            if any(p.any() for p in biases.values()):  # of a model without they are zeros there, until they train
                checkpoint['model_args']['bias'] = True
            if not checkpoint['model_args']['bias']:
                state = {name: p for name, p in state.items() if name not in biases}
        return {**checkpoint, 'model': state}
    except Exception as error:  # what safetensors raises on damaged bytes has a type of its own
        what = f'{type(error).__name__} {error}'.splitlines()[0]
        raise ValueError(f'{folder} is a damaged folder of export.py ({what}): export it again') from None


def build_model(checkpoint, **overrides):
    """The GPT of a checkpoint of ours, of nanoGPT or of nanoGPKANT, with its weights."""
    state = {}
    for name, tensor in checkpoint['model'].items():
        if not name.endswith('.attn.bias'):  # nanoGPT's causal mask, no parameter
            state[re.sub(r'^(_orig_mod\.|module\.)+', '', name)] = tensor  # what torch.compile and DDP put before it
    model_args = {**checkpoint['model_args'], **overrides}
    if 'use_kan' not in model_args:
        model_args.update(kan_args(state))
    try:
        model = GPT(GPTConfig(**model_args))
        model.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f'the checkpoint does not fit its own model_args: {shorten(error)}') from None
    return model


def moments_fit(groups, saved):
    """Whether the saved state of an optimizer is of these groups: of as many weights, by the same optimizer, and with
    moments of their shapes. PyTorch itself looks at the number of weights alone.
    """

    def kinds(groups):
        return [(len(group['params']), is_muons(group)) for group in groups]

    if kinds(groups) != kinds(saved['param_groups']):
        return False
    weights = [p for group in groups for p in group['params']]
    places = [i for group in saved['param_groups'] for i in group['params']]
    for p, i in zip(weights, places):
        moments = [x for x in saved['state'].get(i, {}).values() if torch.is_tensor(x) and x.dim() > 0]  # no counts
        if any(moment.shape != p.shape for moment in moments):
            return False
    return True


def shorten(error):
    """What an error of torch says, in one line."""
    return ' '.join(str(error).split())[:300]


def kan_args(state):
    """The KAN settings of nanoGPKANT's checkpoints, which do not name them, by the shapes of their first splines."""
    splines, knots = (state.get(f'transformer.h.0.attn.c_attn.layers.0.{name}') for name in ('spline_weight', 'grid'))
    if splines is None or knots is None:
        return {}
    K, P = splines.size(-1), knots.size(-1)  # G + k and G + 2k + 1
    spline_order = P - 1 - K
    return dict(use_kan=True, kan_targets='attn,mlp', grid_size=K - spline_order, spline_order=spline_order)


def versions():
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': numpy.__version__}
