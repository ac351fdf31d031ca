"""A GPT made ready for a task, by switches:

    use_kan         its MLPs become KAN layers that compute what these did (kan_single_layer: that of one block alone)
    use_graph       graph attention behind the MLPs, silent at first (graph_last: those of so many last blocks)
    use_lora        low-rank adapters, of the kinds in surgery/adapters.py, on the layers that lora_targets names
    finetune_mode   what trains: 'full' everything, 'head' what reads the answer off, 'adapter' the adapters, with the
                    graph layers and a linear head
    form            where the answer is read off: 'cloze', the logits of the words for the labels after the prompt, or
                    'linear', a new linear layer

The function of the GPT stays what it was until something has trained.
"""

import contextlib
import functools
import os
import sys
from dataclasses import asdict

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import settings_of
from data.loader import load_tokenizer
from data.tokenizer import PretrainedTokenizer
from kan import KANLinear
from layers.graph import add_graph
from model import GPT, GPT2S, MLP, GPTConfig
from run.checkpoint import build_model, holds_model, load_checkpoint, shorten
from run.records import read_record
from surgery import causal_lm
from surgery.adapters import TrainedCopy, lora_layers
from surgery.causal_lm import CausalLM
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora, digest_of, load_lora, lora_param_groups
from tasks.prompts import answer_ids, find_task

CHOICES = dict(form=('cloze', 'linear'), finetune_mode=('full', 'head', 'adapter'), weights=('float32', 'bfloat16'))


def load_base(init_from, dropout, block_size=0, weights='float32'):
    """(model, tokenizer) to begin with: the GPT of a checkpoint of train.py or of GPT-2's weights, the CausalLM of any
    other language model of transformers. block_size is the length of the longest text, 0 what the model takes; weights
    is the dtype of the model's own.
    """
    check_choices(weights=weights)
    dtype = getattr(torch, weights)
    if holds_model(init_from):
        checkpoint = load_checkpoint(init_from)
        if 'finetune' in checkpoint:
            raise ValueError(
                f'{init_from} holds a fine-tuned model: init_from wants one of train.py or of transformers'
            )
        model = build_model(checkpoint, dropout=dropout)
        tokenizer = load_tokenizer(checkpoint, model.config.vocab_size)
    else:
        model, tokenizer = load_pretrained(init_from, dropout, dtype)
    if block_size:
        model.crop_block_size(block_size)
    return cast(model, dtype), tokenizer


def cast(model, dtype):
    """The weights alone: what rotary positions are made of stays in float32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_pretrained(init_from, dropout, dtype):
    """A model of transformers and its tokenizer; of GPT-2, where none lies with it, GPT-2's."""
    is_folder = os.path.isdir(init_from)
    if is_folder and not os.path.exists(os.path.join(init_from, 'config.json')):
        wanted = 'best.pt or ckpt.pt of train.py, or a model of transformers'
        raise ValueError(f'{init_from} holds no model: expected {wanted}')
    if init_from not in GPT2S and not (is_folder and causal_lm.load_config(init_from).model_type == 'gpt2'):
        tokenizer, model = own_tokenizer(init_from), causal_lm.load_causal_lm(init_from, dropout, dtype)
        check_vocabulary(init_from, tokenizer, model)
        return model, tokenizer
    model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    if is_folder and any(os.path.exists(os.path.join(init_from, name)) for name in ('tokenizer.json', 'vocab.json')):
        tokenizer = own_tokenizer(init_from)
        check_vocabulary(init_from, tokenizer, model)
        return model, tokenizer
    n = model.config.vocab_size
    try:
        return model, load_tokenizer({}, n)
    except ValueError:
        raise ValueError(f'{init_from} has {n} tokens and no tokenizer: those of GPT-2 are 50257') from None


def check_vocabulary(init_from, tokenizer, model):
    """ValueError for tokens of texts that the model has no row for; it may have more rows than tokens."""
    n, last = model.config.vocab_size, max(tokenizer.last_of_text, tokenizer.end_of_text or 0, *tokenizer.start)
    if last >= n:
        raise ValueError(f'the tokenizer of {init_from} has tokens up to {last}, the model {n} rows: not its own')


def own_tokenizer(init_from):
    tokenizer = causal_lm.load_hf_tokenizer(init_from)
    return PretrainedTokenizer(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


def describe(gpt):
    """What `build` makes the model from, without its weights and what the switches add."""
    if isinstance(gpt, CausalLM):
        return dict(causal_lm=gpt.description, block_size=gpt.config.block_size, dropout=gpt.config.dropout)
    return asdict(gpt.config)


def build(model_args):
    """A model of such a description."""
    return causal_lm.rebuild(**model_args) if 'causal_lm' in model_args else GPT(GPTConfig(**model_args))


def has_rows(gpt):
    """Whether lm_head is a linear layer, with a row for each token, and not a KAN or one with an adapter."""
    return type(gpt.lm_head) is nn.Linear


def rows_of(layer, rows):
    """Weight and bias (None where there is none) of some rows of a linear layer."""
    return layer.weight[rows], None if layer.bias is None else layer.bias[rows]


def tied_layer(gpt):
    """The layer of the head that shares its weight with the token embeddings; None where there is none."""
    embeddings = gpt.body.get_input_embeddings() if isinstance(gpt, CausalLM) else gpt.transformer.wte
    layers = gpt.lm_head.modules()
    return next((layer for layer in layers if getattr(layer, 'weight', None) is embeddings.weight), None)


class TaskModel(nn.Module):
    """A GPT that answers: logits of labels (B, n_labels), read off the last token; of sonnets (B, T, vocab_size)."""

    def __init__(self, gpt, answers, head):
        super().__init__()
        self.gpt, self.answers, self.head = gpt, answers, head

    def forward(self, idx, lengths):
        """idx (B, T) tokens, padded on the right; lengths (B,) without the padding."""
        x = self.gpt.features(idx, lengths=lengths)  # (B, T, C)
        if not self.answers:
            return self.gpt.lm_head(x)
        x = x[torch.arange(len(x), device=x.device), lengths - 1]  # (B, C)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # in half precision many logits would be equal
            if self.head is not None:
                return self.head(x.to(self.head.weight.dtype))
            if not has_rows(self.gpt):
                return self.gpt.lm_head(x.to(dtype))[:, self.answers]
            weight, bias = rows_of(self.gpt.lm_head, self.answers)  # those of the answers alone, of 50257
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def make_task_model(gpt, tokenizer, settings):
    """The TaskModel that the settings of finetune.py describe. ValueError for settings that contradict each other."""
    check_settings(gpt, settings)
    mode, task = settings['finetune_mode'], find_task(settings['task'])
    if settings['use_graph']:
        graph = {name: settings[name] for name in settings if name.startswith('graph_')}
        last = graph.pop('graph_last')
        if isinstance(gpt, CausalLM):
            gpt.add_graph(last, **graph)
        else:
            add_graph(gpt, last, **graph)
    if settings['use_kan']:
        kanify_mlps(gpt, settings)
    # of a new head numbers alone matter
    answers = answer_ids(task, tokenizer) if settings['form'] == 'cloze' else [*range(len(task.answers))]
    head = make_head(gpt, answers, settings)
    model = TaskModel(gpt, answers, head)
    tied = tied_layer(gpt)
    if mode == 'head' and head is None and tied is not None:  # on its own, or the embeddings would train with it
        tied.weight = nn.Parameter(tied.weight.detach().clone())
    if settings['gradient_checkpointing']:
        checkpoint_blocks(gpt)
    if mode == 'adapter':
        add_lora(model, lora_config(gpt, settings, has_head=head is not None))
        check_adapters(model, settings)
    else:
        model.requires_grad_(mode == 'full')
        if mode == 'head':
            (gpt.lm_head if head is None else head).requires_grad_(True)
        if is_idle(model):
            gpt.lm_head.requires_grad_(False)
    return model


def checkpoint_blocks(gpt):
    """Keep the inputs of blocks alone, and compute what is in them again in the backward pass."""
    from torch.utils.checkpoint import checkpoint  # brings PyTorch's compiler along, which takes a second

    for block in gpt.get_submodule(gpt.blocks_path):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def is_idle(model):
    """Whether lm_head takes no part: another head reads the answer off, and the embeddings have other weights."""
    return model.head is not None and tied_layer(model.gpt) is None


def check_adapters(model, settings):
    """ValueError for layers that were put in and then neither train nor are adapted, and for adapters out of use."""
    layers = lora_layers(model)
    kans = [path for path, module in model.named_modules() if isinstance(module, KANLinear)]
    idle = [path for path in kans if '.adapters.' not in path and path.removesuffix('.base_layer') not in layers]
    if settings['use_kan'] and idle:
        advice = "lora_kind='kan_base' or 'kan', and lora_targets with mlp"
        raise ValueError(f'use_kan=True, but no adapter is on {idle[0]}, and untrained it does nothing: {advice}')
    if model.answers and settings['weights'] == 'bfloat16' and 'gpt.lm_head' in layers:
        raise ValueError("lora_targets names lm_head, and answers are read off in float32: not with weights='bfloat16'")
    if model.head is not None and 'gpt.lm_head' in layers:
        raise ValueError("lora_targets names lm_head, which takes no part with form='linear'")


def check_choices(**settings):
    """ValueError for a setting that is none of its choices."""
    for name, choices in CHOICES.items():
        if name in settings and settings[name] not in choices:
            raise ValueError(f'{name}={settings[name]!r}: expected {", ".join(choices)}')


def check_settings(gpt, settings):
    """ValueError for settings out of range, or that contradict each other or the model."""
    check_choices(**settings)
    mode, use_kan, use_lora = (settings[name] for name in ('finetune_mode', 'use_kan', 'use_lora'))
    if settings['weights'] == 'bfloat16':
        check_half(gpt, settings)
    if settings['form'] == 'linear' and not find_task(settings['task']).answers:
        raise ValueError("form='linear' reads labels off, and sonnets have none: leave form out")
    if settings['use_graph'] and gpt.config.use_graph:
        raise ValueError('use_graph adds graph layers, and this model has some already: leave use_graph out')
    if use_lora != (mode == 'adapter'):
        advice = "by use_lora=True and finetune_mode='adapter'; 'full' and 'head' have none"
        raise ValueError(f'use_lora={use_lora} with finetune_mode={mode!r}: adapters train alone, {advice}')
    if use_lora and settings['lora_kind'] == 'kan_base' and not (use_kan or gpt.config.use_kan):
        raise ValueError("lora_kind='kan_base' adapts KAN layers: it wants use_kan=True, or a model that has some")
    idle = [name for name in ('use_kan', 'use_graph') if settings[name]]
    if mode == 'head' and idle:
        raise ValueError(f"{idle[0]}=True with finetune_mode='head': these layers would not train, and do nothing")
    if use_kan and gpt.config.use_kan:
        raise ValueError('use_kan makes KAN layers of MLPs, and this model has KAN layers already: leave use_kan out')
    single, n = settings['kan_single_layer'], gpt.config.n_layer
    if single >= 0 and not use_kan:
        raise ValueError(f'kan_single_layer={single} says which block gets KAN layers: it wants use_kan=True')
    if not -1 <= single < n:
        raise ValueError(f'kan_single_layer={single}: the model has blocks 0 to {n - 1}; -1 means all')
    last = settings['graph_last']
    if not 0 <= last <= n or (last and not settings['use_graph']):
        wanted = f'the last of {n} blocks that get graph layers by use_graph=True; 0 means all'
        raise ValueError(f'graph_last={last}: expected how many are {wanted}')


def check_half(gpt, settings):
    """ValueError for what wants float32: what trains itself, splines, and the graph layers of the GPT."""
    found = [f'finetune_mode={settings["finetune_mode"]!r}'] if settings['finetune_mode'] != 'adapter' else []
    found += ['KAN layers'] * (settings['use_kan'] or gpt.config.use_kan)
    found += ['graph layers of a GPT'] * ((settings['use_graph'] and isinstance(gpt, GPT)) or gpt.config.use_graph)
    if found:
        raise ValueError(f"weights='bfloat16' is for weights that stay as they are: not with {' or '.join(found)}")


def kanify_mlps(gpt, settings):
    """KAN layers in place of the linear layers of the MLPs. Where MLPs are the GPT's, GELU becomes the base activation
    of the second one; others, which may have gates, keep their activation.
    """
    single, blocks = settings['kan_single_layer'], gpt.get_submodule(gpt.blocks_path)
    parts = gpt.parts('mlp') if isinstance(gpt, CausalLM) else ('mlp',)
    targets = [part if single < 0 else f'{gpt.blocks_path}.{single}.{part}' for part in parts]
    is_ours = not isinstance(gpt, CausalLM) and isinstance(blocks[0].mlp, MLP)
    absorb = {'mlp.c_proj': 'mlp.act'} if is_ours else None
    grid = dict(grid_size=settings['grid_size'], spline_order=settings['spline_order'])
    kanify(gpt, targets, absorb=absorb, grid_range=(settings['grid_min'], settings['grid_max']), **grid)


def make_head(gpt, answers, settings):
    """The linear layer that reads the label off, None where lm_head does; of cloze it begins as the answers' rows."""
    is_linear = settings['form'] == 'linear'
    trains_rows = settings['finetune_mode'] == 'head' and has_rows(gpt)
    if not answers or not (is_linear or trains_rows):
        return None
    if is_linear:
        width = gpt.lm_head.in_features if has_rows(gpt) else gpt.config.n_embd  # of some OPT the head is narrower
        head = nn.Linear(width, len(answers))
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head
    head = nn.Linear(gpt.lm_head.in_features, len(answers), bias=gpt.lm_head.bias is not None)
    with torch.no_grad():
        for p, row in zip(head.parameters(), rows_of(gpt.lm_head, answers)):
            p.copy_(row)
    return head


def lora_config(gpt, settings, has_head):
    copies = ('head',) * has_head + ('ln_3', 'graph') * settings['use_graph']
    own = {name: settings[f'lora_{name}'] for name in ('kind', 'rank', 'alpha', 'dropout', 'grid_size', 'spline_order')}
    same = {name: settings[name] for name in ('rs_lora', 'use_dora', 'lora_plus_ratio')}
    targets = []
    for target in settings['lora_targets'].split(','):
        is_part = isinstance(gpt, CausalLM) and target in ('attn', 'mlp')
        targets += gpt.parts(target) if is_part else [target]
    return LoRAConfig(modules_to_save=copies, target_modules=','.join(targets), **own, **same)


def param_groups(model, settings):
    """Groups for the optimizer: matrices decay, the rest does not; a rate of its own (LoRA+) is `lr_scale`."""
    decay = settings['weight_decay']
    if settings['finetune_mode'] == 'adapter':
        return lora_param_groups(model, settings['learning_rate'], decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {'params': [p for p in trained if p.dim() >= 2], 'weight_decay': decay}
    others = {'params': [p for p in trained if p.dim() < 2], 'weight_decay': 0.0}
    return [group for group in (matrices, others) if group['params']]


def trained_report(model, settings):
    """A line for each kind of parameter that trains, * for the block. AssertionError if finetune_mode says other."""
    mode, kinds = settings['finetune_mode'], {}
    adapted = tuple(f'{path}.adapters.' for path in lora_layers(model))
    heads = ('head.',) if model.head is not None else ('gpt.lm_head.',)
    for name, p in model.named_parameters():
        expected = mode == 'full' or name.startswith(adapted if mode == 'adapter' else heads)
        expected = expected and not (is_idle(model) and name.startswith('gpt.lm_head.'))
        assert p.requires_grad == expected, f'{name} must {"" if expected else "not "}train with finetune_mode={mode!r}'
        if p.requires_grad:
            kind = '.'.join('*' if part.isdigit() else part for part in name.split('.'))
            n, count = kinds.get(kind, (0, 0))
            kinds[kind] = n + 1, count + p.numel()
    trained, total = count_trained(model)
    lines = [f'  {count:>11,}  {kind}' + (f', {n} times' if n > 1 else '') for kind, (n, count) in kinds.items()]
    return '\n'.join([f'{trained:,} of {total:,} parameters train:', *lines])


def count_trained(model):
    """(parameters that train, all), the layers that an adapter has a trained copy of counted once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, count_numbers(model) - sum(map(count_numbers, copied_layers(model)))


def copied_layers(model):
    """The layers that adapters have trained copies of."""
    return [layer.base_layer for layer in lora_layers(model).values() if isinstance(layer.adapter, TrainedCopy)]


def count_numbers(module):
    return sum(p.numel() for p in module.parameters())


def sum_losses(logits, targets):
    """The sum of the losses of a batch, in nats: of labels (B,), or of tokens (B, T); -1 is where there is none."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, reduction='sum')


def count_targets(examples):
    """How many terms that sum has."""
    return sum(len(example.ids) - 1 if example.text else 1 for example in examples)


def state_of(model, base_digest=None):
    """What a checkpoint holds of a TaskModel: {'model': its state}; if the digest of its frozen weights is given, that
    in their place, {'model', 'base'}.
    """
    state, frozen = model.state_dict(), frozen_weights(model)
    if base_digest is None or not frozen:
        return {'model': state}
    return {'model': {name: x for name, x in state.items() if name not in frozen}, 'base': base_digest}


def load_state(model, checkpoint):
    """The other way round. ValueError where the frozen weights, if the checkpoint lacks them, are others by now."""
    if 'base' not in checkpoint:
        model.load_state_dict(checkpoint['model'])
        return
    frozen = frozen_weights(model)
    if digest_of(frozen.items()) != checkpoint['base']:
        raise ValueError('the weights at init_from are not those that the checkpoint was trained on')
    model.load_state_dict({**frozen, **checkpoint['model']})


def frozen_weights(model):
    """{name: weight} of those of the base that stay as they are; where a copy of a layer trains, the layer is none."""
    copied = {id(p) for layer in copied_layers(model) for p in layer.parameters()}
    weights = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in weights if not p.requires_grad and id(p) not in copied}


def complete(settings):
    """The settings of a run of finetune.py, with the defaults of those that there were not yet."""
    return {**settings_of('finetune.py', []), **settings}


def load_task_model(checkpoint, dropout=None):
    """(TaskModel, tokenizer) of a checkpoint of finetune.py; of one without its base that is read from init_from.
    dropout is that of the GPT, None as in training.
    """
    settings = complete(checkpoint['finetune'])
    dropout = settings['dropout'] if dropout is None else dropout
    try:
        if 'base' in checkpoint:
            gpt = load_same_base(checkpoint, settings, dropout)
        else:
            gpt = cast(build({**checkpoint['model_args'], 'dropout': dropout}), getattr(torch, settings['weights']))
        tokenizer = load_tokenizer(checkpoint, gpt.config.vocab_size)
        with contextlib.redirect_stdout(sys.stderr):  # what surgery reports is no part of a sample
            model = make_task_model(gpt, tokenizer, settings)
        load_state(model, checkpoint)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f'the checkpoint does not fit its own settings: {shorten(error)}') from None
    return model, tokenizer


def load_same_base(checkpoint, settings, dropout):
    """The base of a checkpoint without it. ValueError where init_from has none any more, or another one."""
    init_from, then = settings['init_from'], checkpoint['model_args']
    try:
        gpt, _ = load_base(init_from, dropout, settings['block_size'], settings['weights'])
    except ValueError as error:
        raise ValueError(f'the checkpoint was saved without its base, init_from={init_from}: {error}') from None
    if what_computes(describe(gpt)) != what_computes(then):
        raise ValueError(f'the model at init_from={init_from} is made otherwise than that of the checkpoint')
    return gpt


def what_computes(model_args):
    """Of a description what decides what a model computes: not its dropout, where it lay, and who has read it."""
    flat = {**model_args, **model_args.get('causal_lm', {})}
    free = {name for name in flat if 'drop' in name or name[0] == '_'} | {'causal_lm', 'transformers_version'}
    return {name: value for name, value in flat.items() if name not in free}


def load_adapter(out_dir, init_from):
    """(TaskModel, tokenizer, settings) of a base model and the adapter that a run of finetune.py left in out_dir."""
    settings = read_record(out_dir).get('config', {})
    if not settings.get('use_lora') or 'lora_kind' not in settings:
        raise ValueError(f'{out_dir} holds no run of finetune.py with an adapter: expected run.json and adapter/')
    settings = complete(settings)
    gpt, tokenizer = load_base(init_from, 0.0, settings['block_size'], settings['weights'])
    model = make_task_model(
        gpt, tokenizer, {**settings, 'use_lora': False, 'finetune_mode': 'full', 'weights': 'float32'}
    )
    load_lora(model, os.path.join(out_dir, 'adapter'))
    return model.eval(), tokenizer, settings
