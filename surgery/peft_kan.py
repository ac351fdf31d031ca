"""The KAN adapter of adapters.py, y = W x + s phi_out(phi_in(x)), as a method of PEFT: KanLoraConfig stands where
LoraConfig would.

    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from surgery.peft_kan import KanLoraConfig

    base = AutoModelForCausalLM.from_pretrained('gpt2')
    model = get_peft_model(base, KanLoraConfig(task_type='CAUSAL_LM', r=16))
    model.print_trainable_parameters()
    ...
    model.save_pretrained('my-adapter')

To load the adapter, PEFT has to know its type, so this module is imported first:

    from surgery import peft_kan
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained('gpt2')
    model = PeftModel.from_pretrained(base, 'my-adapter')

It acts on nn.Linear and on transformers' Conv1D, not on quantised layers, and cannot be merged.
"""

import contextlib
import functools
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper

from surgery.adapters import KANAdapter, LoRAConfig, adapter_dtype, weights
from surgery.kanify import READ, is_conv1d, is_linear, layers_read
from surgery.lora import write_whole

UNMERGEABLE = 'a KANLORA adapter is not linear in its input, so no weight can hold it'
LEAVE_OUT = 'leave the layer out by target_modules or exclude_modules'
NAME = 'KANLORA'  # the peft_type in adapter_config.json
# fields of KanLoraConfig by the names they have in adapters.py
SHARED = ('use_dora', 'grid_size', 'spline_order', 'grid_range', 'kan_scale_noise', 'kan_scale_base', 'squash')
OURS = dict(rank='r', alpha='lora_alpha', dropout='lora_dropout', rs_lora='use_rslora', **dict(zip(SHARED, SHARED)))
BIASES = ('none', 'all', 'kanlora_only')
CARD = """
## Loading

PEFT does not know adapters of type KANLORA by itself. Import `surgery.peft_kan` first, with the folder that holds
`surgery/`, `layers/` and `kan.py` on Python's path:

```python
from surgery import peft_kan
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, 'the folder of this file')
```
"""


def add_peft_type(name):
    """One more member of PeftType, as register_peft_method takes the names of that enum alone; or the one there is."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType[name]


@dataclass
class KanLoraConfig(PeftConfig):
    """These fields are those of PEFT's LoraConfig, and for the KAN those of LoRAConfig, as are the defaults. It lacks
    what else a LoraConfig has, as rank_pattern and alpha_pattern.
    """

    r: int = LoRAConfig.rank
    lora_alpha: float = LoRAConfig.alpha
    lora_dropout: float = LoRAConfig.dropout
    use_rslora: bool = LoRAConfig.rs_lora
    use_dora: bool = LoRAConfig.use_dora
    grid_size: int = LoRAConfig.grid_size
    spline_order: int = LoRAConfig.spline_order
    grid_range: list[float] | tuple[float, float] = LoRAConfig.grid_range
    kan_scale_noise: float = LoRAConfig.kan_scale_noise
    kan_scale_base: float = LoRAConfig.kan_scale_base
    squash: str = LoRAConfig.squash
    target_modules: list[str] | str | None = None  # None: PEFT's choice for LoRA on this type of model
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = 'none'  # which biases of the base train too: one of BIASES
    init_weights: bool = True  # False: phi_out does not start at zero but at random, for tests

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        checked = self.lora_config()
        for theirs, ours in OURS.items():
            setattr(self, ours, getattr(checked, theirs))
        self.grid_range = list(self.grid_range)  # as JSON has it
        for name in ('target_modules', 'exclude_modules'):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        if self.bias not in BIASES:
            raise ValueError(f'bias must be one of {", ".join(BIASES)}, got {self.bias!r}')
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError('layers_to_transform needs target_modules as a list of names, not as a regular expression')
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError('layers_pattern needs layers_to_transform, the numbers of the layers')

    def lora_config(self):
        """The same settings for LoRAConfig, which checks them."""
        try:
            return LoRAConfig(kind='kan', **{theirs: getattr(self, ours) for theirs, ours in OURS.items()})
        except ValueError as error:
            name, _, complaint = str(error).partition(' ')
            raise ValueError(f'{OURS.get(name, name)} {complaint}') from None

    def save_pretrained(self, save_directory, **kwargs):
        """PEFT calls this for each adapter that it saves, after it has written its model card: that gets a section."""
        super().save_pretrained(save_directory, **kwargs)
        path = os.path.join(save_directory, 'README.md')
        card = '---\nlibrary_name: peft\n---\n'
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                card = f.read()
        if CARD.strip() not in card:
            write_whole(path, (card.rstrip('\n') + '\n' + CARD).encode())


class KanLoraLinear(nn.Module, BaseTunerLayer):
    """A frozen layer and its adapters by name. Those that are active add up. PEFT finds adapted layers for
    target_modules='all-linear' by the word Linear in the name of their class.
    """

    adapter_layer_names = ('kanlora_adapters',)

    def __init__(self, base_layer, adapter_name):
        super().__init__()
        self.base_layer, self.kanlora_adapters = base_layer, nn.ModuleDict()
        self.out_features, self.in_features = weights(base_layer)['weight'].shape
        self._active_adapter, self.merged_adapters = adapter_name, []

    def update_layer(self, adapter_name, config):
        adapter = KANAdapter(self.base_layer, config.lora_config())
        if not config.init_weights:
            adapter.bottleneck.phi_out.reset_parameters()
        self.kanlora_adapters[adapter_name] = adapter.train(self.base_layer.training)  # or dropout would be at work

    def forward(self, x, *args, adapter_names=None, **kwargs):
        y = result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self.disable_adapters:
            return self.update_rows(x, y, adapter_names)
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.kanlora_adapters:
                result = result + self.kanlora_adapters[name].update(self.base_layer, x, y)
        return result.to(y.dtype)

    def update_rows(self, x, y, adapter_names):
        """Each row with the adapter of its name; one that this layer has no adapter for stays as the base has it."""
        if len(adapter_names) != len(x):
            raise ValueError(f'adapter_names has {len(adapter_names)} names for a batch of {len(x)}')
        result = y.clone()
        for name in set(adapter_names) & set(self.kanlora_adapters):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            update = self.kanlora_adapters[name].update(self.base_layer, x[rows], y[rows])
            result[rows] = (y[rows] + update).to(y.dtype)
        return result

    def merge(self, safe_merge=False, adapter_names=None):
        raise NotImplementedError(UNMERGEABLE)  # PEFT's own error for methods that cannot merge

    unmerge = merge


def check_layer(path, layer):
    """ValueError for a layer that cannot have this adapter."""
    weight, found = getattr(layer, 'weight', None), f'{type(layer).__module__}.{type(layer).__name__}'
    # quantised weights are of other classes, or integers
    if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
        found += f' with a weight of type {type(weight).__name__}, dtype {getattr(weight, "dtype", None)}'
    elif is_linear(layer) or is_conv1d(layer):
        return
    wanted = 'a KANLORA adapter goes on nn.Linear or Conv1D of float weights'
    raise ValueError(f'{path} is a {found}: {wanted}; {LEAVE_OUT}, or load the base without quantisation')


def add_names(module, args, kwargs, names):
    """A hook of a layer, which gives its forward the names of the rows."""
    return args, {**kwargs, 'adapter_names': names}


class KanLoraModel(BaseTuner):
    """What get_peft_model makes of a model and a KanLoraConfig."""

    prefix = 'kanlora_'
    tuner_layer_cls = KanLoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None):
        if isinstance(target, KanLoraLinear):
            return target.update_layer(adapter_name, config)
        check_layer(current_key, target)
        if target in layers_read(parent):
            raise ValueError(f'{current_key} {READ}; {LEAVE_OUT}')
        layer = KanLoraLinear(target, adapter_name)
        layer.update_layer(adapter_name, config)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self):
        """PEFT asks before it changes anything; NotImplementedError is its own for methods that cannot merge."""
        raise NotImplementedError(UNMERGEABLE)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """PEFT calls this around forward and generate; adapter_names has a name for each row, '__base__' for none."""
        names = kwargs.get('adapter_names')
        if names is None:
            yield
            return
        hook = functools.partial(add_names, names=self.check_names(names, kwargs))
        with contextlib.ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (KanLoraLinear, AuxiliaryTrainingWrapper)):
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def check_names(self, names, kwargs):
        """The names of the rows that the layers see; ValueError where they cannot be honoured."""
        if self.training:
            raise ValueError('adapter_names is for inference: call model.eval() first')
        layers = [module for module in self.modules() if isinstance(module, KanLoraLinear)]
        known = {'__base__'}.union(*(layer.kanlora_adapters for layer in layers))
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(
                f'adapter_names: no adapter called {", ".join(unknown)}; there is {", ".join(sorted(known))}'
            )
        n_beams = kwargs.get('num_beams') or 1
        if n_beams > 1 and getattr(self.model.config, 'is_encoder_decoder', False):
            raise ValueError('adapter_names with num_beams > 1 is not for models of an encoder and a decoder')
        return [name for name in names for _ in range(n_beams)]

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        """Float32 beside a base in half precision, or the dtype of the base if the user does not want that."""
        for layer in self.model.modules():
            if isinstance(layer, KanLoraLinear) and adapter_name in layer.kanlora_adapters:
                dtype = adapter_dtype(layer.weight) if autocast_adapter_dtype else layer.weight.dtype
                layer.kanlora_adapters[adapter_name].to(dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        """PEFT's own looks for the name at the end of a key only, but an adapter has modules within."""
        layer, separator, rest = key.rpartition('.kanlora_adapters.')
        if separator:
            return layer + separator + rest.removeprefix(f'{adapter_name}.')
        return super()._remove_adapter_name_from_key(key, adapter_name)


def register():
    peft_type = add_peft_type(NAME)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        mapping.pop(peft_type, None)  # importlib.reload makes other classes of the same names
    classes = dict(config_cls=KanLoraConfig, model_cls=KanLoraModel, prefix=KanLoraModel.prefix)
    register_peft_method(name=NAME.lower(), **classes)


register()
