"""The adapters of lora.py: what a frozen layer gets, one class a kind,

    lora       y = W x + s B A x                  Hu et al. 2021, arXiv 2106.09685, eq. 3; s = alpha / rank
    kan        y = W x + s phi_out(phi_in(x))     two small KAN layers in place of A and B, as kolmg-lora; never merged
    kan_base   of a KAN layer, W_base + s B A and W_spline + s B' A'    arXiv 2504.10490, its splines as a matrix

and with each of them rsLoRA (s = alpha / sqrt(rank), arXiv 2312.03732), DoRA (every row of the weights gets a length
that trains, arXiv 2402.09353, eq. 5) and LoRA+ (B and phi_out at a higher learning rate, arXiv 2402.12354).

Legend: I, O features in and out; r rank.
"""

import copy
import math
from dataclasses import dataclass, fields
from types import FunctionType

import torch
import torch.nn as nn
from torch.nn import functional as F

from kan import KANLinear
from surgery.kanify import has_plain_weight, is_conv1d, is_linear, plain, unwrap

KINDS = ('lora', 'kan', 'kan_base')  # their classes: CLASSES; the layers that can have them: kinds_of
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def squash_tanh(x, low, high):
    """The identity in the middle of the grid, bending towards its ends."""
    middle, half = (low + high) / 2, (high - low) / 2
    return torch.tanh(x) if (middle, half) == (0, 1) else middle + half * torch.tanh((x - middle) / half)


SQUASHES = {
    'none': lambda x, low, high: x,
    'clamp': lambda x, low, high: x.clamp(low, high),
    'tanh': squash_tanh,
    'norm': lambda x, low, high: F.layer_norm(x, x.shape[-1:]),
}


@dataclass
class LoRAConfig:
    """Names and defaults are kolmg-lora's; `kind`, `squash` and PEFT's `modules_to_save` are additions."""

    kind: str = 'lora'
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05  # of what goes into the adapter
    target_modules: tuple = ()  # names of layers, or of modules, whose layers of the right kind it means; () is TARGETS
    modules_to_save: tuple = ()  # names of modules that train in full, in a copy saved with the adapter: a new head
    rs_lora: bool = False
    use_dora: bool = False
    lora_plus_ratio: float = 1.0  # learning rate of B and phi_out over that of the others
    grid_size: int = 4
    spline_order: int = 1
    grid_range: tuple = (-1.0, 1.0)
    kan_scale_noise: float = 0.1  # std of the spline weights of phi_in at the start, times sqrt(I)
    kan_scale_base: float = 1.0  # bound of its base weights, times sqrt(I)
    squash: str = 'tanh'  # what brings the inputs of a KAN layer onto its grid: a key of SQUASHES

    def __post_init__(self):
        for field in fields(self):
            setattr(self, field.name, checked(field.name, getattr(self, field.name), type(field.default)))
        for name, choices in ('kind', KINDS), ('squash', tuple(SQUASHES)):
            if getattr(self, name) not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {getattr(self, name)!r}')
        for name in ('alpha', 'lora_plus_ratio'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be a positive number, got {getattr(self, name)}')
        for name in ('kan_scale_noise', 'kan_scale_base'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be a number of at least 0, got {getattr(self, name)}')
        if self.rank < 1:
            raise ValueError(f'rank must be at least 1, got {self.rank}')
        if self.squash == 'norm' and self.rank == 1:
            raise ValueError("squash='norm' makes a zero of a single number: rank must be at least 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout must be at least 0 and less than 1, got {self.dropout}')
        with torch.device('meta'):  # names a grid that cannot be, and draws nothing
            KANLinear(1, 1, self.grid_size, self.spline_order, grid_range=self.grid_range)

    @property
    def scaling(self):
        return self.alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)


def checked(name, value, wanted):
    """A setting in its own type, whether it comes from code or from JSON."""
    if name == 'grid_range':
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(end) in (int, float) for end in value):
            return tuple(map(float, value))
        raise ValueError(f'grid_range must be two numbers, got {value!r}')
    if wanted is tuple:
        names = value.split(',') if isinstance(value, str) else value
        names = () if names is None else names
        if isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names):
            return tuple(sorted(names) if isinstance(names, set) else names)
        raise ValueError(f'{name} must be a list of names, got {value!r}')
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f'{name} must be of type {wanted.__name__}, got {value!r}')
    return value


def kinds_of(layer):
    """The kinds of adapter that a layer can have."""
    if isinstance(layer, KANLinear):
        return ('kan', 'kan_base')
    if is_linear(layer) or is_conv1d(layer):
        return ('lora', 'kan')
    if getattr(layer, 'max_norm', None) is not None:  # an embedding whose forward pass changes its weight
        return ()
    forwards = [kind.forward for kind in (nn.Embedding, *CONVOLUTIONS)]  # a class of one's own may compute otherwise
    return ('lora',) if type(layer).forward in forwards and has_plain_weight(layer) else ()


def weights(layer):
    """{parameter: the (O, n) view of it that an adapter changes}; n is the number of one-hot inputs to an embedding, or
    of the numbers that a kernel of a convolution sees.
    """
    if isinstance(layer, KANLinear):
        return {'base_weight': layer.base_weight, 'spline_weight': layer.spline_weight.flatten(1)}
    if isinstance(layer, CONVOLUTIONS):
        return {'weight': layer.weight.flatten(1)}
    return {'weight': layer.weight.t() if is_transposed(layer) else layer.weight}


def is_transposed(layer):
    return is_conv1d(layer) or isinstance(layer, nn.Embedding)


@torch.no_grad()
def row_norms(layer, updates=None):
    """Lengths of the rows of all its weights plus updates side by side, (O,); without gradient (DoRA, section 4.3)."""
    rows = [w.to(adapter_dtype(w)) + (updates[name] if updates else 0) for name, w in weights(layer).items()]
    return torch.cat(rows, 1).norm(dim=1)


def row_scale(magnitude, lengths):
    """What DoRA multiplies each row by, (O,); 1 for a row of zeros, which has no direction to keep."""
    return torch.where(lengths > 0, magnitude / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0)


def rescaled(y, layer, scale):
    """What becomes of y = W x + bias when the rows of W are multiplied by scale (O,)."""
    n_places = layer.weight.dim() - 2 if isinstance(layer, CONVOLUTIONS) else 0  # dimensions after the channels
    shape = [-1] + [1] * n_places
    bias, scale = getattr(layer, 'bias', None), scale.view(shape)
    return y * scale if bias is None else y * scale + bias.view(shape) * (1 - scale)


def convolve(layer, x, A, B):
    """What a convolution like that of the layer gives, with B A (O, n) for its kernels and without a bias. Each of its
    groups of channels meets the same A.
    """
    size = layer.weight.shape[2:]
    kernels = A.view(len(A), -1, *size).repeat(layer.groups, 1, *[1] * len(size))
    h = layer._conv_forward(x, kernels, None)  # (N, groups * r, ...)
    mix = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    return mix(h, B.view(*B.shape, *[1] * len(size)), groups=layer.groups)


def adapter_dtype(w):
    """Adapters train in float32 beside a base in half precision, which would round small steps away."""
    return torch.promote_types(w.dtype, torch.float32)


class Dropout(nn.Dropout):
    """On a CPU from 16 random bits a number, p to the nearest 1 / 65536: six times as fast as PyTorch's own."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != 'cpu':
            return super().forward(x)
        n_out = min(round(self.p * 2**16), 2**16 - 1)  # of the 2^16 values of 16 bits
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= n_out - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - n_out))


class Adapter(nn.Module):
    """What a LoRALayer holds for one name. Its parameters train; called with the layer and its inputs it returns what
    the layer gives with it; merged(layer) is a module that does the same alone, or a ValueError.
    """

    kind = property(lambda self: self.config.kind)
    fast = ()  # how the names of parameters start that LoRA+ gives a higher learning rate

    def __init__(self, config):
        super().__init__()
        self.config, self.dropout = config, Dropout(config.dropout)

    def adds_nothing(self):
        """Whether it is as it began."""
        return False


class LowRank(Adapter):
    """lora and kan_base: every weight W of the layer becomes W + s B A."""

    fast = 'lora_B.'

    def __init__(self, layer, config):
        super().__init__(config)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, w in weights(layer).items():
            A = w.new_zeros(config.rank, w.size(1), dtype=adapter_dtype(w))
            B = w.new_zeros(w.size(0), config.rank, dtype=adapter_dtype(w))
            if isinstance(layer, nn.Embedding):  # one-hot inputs meet one column of A: it starts at zero, B at random
                nn.init.normal_(B)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.magnitude = nn.Parameter(row_norms(layer)) if config.use_dora else None

    def forward(self, layer, x):
        if isinstance(layer, KANLinear):  # its scalers come after the update, so through the weights
            kept = self.dropout(torch.ones_like(self.lora_A['base_weight'][0]))  # (I,), of features, for all rows
            return layer(x, **self.adapted(layer, kept))
        y = layer(x)
        A, B = self.lora_A['weight'], self.config.scaling * self.lora_B['weight']
        if isinstance(layer, nn.Embedding):
            update = F.linear(F.embedding(x, A.t(), layer.padding_idx), B)
        elif isinstance(layer, CONVOLUTIONS):
            update = convolve(layer, self.dropout(x.to(A.dtype)), A, B)
        else:
            update = F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B)
        adapted = y + update
        if self.magnitude is not None:
            with torch.no_grad():
                lengths = row_norms(layer, self.updates())
            adapted = rescaled(adapted, layer, row_scale(self.magnitude, lengths))
        return adapted.to(y.dtype)

    def updates(self, kept=None):
        """{parameter: s B A, (O, n)}; `kept` (I,) multiplies the n / I numbers of each feature in a row of A."""
        A = dict(self.lora_A.items())
        if kept is not None:
            A = {name: (a.unflatten(1, (len(kept), -1)) * kept.unsqueeze(1)).flatten(1) for name, a in A.items()}
        return {name: self.config.scaling * (self.lora_B[name] @ a) for name, a in A.items()}

    def adds_nothing(self):
        return not any(self.lora_A[name].any() and self.lora_B[name].any() for name in self.lora_A)

    def adapted(self, layer, kept=None):
        """{parameter: the weight with the adapter, as the layer stores it}"""
        updates = self.updates(kept)
        scale = 1.0 if self.magnitude is None else row_scale(self.magnitude, row_norms(layer, updates)).unsqueeze(1)
        adapted = {}
        for name, w in weights(layer).items():
            stored, rows = getattr(layer, name), (w + updates[name]) * scale
            rows = rows.t() if is_transposed(layer) else rows
            adapted[name] = rows.reshape(stored.shape).to(stored.dtype)
        return adapted

    def merged(self, layer):
        merged = copy.copy(layer)
        merged._parameters = dict(layer._parameters)  # its own: the layer that it copies keeps its weights and its grid
        merged._buffers = {name: None if p is None else p.clone() for name, p in layer._buffers.items()}
        for name in {'forward', '_old_forward'} & vars(layer).keys():  # accelerate binds them to the layer
            forward = vars(layer)[name]
            if isinstance(forward, FunctionType):  # the layer that it computes with cannot be told
                raise ValueError(f'a {type(layer).__name__} has a function as its {name}: take it off before you merge')
            vars(merged)[name] = copy.deepcopy(forward, {id(layer): merged})
        for name, w in self.adapted(layer).items():
            setattr(merged, name, nn.Parameter(w, requires_grad=False))
        return merged


class KANBottleneck(nn.Module):
    """s phi_out(phi_in(x)): (..., I) -> (..., r) -> (..., O), each input brought onto the grid. Zero at the start."""

    def __init__(self, in_features, out_features, config):
        super().__init__()
        settings = dict(grid_size=config.grid_size, spline_order=config.spline_order, grid_range=config.grid_range)
        settings.update(scale_base=config.kan_scale_base, enable_standalone_scale_spline=False)
        self.phi_in = KANLinear(in_features, config.rank, **settings)
        self.phi_out = KANLinear(config.rank, out_features, **settings)
        nn.init.normal_(self.phi_in.spline_weight, std=config.kan_scale_noise / math.sqrt(in_features))
        nn.init.zeros_(self.phi_out.base_weight)
        nn.init.zeros_(self.phi_out.spline_weight)
        self.config = config

    def forward(self, x):
        squash, s, out = SQUASHES[self.config.squash], self.config.scaling, self.phi_out
        h = self.phi_in(squash(x, *self.config.grid_range))
        return out(squash(h, *self.config.grid_range), s * out.base_weight, s * out.spline_weight)


class KANAdapter(Adapter):
    """kan: s phi_out(phi_in(x)) beside the layer; DoRA rescales what that gives, less its bias, as in kolmg-lora."""

    fast = 'bottleneck.phi_out.'

    def __init__(self, layer, config):
        super().__init__(config)
        w = next(iter(weights(layer).values()))  # (O, I)
        with torch.device(w.device):
            self.bottleneck = KANBottleneck(w.size(1), w.size(0), config).to(adapter_dtype(w))
        # the rows of the layer are frozen: their lengths are measured once, and saved with what was learned on them
        self.register_buffer('lengths', row_norms(layer) if config.use_dora else None)
        self.magnitude = nn.Parameter(self.lengths.clone()) if config.use_dora else None

    def forward(self, layer, x):
        y = layer(x)
        return (y + self.update(layer, x, y)).to(y.dtype)

    def update(self, layer, x, y):
        """What is to be added to the layer's output y."""
        update = self.bottleneck(self.dropout(x.to(self.bottleneck.phi_in.weight.dtype)))
        if self.magnitude is not None:
            update = update + (rescaled(y, layer, row_scale(self.magnitude, self.lengths)) - y)
        return update

    def adds_nothing(self):
        phi = self.bottleneck.phi_out
        return not (phi.base_weight.any() or phi.spline_weight.any())

    def merged(self, layer):
        raise ValueError("a 'kan' adapter is not linear in its input, so no weight can hold it: fit_linear comes near")


def shapes_of(module):
    """Linear(weight 768x768, bias 768)"""
    shapes = (f'{plain(name)} {"x".join(map(str, p.shape))}' for name, p in module.named_parameters())
    return f'{type(unwrap(module)).__name__}({", ".join(shapes)})'


class TrainedCopy(Adapter):
    """A copy of a module that trains in its place."""

    kind = 'copy'

    def __init__(self, module, config):
        super().__init__(config)
        inner = list(lora_layers(module))
        if inner:
            raise ValueError(f'modules_to_save: {inner[0]} in {shapes_of(module)[:80]} has an adapter of its own')
        self.copy = copy.deepcopy(module).requires_grad_(True)

    def forward(self, module, *args, **kwargs):
        return self.copy(*args, **kwargs)

    def merged(self, module):
        return self.copy


CLASSES = {'lora': LowRank, 'kan': KANAdapter, 'kan_base': LowRank, 'copy': TrainedCopy}


class LoRALayer(nn.Module):
    """A frozen module and its adapters by name, of which one is active, or none."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.adapters = base_layer, nn.ModuleDict()
        self.training = self.adapters.training = base_layer.training
        self.active, self.off = None, False
        self.unmerged = None  # the base layer itself, while one with the adapter merged into it stands in its place

    # for code that looks at the dtype or device of a layer
    weight = property(lambda self: self.acting.weight)
    bias = property(lambda self: getattr(self.acting, 'bias', None))

    @property
    def adapter(self):
        return self.adapters[self.active] if self.active in self.adapters else None

    def __getattr__(self, name):
        """What others ask of the module that acts: its sizes, its settings, the modules in it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith('__') or name in ('base_layer', 'adapters', 'active', 'off'):  # while this one is made
                raise
            is_below = isinstance(self.acting, KANLinear) and self.acting in (self.base_layer, self.unmerged)
            if name in ('update_grid', 'refine_grid') and is_below:
                raise AttributeError(
                    f'{name} would change the splines beneath an adapter: remove_lora comes first'
                ) from None
            if name in ('regularization_loss', 'scaled_spline_weight') and is_below and self.at_work is not None:
                advice = 'merge it first, or ask within lora_off(model) for that of the base'
                raise AttributeError(f'{name} would leave the adapter out: {advice}') from None
            return getattr(self.acting, name)

    def register_parameter(self, name, p):
        """Where tie_weights of transformers puts the shared weight. The layer of one that is tied has it already."""
        if p is not getattr(self.alone, name, None):
            raise ValueError(
                f'the {name} of a layer with an adapter cannot become another one: remove_lora comes first'
            )

    @property
    def at_work(self):
        """The adapter that forward goes through: the active one, unless it is off or merged into the weights."""
        return None if self.off or self.unmerged is not None else self.adapter

    @property
    def alone(self):
        """The module that acts where no adapter is at work."""
        return self.unmerged if self.off and self.unmerged is not None else self.base_layer

    @property
    def acting(self):
        """The copy of the base layer that trains in its place, where such a one is at work, else the base layer."""
        adapter = self.at_work
        return adapter.copy if isinstance(adapter, TrainedCopy) else self.alone

    def forward(self, *args, **kwargs):
        adapter = self.at_work
        return self.alone(*args, **kwargs) if adapter is None else adapter(self.base_layer, *args, **kwargs)


def lora_layers(model):
    """{path: LoRALayer}"""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}
