"""Graph attention for a GPT: tokens are nodes, edges say which earlier tokens a token looks at, and PyTorch Geometric's
GATConv (arXiv 1710.10903) or GATv2Conv (arXiv 2105.14491) passes messages along them, on lists of edges or, with the
same parameters and the same result, on masks.

B, T, C   batch, tokens, width
H, D      heads, and the width of each: C = H * D
S         all tokens so far: the T at hand and those before them in a cache
E         edges; the list of them is (2, E), row 0 the source j, row 1 the target i, both b * T + position
mask      (T, S) or (B, T, S), true where target i looks at source j: at itself always, at none that comes later
"""

import functools
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

EDGES = ('causal', 'window', 'topk', 'same')
KINDS = {'gat': 'GATConv', 'gatv2': 'GATv2Conv'}
ROWS = 128  # targets at a time on masks: none looks beyond itself, so nearly half of the sources are left out
NUMBERS = 2**24  # GATv2 holds about that many at a time, C for each pair of a target and a source


def check_graph(config):
    """ValueError for the graph settings of a GPTConfig that nothing can be made of."""
    expected = dict(graph_kind=tuple(KINDS), graph_place=('after', 'attention'), graph_backend=('auto', 'dense', 'pyg'))
    for name, choices in expected.items():
        if getattr(config, name) not in choices:
            raise ValueError(f'{name}={getattr(config, name)!r}: expected {", ".join(choices[:-1])} or {choices[-1]}')
    if set(config.graph_edges.split(',')) - set(EDGES):
        raise ValueError(f'graph_edges={config.graph_edges!r}: expected any of {", ".join(EDGES)} joined by commas')
    for name in 'graph_heads', 'graph_window', 'graph_topk':
        if getattr(config, name) < 1:
            raise ValueError(f'{name} must be at least 1, got {getattr(config, name)}')
    if config.graph_place == 'attention' and config.is_kan('attn'):
        taken = "graph_place='attention' leaves no attention to make a KAN of"
        raise ValueError(f'kan_targets names attn, but {taken}: expected mlp or head')


def add_graph(model, last=0, **settings):
    """Put graph layers (settings: graph_kind ...) behind the MLPs of a GPT, or of its `last` blocks alone, and return
    it. At first its logits stay. ValueError for other settings, or where there are some.
    """
    config = with_graph(model.config, settings)
    blocks = last_of(model.transformer.h, last)
    made = [(nn.LayerNorm(config.n_embd, bias=config.bias), GraphAttention(config)) for _ in blocks]
    for block, layers in zip(blocks, made):
        block.ln_3, block.graph = (layer.to(block.ln_2.weight).train(block.training) for layer in layers)
    model.config = config
    return model


def with_graph(config, settings):
    """The GPTConfig with graph layers behind its MLPs, as add_graph puts them there; ValueError as there."""
    unknown = [name for name in settings if not (name.startswith('graph_') and hasattr(config, name))]
    if unknown:
        raise ValueError(f'no settings of graph layers: {", ".join(unknown)}')
    if config.use_graph or settings.get('graph_place', 'after') != 'after':
        raise ValueError(f'expected a GPT without graph layers, and settings of layers after the MLPs, got {settings}')
    return replace(config, **{'use_graph': True, 'graph_place': 'after', **settings})


def last_of(blocks, n):
    """The last n blocks of a model, with 0 all of them."""
    if not 0 <= n <= len(blocks):
        raise ValueError(f'last must lie between 0 and {len(blocks)}, the number of blocks, got {n}')
    return blocks[-n:]


@functools.cache
def list_near(N, window, device):
    """The list (2, E) of N tokens and the `window` tokens before each, by target, and how many edges end up to each."""
    with torch.inference_mode(False):  # it outlives the pass that asks for it
        targets = torch.arange(N, device=device)[:, None]
        sources = targets - torch.arange(min(window, N - 1), -1, -1, device=device)  # (N, 1 + window)
        is_there = sources >= 0
        edges = torch.stack((sources, targets.expand_as(sources)))[:, is_there]
        return edges, is_there.sum(1).cumsum(0).tolist()


def list_of(mask, B):
    """The edges of a mask (T, T) or (B, T, T) as a list (2, E), of tokens b * T + position."""
    T = mask.size(-1)
    b, target, source = mask.expand(B, T, T).nonzero().t()
    return torch.stack((source, target)) + b * T


def bias_of(mask):
    """(T, S) or (B, T, S) -> (1, T, S) or (B, 1, T, S): zero at edges, -inf elsewhere"""
    return torch.zeros(mask.size(), device=mask.device).masked_fill_(~mask, -torch.inf).unsqueeze(-3)


class Edges:
    """The edges of one forward pass: those that places and tokens decide are found once and shared by the layers, those
    to the most similar tokens differ between layers. ids (B, T) are the tokens at hand, cache the KVCache of those so
    far; from lengths (B,) on, tokens are padding and linked with themselves alone.
    """

    def __init__(self, config, ids, cache=None, lengths=None):
        kinds = config.graph_edges.split(',')
        self.window = config.graph_window if 'window' in kinds else 0
        self.same, self.similar = 'same' in kinds, 'topk' in kinds
        if 'causal' in kinds:  # which holds all others
            self.window, self.same, self.similar = config.block_size, False, False
        self.block_size, self.topk, self.lengths = config.block_size, config.graph_topk, lengths
        self.B, T = ids.size()
        ids = ids if cache is None else cache.extend('ids', ids.unsqueeze(-1)).squeeze(-1)  # (B, S)
        places = torch.arange(ids.size(1), device=ids.device)
        gaps = places[-T:, None] - places  # how many tokens each source lies before each target, (T, S)
        self.earlier = gaps > 0  # where a target may look besides at itself: (T, S), with lengths (B, T, S)
        if lengths is not None:
            self.earlier = self.earlier & (torch.arange(T, device=ids.device) < lengths[:, None]).unsqueeze(-1)
        near = gaps <= self.window
        if self.same:
            near = near | (ids[:, -T:, None] == ids[:, None])
        self.shared = (gaps == 0) | near & self.earlier  # the mask of the edges that all layers have
        self.shared_bias = None

    def mask(self, x, cache=None):
        """The mask of a layer with inputs x (B, T, C)."""
        if not self.similar:
            return self.shared
        x = F.normalize(x.detach().float(), dim=-1)
        x = x if cache is None else cache.extend('similar', x)  # (B, S, C)
        device_type = 'cpu' if x.is_meta else x.device.type
        with torch.autocast(device_type, enabled=False):  # at half precision many would be equally similar
            similarity = x[:, -self.shared.size(-2) :] @ x.transpose(1, 2)  # (B, T, S)
        similarity.masked_fill_(~self.earlier, -torch.inf)
        least = similarity.topk(min(self.topk, x.size(1)), sorted=False).values.amin(-1, keepdim=True)
        # equal ones stay equal however they are rounded, or a text would get other edges alone than in a batch
        return self.shared | (similarity >= least - 1e-5) & self.earlier

    def bias(self, x, cache=None):
        """The same as what is added to scores, (1, T, S) or (B, 1, T, S): zero at edges, -inf elsewhere."""
        if self.similar:
            return bias_of(self.mask(x, cache))
        if self.shared_bias is None:  # no cached_property, whose lock (Python 3.11) torch.compile cannot follow
            self.shared_bias = bias_of(self.shared)
        return self.shared_bias

    def list(self, x):
        """The same as a list (2, E), of tokens b * T + position; there is no cache."""
        return list_of(self.mask(x), len(x)) if self.similar else self.shared_list

    @functools.cached_property
    def shared_list(self):
        if self.same or self.lengths is not None:
            return list_of(self.shared, self.B)
        T, device = self.shared.size(-1), self.shared.device
        N = min(self.block_size, 1 << (T - 1).bit_length())  # T or more, so that lists of few lengths are kept
        edges, counts = list_near(N, self.window, device)  # those of T tokens are its beginning
        edges, b = edges[:, None, : counts[T - 1]], torch.arange(self.B, device=device)[:, None]
        return (edges + b * T).flatten(1)


class GraphAttention(nn.Module):
    """GATConv or GATv2Conv over the tokens, then a projection, in place of self-attention, or a gate, behind an MLP."""

    def __init__(self, config):
        super().__init__()
        try:
            from torch_geometric import nn as pyg
        except ImportError:
            raise ValueError('graph layers need PyTorch Geometric: pip install torch-geometric') from None
        C, self.n_head, self.kind = config.n_embd, config.graph_heads, config.graph_kind
        conv = getattr(pyg, KINDS[self.kind])
        self.conv = conv(C, C // self.n_head, heads=self.n_head, add_self_loops=False, bias=config.bias)
        if config.graph_place == 'attention':
            self.c_proj = nn.Linear(C, C, bias=config.bias)
        else:
            self.gate = nn.Parameter(torch.zeros(C))
        self.dropout = nn.Dropout(config.dropout)
        causal = 'causal' in config.graph_edges.split(',')
        self.dense = causal if config.graph_backend == 'auto' else config.graph_backend == 'dense'

    def forward(self, x, cache=None, edges=None):
        """x (B, T, C), with a cache the tokens that follow those in it; edges: the Edges of the pass."""
        if self.dense or cache is not None or x.is_meta:  # without data there is no list of edges
            y = self.attend(x, edges.bias(x, cache), cache)
        else:
            y = self.conv(x.flatten(0, 1), edges.list(x)).view(x.size())
        return self.dropout(y * self.gate if hasattr(self, 'gate') else self.c_proj(y))

    def attend(self, x, bias, cache=None):
        """What the convolution gives on the edges of `Edges.bias`, from its parameters."""
        (B, T, C), conv = x.size(), self.conv
        values = self.split(conv.lin(x) if self.kind == 'gat' else conv.lin_l(x))  # (B, H, T, D)
        if cache is not None:
            values = cache.extend('values', values)  # (B, H, S, D)
        S = values.size(2)
        if self.kind == 'gat':
            sources = (values * conv.att_src.transpose(0, 1)).sum(-1, keepdim=True)  # (B, H, S, 1)
            targets = (values[:, :, S - T :] * conv.att_dst.transpose(0, 1)).sum(-1, keepdim=True)  # (B, H, T, 1)
            R, attend_rows = ROWS, self.attend_rows
        else:  # the pairs are computed again in the backward pass
            from torch.utils.checkpoint import checkpoint  # brings PyTorch's compiler along, which takes a second

            sources, targets = values, self.split(conv.lin_r(x))  # (B, H, S, D), (B, H, T, D)
            R = max(16, NUMBERS // max(1, B * S * C))
            attend_rows = functools.partial(checkpoint, self.attend_rows, use_reentrant=False)
        if x.is_meta:  # FLOPs are counted: of whole matrices, once
            R, attend_rows = T, self.attend_rows
        parts = []
        for i in range(0, T, R):
            rows, n = slice(i, i + R), S - T + min(i + R, T)  # no target of these rows looks beyond n sources
            parts.append(attend_rows(targets[:, :, rows], sources[:, :, :n], values[:, :, :n], bias[..., rows, :n]))
        y = torch.cat(parts, 2).transpose(1, 2).reshape(B, T, C)  # heads side by side
        return y if conv.bias is None else y + conv.bias

    def split(self, x):
        """(B, T, C) -> (B, H, T, D)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def attend_rows(self, targets, sources, values, bias):
        """targets (B, H, R, 1 or D), sources (B, H, S, 1 or D), values (B, H, S, D), bias of Edges -> (B, H, R, D)"""
        slope = self.conv.negative_slope
        if self.kind == 'gat':
            scores = F.leaky_relu((targets + sources.mT).add_(bias), slope, inplace=True)  # (B, H, R, S)
        else:
            pairs = F.leaky_relu(targets.unsqueeze(3) + sources.unsqueeze(2), slope, inplace=True)  # (B, H, R, S, D)
            scores = (pairs * self.conv.att[:, :, None, None]).sum(-1).add_(bias)
        return scores.softmax(-1).to(values.dtype) @ values
