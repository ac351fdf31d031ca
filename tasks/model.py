"""A GPT made ready for a task, by switches:

    use_kan         its MLPs become KAN layers that compute what these did (kan_single_layer: that of one block alone)
    use_graph       graph attention behind the MLPs, silent at first
    use_lora        low-rank adapters, of the kinds of lora.py, on the layers that lora_targets names
    finetune_mode   what trains: 'full' everything, 'head' what reads the answer off, 'adapter' the adapters, with the
                    graph layers and a linear head
    form            where the answer is read off: 'cloze', the logits of the words for the labels after the prompt, or
                    'linear', a new linear layer

The function of the GPT stays what it was until something has trained.
"""

import contextlib
import os
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

from data.loader import load_tokenizer
from kan import KANLinear
from layers.graph import add_graph
from model import GPT, MLP, GPTConfig
from run.checkpoint import EXPORT, build_model, load_checkpoint, shorten
from run.records import read_record
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, TrainedCopy, add_lora, load_lora, lora_layers, lora_param_groups
from tasks.prompts import answer_ids, find_task

FORMS, MODES = ('cloze', 'linear'), ('full', 'head', 'adapter')


def load_base(init_from, dropout):
    """(GPT, tokenizer) of a folder with a checkpoint of train.py or a GPT-2 of transformers, or of the hub."""
    if any(os.path.exists(os.path.join(init_from, name)) for name in ('best.pt', 'ckpt.pt', EXPORT)):
        checkpoint = load_checkpoint(init_from)
        if 'finetune' in checkpoint:
            raise ValueError(f'{init_from} holds a fine-tuned model: init_from wants one of train.py, or a GPT-2')
        model = build_model(checkpoint, dropout=dropout)
        return model, load_tokenizer(checkpoint, model.config.vocab_size)
    if os.path.isdir(init_from) and not os.path.exists(os.path.join(init_from, 'config.json')):
        wanted = 'best.pt or ckpt.pt of train.py, or a GPT-2 of transformers'
        raise ValueError(f'{init_from} holds no model: expected {wanted}')
    model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    n = model.config.vocab_size
    try:
        return model, load_tokenizer({}, n)
    except ValueError:
        raise ValueError(f'{init_from} has {n} tokens: the tasks want a model with those of GPT-2, 50257') from None


def has_rows(gpt):
    """Whether lm_head is a linear layer, with a row for each token, and not a KAN or one with an adapter."""
    return type(gpt.lm_head) is nn.Linear


def tied_layer(gpt):
    """The layer of the head that shares its weight with the token embeddings; None where there is none."""
    weight = gpt.transformer.wte.weight
    return next((layer for layer in gpt.lm_head.modules() if getattr(layer, 'weight', None) is weight), None)


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
        if self.head is not None:
            return self.head(x)
        if has_rows(self.gpt):  # those of the answers alone, of 50257
            return F.linear(x, self.gpt.lm_head.weight[self.answers])
        return self.gpt.lm_head(x)[:, self.answers]


def make_task_model(gpt, tokenizer, settings):
    """The TaskModel that the settings of finetune.py describe. ValueError for settings that contradict each other."""
    check_settings(gpt, settings)
    mode, task = settings['finetune_mode'], find_task(settings['task'])
    if settings['use_graph']:
        add_graph(gpt, **{name: settings[name] for name in settings if name.startswith('graph_')})
    if settings['use_kan']:
        kanify_mlps(gpt, settings)
    answers = answer_ids(task, tokenizer)
    head = make_head(gpt, answers, settings)
    model = TaskModel(gpt, answers, head)
    tied = tied_layer(gpt)
    if mode == 'head' and not answers and tied is not None:  # on its own, or the embeddings would train with it
        tied.weight = nn.Parameter(tied.weight.detach().clone())
    if mode == 'adapter':
        add_lora(model, lora_config(settings, has_head=head is not None))
        check_adapters(model, settings)
    else:
        model.requires_grad_(mode == 'full')
        if mode == 'head':
            (gpt.lm_head if head is None else head).requires_grad_(True)
        if is_idle(model):
            gpt.lm_head.requires_grad_(False)
    return model


def is_idle(model):
    """Whether lm_head takes no part: another head reads the answer off, and the embeddings have other weights."""
    return model.head is not None and tied_layer(model.gpt) is None


def check_adapters(model, settings):
    """ValueError for layers that were put in and then neither train nor are adapted, and for adapters out of use."""
    layers = lora_layers(model)
    if settings['use_kan'] and not any(isinstance(layer.base_layer, KANLinear) for layer in layers.values()):
        advice = "lora_kind='kan_base' or 'kan', and lora_targets with mlp"
        raise ValueError(f'use_kan=True, but no adapter is on a KAN layer, and untrained they do nothing: {advice}')
    if model.head is not None and 'gpt.lm_head' in layers:
        raise ValueError("lora_targets names lm_head, which takes no part with form='linear'")


def check_settings(gpt, settings):
    """ValueError for settings out of range, or that contradict each other or the model."""
    for name, choices in ('form', FORMS), ('finetune_mode', MODES):
        if settings[name] not in choices:
            raise ValueError(f'{name}={settings[name]!r}: expected {", ".join(choices)}')
    mode, use_kan, use_lora = (settings[name] for name in ('finetune_mode', 'use_kan', 'use_lora'))
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


def kanify_mlps(gpt, settings):
    """KAN layers in place of the linear layers of the MLPs: GELU becomes the base activation of the second one."""
    single = settings['kan_single_layer']
    target = 'mlp' if single < 0 else f'transformer.h.{single}.mlp'
    absorb = {'mlp.c_proj': 'mlp.act'} if isinstance(gpt.transformer.h[0].mlp, MLP) else None
    grid = dict(grid_size=settings['grid_size'], spline_order=settings['spline_order'])
    kanify(gpt, (target,), absorb=absorb, grid_range=(settings['grid_min'], settings['grid_max']), **grid)


def make_head(gpt, answers, settings):
    """The linear layer that reads the label off, None where lm_head does; of cloze it begins as the answers' rows."""
    if not answers or (settings['form'] == 'cloze' and not (settings['finetune_mode'] == 'head' and has_rows(gpt))):
        return None
    head = nn.Linear(gpt.config.n_embd, len(answers), bias=settings['form'] == 'linear')
    with torch.no_grad():
        if settings['form'] == 'cloze':
            head.weight.copy_(gpt.lm_head.weight[answers])
        else:
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
    return head


def lora_config(settings, has_head):
    copies = ('head',) * has_head + ('ln_3', 'graph') * settings['use_graph']
    own = {name: settings[f'lora_{name}'] for name in ('kind', 'rank', 'alpha', 'dropout', 'grid_size', 'spline_order')}
    same = {name: settings[name] for name in ('rs_lora', 'use_dora', 'lora_plus_ratio')}
    return LoRAConfig(modules_to_save=copies, target_modules=settings['lora_targets'], **own, **same)


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
    copied = [layer.base_layer for layer in lora_layers(model).values() if isinstance(layer.adapter, TrainedCopy)]
    return trained, count_numbers(model) - sum(map(count_numbers, copied))


def count_numbers(module):
    return sum(p.numel() for p in module.parameters())


def sum_losses(logits, targets):
    """The sum of the losses of a batch, in nats: of labels (B,), or of tokens (B, T); -1 is where there is none."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, reduction='sum')


def count_targets(examples):
    """How many terms that sum has."""
    return sum(len(example.ids) - 1 if example.text else 1 for example in examples)


def load_task_model(checkpoint, **overrides):
    """(TaskModel, tokenizer) of a checkpoint of finetune.py, which holds all weights, those of its base too."""
    settings = checkpoint['finetune']
    try:
        gpt = GPT(GPTConfig(**{**checkpoint['model_args'], **overrides}))
        tokenizer = load_tokenizer(checkpoint, gpt.config.vocab_size)
        with contextlib.redirect_stdout(sys.stderr):  # what surgery reports is no part of a sample
            model = make_task_model(gpt, tokenizer, settings)
        model.load_state_dict(checkpoint['model'])
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f'the checkpoint does not fit its own settings: {shorten(error)}') from None
    return model, tokenizer


def load_adapter(out_dir, init_from):
    """(TaskModel, tokenizer, settings) of a base model and the adapter that a run of finetune.py left in out_dir."""
    settings = read_record(out_dir).get('config', {})
    if not settings.get('use_lora') or 'lora_kind' not in settings:
        raise ValueError(f'{out_dir} holds no run of finetune.py with an adapter: expected run.json and adapter/')
    gpt, tokenizer = load_base(init_from, dropout=0.0)
    model = make_task_model(gpt, tokenizer, {**settings, 'use_lora': False, 'finetune_mode': 'full'})
    load_lora(model, os.path.join(out_dir, 'adapter'))
    return model, tokenizer, settings
