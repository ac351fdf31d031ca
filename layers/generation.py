"""How a GPT writes text: a cache of what it has computed, weights packed once, tokens drawn one after another."""

import math
from contextlib import contextmanager

import torch
from torch.nn import functional as F


class KVCache:
    """What a block has computed of the tokens so far, such as keys and values, so that each token is computed once."""

    def __init__(self, block_size):
        self.block_size, self.kept, self.lengths = block_size, {}, {}

    @property
    def length(self):
        """The number of tokens so far."""
        return max(self.lengths.values()) if self.lengths else 0  # torch.compile does not know max(default=...)

    def count(self, name):
        """The number of tokens whose x is kept by this name."""
        return self.lengths.get(name, 0)

    def extend(self, name, x):
        """Keep x of the next tokens, (..., T, n), and return that of all tokens so far."""
        start = self.count(name)
        end = self.lengths[name] = start + x.size(-2)
        if start == 0 or end > self.kept[name].size(-2):
            room = x.new_empty(*x.shape[:-2], min(self.block_size, max(2 * end, 64)), x.size(-1))
            if start > 0:
                room[..., :start, :] = self.kept[name][..., :start, :]
            self.kept[name] = room
        self.kept[name][..., start:end, :] = x
        return self.kept[name][..., :end, :]

    def select(self, rows):
        """Go on with these rows of the batch (a list), in this order; a row may come several times."""
        for name, x in self.kept.items():
            self.kept[name] = x.new_empty(len(rows), *x.shape[1:])
            self.kept[name][..., : self.lengths[name], :] = x[rows, ..., : self.lengths[name], :]


def check_places(start, T, block_size):
    """ValueError where T tokens after `start` in a cache do not fit, or are several after some, or none."""
    if T == 0:
        raise ValueError('expected one token at least, got none')
    if start + T > block_size:
        raise ValueError(f'cannot forward length {start + T}, block_size is only {block_size}')
    if start > 0 and T > 1:
        raise ValueError(f'with tokens in the caches, expected one more at a time, got {T}')


@contextmanager
def packed_weights(model):
    """Inside, KAN layers pack their weights once for all passes without gradients."""
    layers = [module for module in model.modules() if hasattr(module, 'keep_packed')]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.keep_packed()
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop('_packed', None)


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, use_cache=True):
    """The tokens with which a GPT continues idx (B, T) as they come, max_new_tokens of (B, 1) each. Wants
    model.eval(). Rows of the head from vocab_size on are padding, never drawn. With a cache each token is computed
    once, as long as all fit into block_size. Beyond that the window moves, and the position of every token in it, so
    that the window is computed anew for each token.
    """
    block_size = model.config.block_size
    with packed_weights(model):
        caches = None
        for _ in range(max_new_tokens):
            if not caches or caches[0].length == block_size:
                caches = model.new_caches() if use_cache and idx.size(1) < block_size else None
                fresh = idx[:, -block_size:]
            logits, _ = model(fresh, caches=caches)
            fresh = sample_token(logits[:, -1, :vocab_size], temperature, top_k, top_p)
            idx = torch.cat((idx, fresh), dim=1)
            yield fresh


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw a token from each row: (B, V) -> (B, 1). Temperature 0 takes the most likely one, top_k keeps the k most
    likely, top_p the fewest tokens whose probabilities reach p (nucleus sampling, arXiv 1904.09751). ValueError for
    settings that make no sense, and for logits that are not finite.
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f'expected temperature >= 0, top_k >= 1, 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}')
    check_finite(logits)
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most zero, so that none can overflow
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -math.inf).scatter_(1, kept.indices, kept.values)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the probability before a token already reaches p
        probs = torch.zeros_like(probs).scatter_(1, order, ranked)
    return torch.multinomial(probs, num_samples=1)


def check_finite(logits):
    """ValueError for logits (B, V) that no token can be drawn by."""
    if not logits.amax(-1).float().isfinite().all():
        raise ValueError('the logits are not finite: the weights have diverged, or their dtype is too small for them')
