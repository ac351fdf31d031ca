"""kanify: KAN layers in place of the linear layers of any PyTorch model, a BERT, BART, GPT-2 or Llama, by their names;
or learned functions in place of its activations.

    from surgery.kanify import kanify

    kanify(model)  # every linear layer in the blocks; what the model computes stays what it was
    kanify(model, ('query', 'value'), train='splines')
    kanify(gpt2, 'mlp', absorb={'mlp.c_proj': 'mlp.act'})
    kanify(llama, kind='channel', example=tokens, train='splines')  # a function on each channel of its gates

The functions that find layers serve adapters, too.
"""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
import torch.nn as nn

from kan import ChannelSpline, KANLinear, broken_rule

AROUND = '_orig_mod', '_checkpoint_wrapped_module'  # what torch.compile and activation checkpointing put into paths
PLACES = 'rel_pos_bias', 'rel_pos_x_bias', 'rel_pos_y_bias'
READERS = {  # modules of transformers that take the weights of these layers and do not, or not always, call them
    'WavLMAttention': ('q_proj', 'k_proj', 'v_proj', 'out_proj'),
    'DisentangledSelfAttention': ('in_proj',),
    'LSHSelfAttention': ('query_key', 'value'),
    'DetrMHAttentionMap': ('k_proj',),
    'ConditionalDetrMHAttentionMap': ('k_proj',),
    'MaskFormerDetrMHAttentionMap': ('k_proj',),
    'DabDetrMHAttentionMap': ('k_linear',),
    'TDNNLayer': ('kernel',),
    'Lfm2ShortConv': ('conv',),
    'Lfm2MoeShortConv': ('conv',),
    'Lfm3ShortConv': ('conv',),
    'LongcatFlashTopkRouter': ('classifier',),
    'Gemma3nTextAltUp': ('correction_coefs', 'prediction_coefs'),
    'Gemma4AssistantForCausalLM': ('lm_head',),
    'Gemma4UnifiedAssistantForCausalLM': ('lm_head',),
    'MobileBertLMPredictionHead': ('decoder', 'dense'),
    'NeoMMEForMaskedLM': ('unembedding_projection',),
    'LayoutLMv2Encoder': PLACES,
    'LayoutLMv3Encoder': PLACES,
    'PPDocLayoutV2ReadingOrderEncoder': PLACES,
}
SHORT = 'conv1d', 'conv_1d'  # in transformers a kernel takes convolutions of these names that have a group a channel
READ = 'is read by the module around it and not always called: what stood in its place would be passed by'
CHANNELS_FIRST = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm  # in what these give


def kanify(model, targets=None, init='preserve', train='all', absorb=None, kind='edge', example=None, **settings):
    """Put KAN layers in place of the nn.Linear and Conv1D layers of any model, in place, and return it.

    targets   names of layers, or of modules that hold some; None: all within the blocks of the model (the entries of an
              nn.ModuleList or nn.Sequential, but not of a model that is one itself), not heads. A layer with a shared
              weight is left out unless named itself.
    init      'preserve': the layer's weight and bias under an identity activation, and splines of zero, so that the
              model still gives what it gave; 'fresh': as KANLinear starts.
    train     'all': a KAN layer trains if the layer it replaces does; 'splines': these alone train in the whole model.
    absorb    {layer: the activation module before it}, e.g. {'mlp.c_proj': 'mlp.act'}: the activation becomes the base
              activation of the KAN layer, so that the splines lie beside it and not behind it. Not for gated MLPs: what
              the activation gives must go to that layer, as it is, and nowhere else.
    kind      'channel': activations become learned functions in place of all this, see kanify_activations, which takes
              `example`, targets, train and settings.
    settings  of KANLinear: grid_size, spline_order, grid_range ...

    Prints the number of parameters before and after. ValueError where nothing matches, naming what is there.
    """
    if kind not in ('edge', 'channel') or (kind == 'channel') != (example is not None):
        got = f'{kind!r} and {type(example).__name__}'
        raise ValueError(
            f"expected kind 'edge', or 'channel' and an example of what the model is called with, got {got}"
        )
    if kind == 'channel' and (init != 'preserve' or absorb):
        raise ValueError("init and absorb are for kind 'edge': activations become functions that preserve them")
    if kind == 'channel':
        return kanify_activations(model, example, targets, train, **settings)
    if init not in ('preserve', 'fresh') or train not in ('all', 'splines'):
        raise ValueError(f"expected init 'preserve' or 'fresh' and train 'all' or 'splines', got {init!r}, {train!r}")
    refuse_adapters(model)
    refuse_offloaded(model)
    if init == 'preserve' and 'base_activation' in settings:
        raise ValueError("init 'preserve' has the identity as base_activation; absorb takes an activation in")
    if 'bias' in settings:
        raise ValueError('a KAN layer has a bias where the layer it replaces has one: leave bias out')
    if init == 'preserve':
        settings = dict(base_activation=nn.Identity, enable_standalone_scale_spline=False) | settings
    targets = [targets] if isinstance(targets, str) else targets
    paths = find_paths(model, targets, 'linear layers', lambda module: is_linear(module) or is_conv1d(module))
    paths = without_tied(paths, tied_modules(model), targets or ())
    absorbed = find_absorbed(model, paths, absorb or {})
    refuse_hooks(model, [*paths, *absorbed.values()])
    before, layers = sum(p.numel() for p in model.parameters()), {}
    for path in paths:
        activation = model.get_submodule(absorbed[path]) if path in absorbed else None
        layers[path] = to_kan(model.get_submodule(path), init, activation, settings)
    for path, layer in (layers | dict.fromkeys(absorbed.values(), nn.Identity())).items():
        model.set_submodule(path, layer)
    choose_what_trains(model, layers, train)
    report(model, f'{len(layers)} layers became KAN layers', before)
    if targets is None:
        say_what_stays(model)
    return model


def kanify_activations(model, example, targets=None, train='all', **settings):
    """Put a ChannelSpline in place of the activations of any model, in place, and return it. What the model computes
    stays as it was: each function begins as the activation that it replaces.

    example   what the model is called with once, without gradients and in eval mode, to see the width of each
              activation, whose channels are its last dimension: a tensor, a tuple of arguments, or a dict of them.
    targets   names of activations, or of modules that hold some; None: all within the blocks of the model. Those of
              PyTorch, transformers and layers/activations.py are known, any other is to be named itself. Not for those
              that have parameters.
    train     'all': the functions train beside what trains already; 'splines': they alone train in the whole model.
    settings  of ChannelSpline: grid_size, spline_order, grid_range ...

    Prints the number of parameters before and after. ValueError where nothing matches, naming what is there; for an
    activation that the example does not reach, that is used at several places, that has more than three dimensions or
    follows a convolution: channels do not come last there. In a model with convolutions targets must name those of
    three dimensions.
    """
    if train not in ('all', 'splines'):
        raise ValueError(f"expected train 'all' or 'splines', got {train!r}")
    if 'base_activation' in settings:
        raise ValueError('each function begins as the activation that it replaces: leave base_activation out')
    refuse_adapters(model)
    refuse_offloaded(model)
    targets = [targets] if isinstance(targets, str) else targets
    named = [module for path, module in named_layers(model).items() if is_named(path, targets or ())]
    own = [module for module in named if not [*module.children()] and broken_rule(module) is None]
    paths = find_paths(model, targets, 'activations', lambda module: module in own or is_activation(module))
    refuse_hooks(model, paths)
    inputs = watch_inputs(model, paths, example)
    if targets is None and any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        doubtful = [path for path, x in inputs.items() if x.dim() > 2]
        if doubtful:
            advice = 'name in targets those whose last dimension holds channels'
            raise ValueError(
                f'the model has convolutions, behind which channels come first, and {doubtful[0]}: {advice}'
            )
    before, layers = sum(p.numel() for p in model.parameters()), {}
    for path in paths:
        activation, x = model.get_submodule(path), inputs[path]
        phi = ChannelSpline(x.size(-1), base_activation=as_torch(activation), **settings)
        layers[path] = phi.to(x.device).train(activation.training)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    choose_what_trains(model, layers, train)
    report(model, f'{len(layers)} activations became learned functions', before)
    return model


def say_what_stays(model):
    """A line for stacks of matrices within the blocks that are in no layer, as those of fused experts."""
    stay = []
    for path, module in model.named_modules():
        if not isinstance(module, (KANLinear, nn.modules.conv._ConvNd)) and in_block(model, path):
            stay += [f'{path}.{name}' for name, p in module.named_parameters(recurse=False) if is_stack(p)]
    if stay:
        print(f'{len(stay)} tensors stay as they are, such as {stay[0]}: they are in no linear layer')


def is_stack(p):
    return p.dim() > 2 and min(p.shape) > 1


def refuse_adapters(model):
    # the wrappers of adapters.py and of PEFT have one
    if any(hasattr(module, 'base_layer') for module in model.modules()):
        raise ValueError('the model has adapters: kanify comes before them')


def refuse_offloaded(model):
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f'{name} is on the meta device, without its numbers: expected a model that is not offloaded'
            )


def refuse_compiled(path):
    if path.rpartition('.')[2] == '_orig_mod':  # torch.compile calls the module that it was given
        what = plain(path) or 'the model itself, one layer,'
        raise ValueError(f'{what} is compiled by itself, so what stands in its place would not run: compile later')


def refuse_hooks(model, paths):
    for path in paths:
        refuse_compiled(path)
        module = model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f'{path} has hooks, which would be lost: remove them before kanify, and register them anew'
            )
        if 'forward' in vars(module):  # as accelerate puts its hooks
            raise ValueError(f'{path} has a forward of its own in place of that of its class, which would be lost')


def choose_what_trains(model, layers, train):
    if train == 'splines':
        model.requires_grad_(False)
        for layer in layers.values():
            layer.spline_weight.requires_grad_(True)


def report(model, what, before):
    after = sum(p.numel() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f'{what}: {before:,} -> {after:,} parameters, {training:,} of them train')


def find_paths(model, targets, kind, is_one):
    """The paths of those modules that targets name, in order; None: of all within the blocks."""
    modules = named_layers(model)
    found = [path for path, module in modules.items() if is_one(module)]
    chosen = [path for path in found if in_block(model, path)] if targets is None else matching(found, targets, modules)
    if not chosen:
        raise ValueError(f'found no {kind} within blocks: name some in targets; there is {names_of(found)}')
    return without_read(chosen, model, targets or ())


def is_activation(module):
    """Whether a module is one of PyTorch's, of transformers' or of ours that act on each number by itself."""
    known = 'torch.nn.modules.activation', 'transformers.activations', 'layers.activations'
    is_known = type(module).__module__ in known
    return is_known and broken_rule(module) is None


@torch.no_grad()
def as_torch(activation):
    """The activation of PyTorch that computes the same, whatever another library calls it: the fast passes know it.
    One that is none of them stays as it is.
    """
    x = torch.linspace(-40, 40, 8001, dtype=torch.float64).sinh()  # to 1e17: a clipped ReLU equals ReLU up to its bound
    y, known = activation(x), (nn.SiLU(), nn.GELU(), nn.GELU('tanh'), nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    return next((plain for plain in known if torch.allclose(plain(x), y, rtol=1e-12, atol=1e-12)), activation)


@torch.no_grad()
def watch_inputs(model, paths, example):
    """{path: what the activation there was called with}"""
    seen, handles, convolved = {path: [] for path in paths}, [], []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda module, inputs, path=path: seen[path].extend(inputs)))
    for module in model.modules():
        if isinstance(module, CHANNELS_FIRST):
            handles.append(module.register_forward_hook(lambda module, inputs, output: convolved.append(output)))
    with in_eval_mode(model, handles):
        call(model, example)
    for path, inputs in seen.items():
        if any(x.dim() > 3 for x in inputs):
            raise ValueError(
                f'{path} acts on {tuple(inputs[0].shape)}: expected (..., channels), three dimensions at most'
            )
        if any(x.dim() > 2 and x is made for x in inputs for made in convolved):
            raise ValueError(f'{path} follows a convolution: expected (..., channels), and channels come first there')
        if len(inputs) != 1:
            wanted = 'expected once, by position, in a place of its own'
            raise ValueError(f'{path} was called {len(inputs)} times on the example: {wanted}')
    return {path: inputs[0] for path, inputs in seen.items()}


@contextmanager
def in_eval_mode(model, handles):
    """Inside, the model is in eval mode. Then every module is in its own again, and the hooks (handles) are gone."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()


def call(model, inputs):
    """Call a model with a tensor, a tuple of arguments, or a dict of them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, (tuple, list)) else [inputs]))


@torch.no_grad()
def to_kan(layer, init, activation, settings):
    """A KANLinear for a linear layer, with `activation` (None: that of the settings) as its base activation."""
    weight = layer.weight.t() if is_conv1d(layer) else layer.weight
    O, I = weight.shape
    if activation is not None:
        settings = settings | dict(base_activation=activation)
    with torch.device(weight.device):
        kan = KANLinear(I, O, bias=layer.bias is not None, **settings).to(weight.dtype).train(layer.training)
    kan.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        kan.bias.requires_grad_(layer.bias.requires_grad)
    if init == 'preserve':
        kan.base_weight.copy_(weight)
        kan.spline_weight.zero_()
        if layer.bias is not None:
            kan.bias.copy_(layer.bias)
    return kan


def is_linear(layer):
    """nn.Linear, or a kind of it that computes the same; quantised layers have a forward of their own."""
    is_falcon = type(layer).__name__ == 'FalconLinear' and type(layer).__module__.startswith('transformers.')
    return (type(layer).forward is nn.Linear.forward or is_falcon) and has_plain_weight(layer)


def has_plain_weight(layer):
    """Whether its weight is a parameter, and neither computed from others, as by weight_norm, nor still to come."""
    weight = layer._parameters.get('weight')
    is_there = weight is not None and not isinstance(weight, nn.UninitializedParameter)
    return is_there and weight.is_floating_point() and not hasattr(layer, 'parametrizations')


def is_conv1d(layer):
    """transformers' Conv1D, a linear layer with a weight of (I, O), by its looks: transformers need not be there."""
    return type(layer).__name__ == 'Conv1D' and hasattr(layer, 'nf')


def named_layers(model):
    """{path: module} of all modules in the model, one that has several paths under each"""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path}


def plain(path):
    """The path of a module or tensor as it is without what stands around modules."""
    return '.'.join(part for part in path.split('.') if part not in AROUND)


def unwrap(model):
    """The model within what torch.compile, activation checkpointing and (Distributed)DataParallel put around it: its
    layers have their names.
    """
    children = dict(model.named_children())
    for name in AROUND:
        if name in children:
            return unwrap(children[name])
    is_parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return unwrap(model.module) if is_parallel else model


def without_read(paths, model, targets):
    """The paths less those of layers that are read, which a line names. ValueError where a target names one itself, or
    where none is left.
    """
    ids = {id(layer) for module in model.modules() for layer in layers_read(module)}
    read = [path for path in paths if id(model.get_submodule(path)) in ids]
    for path in read:
        if is_named(path, targets) or len(read) == len(paths):
            raise ValueError(f'{path} {READ}')
    if read:
        print(f'left out: {names_of(read)}, each of which {READ}')
    return [path for path in paths if path not in read]


def layers_read(module):
    """The layers in a module whose weights it, or a kernel that it calls, takes for itself."""
    if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return [*module.children()]
    if all(hasattr(module, name) for name in ('A_log', 'in_proj', 'conv1d')):  # a Mamba, of any kind
        return [layer for name, layer in module.named_children() if name != 'in_proj']
    read = [getattr(module, name) for name in READERS.get(type(module).__name__, ()) if hasattr(module, name)]
    if not type(module).__module__.startswith('transformers.'):
        return read
    convolutions = [getattr(module, name) for name in SHORT if isinstance(getattr(module, name, None), nn.Conv1d)]
    return read + [layer for layer in convolutions if layer.groups == layer.in_channels > 1]


def without_tied(paths, tied, targets):
    """The paths less those of layers that share their weight and that no target names; ValueError if none is left."""
    left = [path for path in paths if path not in tied or is_named(path, targets)]
    if not left:
        others = ', '.join(tied[paths[0]])
        raise ValueError(f'{paths[0]} shares its weight with {others}: it is left alone unless named itself')
    return left


def in_block(model, path):
    """Whether the layer at a path lies within an entry of an nn.ModuleList or nn.Sequential."""
    parents = [path[:i] for i, character in enumerate(path) if character == '.']
    return any(isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)) for parent in parents[:-1])


def find_absorbed(model, paths, absorb):
    """{path of a layer: path of the activation that it takes in}, both under the same parent"""
    modules, found = {plain(path): path for path in named_layers(model)}, {}
    for layer, activation in absorb.items():
        pairs = [(path, plain(path).removesuffix(layer) + activation) for path in paths if is_named(path, [layer])]
        pairs = {path: modules[other] for path, other in pairs if other in modules}
        if not pairs:
            raise ValueError(f'absorb: found no layer {layer!r} among the targets with {activation!r} beside it')
        found.update(pairs)
    return found


def matching(paths, targets, modules):
    """The paths that targets name: `c_attn`, `attn`, `h.0` name h.0.attn.c_attn. ValueError where one names nothing;
    `modules`, {path: module} of all there are, says what it names in their place.
    """
    for target in targets:
        if not any(f'.{target}.' in f'.{plain(path)}.' for path in paths):
            kinds = [type(module).__name__ for path, module in modules.items() if is_named(path, [target])]
            what = f'{target!r} is a {kinds[0]}, which cannot be replaced or adapted' if kinds else ''
            what = what or f'no layer to replace or adapt by the name {target!r}'
            raise ValueError(f'{what}; there is {names_of(paths)}')
    return [path for path in paths if any(f'.{target}.' in f'.{plain(path)}.' for target in targets)]


def is_named(path, targets):
    """Whether a target names the layer at a path itself, and not a module that holds it."""
    return any(f'.{plain(path)}'.endswith(f'.{target}') for target in targets)


def names_of(paths):
    """Their last names, each once, with their number: c_attn (12), c_proj (24)"""
    names = [plain(path).rpartition('.')[2] for path in paths]
    return ', '.join(f'{name} ({names.count(name)})' for name in dict.fromkeys(names)) or 'none'


def tied_modules(model):
    """{path: paths of the modules that share a parameter with the one at that path}"""
    owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(path)
    shared = [paths for paths in owners.values() if len(paths) > 1]
    return {path: [other for other in paths if other != path] for paths in shared for path in paths}
