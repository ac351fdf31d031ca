"""
A pretrained MiniLM learns the sentiment of film reviews (SST, five classes): full fine-tuning, its head alone, low-rank adapters, their
KAN forms, and splines grown into its own layers, side by side.

$ python data/minilm/prepare.py && python data/sst/prepare.py
$ OMP_NUM_THREADS=1 python study/minilm.py                      # in two shells, to share the runs
$ OMP_NUM_THREADS=1 python study/minilm.py --stages=time,peft   # in one, when all else is done

`search` looks for the learning rate of each method by a part of train that is held out, `widen` tries further ones where the highest or
the lowest won, `final` trains on all of train with several seeds, `squash` compares ways of keeping the inputs of KAN-LoRA on its grid, `time`
measures steps and memory, `peft` compares with PEFT's own adapters; the last two want the machine for themselves. Each run has a process and a record of its own in runs/, and what has a record is not run again.
Then table.md and accuracy.png are made from the records, by --stages= without running anything.
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
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch.nn import functional as F
from tqdm import tqdm

from configurator import ROOT, configure
from kan import KANLinear
from run.device import keep_memory, peak_memory
from run.files import write_atomically
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora, fit_linear, lora_layers, lora_param_groups, save_lora
from tasks.prompts import read_rows

# -----------------------------------------------------------------------------
seeds = '1,2,3'  # of the final runs
stages = 'search,widen,final,squash'
run = ''  # what a process runs, as JSON
# -----------------------------------------------------------------------------
configure(globals())

HERE = Path(ROOT, 'results/minilm')
MODEL, DATA = Path(ROOT, 'data/minilm'), Path(ROOT, 'data/sst')
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

    def forward(self, input_ids, attention_mask):
        x = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, C)
        mask = attention_mask.unsqueeze(-1)
        return self.head((x * mask).sum(1) / mask.sum(1))  # (B, 5)


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
        model(**batch)
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


def load_split(name, tokenizer):
    rows = read_rows('sst', DATA / f'{name}.csv')
    return list(zip(tokenizer([sentence for _, sentence, _ in rows])['input_ids'], [label for _, _, label in rows]))


def make_batches(rows, shuffle):
    """Batches of sentences of about the same length: [(inputs, labels)]. `shuffle` is a random.Random, or None."""
    rows = list(rows)
    if shuffle:
        shuffle.shuffle(rows)
    pool = 20 * BATCH if shuffle else len(rows)
    rows = [row for i in range(0, len(rows), pool) for row in sorted(rows[i : i + pool], key=lambda row: len(row[0]))]
    batches = [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    if shuffle:
        shuffle.shuffle(batches)
    return batches


def collate(rows):
    ids = [torch.tensor(row) for row, _ in rows]
    pad = nn.utils.rnn.pad_sequence
    inputs = {
        'input_ids': pad(ids, batch_first=True),
        'attention_mask': pad([torch.ones_like(row) for row in ids], batch_first=True),
    }
    return inputs, torch.tensor([label for _, label in rows])


# a run


def train(stage, method, lr, seed):
    """One run, in a process of its own; returns its record."""
    from transformers import AutoTokenizer

    if stage == 'peft':
        return dict(stage=stage, method=method, lr=lr, seed=seed, **compare_with_peft(method))
    keep_memory()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows, dev = load_split('train', tokenizer), load_split('dev', tokenizer)
    if stage in (
        'search',
        'squash',
    ):  # a third of train to learn from, an eighth to choose by; dev is only reported, at the end
        random.Random(0).shuffle(rows)
        rows, dev = rows[: len(rows) // 3], rows[-len(rows) // 8 :]
    torch.manual_seed(seed)
    model = load_model()
    loaded = peak_memory('cpu')
    batches = make_batches(rows, random.Random(seed))
    if stage == 'time':
        batches, dev = [batch for batch in batches if 24 <= batch[0]['input_ids'].size(1) <= 28][:13], []
    groups = apply_method(model, method, lr, batches[0][0])
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step, len(batches)))
    parameters = [p for group in groups for p in group['params']]
    seconds = []
    model.train()
    for inputs, labels in tqdm(batches, desc=f'{stage} {method} {lr:g}', disable=None):
        start = time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(**inputs)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        seconds.append(time.perf_counter() - start)
    record = dict(
        stage=stage, method=method, lr=lr, seed=seed, steps=len(batches), trainable=sum(p.numel() for p in parameters)
    )
    if stage == 'time':
        return record | dict(
            seconds=statistics.median(seconds[3:]),
            peak_bytes=peak_memory('cpu') - loaded,
            bytes=count_bytes(model, method),
        )
    record['accuracy'] = score(model, dev)
    if (stage, method) == ('final', 'KAN-LoRA'):  # what its nearest linear map would do
        record['linear_error'] = statistics.mean(fit_linear(model, [inputs for inputs, _ in batches[:60]]).values())
        record['linear_accuracy'] = score(model, dev)
    return record


def scale(step, steps):
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / max(1, WARMUP * steps), (steps - step) / steps)


@torch.no_grad()
def score(model, rows):
    """The share of rows whose label the model gives."""
    model.eval()
    with torch.autocast('cpu', torch.bfloat16):
        return sum(
            (model(**inputs).argmax(-1) == labels).sum().item() for inputs, labels in make_batches(rows, None)
        ) / len(rows)


# against PEFT


def compare_with_peft(method):
    """Ours and PEFT's adapter with the same weights: largest differences relative to the largest value, and seconds per step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    keep_memory()
    rows = load_split('train', AutoTokenizer.from_pretrained(MODEL))
    inputs, labels = [
        batch for batch in make_batches(rows, random.Random(0)) if 24 <= batch[0]['input_ids'].size(1) <= 28
    ][0]
    settings, _ = METHODS[method]
    torch.manual_seed(0)
    ours, theirs = load_model(), load_model()
    theirs.load_state_dict(ours.state_dict())
    options = dict(use_dora=settings.get('use_dora', False), use_rslora=settings.get('rs_lora', False))
    add_lora(ours, LoRAConfig(**settings))
    theirs.head.requires_grad_(False)
    get_peft_model(
        theirs.encoder, LoraConfig(target_modules=['query', 'value'], r=16, lora_alpha=32, lora_dropout=0.05, **options)
    )
    pairs = []
    for path, layer in lora_layers(ours).items():
        adapter, other = layer.adapter, theirs.get_submodule(path)
        pairs += [
            (adapter.lora_A['weight'], other.lora_A['default'].weight),
            (adapter.lora_B['weight'], other.lora_B['default'].weight),
        ]
        if adapter.magnitude is not None:
            pairs.append((adapter.magnitude, other.lora_magnitude_vector['default'].weight))
    for p, other in pairs:
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
        other.data.copy_(p.data)
    ours.eval(), theirs.eval()
    outputs = [model(**inputs) for model in (ours, theirs)]
    for y in outputs:
        F.cross_entropy(y, labels).backward()
    gradients = max(difference(p.grad, other.grad) for p, other in pairs)
    seconds = time_steps([ours.train(), theirs.train()], inputs, labels)
    return dict(outputs=difference(*outputs), gradients=gradients, seconds=seconds[0], peft_seconds=seconds[1])


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def time_steps(models, inputs, labels, repeats=15):
    """Median seconds of forward and backward of each model, measured in turns."""
    seconds = [[] for _ in models]
    for _ in range(repeats):
        for model, mine in zip(models, seconds):
            start = time.perf_counter()
            F.cross_entropy(model(**inputs), labels).backward()
            mine.append(time.perf_counter() - start)
            model.zero_grad()
    return [statistics.median(mine[2:]) for mine in seconds]


# all runs


def path_of(stage, method, lr, seed):
    return HERE / 'runs' / f'{stage},{method.replace(" ", "_")},lr={lr:g},seed={seed}.json'


def read_records():
    return [json.loads(path.read_text(encoding='utf-8')) for path in sorted((HERE / 'runs').glob('*.json'))]


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


def run_all(runs):
    """Run what has no record, each in a process of its own; what another shell is at is waited for in the end."""
    (HERE / 'runs').mkdir(exist_ok=True)
    for blocking in (False, True):
        for one in tqdm(runs, unit='run', disable=None):
            try:
                with FileLock(path_of(*one).with_suffix('.lock'), blocking=blocking):
                    if not path_of(*one).exists():
                        run_one(one)
            except Timeout:
                continue


def run_one(one):
    done = subprocess.run([sys.executable, __file__, f'--run={json.dumps(one)}'], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'error: {path_of(*one).stem} failed')
    with write_atomically(path_of(*one), 'w', 'utf-8') as f:
        f.write(done.stdout.splitlines()[-1] + '\n')


# the page


def mean_of(records, key):
    return statistics.mean(record[key] for record in records)


def describe(values):
    return f'{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}'


def to_baseline(values, baseline):
    """Points above the baseline, and from three seeds on p of a paired t-test over them."""
    from scipy.stats import ttest_rel

    if values == baseline:
        return ''
    apart = f'{100 * (statistics.mean(values) - statistics.mean(baseline)):+.2f}'
    return f'{apart} (p = {ttest_rel(values, baseline).pvalue:.2g})' if len(values) > 2 else apart


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
        cells = [f'{final[0]["trainable"]:,}', describe(values), to_baseline(values, baseline), f'{final[0]["lr"]:.3g}']
        lines.append(f'| {method} | {" | ".join(cells)} | {1e3 * seconds:.0f} | {memory:.0f} MB | {size:.2f} MB |')
    lines += ['', '| KAN-LoRA with inputs | held-out accuracy, % | to tanh |', '|---|--:|--:|']
    baseline = accuracies(records, 'squash', 'KAN-LoRA')
    for method in ('KAN-LoRA', *SQUASHED):
        values = accuracies(records, 'squash', method)
        lines.append(
            f'| {method.partition(", ")[2] or "tanh"} | {describe(values)} | {to_baseline(values, baseline)} |'
        )
    lines += [
        '',
        '| against PEFT | outputs differ by | gradients by | forward + backward, ms | PEFT | ratio |',
        '|---|--:|--:|--:|--:|--:|',
    ]
    for method in ('LoRA', 'rsLoRA', 'DoRA'):
        rounds = select(records, 'peft', method)
        apart = [max(record[key] for record in rounds) for key in ('outputs', 'gradients')]
        ours, theirs = (
            1e3 * statistics.median(record[key] for record in rounds) for key in ('seconds', 'peft_seconds')
        )
        ratio = statistics.median(record['seconds'] / record['peft_seconds'] for record in rounds)
        lines.append(f'| {method} | {apart[0]:.1e} | {apart[1]:.1e} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |')
    fitted = select(records, 'final', 'KAN-LoRA')
    error, linear = mean_of(fitted, 'linear_error'), describe([record['linear_accuracy'] for record in fitted])
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
    figure.savefig(HERE / 'accuracy.png', dpi=110)


if run:
    print(json.dumps(train(*json.loads(run))))
    sys.exit()
if stages and not ((MODEL / 'model.safetensors').exists() and (DATA / 'meta.json').exists()):
    raise ValueError('the model or the data is not there: python data/minilm/prepare.py && python data/sst/prepare.py')
for stage in filter(None, stages.split(',')):
    runs = list_runs(stage)
    run_all(runs)
    while stage == 'widen' and runs:
        run_all(runs := list_runs(stage))
records = read_records()
table = make_tables(records)
with write_atomically(HERE / 'table.md', 'w', 'utf-8') as f:
    f.write(table)
draw(records)
print(table, end='')
