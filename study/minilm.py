"""A pretrained MiniLM learns the sentiment of film reviews (SST, five classes): full fine-tuning, its head alone,
low-rank adapters, their KAN forms, and splines grown into its own layers, side by side.

    python data/minilm/prepare.py && python data/sst/prepare.py
    OMP_NUM_THREADS=1 python study/minilm.py                      # in two shells, to share the runs
    OMP_NUM_THREADS=1 python study/minilm.py --stages=time,peft   # in one, when all else is done

`search` looks for the learning rate of each method by a part of train that is held out, `widen` tries further ones
where the highest or the lowest won, `final` trains on all of train with several seeds, `squash` compares ways of
keeping the inputs of KAN-LoRA on its grid. `time` measures steps and memory and `peft` steps beside PEFT's own
adapters: these two want the machine for themselves. Each run has a process of its own, and what has a record is not run
again. Then table.md and accuracy.png are made from the records, by --stages= without running anything.
"""

import json
import math
import operator
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import torch
import torch.nn as nn
from safetensors.torch import save
from torch.nn import functional as F
from tqdm import tqdm

from configurator import ROOT, configure
from kan import KANLinear
from run.device import device_name, keep_memory, peak_memory
from run.tables import markdown_table
from study.runner import Study, check_machine, choose, mean_and_std, paired, paired_p, run_json
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora, fit_linear, lora_param_groups, save_lora
from tasks.prompts import Example, collate, find_task, make_batches

# -----------------------------------------------------------------------------
seeds = '1,2,3'  # of the final runs
stages = 'search,widen,final,squash'
run = ''  # what a process runs, as JSON
# -----------------------------------------------------------------------------
STUDY = Study('minilm')
NAME = '{}, {}, lr={:g}, seed={}'  # of a run: stage, method, learning rate, seed
MODEL = Path(ROOT, 'data/minilm')
BATCH, WEIGHT_DECAY, WARMUP = 32, 0.01, 0.06
HEAD_RATE = 4.5e-3  # of the new head beside all that trains; alone it has a search of its own
LOW, HIGH = (5e-4, 1.5e-3, 4.5e-3), (1.5e-3, 4.5e-3, 1.35e-2)
METHODS = {  # settings of LoRAConfig, where it is an adapter; learning rates to try
    'full': (None, (5e-5, 1e-4, 2e-4)),
    'head only': (None, (4e-3, 1.6e-2, 4.8e-2)),
    'LoRA': (dict(), HIGH),
    'rsLoRA': (dict(rs_lora=True), LOW),
    'DoRA': (dict(use_dora=True), HIGH),
    'LoRA+': (dict(lora_plus_ratio=4.0), LOW),
    'LoRA, rank 96': (dict(rank=96), HIGH),  # as many parameters as KAN-LoRA
    'KAN-LoRA': (dict(kind='kan'), LOW),
    'KAN-DoRA': (dict(kind='kan', use_dora=True), LOW),
    'kanified': (None, (5.6e-5, 1.7e-4, 5e-4)),
}
PEFT = ('LoRA', 'rsLoRA', 'DoRA')  # that PEFT has, too
SQUASHED = {  # KAN-LoRA with other ways of keeping inputs on the grid, at its learning rate
    'KAN-LoRA, none': (dict(kind='kan', squash='none'), ()),
    'KAN-LoRA, clamp': (dict(kind='kan', squash='clamp'), ()),
    'KAN-LoRA, norm': (dict(kind='kan', squash='norm'), ()),
    'KAN-LoRA, norm, grid to 3': (dict(kind='kan', squash='norm', grid_range=(-3.0, 3.0)), ()),
}


class Classifier(nn.Module):
    """Sentence vectors as MiniLM's authors make them, the mean over the tokens, and a linear layer of five classes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 5)

    def forward(self, idx, lengths):
        """idx (B, T) tokens, padded on the right; lengths (B,) without the padding."""
        mask = (torch.arange(idx.size(1)) < lengths.unsqueeze(1)).long()  # (B, T)
        x = self.encoder(input_ids=idx, attention_mask=mask).last_hidden_state  # (B, T, C)
        return self.head((x * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1))  # (B, 5)


def load_model():
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Classifier(AutoModel.from_pretrained(MODEL, dtype=torch.float32))


def apply_method(model, method, lr, batch):
    """Give the model what the method trains; returns parameter groups."""
    settings, _ = (METHODS | SQUASHED)[method]
    if settings is not None:
        add_lora(model, LoRAConfig(modules_to_save=('head',), **settings))
        groups = lora_param_groups(model, lr, WEIGHT_DECAY)
    else:
        if method != 'full':
            model.requires_grad_(False)
        if method == 'kanified':
            kanify(model, ('query', 'value'), train='splines', grid_size=4, spline_order=1, grid_eps=1.0)
            fit_grids(model, batch)
        model.head.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{'params': trained, 'lr': lr, 'weight_decay': WEIGHT_DECAY}]
    if method == 'head only':
        return groups
    head = dict.fromkeys(p for p in model.head.parameters() if p.requires_grad)
    for group in groups:
        group['params'] = [p for p in group['params'] if p not in head]
    for p in head:
        decay = WEIGHT_DECAY if p.dim() == 2 else 0.0  # none of the bias
        groups.append({'params': [p], 'lr': HEAD_RATE, 'weight_decay': decay})
    return [group for group in groups if group['params']]


def fit_grids(model, batch):
    """Lay the grid of each KAN layer over the inputs that it meets in a batch."""
    layers = [module for module in model.modules() if isinstance(module, KANLinear)]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.update_grid(inputs[0])) for layer in layers]
    with torch.no_grad():
        model(*batch)
    for hook in hooks:
        hook.remove()


def count_bytes(model, method):
    """What the trained part takes as a file."""
    with tempfile.TemporaryDirectory() as folder:
        if (METHODS | SQUASHED)[method][0] is not None:
            save_lora(model, folder)
            return Path(folder, 'adapter_model.safetensors').stat().st_size
    grids = {name: tensor for name, tensor in model.named_buffers() if name.endswith('.grid')}
    return len(save({name: p for name, p in model.named_parameters() if p.requires_grad} | grids))


def load_split(split):
    """The sentences of a split of SST as Examples of MiniLM's tokens."""
    from transformers import AutoTokenizer

    ids, sentences, labels = zip(*find_task('sst').read(split))
    tokens = AutoTokenizer.from_pretrained(MODEL)(list(sentences))['input_ids']
    return [Example(*row) for row in zip(ids, tokens, labels)]


def load_batches(examples, seed=None):
    """[(idx, lengths, labels)], shuffled by a seed"""
    return [collate(batch, 'cpu') for batch in make_batches(examples, BATCH, seed)]


def typical(batches):
    """The batches of about the mean length, for measurements."""
    return [batch for batch in batches if 24 <= batch[0].size(1) <= 28]


def train(stage, method, lr, seed):
    """One run, in a process of its own; returns what it measures."""
    if stage == 'peft':
        return time_beside_peft(method)
    keep_memory()
    rows, dev = load_split('train'), load_split('dev')
    if stage in ('search', 'squash'):  # a third of train to learn from, an eighth to choose by; dev is for the end
        random.Random(0).shuffle(rows)
        rows, dev = rows[: len(rows) // 3], rows[-len(rows) // 8 :]
    torch.manual_seed(seed)
    model = load_model()
    loaded = peak_memory('cpu')
    batches = load_batches(rows, seed)
    if stage == 'time':
        batches, dev = typical(batches)[:13], []
    groups = apply_method(model, method, lr, batches[0][:2])
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    n = len(batches)  # linear warm-up, then linear decay to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / max(1, WARMUP * n), (n - i) / n))
    parameters = [p for group in groups for p in group['params']]
    seconds = []
    model.train()
    for idx, lengths, labels in tqdm(batches, desc=f'{stage} {method} {lr:g}', disable=None):
        start = time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(idx, lengths)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    found = dict(steps=n, trainable=sum(p.numel() for p in parameters))
    if stage == 'time':
        found.update(peak_bytes=peak_memory('cpu') - loaded, bytes=count_bytes(model, method))
        return dict(found, seconds=statistics.median(seconds[3:]))
    found['accuracy'] = count_right(model, dev)
    if (stage, method) == ('final', 'KAN-LoRA'):  # what its nearest linear map would do
        errors = fit_linear(model, [batch[:2] for batch in batches[:60]])
        found.update(linear_error=statistics.mean(errors.values()), linear_accuracy=count_right(model, dev))
    return found


@torch.no_grad()
def count_right(model, rows):
    """The share of rows whose label the model gives."""
    model.eval()
    with torch.autocast('cpu', torch.bfloat16):
        batches = load_batches(rows)
        return sum((model(*inputs).argmax(-1) == labels).sum().item() for *inputs, labels in batches) / len(rows)


def time_beside_peft(method):
    """Median seconds of forward and backward, of ours and of PEFT's adapter, measured in turns."""
    from peft import LoraConfig, get_peft_model

    keep_memory()
    *inputs, labels = typical(load_batches(load_split('train'), 0))[0]
    settings, _ = METHODS[method]
    torch.manual_seed(0)
    ours, theirs = load_model(), load_model()
    add_lora(ours, LoRAConfig(**settings))
    theirs.head.requires_grad_(False)
    options = dict(use_dora=settings.get('use_dora', False), use_rslora=settings.get('rs_lora', False))
    config = LoraConfig(target_modules=['query', 'value'], r=16, lora_alpha=32, lora_dropout=0.05, **options)
    get_peft_model(theirs.encoder, config)
    seconds = {'seconds': [], 'peft_seconds': []}
    for _ in range(15):
        for model, mine in zip((ours.train(), theirs.train()), seconds.values()):
            start = time.perf_counter()
            F.cross_entropy(model(*inputs), labels).backward()
            mine.append(time.perf_counter() - start)
            model.zero_grad()
    return {name: statistics.median(mine[2:]) for name, mine in seconds.items()}


def searched(method):
    """{learning rate: accuracy on what was held out}, in order."""
    runs = [run for run in STUDY.read().values() if (run['stage'], run['method']) == ('search', method)]
    rates = {run['lr']: run['accuracy'] for run in sorted(runs, key=lambda run: run['lr'])}
    missing = set(METHODS[method][1]) - rates.keys()
    if missing:
        raise ValueError(f'the search of {method} is not finished: {sorted(missing)}')
    return rates


def best_rate(method):
    rates = searched(method)
    return max(rates, key=rates.get)


def next_rate(method):
    """Three times the highest rate or a third of the lowest, where that one is the best; else None."""
    rates, best = list(searched(method)), best_rate(method)
    factor = {rates[-1]: 3, rates[0]: 1 / 3}.get(best)
    return factor and float(f'{factor * best:.2g}')


def list_runs(stage):
    many = [int(seed) for seed in seeds.split(',')]
    if stage == 'search':
        return [(stage, method, lr, 0) for method, (_, rates) in METHODS.items() for lr in rates]
    if stage == 'widen':
        beyond = [(method, next_rate(method)) for method in METHODS]
        return [('search', method, lr, 0) for method, lr in beyond if lr]
    if stage == 'squash':
        return [(stage, method, best_rate('KAN-LoRA'), seed) for seed in many for method in ('KAN-LoRA', *SQUASHED)]
    if stage in ('final', 'time'):
        return [(stage, method, best_rate(method), seed) for seed in many for method in METHODS]
    return [(stage, method, 0, seed) for seed in many for method in PEFT]


def make(name, one, folder):
    """One run in a process of its own: its record."""
    about = dict(zip(('stage', 'method', 'lr', 'seed'), one), device=device_name('cpu'))
    return about | run_json('study/minilm.py', run=json.dumps(one))


def percent(values):
    return mean_and_std([100 * value for value in values], 2)


def to_baseline(stage, method, baseline):
    """Points of accuracy above another method, over the seeds of both, and from three on p of a paired t-test."""
    if method == baseline:
        return ''
    values, baseline = paired(*(by_seed('accuracy', stage, name) for name in (method, baseline)), float)
    apart = f'{100 * (statistics.mean(values) - statistics.mean(baseline)):+.2f}'
    return f'{apart} (p = {paired_p(values, baseline):.2g})' if len(values) > 2 else apart


def by_seed(key, stage, method):
    """{seed: what the runs of a method in a stage have}, at the learning rate that its search has found."""
    method_of_rate = 'KAN-LoRA' if stage == 'squash' else method
    rate = 0 if stage == 'peft' else best_rate(method_of_rate)
    runs = [run for run in STUDY.read().values() if (run['stage'], run['method'], run['lr']) == (stage, method, rate)]
    if not runs:
        raise ValueError(f'no page yet: the stage {stage} is not finished, {method} has no runs in it')
    return {run['seed']: run[key] for run in sorted(runs, key=lambda run: run['seed'])}


def values_of(key, stage, method):
    return [*by_seed(key, stage, method).values()]


def make_tables():
    for stage in 'time', 'peft':
        check_machine({name: run for name, run in STUDY.read().items() if run['stage'] == stage})
    heads = ['method', 'trains', 'dev accuracy, %', 'to LoRA', 'learning rate', 'ms / step', 'peak memory', 'on disk']
    rows, squashes, times = [], [], []
    for method in METHODS:
        values, seconds = values_of('accuracy', 'final', method), values_of('seconds', 'time', method)
        memory, size = values_of('peak_bytes', 'time', method), values_of('bytes', 'time', method)
        trained = values_of('trainable', 'final', method)[0]
        cells = [method, f'{trained:,}', percent(values), to_baseline('final', method, 'LoRA')]
        cells += [f'{best_rate(method):.3g}', f'{1e3 * statistics.median(seconds):.0f}']
        rows.append([*cells, f'{max(memory) / 1e6:.0f} MB', f'{size[0] / 1e6:.2f} MB'])
    for method in ('KAN-LoRA', *SQUASHED):
        values, squash = values_of('accuracy', 'squash', method), method.partition(', ')[2] or 'tanh'
        squashes.append([squash, percent(values), to_baseline('squash', method, 'KAN-LoRA')])
    for method in PEFT:
        ours, theirs = values_of('seconds', 'peft', method), values_of('peft_seconds', 'peft', method)
        medians = [f'{1e3 * statistics.median(seconds):.0f}' for seconds in (ours, theirs)]
        times.append([method, *medians, f'{statistics.median(map(operator.truediv, ours, theirs)):.2f}'])
    error = 100 * statistics.mean(values_of('linear_error', 'final', 'KAN-LoRA'))
    linear = percent(values_of('linear_accuracy', 'final', 'KAN-LoRA'))
    fitted = f'{linear} % on dev; its layers are {error:.0f} % off, by root mean squares.'
    lines = markdown_table(heads, rows)
    lines += ['', *markdown_table(['KAN-LoRA with inputs', 'held-out accuracy, %', 'to tanh'], squashes)]
    lines += ['', *markdown_table(['forward + backward', 'ours, ms', 'PEFT', 'ratio'], times)]
    return '\n'.join([*lines, '', f'KAN-LoRA after `fit_linear`: {fitted}', ''])


def draw():
    """Accuracy over trained parameters: a point for each seed, a bar for the mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure, places = Figure(figsize=(10, 6), layout='constrained'), {}
    panel = figure.subplots()
    for method in METHODS:
        values = [100 * value for value in values_of('accuracy', 'final', method)]
        x = values_of('trainable', 'final', method)[0]
        mean = statistics.mean(values)
        color = 'tab:orange' if 'KAN' in method or method == 'kanified' else 'tab:blue'
        panel.plot([x] * len(values), values, 'o', markersize=4, alpha=0.35, color=color)
        panel.plot([x], [mean], '_', markersize=22, markeredgewidth=2.5, color=color)
        places.setdefault(round(math.log10(x), 1), []).append((mean, x, method, color))
    for column in places.values():  # labels beside the bars, apart from each other
        last = -math.inf
        for mean, x, method, color in sorted(column):
            last = max(mean, last + 0.19)
            panel.annotate(method, (x, mean), (x * 1.28, last), va='center', fontsize=10, color=color)
    panel.set(xscale='log', xlim=(1200, 1.2e8), xlabel='parameters that train')
    panel.xaxis.set_major_formatter(EngFormatter(sep=''))
    panel.set_ylabel('accuracy on dev, %; a point per seed, a bar for their mean')
    panel.grid(alpha=0.3)
    figure.savefig(STUDY.folder / 'accuracy.png', dpi=110)


if __name__ == '__main__':
    configure(globals())
    if run:
        print(json.dumps(train(*json.loads(run)), allow_nan=False))
        sys.exit()
    if stages and not ((MODEL / 'model.safetensors').exists() and find_task('sst').path('train').exists()):
        raise ValueError('model or data are missing: python data/minilm/prepare.py && python data/sst/prepare.py')
    for stage in choose('stages', stages, ('search', 'widen', 'final', 'squash', 'time', 'peft')):
        runs = list_runs(stage)
        while runs:
            STUDY.run_all({NAME.format(*one): one for one in runs}, make)
            runs = list_runs(stage) if stage == 'widen' else []
    STUDY.show(make_tables())
    draw()
