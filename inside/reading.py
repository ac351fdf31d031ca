"""What a model is looked at with: tokens of its data set, or examples of its task. One half of them is for the
statistics (`read`), the other for losses (`loss`), so that a formula is not judged on what it was fitted to.
"""

import math
import random

import numpy as np
import torch

from data import loader
from model import GPT, GPTConfig
from run.checkpoint import build_model
from tasks import model as task_model
from tasks import prompts


class Reading:
    """What Text and Examples share: `halves`, and `mean_loss` of a model on one of them."""

    def read(self, model):
        loss = self.mean_loss(model, self.halves[0])
        if not math.isfinite(loss):
            raise ValueError(f'the loss is {loss}: the weights have diverged')

    def loss(self, model):
        return self.mean_loss(model, self.halves[1])


class Text(Reading):
    """Windows of a split of a data set, every other one for the statistics."""

    def __init__(self, checkpoint, dataset, split, rows, loss_rows, device):
        self.checkpoint, self.device = checkpoint, device
        self.model = build_model(checkpoint, dropout=0.0).to(device).eval()
        T, vocab_size = self.model.config.block_size, self.model.config.vocab_size
        name, _, self.tokenizer, self.data = loader.open_text(checkpoint, dataset, split, vocab_size)
        loader.check_dataset(name, T, vocab_size, [split])
        starts = loader.fixed_starts(self.data, T, 2 * math.ceil(max(rows, loss_rows) / T))
        if len(starts) < 2:
            raise ValueError(f'{split} of {name!r} holds one window of {T} tokens: statistics and losses want one each')
        self.halves = spread(starts[::2], math.ceil(rows / T)), spread(starts[1::2], math.ceil(loss_rows / T))
        self.about = f'{min(rows, len(self.halves[0]) * T):,} tokens of {split} of {name}'

    def fresh(self):
        """The model with the random weights that its training began with, if the same PyTorch made them."""
        torch.manual_seed(self.checkpoint.get('config', {}).get('seed', 1337))
        return GPT(GPTConfig(**vars(self.model.config))).to(self.device).eval()

    @torch.no_grad()
    def mean_loss(self, model, starts):
        total = 0.0
        for batch in np.array_split(starts, math.ceil(len(starts) / 16)):
            x, y = loader.get_batch(self.data, self.model.config.block_size, batch, self.device)
            total += model(x, y)[1].item() * len(batch)
        return total / len(starts)


class Examples(Reading):
    """The examples of dev of a task in a fixed random order, as the files of tasks are sorted here and there. One at
    a time, so that no padding is measured.
    """

    def __init__(self, checkpoint, rows, loss_rows, device):
        self.settings, self.device = task_model.complete(checkpoint['finetune']), device
        model, self.tokenizer = task_model.load_task_model(checkpoint, dropout=0.0)
        self.model = model.to(device).eval()
        name = self.settings['task']
        prompts.prepare_task(name)
        examples = prompts.read_examples(name, 'dev', self.tokenizer, model.gpt.config.block_size)
        if len(examples) < 2:
            raise ValueError(f'dev of {name} holds {len(examples)} examples: statistics and losses want one each')
        random.Random(0).shuffle(examples)
        self.halves = first(examples[::2], rows), first(examples[1::2], loss_rows)
        self.about = f'{len(self.halves[0]):,} examples of dev of {name}'

    def fresh(self):
        """The base model with new adapters, graph layers and KAN layers, as its fine-tuning began with it."""
        torch.manual_seed(self.settings['seed'])
        longest, weights = self.settings['block_size'], self.settings['weights']
        gpt, tokenizer = task_model.load_base(self.settings['init_from'], 0.0, longest, weights)
        return task_model.make_task_model(gpt, tokenizer, self.settings).to(self.device).eval()

    @torch.no_grad()
    def mean_loss(self, model, examples):
        total = 0.0
        for example in examples:
            idx, lengths, targets = prompts.collate([example], self.device)
            total += float(task_model.sum_losses(model(idx, lengths), targets))
        return total / task_model.count_targets(examples)


def spread(starts, n):
    """n of the starts, from all over the split; all where there are fewer."""
    return starts[np.linspace(0, len(starts) - 1, min(n, len(starts))).round().astype(int)]


def first(examples, n_tokens):
    """The first examples, up to that many tokens, one at least."""
    ends = np.cumsum([len(example.ids) for example in examples])
    return examples[: max(1, int((ends <= n_tokens).sum()))]
