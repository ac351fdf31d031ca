"""What the blocks below the first trained one make of a text is the same in every step, and in every run from the same
base. Here it is computed once and kept, in memory and in a file.
"""

import functools
import hashlib
import os

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from run.device import autocast
from run.files import write_file
from run.session import progress
from surgery.lora import digest_of
from tasks.prompts import collate, make_batches


class FrozenBlocks:
    """Takes the place of gpt.features, for a GPT or a CausalLM: texts that are `kept` begin at the first trained block.
    ValueError where no block is frozen, or where a frozen one has dropout.

    kept: {digest of the token ids: what the last frozen block gives, (T, C)}, of which `loaded` come from a file
    """

    def __init__(self, gpt):
        self.gpt, self.compute, self.kept, self.loaded = gpt, gpt.features, {}, set()
        self.given = None  # in a pass over kept texts: what the trained blocks get, (B, T, C)
        self.made, self.in_tuple = None, False  # what the last frozen block gave, and whether as the first of a tuple
        blocks = gpt.get_submodule(gpt.blocks_path)
        self.n = count_frozen(gpt, blocks)
        for i, block in enumerate(blocks[: self.n]):
            block.forward = functools.partial(self.run_block, block.forward, i == self.n - 1)
        gpt.features = self.features

    def run_block(self, forward, is_last, x, *args, **kwargs):
        """The forward pass of a frozen block; of kept texts it hands on what it gets."""
        if self.given is not None:
            y = self.given if is_last else x
            return (y,) if self.in_tuple else y
        y = forward(x, *args, **kwargs)
        if is_last:
            self.made, self.in_tuple = first_of(y), isinstance(y, tuple)
        return y

    def features(self, idx, caches=None, lengths=None):
        """See GPT.features."""
        rows = [] if caches or lengths is None else [self.kept.get(name) for name in digests(idx, lengths)]
        if not rows or any(row is None for row in rows):
            return self.compute(idx, caches, lengths)
        self.given = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(idx.device)
        try:
            return self.compute(idx, lengths=lengths)
        finally:
            self.given = None

    @torch.no_grad()
    def read(self, examples, batch_size, device, dtype, stop=()):
        """Keep what the frozen blocks make of these, until `stop` holds something; returns how many are new. One batch
        is made anew in any case: ValueError where a file has something else of it.
        """
        n = len(self.kept)
        for i, batch in enumerate(progress(make_batches(examples, batch_size), 'batch')):
            if stop:
                break
            idx, lengths, _ = collate(batch, device)
            names = digests(idx, lengths)
            if i > 0 and all(name in self.kept for name in names):
                continue
            with autocast(device, dtype):
                self.compute(idx, lengths=lengths)
            is_exact = (dtype, device, self.made.dtype) == ('float32', 'cpu', torch.float32)
            tolerance = 1e-3 if is_exact else 0.1
            for name, x, length in zip(names, self.made, lengths.tolist()):
                x = x[:length].cpu().clone()
                if name in self.loaded and not is_close(self.kept[name], x, tolerance):
                    raise ValueError('the file of frozen_cache is not of these blocks: delete it')
                self.kept.setdefault(name, x)
        self.made = None
        return len(self.kept) - n

    def load(self, path):
        """Keep what a file has, if it is there. ValueError for a damaged one."""
        if os.path.exists(path):
            try:
                found = load_file(path)
            except SafetensorError as error:
                raise ValueError(f'{path} is damaged ({error}): delete it') from None
            self.kept |= found
            self.loaded |= found.keys()

    def save(self, path):
        """Add what is kept to a file, which other processes may add to as well. What they have put there stays: their
        runs train on it, and go on with it when they are resumed.
        """
        with FileLock(f'{path}.lock'):
            others = load_file(path) if os.path.exists(path) else {}
            write_file(path, save({**self.kept, **others}))

    def path_in(self, folder, about):
        """The file for these blocks, named by their weights and by `about`, whatever else their numbers depend on."""
        later = tuple(f'{self.gpt.blocks_path}.{i}.' for i in range(self.n, self.gpt.config.n_layer))
        state = self.gpt.state_dict().items()
        weights = digest_of((name, x) for name, x in state if not name.startswith((*later, 'lm_head.')))
        digest = hashlib.sha256(repr((self.n, about, weights)).encode()).hexdigest()
        return os.path.join(folder, f'frozen-{digest[:16]}.safetensors')


def keep_frozen(gpt, folder, about, examples, batch_size, session):
    """Have the frozen blocks of a GPT read all examples, and keep what they make of them in a file of the folder, for
    other runs; `about` as in path_in.
    """
    frozen = FrozenBlocks(gpt)
    os.makedirs(folder, exist_ok=True)
    path = frozen.path_in(folder, about)
    frozen.load(path)
    n_new = frozen.read(examples, batch_size, session.device, session.dtype, session.signals)
    what = f'texts as the first {frozen.n} of {gpt.config.n_layer} blocks give them'
    megabytes = sum(x.nbytes for x in frozen.kept.values()) / 1e6
    session.say(f'{path}: {what}, {n_new:,} of {len(frozen.kept):,} are new, {megabytes:.0f} MB in memory')
    if n_new and session.master:
        try:
            frozen.save(path)
        except OSError as error:
            session.say(f'warning: the next run has to read them again: {error}')
    if session.all_reduce(n_new)[0] > 0:  # of any process; and by now the first one has saved
        frozen.load(path)  # in which another run may have been first


def count_frozen(gpt, blocks):
    """How many of the first blocks give what no trained weight changes. ValueError for none, and for dropout."""
    training, n = gpt.training, 0
    trained, still = outputs_of(gpt.train(), blocks), outputs_of(gpt.eval(), blocks)
    gpt.train(training)
    while n < len(blocks) and not trained[n].requires_grad:
        n += 1
    if n == 0:
        advice = "finetune_mode='head', or lora_targets that name the last blocks alone"
        raise ValueError(f'frozen_cache wants frozen blocks below those that train: {advice}')
    if not is_close(trained[n - 1], still[n - 1], 1e-3 if still[n - 1].dtype == torch.float32 else 0.1):
        raise ValueError('frozen_cache keeps what is the same in every step: it wants dropout=0')
    return n


@torch.enable_grad()
def outputs_of(gpt, blocks):
    """What each block gives, of a few tokens."""
    outputs, device = [], next(gpt.parameters()).device
    hooks = [block.register_forward_hook(lambda block, inputs, y: outputs.append(first_of(y))) for block in blocks]
    idx = torch.arange(min(8, gpt.config.block_size, gpt.config.vocab_size), device=device)[None]
    gpt.features(idx, lengths=torch.tensor([idx.size(1)], device=device))
    for hook in hooks:
        hook.remove()
    return outputs


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def is_close(x, y, tolerance):
    """Whether they differ by rounding alone."""
    return torch.allclose(x, y, atol=tolerance * y.float().std().nan_to_num().item(), rtol=tolerance)


def digests(idx, lengths):
    """What tells the texts (B, T) of these lengths (B,) apart."""
    rows = [row[:length] for row, length in zip(idx.tolist(), lengths.tolist())]
    return [hashlib.sha256(repr(row).encode()).hexdigest()[:32] for row in rows]
