"""A GPT whose linear layers become Kolmogorov-Arnold layers by config, and that gets graph attention by config: one
read, in the shape and with the names of nanoGPT's model.py (https://github.com/karpathy/nanoGPT), so that code
written for it and checkpoints saved by it work unchanged.
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from kan import KAN, ChannelSpline, KANLinear
from layers.activations import ACTIVATIONS
from layers.generation import KVCache, check_places, stream
from layers.graph import Edges, GraphAttention, check_graph
from layers.muon import join_muon
from layers.pretrained import load_gpt2

GPT2S = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # what transformers' GPT-2 has the other way round


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2 vocab_size of 50257, padded up to nearest multiple of 64 for efficiency
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    gelu: str = 'none'  # the `approximate` of F.gelu: 'none' is exact, 'tanh' is what GPT-2 was trained with
    mlp: str = 'mlp'  # or 'swiglu'
    mlp_hidden: float = 4.0  # width of the MLP's hidden layer, by n_embd; 8 / 3 gives SwiGLU as many parameters
    activation: str = ''  # of the MLP, one of ACTIVATIONS; empty: gelu, of swiglu silu
    init_std: float = 0.02  # of the initial weights; those of KAN layers are scaled by init_std / 0.02
    rotary: bool = False  # rotary positions, of queries and keys, in place of position embeddings
    use_kan: bool = False  # KAN layers in place of the linear layers named by kan_targets
    kan_kind: str = 'edge'  # a function on every edge; 'channel': a linear layer behind one function a channel
    kan_targets: str = 'mlp'  # any of attn, mlp, head, joined by commas
    kan_hidden: float = 4.0  # width of the hidden layer of an MLP of kind edge, in multiples of n_embd
    kan_norm: bool = False  # normalise that hidden layer, to unit variance; it wants a grid of about -3 to 3
    grid_size: int = 5
    spline_order: int = 3
    grid_min: float = -1.0
    grid_max: float = 1.0
    spline_init_std: float = 0.0  # of channel functions: zero makes them their plain activations at first
    kan_bias: bool = False  # of pruned models: a bias of KAN layers, for the mean of what was cut off
    kan_mask: bool = False  # of pruned models: a mask of their edges
    use_graph: bool = False  # graph attention by layers/graph.py; needs torch-geometric
    graph_kind: str = 'gat'  # or 'gatv2'
    graph_edges: str = 'causal'  # from a token to any of causal, window, topk, same, joined by commas
    graph_heads: int = 4
    graph_place: str = 'after'  # the MLP, with a gate that starts at zero; or 'attention', in place of self-attention
    graph_window: int = 8  # window: that many tokens before
    graph_topk: int = 8  # topk: that many of the earlier tokens, those whose inputs to the layer are most similar
    graph_backend: str = 'auto'  # 'dense', 'pyg'; auto is dense where edges hold causal, else pyg

    def __post_init__(self):
        hidden = 'kan_hidden' if self.mlp_form() == 'kan' else 'mlp_hidden'
        if self.n_head < 1 or round(getattr(self, hidden) * self.n_embd) < 1:
            found = f'{self.n_head} and {getattr(self, hidden)} * {self.n_embd}'
            raise ValueError(f'expected n_head >= 1 and {hidden} * n_embd >= 1, got {found}')
        if self.mlp not in ('mlp', 'swiglu'):
            raise ValueError(f"mlp={self.mlp!r}: expected 'mlp' or 'swiglu' (KAN layers by use_kan)")
        if self.activation and self.activation not in ACTIVATIONS:
            raise ValueError(f'activation={self.activation!r}: expected one of {", ".join(ACTIVATIONS)}')
        if self.gelu not in ('none', 'tanh'):
            raise ValueError(f"gelu={self.gelu!r}: expected 'none' or 'tanh'")
        if self.kan_kind not in ('edge', 'channel'):
            raise ValueError(f"kan_kind={self.kan_kind!r}: expected 'edge' or 'channel'")
        self.check_functions()
        if not self.init_std > 0:
            raise ValueError(f'init_std must be greater than zero, got {self.init_std}')
        if not self.grid_min < self.grid_max:
            raise ValueError(f'grid_min must be less than grid_max, got {self.grid_min} and {self.grid_max}')
        if self.use_graph:
            check_graph(self)
        self.check_heads('n_head', is_even=self.rotary)
        if self.use_graph:
            self.check_heads('graph_heads')
        if self.rotary and self.is_graph('attention'):
            raise ValueError("rotary turns queries and keys, and graph_place='attention' has none: leave one out")
        if set(self.kan_targets.split(',')) - {'attn', 'mlp', 'head'}:
            raise ValueError(f'kan_targets={self.kan_targets!r}: expected any of attn, mlp, head joined by commas')

    def check_heads(self, name, is_even=False):
        """ValueError where n_embd does not divide into heads, or where is_even into heads of even width."""
        heads, unit = getattr(self, name), 2 if is_even else 1
        step = heads * unit
        if self.n_embd % step == 0:
            return
        below = self.n_embd // step * step
        nearest = f'n_embd={below} or {below + step}' if below else f'n_embd={step}'
        divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % (n * unit) == 0]
        if divisors:  # an odd width has none of even heads
            nearest += f', or {name}={min(divisors, key=lambda divisor: abs(divisor - heads))}'
        problem = f'n_embd={self.n_embd} is not divisible by {name}={heads}'
        if is_even:
            problem += ' into heads of an even width, as rotary wants'
        raise ValueError(f'{problem}; nearest: {nearest}')

    def check_functions(self):
        """ValueError for settings that would do nothing."""
        is_channel = self.use_kan and self.kan_kind == 'channel'
        if is_channel and (self.kan_norm or self.kan_bias or self.kan_mask or self.kan_hidden != 4.0):
            wanted = 'kan_hidden, kan_norm, kan_bias and kan_mask are for functions on edges'
            raise ValueError(f"{wanted}, and kan_kind is 'channel', where mlp_hidden is the width")
        if is_channel and self.is_kan('mlp') and self.activation == 'swish':
            raise ValueError("activation='swish' learns a slope: a learned function begins as one of the others")
        if self.mlp_form() == 'kan' and self.activation:
            raise ValueError(f'activation={self.activation!r}: between KAN layers in the MLP there is none, drop it')
        if self.spline_init_std < 0 or (self.spline_init_std and not is_channel):
            wanted = "spline_init_std must not be negative, and wants use_kan and kan_kind='channel'"
            raise ValueError(f'{wanted}, got {self.spline_init_std}')

    def refuse_idle(self):
        """ValueError for more settings that would do nothing; models that were made with them are loaded."""
        if self.mlp_form() == 'kan' and (self.mlp != 'mlp' or self.mlp_hidden != 4.0):
            advice = 'whose width is kan_hidden: leave them out'
            raise ValueError(f'mlp and mlp_hidden are of MLPs without KAN layers on edges, {advice}')
        if self.use_kan and not self.is_kan('mlp') and (self.kan_norm or self.kan_hidden != 4.0):
            advice = f'leave them out, or add mlp to kan_targets={self.kan_targets!r}'
            raise ValueError(f'kan_norm and kan_hidden are of KAN layers in the MLP: {advice}')

    def is_kan(self, target):
        return self.use_kan and target in self.kan_targets.split(',')

    def mlp_form(self):
        """The key of MLPS"""
        if not self.is_kan('mlp'):
            return self.mlp
        return 'kan' if self.kan_kind == 'edge' else f'channel_{self.mlp}'

    def is_graph(self, place):
        return self.use_graph and place == self.graph_place


def model_settings(settings):
    """Those of a script's settings that are arguments of GPTConfig."""
    return {name: settings[name] for name in GPTConfig.__dataclass_fields__ if name in settings}


@torch.no_grad()
def gives_the_same(gpt, model_hf):
    """Whether a GPT and a GPT-2 of transformers have the same logits, on a few tokens."""
    idx = torch.arange(min(8, gpt.config.block_size, gpt.config.vocab_size)).unsqueeze(0)
    ours, theirs = gpt(idx, idx)[0], model_hf(idx).logits
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.std().item())


def make_kan(config, *widths):
    settings = dict(grid_range=(config.grid_min, config.grid_max), bias=config.kan_bias, mask=config.kan_mask)
    return KAN(widths, config.grid_size, config.spline_order, **settings)


def make_phi(config, channels, activation):
    """A learned function for each channel."""
    grid = config.grid_size, config.spline_order
    return ChannelSpline(channels, *grid, activation, grid_range=(config.grid_min, config.grid_max))


def make_act(config, hidden, default):
    """The activation of an MLP; or a learned function for each channel, which begins as it."""
    act = ACTIVATIONS[config.activation or default](config, hidden)
    return make_phi(config, hidden, act) if config.is_kan('mlp') else act


def make_linear(config, target, in_features, out_features, bias):
    """A linear layer, or what kan_targets and kan_kind make of one."""
    if config.is_kan(target) and config.kan_kind == 'edge':
        return make_kan(config, in_features, out_features)
    linear = nn.Linear(in_features, out_features, bias=bias)
    if config.is_kan(target):
        return nn.Sequential(make_phi(config, in_features, nn.Identity), linear)
    return linear


def rotate(x, start):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34): x (B, nh, T, hs) of the tokens from place `start`
    on, where the channels i and i + hs / 2 are a pair that its place turns by place * 10000^(-2i / hs).
    """
    T, hs = x.shape[-2:]
    channels = torch.arange(0, hs, 2, device=x.device, dtype=torch.float32)
    frequencies = 10000.0 ** (channels / -hs)  # (hs / 2,)
    angles = torch.outer(torch.arange(start, start + T, device=x.device), frequencies)  # (T, hs / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        # query, key, value projections for all heads, in one batch; then the output projection
        self.c_attn = make_linear(config, 'attn', C, 3 * C, config.bias)
        self.c_proj = make_linear(config, 'attn', C, C, config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.rotary = config.rotary
        self.dropout = config.dropout

    def forward(self, x, cache=None, edges=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, nh, T, hs)
        if self.rotary:
            start = cache.count('k') if cache is not None else 0
            q, k = rotate(q, start), rotate(k, start)
        if cache is not None:
            k, v = cache.extend('k', k), cache.extend('v', v)  # (B, nh, S, hs) each, of S >= T tokens
        dropout = self.dropout if self.training else 0.0
        is_causal = cache is None or k.size(2) == T
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)  # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    gelu = property(lambda self: self.act)  # nanoGPT's name

    def __init__(self, config):
        super().__init__()
        hidden = round(config.mlp_hidden * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.act = make_act(config, hidden, 'gelu')
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, arXiv 2002.05202, eq. 6). The first half of c_fc's outputs are the gates."""

    def __init__(self, config):
        super().__init__()
        hidden = round(config.mlp_hidden * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.act = make_act(config, hidden, 'silu')
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.act(gate) * value))


class KANGLU(SwiGLU):
    """SwiGLU with a learned function a channel at the gate: c_proj(phi(gate) * value), which begins as SwiGLU."""

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x), gated=True)))


class KANMLP(nn.Module):
    """Two KAN layers in place of Linear, GELU, Linear: their edges are the activations."""

    c_proj = property(lambda self: self.kan.layers[-1])

    def __init__(self, config):
        super().__init__()
        self.kan = make_kan(config, config.n_embd, round(config.kan_hidden * config.n_embd), config.n_embd)
        self.norm = config.kan_norm
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        first, second = self.kan.layers
        x = first(x)
        if self.norm:
            x = F.layer_norm(x, x.shape[-1:])
        return self.dropout(second(x))


MLPS = {'mlp': MLP, 'swiglu': SwiGLU, 'kan': KANMLP, 'channel_mlp': MLP, 'channel_swiglu': KANGLU}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = (GraphAttention if config.is_graph('attention') else CausalSelfAttention)(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLPS[config.mlp_form()](config)
        self.graph = None
        if config.is_graph('after'):
            self.ln_3, self.graph = nn.LayerNorm(config.n_embd, bias=config.bias), GraphAttention(config)

    def forward(self, x, cache=None, edges=None):
        x = x + self.attn(self.ln_1(x), cache, edges)
        x = x + self.mlp(self.ln_2(x))
        if self.graph is not None:
            x = x + self.graph(self.ln_3(x), cache, edges)
        return x


class GPT(nn.Module):
    blocks_path = 'transformer.h'

    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=None if config.rotary else nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        )
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = make_linear(config, 'head', config.n_embd, config.vocab_size, bias=False)
        for layer in self.lm_head.modules():
            if isinstance(layer, nn.Linear):
                self.transformer.wte.weight = layer.weight  # weight tying, https://arxiv.org/abs/1608.05859
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """wte, wpe, Linear weights   normal, std init_std (GPT-2's is 0.02)
        Linear and LayerNorm bias  zero
        LayerNorm weights          one
        KANLinear                  as its reset_parameters says, base and spline weights times init_std / 0.02
        ChannelSpline              normal, std spline_init_std (0: the function is the plain activation at first)
        residual projections       attn.c_proj and the last layer of the MLP, Linear or KAN (base and spline weights):
                                   the same, divided by sqrt(2 * n_layer), per the GPT-2 paper
        graph layers               the convolution as PyTorch Geometric has it: Glorot, biases zero; the gate behind
                                   the MLP zero, so that it is silent at first; c_proj for self-attention as above
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, KANLinear):
                module.base_weight.mul_(self.config.init_std / 0.02)
                module.spline_weight.mul_(self.config.init_std / 0.02)
        for block in self.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                for name, p in projection.named_parameters():
                    if name.endswith('weight'):
                        p.div_(math.sqrt(2 * self.config.n_layer))
        for module in self.modules():  # last, as functions before a projection are none of its weights
            if isinstance(module, ChannelSpline) and self.config.spline_init_std:
                nn.init.normal_(module.spline_weight, std=self.config.spline_init_std)

    def tied_names(self):
        """The names of the head's weights that are the token embeddings' too."""
        weights = self.lm_head.named_parameters(remove_duplicate=False)
        return [f'lm_head.{name}' for name, p in weights if p is self.transformer.wte.weight]

    def get_num_params(self, non_embedding=True):
        """The number of parameters, by default less the position embeddings; those of tokens are the head's, too."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding and self.transformer.wpe is not None:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def features(self, idx, caches=None, lengths=None):
        """What the head gets, (B, T, C), of the token ids idx (B, T). caches from `new_caches`: idx then goes on from
        the tokens they hold, at first any number of them, after that one at a time. lengths (B,), where sequences end
        in padding: the number of tokens before it. No token sees the padding behind it, and graph layers leave it
        out.
        """
        B, T = idx.size()
        start = caches[0].length if caches else 0
        check_places(start, T, self.config.block_size)
        caches = caches or [None] * self.config.n_layer
        if len(caches) != self.config.n_layer:
            raise ValueError(f'expected a cache for each of {self.config.n_layer} blocks, got {len(caches)}')
        edges = Edges(self.config, idx, caches[0], lengths) if self.config.use_graph else None
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))
        x = self.transformer.drop(x)
        for block, cache in zip(self.transformer.h, caches):
            x = block(x, cache, edges)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) token ids; targets (B, T) the ids that follow, -1 where there is none to learn; caches as in
        `features`. Returns (logits (B, T, vocab_size), loss), without targets (those of the last token, None).
        """
        x = self.features(idx, caches)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None  # generation needs the last position alone
        logits = self.lm_head(x)  # (B, T, vocab_size)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def crop_block_size(self, block_size):
        """Shorten the longest context, e.g. of GPT-2's 1024 positions."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'cannot crop to block_size={block_size}, the model has {self.config.block_size}')
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        if wpe is not None:
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone(), wpe.weight.requires_grad)
            wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT-2's weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl of the Hugging Face hub, or a folder in its form."""
        override_args = override_args or {}
        if model_type not in GPT2S and not os.path.isdir(model_type):
            raise ValueError(f'expected {", ".join(GPT2S)} or a folder, got {model_type!r}')
        if set(override_args) - {'dropout'}:
            raise ValueError(f'of a pretrained model only dropout can be overridden, got {override_args}')
        model_hf = load_gpt2(model_type)
        hf = model_hf.config
        sizes = dict(n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd, vocab_size=hf.vocab_size)
        sizes.update(block_size=hf.n_positions, mlp_hidden=(hf.n_inner or 4.0 * hf.n_embd) / hf.n_embd)
        gelu = {'gelu_new': 'tanh', 'gelu': 'none'}.get(hf.activation_function)
        if gelu is None:
            raise ValueError(f'{model_type!r} has activation {hf.activation_function!r}, expected gelu_new or gelu')
        model = cls(GPTConfig(**sizes, bias=True, gelu=gelu, **override_args)).eval()
        state, masks = model_hf.state_dict(), ('.attn.bias', '.attn.masked_bias')
        state = {name: p for name, p in state.items() if not name.endswith(masks)}
        state = {name: p.t() if name.endswith(CONV1D) else p for name, p in state.items()}
        has_same_names = state.keys() == model.state_dict().keys()
        if has_same_names:
            model.load_state_dict(state)
        if not has_same_names or not gives_the_same(model, model_hf):
            settings = 'a head of its own, cross-attention, another layer_norm_epsilon, or scale_attn_weights'
            raise ValueError(f'{model_type!r} is no GPT-2 as OpenAI made it: look in its config for {settings}')
        return model.train()

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, spline_lr_scale=1.0, spline_weight_decay=None, muon=False
    ):
        """AdamW. Tensors of two or more dimensions decay (matrices, splines, embeddings), biases and LayerNorms do not.
        Spline weights and their scalers take spline_lr_scale times the learning rate, which their group says as
        `lr_scale`, for schedules, and spline_weight_decay (None: weight_decay). Learned slopes take that rate and never
        decay. With `muon` the matrices of `names_of_matrices` are Muon's.
        """
        spline_decay = weight_decay if spline_weight_decay is None else spline_weight_decay
        alike = spline_lr_scale == 1 and spline_decay == weight_decay  # then splines have no group of their own
        of_splines = () if alike else ('.spline_weight', '.spline_scaler')
        of_muon = self.names_of_matrices() if muon else ()
        matrices, splines, slopes, decaying, undecaying = [], [], [], [], []
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if name.endswith(of_splines):
                splines.append(p)
            elif name.endswith('.slope'):
                slopes.append(p)
            elif name in of_muon:
                matrices.append(p)
            else:
                (decaying if p.dim() >= 2 else undecaying).append(p)
        rate = {'lr': learning_rate * spline_lr_scale, 'lr_scale': spline_lr_scale}
        groups = [{'params': decaying, 'weight_decay': weight_decay}, {'params': undecaying, 'weight_decay': 0.0}]
        groups += [{'params': splines, 'weight_decay': spline_decay, **rate}] if splines else []
        groups += [{'params': slopes, 'weight_decay': 0.0, **rate}] if slopes else []
        fused = device_type in ('cuda', 'cpu') or None
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
        return join_muon(adamw, matrices, learning_rate, weight_decay) if muon else adamw

    def names_of_matrices(self):
        """Of weights of nn.Linear in the blocks and base weights of KAN layers; graph convolutions have none."""
        weights = {nn.Linear: 'weight', KANLinear: 'base_weight'}
        modules = self.transformer.h.named_modules(prefix=self.blocks_path)
        return [f'{name}.{weights[type(module)]}' for name, module in modules if type(module) in weights]

    def num_params_outside_matmuls(self):
        """Numbers of splines that no matrix product takes: scalers, folded into weights, and functions of channels."""
        scalers = sum(p.numel() for name, p in self.named_parameters() if name.endswith('.spline_scaler'))
        return scalers + sum(m.spline_weight.numel() for m in self.modules() if isinstance(m, ChannelSpline))

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilisation of an iteration that took dt seconds, by default against an A100's bfloat16 peak."""
        cfg = self.config
        N = self.get_num_params() - self.num_params_outside_matmuls()  # PaLM (arXiv 2204.02311), appendix B
        if cfg.is_kan('head') and cfg.kan_kind == 'edge':
            N -= self.transformer.wte.weight.numel()  # not tied to the head, the token embeddings are looked up only
        L, H, Q, T = cfg.n_layer, cfg.n_head, cfg.n_embd // cfg.n_head, cfg.block_size
        flops_per_iter = (6 * N + 12 * L * H * Q * T) * T * fwdbwd_per_iter
        return flops_per_iter / dt / flops_promised

    def new_caches(self):
        """An empty KVCache for each block."""
        return [KVCache(self.config.block_size) for _ in self.transformer.h]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, use_cache=True):
        """Continue idx (B, T) by sampled tokens: (B, T + max_new_tokens). See layers.generation.stream."""
        for idx_next in stream(self, idx, max_new_tokens, temperature, top_k, top_p, vocab_size, use_cache):
            idx = torch.cat((idx, idx_next), dim=1)
        return idx
