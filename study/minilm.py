"""
A pretrained MiniLM learns the sentiment of film reviews (SST, five classes): full fine-tuning, its head alone, low-rank adapters, their
KAN forms, and splines grown into its own layers, side by side.

    python data/minilm/prepare.py && python data/sst/prepare.py
    OMP_NUM_THREADS=1 python study/minilm.py                      # in two shells, to share the runs
    OMP_NUM_THREADS=1 python study/minilm.py --stages=time,peft   # in one, when all else is done

`search` looks for the learning rate of each method by a part of train that is held out, `widen` tries further ones where the highest or
the lowest won, `final` trains on all of train with several seeds, `squash` compares ways of keeping the inputs of KAN-LoRA on its grid.
`time` measures steps and memory and `peft` steps beside PEFT's own adapters: these two want the machine for themselves. Each run has a
process of its own, and what has a record is not run again. Then table.md and accuracy.png are made from the records, by --stages=
without running anything.
"""

import json
import math
import random
import statistics
import subprocess
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
from run.device import keep_memory, peak_memory
from run.files import write_atomically
from study.runner import Study, mean_and_std, paired_p
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora, fit_linear, lora_param_groups, save_lora
from tasks.prompts import Example, collate, find_task, make_batches

# -----------------------------------------------------------------------------
seeds = '1,2,3'  # of the final runs
stages = 'search,widen,final,squash'
run = ''  # what a process runs, as JSON
# -----------------------------------------------------------------------------
STUDY = Study('minilm')
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
SQUASHED = {  # KAN-LoRA with other ways of keeping inputs on the grid, at its learning rate
    'KAN-LoRA, none': (dict(kind='kan', squash='none'), ()),
    'KAN-LoRA, clamp': (dict(kind='kan', squash='clamp'), ()),
    'KAN-LoRA, norm': (dict(kind='kan', squash='norm'), ()),
    'KAN-LoRA, norm, grid to 3': (dict(kind='kan', squash='norm', grid_range=(-3.0, 3.0)), ()),
}


# the model and its methods


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
        groups = [
            {'params': [p for p in model.parameters() if p.requires_grad], 'lr': lr, 'weight_decay': WEIGHT_DECAY}
        ]
    if method == 'head only':
        return groups
    head = {
        p: {'params': [p], 'lr': HEAD_RATE, 'weight_decay': WEIGHT_DECAY * (p.dim() - 1)}
        for p in model.head.parameters()
        if p.requires_grad
    }
    for group in groups:
        group['params'] = [p for p in group['params'] if p not in head]
    return [group for group in groups if group['params']] + list(head.values())


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


# data


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


# a run


def train(stage, method, lr, seed):
    """One run, in a process of its own; returns what it measures."""
    if stage == 'peft':
        return time_beside_peft(method)
    keep_memory()
    rows, dev = load_split('train'), load_split('dev')
    if stage in (
        'search',
        'squash',
    ):  # a third of train to learn from, an eighth to choose by; dev is only reported, at the end
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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, len(batches)))
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
    found = dict(steps=len(batches), trainable=sum(p.numel() for p in parameters))
    if stage == 'time':
        memory = peak_memory('cpu') - loaded
        return found | dict(seconds=statistics.median(seconds[3:]), peak_bytes=memory, bytes=count_bytes(model, method))
    found['accuracy'] = count_right(model, dev)
    if (stage, method) == ('final', 'KAN-LoRA'):  # what its nearest linear map would do
        errors = fit_linear(model, [batch[:2] for batch in batches[:60]])
        found.update(linear_error=statistics.mean(errors.values()), linear_accuracy=count_right(model, dev))
    return found


def rate_at(step, steps):
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / max(1, WARMUP * steps), (steps - step) / steps)


@torch.no_grad()
def count_right(model, rows):
    """The share of rows whose label the model gives."""
    model.eval()
    with torch.autocast('cpu', torch.bfloat16):
        batches = load_batches(rows)
        return sum((model(*inputs).argmax(-1) == labels).sum().item() for *inputs, labels in batches) / len(rows)


# beside PEFT


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


# all runs


def name_run(stage, method, lr, seed):
    return f'{stage}, {method}, lr={lr:g}, seed={seed}'


def read_records():
    return list(STUDY.read().values())


def searched(method):
    """{learning rate: accuracy on what was held out}, in order."""
    found = [record for record in read_records() if record['stage'] == 'search' and record['method'] == method]
    rates = {record['lr']: record['accuracy'] for record in sorted(found, key=lambda record: record['lr'])}
    if missing := set(METHODS[method][1]) - rates.keys():
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
    if stage == 'peft':
        return [(stage, method, 0, seed) for seed in many for method in ('LoRA', 'rsLoRA', 'DoRA')]
    raise ValueError(f'stages: expected any of search, widen, final, squash, time, peft, got {stage!r}')


def make(name, one, folder):
    """One run in a process of its own: its record."""
    command = [sys.executable, __file__, f'--run={json.dumps(one)}']
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f'{name} failed, see above')
    stage, method, lr, seed = one
    return dict(stage=stage, method=method, lr=lr, seed=seed, **json.loads(done.stdout.splitlines()[-1]))


def run_all(runs):
    STUDY.run_all({name_run(*one): one for one in runs}, make)


# the page


def mean_of(records, key):
    return statistics.mean(record[key] for record in records)


def percent(values):
    return mean_and_std([100 * value for value in values], 2)


def to_baseline(values, baseline):
    """Points above the baseline, and from three seeds on p of a paired t-test over them."""
    if values == baseline:
        return ''
    apart = f'{100 * (statistics.mean(values) - statistics.mean(baseline)):+.2f}'
    return f'{apart} (p = {paired_p(values, baseline):.2g})' if len(values) > 2 else apart


def select(records, stage, method):
    """The runs of a method in a stage, at the learning rate that its search has found, by seed."""
    rate = 0 if stage == 'peft' else best_rate('KAN-LoRA' if stage == 'squash' else method)
    found = [record for record in records if (record['stage'], record['method'], record['lr']) == (stage, method, rate)]
    return sorted(found, key=lambda record: record['seed'])


def accuracies(records, stage, method):
    return [record['accuracy'] for record in select(records, stage, method)]


def make_tables(records):
    baseline = accuracies(records, 'final', 'LoRA')
    lines = [
        '| method | trains | dev accuracy, % | to LoRA | learning rate | ms / step | peak memory | on disk |',
        '|---|--:|--:|--:|--:|--:|--:|--:|',
    ]
    for method in METHODS:
        values, final, timed = (
            accuracies(records, 'final', method),
            select(records, 'final', method),
            select(records, 'time', method),
        )
        seconds = statistics.median(record['seconds'] for record in timed)
        memory, size = max(record['peak_bytes'] for record in timed) / 1e6, timed[0]['bytes'] / 1e6
        cells = [f'{final[0]["trainable"]:,}', percent(values), to_baseline(values, baseline), f'{final[0]["lr"]:.3g}']
        lines.append(f'| {method} | {" | ".join(cells)} | {1e3 * seconds:.0f} | {memory:.0f} MB | {size:.2f} MB |')
    lines += ['', '| KAN-LoRA with inputs | held-out accuracy, % | to tanh |', '|---|--:|--:|']
    baseline = accuracies(records, 'squash', 'KAN-LoRA')
    for method in ('KAN-LoRA', *SQUASHED):
        values = accuracies(records, 'squash', method)
        lines.append(f'| {method.partition(", ")[2] or "tanh"} | {percent(values)} | {to_baseline(values, baseline)} |')
    lines += ['', '| forward + backward | ours, ms | PEFT | ratio |', '|---|--:|--:|--:|']
    for method in ('LoRA', 'rsLoRA', 'DoRA'):
        rounds = select(records, 'peft', method)
        ours, theirs = (
            1e3 * statistics.median(record[key] for record in rounds) for key in ('seconds', 'peft_seconds')
        )
        ratio = statistics.median(record['seconds'] / record['peft_seconds'] for record in rounds)
        lines.append(f'| {method} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |')
    fitted = select(records, 'final', 'KAN-LoRA')
    error, linear = mean_of(fitted, 'linear_error'), percent([record['linear_accuracy'] for record in fitted])
    lines += [
        '',
        f'KAN-LoRA after `fit_linear`: {linear} % on dev; its layers are {100 * error:.0f} % off, by root mean squares.',
    ]
    return '\n'.join(lines) + '\n'


def draw(records):
    """Accuracy over trained parameters: a point for each seed, a bar for the mean."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, panel = plt.subplots(figsize=(10, 6), layout='constrained')
    places = {}
    for method in METHODS:
        values = [100 * value for value in accuracies(records, 'final', method)]
        x = select(records, 'final', method)[0]['trainable']
        mean = statistics.mean(values)
        color = 'tab:orange' if 'KAN' in method or method == 'kanified' else 'tab:blue'
        panel.plot([x] * len(values), values, 'o', markersize=4, alpha=0.35, color=color)
        panel.plot([x], [mean], '_', markersize=22, markeredgewidth=2.5, color=color)
        places.setdefault(round(math.log10(x), 1), []).append((mean, x, method, color))
    for column in places.values():  # labels beside the bars, apart from each other
        last = -math.inf
        for mean, x, method, color in sorted(column):
            last = max(mean, last + 0.19)
            panel.annotate(
                method, (x, mean), (x * 1.28, last), textcoords='data', va='center', fontsize=10, color=color
            )
    panel.set_xscale('log')
    panel.set_xlim(1200, 1.2e8)
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    panel.set_xlabel('parameters that train')
    panel.set_ylabel('accuracy on dev, %; a point per seed, a bar for their mean')
    panel.grid(alpha=0.3)
    figure.savefig(STUDY.folder / 'accuracy.png', dpi=110)


def main():
    if stages and not ((MODEL / 'model.safetensors').exists() and find_task('sst').path('train').exists()):
        raise ValueError(
            'the model or the data is not there: python data/minilm/prepare.py && python data/sst/prepare.py'
        )
    for stage in filter(None, stages.split(',')):
        runs = list_runs(stage)
        run_all(runs)
        while stage == 'widen' and runs:
            runs = list_runs(stage)
            run_all(runs)
    records = read_records()
    table = make_tables(records)
    with write_atomically(STUDY.folder / 'table.md', 'w', 'utf-8') as f:
        f.write(table)
    draw(records)
    print(table, end='')


if __name__ == '__main__':
    configure(globals())
    if run:
        print(json.dumps(train(*json.loads(run)), allow_nan=False))
    else:
        main()
