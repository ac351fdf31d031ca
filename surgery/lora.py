"""Low-rank adapters for any PyTorch model: a frozen layer gets a small path that trains, or a small change of its
weights. surgery/adapters.py has the kinds.

    add_lora(model, LoRAConfig(kind='kan', rank=16))
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-3, weight_decay=0.0))
    ...
    save_lora(model, 'my-adapter')
"""

import copy
import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from kan import KANLinear, least_squares
from layers.spline import to_float64
from surgery.adapters import (
    CLASSES,
    Adapter,
    KANAdapter,
    LoRAConfig,
    LoRALayer,
    TrainedCopy,
    kinds_of,
    lora_layers,
    shapes_of,
    weights,
)
from surgery.kanify import (
    call,
    in_eval_mode,
    is_named,
    matching,
    named_layers,
    names_of,
    plain,
    refuse_compiled,
    refuse_offloaded,
    tied_modules,
    unwrap,
    without_read,
    without_tied,
)

TARGETS = (  # the attention projections of model families by their names; the first of these that a model has
    ('q_proj', 'v_proj'),  # Llama, OPT, BART, ViT
    ('query', 'value'),  # BERT, RoBERTa
    ('q_lin', 'v_lin'),  # DistilBERT
    ('c_attn',),  # GPT-2, and the GPT of model.py
    ('query_key_value',),  # GPT-NeoX, BLOOM, Falcon
    ('qkv_proj',),  # Phi-3, CodeGen
    ('Wqkv',),  # MPT, ModernBERT
    ('SelfAttention.q', 'SelfAttention.v'),  # T5
)


def add_lora(model, config, name='default'):
    """Freeze a model, give the layers named by the config an adapter, which becomes the active one, and return the
    model. Its outputs stay what they were until an adapter has learned something. ValueError where a target matches
    nothing.
    """
    if not isinstance(config, LoRAConfig):
        raise ValueError(f'expected a LoRAConfig, got {type(config).__name__}; those of PEFT go to get_peft_model')
    refuse_merged(model)
    refuse_offloaded(model)
    if any(type(module).__module__.startswith('peft.') for module in model.modules()):
        raise ValueError('the model has adapters of PEFT: merge_and_unload them first, or add these by PEFT, too')
    copies = dict.fromkeys(find_modules_to_save(model, config), 'copy')
    within = tuple(path + '.' for path in copies)
    found = [path for path in find_targets(model, config) if not path.startswith(within)]
    say_what_is_left_out(model, config, found, within)
    targets = dict.fromkeys(found, config.kind) | copies
    install(model, make_adapters(model, config, targets), name)
    return model


def make_adapters(model, config, targets):
    """{path: an adapter for the module at that path}, the model untouched; targets {path: kind or 'copy'}"""
    return {path: CLASSES[kind](base_of(model.get_submodule(path)), config) for path, kind in targets.items()}


def install(model, adapters, name):
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f'an adapter needs a Python name, and none of a method of nn.ModuleDict, got {name!r}')
    if any(name in layer.adapters for layer in lora_layers(model).values()):
        raise ValueError(f'the model already has an adapter named {name!r}; others can be added under other names')
    for path in adapters:
        if not isinstance(model.get_submodule(path), LoRALayer):
            refuse_compiled(path)
    for path, adapter in adapters.items():
        module = model.get_submodule(path)
        if not isinstance(module, LoRALayer):
            module = LoRALayer(module)
            model.set_submodule(path, module)
        module.adapters[name] = adapter.train(module.training)
        if isinstance(adapter, TrainedCopy):
            for part, original in zip(adapter.copy.modules(), module.base_layer.modules()):
                part.training = original.training  # a frozen BatchNorm in it stays frozen
    set_lora(model, name)


def base_of(module):
    return module.base_layer if isinstance(module, LoRALayer) else module


def set_lora(model, name):
    """Make the adapter of this name the active one, or none by None. The active one trains, all else is frozen."""
    layers = lora_layers(model)
    names = sorted({name for layer in layers.values() for name in layer.adapters})
    if name is not None and name not in names:
        raise ValueError(f'the model has no adapter named {name!r}, only {", ".join(names) or "none at all"}')
    refuse_merged(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.active = name
        if layer.adapter is not None:
            layer.adapter.requires_grad_(True)


def active_lora(model):
    """The LoRALayers whose adapter is at work, {path: LoRALayer}; ValueError if there are none."""
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.adapter is not None}
    if not layers:
        raise ValueError('the model has no active adapter: add_lora and load_lora give it one, set_lora chooses')
    return layers


@contextmanager
def lora_off(model):
    """Inside, the model is the base model, also where an adapter is merged."""
    before = [(layer, layer.off) for layer in lora_layers(model).values()]
    for layer, _ in before:
        layer.off = True
    try:
        yield
    finally:
        for layer, off in before:
            layer.off = off


def find_targets(model, config):
    """The paths of the layers that a config names, embeddings and those that share a weight by their own names only."""
    modules = dict(named_base_modules(model))
    layers = {path: module for path, module in modules.items() if kinds_of(module)}
    targets = config.target_modules or default_targets(layers)
    found = matching(layers, targets, modules)
    chosen = [path for path in found if is_named(path, targets) or not isinstance(layers[path], nn.Embedding)]
    if not chosen:
        raise ValueError(f'embeddings have to be named themselves: {names_of(found)}')
    chosen = without_read(chosen, model, targets)
    fitting = [path for path in chosen if config.kind in kinds_of(layers[path])]
    wrong = [path for path in chosen if path not in fitting and (is_named(path, targets) or not fitting)]
    if wrong:
        layer, kinds = type(layers[wrong[0]]).__name__, ' or '.join(map(repr, kinds_of(layers[wrong[0]])))
        raise ValueError(f'{wrong[0]} is a {layer}: its adapters are of kind {kinds}, not {config.kind!r}')
    tied = {path.removesuffix('.base_layer'): others for path, others in tied_modules(model).items()}
    adapted = without_tied(fitting, tied, targets)
    for path in adapted:
        others = [other for other in tied.get(path, []) if other not in adapted]
        if others:
            print(f'{path} gets an adapter, and not {", ".join(others)}, which shares its weight')
    return adapted


def say_what_is_left_out(model, config, adapted, copied):
    """A line for each target none of whose layers gets an adapter, and one for matrices within targets that are in no
    layer, as those of fused experts. `adapted` are paths, `copied` how the paths in modules that train begin.
    """
    modules, targets = dict(named_base_modules(model)), config.target_modules or ()
    for target in targets:
        if not any(f'.{target}.' in f'.{plain(path)}.' for path in (*adapted, *copied)):
            print(
                f'{target!r} gets no adapter: none of its layers takes kind {config.kind!r} without being named itself'
            )
    named = [(path, module) for path, module in modules.items() if is_named(path, targets)]
    matrices = [name for path, module in named for name, p in module.named_parameters(prefix=path) if p.dim() >= 2]
    within = (*copied, *(f'{path}.' for path, module in modules.items() if kinds_of(module)))
    beyond = [name for name in dict.fromkeys(matrices) if not name.startswith(within)]
    if beyond:
        print(f'no adapter reaches {len(beyond)} tensors, such as {beyond[0]}: they are in no layer of a known kind')


def default_targets(layers):
    for group in TARGETS:
        if all(any(is_named(path, [name]) or f'.{name}.' in plain(path) for path in layers) for name in group):
            return group
    raise ValueError(f'found no attention projections by a known name: set target_modules; there is {names_of(layers)}')


def named_base_modules(model):
    """named_layers of the model as it was without adapters."""
    wrapped = ()
    for path, module in named_layers(model).items():
        if not path.startswith(wrapped):
            yield path, base_of(module)
        if isinstance(module, LoRALayer):
            wrapped += (path + '.',)


def find_modules_to_save(model, config):
    found = [path for path, _ in named_base_modules(model) if is_named(path, config.modules_to_save)]
    for target in config.modules_to_save:
        if not any(is_named(path, [target]) for path in found):
            children = ', '.join(name for name, _ in model.named_children())
            raise ValueError(f'modules_to_save: there is no module {target!r}; at the top there are {children}')
    for path in found:
        kind = type(model.get_submodule(path))
        if kind in (nn.ModuleList, nn.ModuleDict):
            raise ValueError(f'modules_to_save: {path} is a {kind.__name__}, which is never called: name what is in it')
    for path, others in tied_modules(model).items():
        if path in found:
            print(f'{path} gets a copy that trains by itself, apart from {", ".join(others)}, which shares its weight')
    return [path for path in found if not path.startswith(tuple(other + '.' for other in found))]


def merged_layers(model):
    return [layer for layer in lora_layers(model).values() if layer.unmerged is not None]


def refuse_merged(model):
    if merged_layers(model):
        raise ValueError('an adapter is merged into the model: unmerge_lora(model) comes first')


@torch.no_grad()
def merge_lora(model):
    """Put the active adapter into the weights of its layers, which then run as fast as the base model. Next,
    unmerge_lora goes back or remove_lora makes a plain model of it. ValueError, and nothing done, for a 'kan', if one
    is merged, or on a layer with a function in place of its forward.
    """
    refuse_merged(model)
    layers = active_lora(model)
    merged = {path: layer.adapter.merged(layer.base_layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.unmerged, layer.base_layer = layer.base_layer, merged[path].requires_grad_(False)
    dtypes = {str(p.dtype).removeprefix('torch.') for module in merged.values() for p in module.parameters()}
    print(f'merged into {len(layers)} layers: exact up to the rounding of {", ".join(sorted(dtypes))}')
    return model


def unmerge_lora(model):
    """The reverse of merge_lora. The base weights are the very same as before, bit for bit."""
    if not merged_layers(model):
        raise ValueError('no adapter is merged into the model')
    for layer in merged_layers(model):
        layer.base_layer, layer.unmerged = layer.unmerged, None
        if isinstance(layer.adapter, TrainedCopy):  # which stood in its place, and did not train there
            layer.adapter.requires_grad_(True)
    return model


def remove_lora(model):
    """The model without wrappers and adapters: the base model, or what merge_lora made of it. It stays frozen."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base_layer.requires_grad_(False))
    return model


@torch.no_grad()
def fit_linear(model, batches, name='linear'):
    """The linear map nearest to an active 'kan' adapter, as another adapter, which becomes the active one and can
    merge: by least squares, with a bias where the layer has one, over all rows (padding too) that layers meet in
    `batches`, each a tensor, a tuple or a dict of the model's inputs. Every fifth batch, of fewer than five the last,
    is kept out of the fit and measures it. Returns {path: error}, the root mean square of what the map misses over
    that of what the adapter adds, before rounding to the dtype of the weights: 0 is exact, 1 no better than nothing.
    ValueError where there is no 'kan' adapter, its layer is not linear, or there are fewer than two batches.
    """
    active = active_lora(model)
    layers = {path: layer for path, layer in active.items() if isinstance(layer.adapter, KANAdapter)}
    if not layers:
        raise ValueError('fit_linear is for kind kan, and the active adapter is linear: merge_lora(model) is exact')
    for path, layer in layers.items():
        if isinstance(layer.base_layer, KANLinear):
            raise ValueError(f'{path} is a KAN layer: its weights cannot hold a linear map')
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f'fit_linear needs at least two batches, one to fit and one to measure, got {len(batches)}')
    held = range(4, len(batches), 5) or [len(batches) - 1]
    fit = collect_moments(model, layers, [batch for i, batch in enumerate(batches) if i not in held])
    measured = collect_moments(model, layers, [batches[i] for i in held])
    for path in layers:
        if not all(torch.is_tensor(sums[path][0]) for sums in (fit, measured)):
            raise ValueError(f'{path} is not called for the batches to fit, or for those to measure by: give others')
    adapters = {path: copy.deepcopy(layer.adapter) for path, layer in active.items() if path not in layers}
    errors = {}
    for path, layer in layers.items():
        adapters[path] = TrainedCopy(layer.base_layer, layer.adapter.config)
        xx, xd, _ = fit[path]
        n = len(xx) - (layer.bias is None)  # without a bias the last row, of the ones, stays zero
        M = torch.zeros_like(xd)  # (I + 1, O)
        M[:n] = least_squares(xx[:n, :n], xd[:n])
        xx, xd, dd = measured[path]
        missed = dd - 2 * (M * xd).sum() + (M * (xx @ M)).sum()
        errors[path] = math.sqrt(missed.clamp_min(0) / dd) if dd > 0 else 0.0
        weights(adapters[path].copy)['weight'].add_(M[:-1].T)
        if layer.bias is not None:
            adapters[path].copy.bias.add_(M[-1])
    install(model, adapters, name)
    return errors


def collect_moments(model, layers, batches):
    """{path: [x'x, x'd, d'd]} in float64 of the inputs x, with a one at their end, and d, what the adapters add"""
    moments = {path: [0, 0, 0] for path in layers}

    def add(layer, inputs, output, sums):
        x, d = inputs[0], layer.adapter.update(layer.base_layer, inputs[0], layer.base_layer(inputs[0]))
        x, d = (to_float64(rows.reshape(-1, rows.size(-1))) for rows in (F.pad(x, (0, 1), value=1.0), d))
        sums[:] = sums[0] + x.T @ x, sums[1] + x.T @ d, sums[2] + d.square().sum()

    hooks = [layer.register_forward_hook(partial(add, sums=moments[path])) for path, layer in layers.items()]
    with in_eval_mode(model, hooks):
        for batch in batches:
            call(model, batch)
    return moments


def save_lora(model, folder):
    """Write the active adapter to a folder: adapter_model.safetensors holds its tensors and, in its header, its
    config and the identity of the base, and is all that load_lora reads; adapter_config.json is that header for
    people and tools.
    """
    from safetensors.torch import save

    model = unwrap(model)
    refuse_merged(model)
    sharded = next((path for path, p in model.named_parameters() if hasattr(p, 'full_tensor')), None)
    if sharded:
        raise ValueError(f'{sharded} is in parts on several processes, by fully_shard: save_lora wants whole tensors')
    layers = active_lora(model)
    say_what_adds_nothing(layers)
    ours = {id(p) for layer in layers.values() for p in layer.adapter.parameters()}
    stray = [path for path, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if stray:
        raise ValueError(f'{stray[0]} trains but is not part of the adapter and would be lost: see modules_to_save')
    copied = [plain(path) for path, layer in layers.items() if layer.adapter.kind == 'copy']
    moving = moving_buffers(model)
    record = {
        'config': asdict(next(iter(layers.values())).adapter.config),
        'layers': {plain(path): [layer.adapter.kind, shapes_of(layer.base_layer)] for path, layer in layers.items()},
        'base': base_identity(model, copied, moving),
        'statistics': sorted(moving),
    }
    tensors = tensors_of({path: layer.adapter for path, layer in layers.items()})
    tensors.update({f'statistics of the base: {name}': buffer for name, buffer in moving.items()})
    # a file holds each by itself, also shared ones, in the usual order of its dimensions
    tensors = {name: p.clone(memory_format=torch.contiguous_format) for name, p in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, 'adapter_model.safetensors'), save(tensors, {'adapter': json.dumps(record)}))
    write_whole(os.path.join(folder, 'adapter_config.json'), (json.dumps(record, indent=2) + '\n').encode())


def say_what_adds_nothing(layers):
    """A line about adapters that are as they began: every step moves those whose layers are called."""
    idle = [plain(path) for path, layer in layers.items() if layer.adapter.adds_nothing()]
    if idle:
        why = 'no step was taken, or the model does not call their layers'
        print(f'{len(idle)} of {len(layers)} adapters add nothing, such as that of {idle[0]}: {why}')


def write_whole(path, content):
    """Put bytes at a path. A crash or a full disk leaves what was there. run/files.py is not copied with surgery/."""
    try:
        with open(path + '.tmp', 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except BaseException:
        with suppress(OSError):
            os.remove(path + '.tmp')
        raise


def tensors_of(adapters):
    """{name in a file: tensor} of adapters by path"""
    return {plain(f'{path}.{key}'): p for path in adapters for key, p in adapters[path].state_dict().items()}


def moving_buffers(model):
    """{name in the base: buffer} of what forward passes in training change although all weights are frozen: running
    statistics, and the vectors of spectral norms.
    """
    found = {}
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if not isinstance(module, (nn.modules.batchnorm._NormBase, nn.utils.parametrizations._SpectralNorm)):
            names = [name for name in names if name.endswith(('_u', '_v')) and hasattr(module, f'{name[:-2]}_orig')]
        if '.adapters.' not in f'.{path}.':
            found.update({base_name(f'{path}.{name}'): getattr(module, name) for name in names})
    return found


def base_name(name):
    """The name of a tensor in the base alone."""
    return plain(name).removeprefix('.').replace('.base_layer.', '.')


def base_identity(model, copied, moving):
    """Class, number and sha256 of the tensors of a model's state dict, less adapters, the modules `copied`, which these
    bring, and the buffers `moving`, which a file has.
    """
    layers = [path for path, module in named_layers(model).items() if isinstance(module, LoRALayer)]  # under each name
    left_out = tuple(f'{plain(path)}.adapters.' for path in layers) + tuple(f'{path}.' for path in copied)
    state = [(base_name(name), x) for name, x in model.state_dict().items() if not plain(name).startswith(left_out)]
    kept = [(name, part) for name, x in state if name not in moving for part in tensors_in(x)]
    kept.sort(key=lambda pair: pair[0])
    numbers = sum(x.numel() for _, x in kept)
    return {'class': type(model).__name__, 'numbers': numbers, 'sha256': digest_of(kept)}


def tensors_in(entry):
    """The tensors in an entry of a state dict: quantised layers of PyTorch have tuples, and numbers of other kinds."""
    if torch.is_tensor(entry):
        return [entry.dequantize() if entry.is_quantized else entry]
    return [tensor for part in entry for tensor in tensors_in(part)] if isinstance(entry, (tuple, list)) else []


def digest_of(named):
    """The sha256 of tensors and their names, [(name, tensor)], in this order."""
    digest = hashlib.sha256()
    for name, x in named:
        digest.update(f'{name} {x.dtype} {tuple(x.shape)}'.encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_lora(model, folder, name='default', check_base=True):
    """Give a model the adapter that save_lora wrote, under a name, as the active one. ValueError says what does not
    fit, before the model is touched. check_base=False takes any base of the same layers, e.g. one in bfloat16.
    The running statistics of the base, where it has some, become those that were saved with this adapter.
    """
    whole, model = model, unwrap(model)
    refuse_merged(model)
    refuse_offloaded(model)
    record, tensors = read_adapter(os.path.join(folder, 'adapter_model.safetensors'))
    config, kinds, base = read_header(record, folder)
    moving = moving_buffers(model)
    statistics = take_statistics(record, tensors, moving, folder)
    if check_base:
        copied = [path for path, kind in kinds.items() if kind == 'copy']
        refuse_another_base(base, base_identity(model, copied, statistics), folder)
    adapters = make_adapters(model, config, find_layers(model, record['layers'], folder))
    load_adapters(adapters, tensors, folder)
    install(model, adapters, name)
    for key, tensor in statistics.items():
        moving[key].copy_(tensor)
    return whole


def read_header(record, folder):
    """(LoRAConfig, {path: kind}, identity of the base) of what is in the header of a file"""
    try:
        config = LoRAConfig(**record['config'])
        kinds = {path: kind for path, (kind, _) in record['layers'].items()}
        base = {key: record['base'][key] for key in ('class', 'numbers', 'sha256')}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f'{folder}: the header of the adapter is not what save_lora writes ({error})') from None
    return config, kinds, base


def take_statistics(record, tensors, moving, folder):
    """{name in the base: running statistic}, taken out of the tensors of a file"""
    statistics = {key: tensors.pop(f'statistics of the base: {key}', None) for key in record.get('statistics', ())}
    for key, tensor in statistics.items():
        if tensor is None or key not in moving or tensor.shape != moving[key].shape:
            raise ValueError(f'{folder}: the running statistics {key!r} do not fit those of this model')
    return statistics


def refuse_another_base(wanted, found, folder):
    if found != wanted:
        theirs, ours = ('{class} of {numbers} numbers, sha256 {sha256!s:.12}'.format(**one) for one in (wanted, found))
        advice = 'a new head belongs in modules_to_save; check_base=False takes any base of the same layers'
        raise ValueError(f'{folder} belongs to another base: {theirs}; this is {ours}; {advice}')


def find_layers(model, layers, folder):
    """{path in the model: kind} of the layers of a record, {path in a file: [kind, shapes]}"""
    modules, paths, targets = dict(named_base_modules(model)), {}, {}
    for path in modules:
        paths.setdefault(plain(path), []).append(path)
    for name, (kind, was) in layers.items():
        found, kinds = 'not there', ()
        if name in paths:
            path = paths[name][0] if kind == 'copy' else paths[name][-1]  # with what is around a layer, or it alone
            found, kinds = shapes_of(modules[path]), (*kinds_of(modules[path]), 'copy')
        if found != was or kind not in kinds:
            raise ValueError(f'{folder}: {name} was {was} with adapter of kind {kind!r}; in this model it is {found}')
        targets[path] = kind
    return targets


def load_adapters(adapters, tensors, folder):
    """Put the tensors of a file into new adapters. ValueError unless names and shapes are the same."""
    wanted = tensors_of(adapters)  # the tensors of the adapters themselves
    # a file may lack the lengths of rows: these are then the base's
    paths = {plain(path) for path in adapters}
    tensors = {key: p for key, p in wanted.items() if key.removesuffix('.lengths') in paths} | tensors
    if wanted.keys() != tensors.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f'{folder}: missing {missing[:3] or "nothing"}, not expected {extra[:3] or "nothing"}')
    for key, p in wanted.items():
        if p.shape != tensors[key].shape:
            raise ValueError(f'{folder}: {key} is {tuple(tensors[key].shape)}, expected {tuple(p.shape)}')
        p.copy_(tensors[key])


def read_adapter(path):
    """(the record in the header, {name: tensor}) of a file of save_lora"""
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise ValueError(f'no adapter in {os.path.dirname(path)!r}: expected adapter_model.safetensors of save_lora')
    try:
        with safe_open(path, 'pt') as f:
            record = json.loads((f.metadata() or {}).get('adapter', 'null'))
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{path} is cut off or damaged ({" ".join(str(error).split())[:200]})') from None
    if not isinstance(record, dict):
        raise ValueError(f'{path} has no header of save_lora; PeftModel.from_pretrained loads an adapter of PEFT')
    return record, tensors


def lora_param_groups(model, lr, weight_decay):
    """Groups for an optimizer: vectors do not decay; B and phi_out learn at lora_plus_ratio * lr (LoRA+). DoRA's
    magnitude learns at lr; PEFT's create_loraplus_optimizer gives it the rate of B.
    """
    refuse_merged(model)
    groups = {}
    for layer in active_lora(model).values():
        for name, p in layer.adapter.named_parameters():
            scale = layer.adapter.config.lora_plus_ratio if name.startswith(layer.adapter.fast) else 1.0
            decay = weight_decay if p.dim() >= 2 else 0.0
            group = dict(params=[], weight_decay=decay, lr=lr * scale, lr_scale=scale)
            groups.setdefault((scale, decay), group)['params'].append(p)
    return list(groups.values())


def lora_report(model):
    """What trains of the active adapter, as text: a line for each layer and one for all, with the share of the base."""
    refuse_merged(model)
    layers, lines, trainable = active_lora(model), [], 0
    for path, layer in layers.items():
        n = sum(p.numel() for p in layer.adapter.parameters())
        lines.append(f'{path:{max(map(len, layers))}}  {layer.adapter.kind:8}  {n:12,}')
        trainable += n
    ours = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in ours)
    lines.append(f'{trainable:,} parameters train beside {total:,} of the base model: {trainable / total:.2%}')
    return '\n'.join(lines)
