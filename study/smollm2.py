"""What learned gates add to a pretrained Llama: the SiLUs of SmolLM2 become functions on channels, which alone learn to
write Shakespeare, beside LoRA of as many parameters. Records and page go to results/smollm2.

    OMP_NUM_THREADS=1 python study/smollm2.py  # trains what has no record; make smollm2 does the same
    python study/smollm2.py --stages=          # the page from the records alone

`search` tries learning rates and chooses on the ninth tenth of the text; `final` trains with other seeds at the best
one and is measured on the last tenth.
"""

import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure
from data.loader import dataset_folder, prepare_dataset
from data.smollm2.prepare import FILES
from data.tinyshakespeare import read_plays
from run.device import device_name
from run.records import commit
from run.tables import markdown_table
from study.runner import Study, check_machine, choose, mean_and_std
from surgery.causal_lm import load_hf, load_hf_tokenizer
from surgery.kanify import kanify
from surgery.lora import LoRAConfig, add_lora

STUDY = Study('smollm2')
STEPS, BATCH, LENGTH = 60, 2, 128  # windows of LENGTH tokens
WINDOWS = 32  # of each of the two parts that measure
TITLES = {'functions': 'functions in place of the SiLUs', 'LoRA': 'LoRA of rank 8 on queries and values'}
RATES = {  # of AdamW, rising over a tenth of the steps and then falling to zero in a line
    'functions': (1e-3, 4e-3, 1.6e-2, 6.4e-2),
    'LoRA': (4e-4, 1.6e-3, 6.4e-3, 2.56e-2),
}
SEEDS = {'search': (1,), 'final': (11, 12, 13)}

# -----------------------------------------------------------------------------
stages = 'search,final'
# -----------------------------------------------------------------------------


def load():
    (name,) = FILES
    prepare_dataset('smollm2', [name])
    source = os.path.join(dataset_folder('smollm2'), name)
    return load_hf_tokenizer(source), load_hf(source)


def adapt(model, kind, example):
    """Freeze the model and give it what is to learn, 460,800 numbers either way."""
    if kind == 'functions':
        grid = dict(grid_size=8, spline_order=2, grid_range=(-4, 4))
        kanify(model, kind='channel', example=example, train='splines', **grid)
    else:
        add_lora(model, LoRAConfig(rank=8, alpha=16, dropout=0.0, target_modules=('q_proj', 'v_proj')))
    return [p for p in model.parameters() if p.requires_grad]


def windows(tokens, starts):
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts])


def even_windows(tokens):
    return windows(tokens, np.linspace(0, len(tokens) - LENGTH - 1, WINDOWS).astype(int))


def loss_of(model, batch):
    """Mean cross entropy of the tokens that follow: batch (B, LENGTH + 1)."""
    logits = model(batch[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def measure(model, batches):
    return np.mean([loss_of(model, batch).item() for batch in batches.split(8)])


def make(name, job, folder):
    """Train one and measure it before and after."""
    kind, rate, seed = job['kind'], job['rate'], job['seed']
    tokenizer, model = load()
    tokens = torch.tensor(tokenizer(read_plays()[0]).input_ids)
    train, choosing, held_out = tokens.tensor_split([len(tokens) * 8 // 10, len(tokens) * 9 // 10])
    parts = dict(choosing=even_windows(choosing))
    if job['stage'] == 'final':
        parts.update(held_out=even_windows(held_out))
    untouched = {part: measure(model, batches) for part, batches in parts.items()}
    torch.manual_seed(seed)
    learning = adapt(model, kind, parts['choosing'][:1, :8])
    before = {part: measure(model, batches) for part, batches in parts.items()}
    if any(abs(before[part] - untouched[part]) > 1e-4 for part in parts):
        raise ValueError(f'{kind} changed the model before it learned: {untouched} -> {before}')
    optimizer, draw = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0), np.random.default_rng(seed)
    losses, started = [], time.perf_counter()
    for step in tqdm(range(STEPS), unit='step', leave=False, disable=None):
        optimizer.param_groups[0]['lr'] = rate * min((step + 1) / (STEPS / 10), 1 - step / STEPS)
        loss = loss_of(model, windows(train, draw.integers(len(train) - LENGTH - 1, size=BATCH)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    about = dict(commit=commit(), hardware=device_name('cpu'), threads=torch.get_num_threads())
    about.update(parameters=sum(p.numel() for p in learning), seconds=seconds, losses=losses)
    after = {part: measure(model, batches) for part, batches in parts.items()}
    if not all(map(math.isfinite, [*losses, *after.values()])):
        raise ValueError(f'{kind} diverged at learning rate {rate}: leave that rate out')
    return {**job, **about, 'before': before, 'after': after}


def jobs_of(stage, kind, rates):
    jobs = [dict(stage=stage, kind=kind, rate=rate, seed=seed) for rate in rates for seed in SEEDS[stage]]
    return {'{stage}, {kind}, learning_rate={rate}, seed={seed}'.format(**job): job for job in jobs}


def runs_of(stage, kind):
    return [run for run in STUDY.read().values() if (run['stage'], run['kind']) == (stage, kind)]


def best_rate(kind):
    runs = [run for name, run in STUDY.read().items() if name in jobs_of('search', kind, RATES[kind])]
    return min(runs, key=lambda run: run['after']['choosing'])['rate']


def run(stages):
    for kind, rates in RATES.items():
        if 'search' in stages:
            STUDY.run_all(jobs_of('search', kind, rates), make)
    for kind, rates in RATES.items():
        if 'final' in stages:
            if not jobs_of('search', kind, rates).keys() <= STUDY.read().keys():
                raise ValueError(f'stage final wants all rates of {kind} first: --stages=search')
            STUDY.run_all(jobs_of('final', kind, [best_rate(kind)]), make)


def make_table():
    heads = 'what learns, parameters, learning rate, loss before, loss after, ninth tenth after, seconds'.split(', ')
    rows, searched = [], []
    check_machine({run['name']: run for kind in RATES for run in runs_of('final', kind)})
    for kind in RATES:
        runs = [run for run in runs_of('final', kind) if run['rate'] == best_rate(kind)]
        if runs:
            one = runs[0]
            cells = [TITLES[kind], f'{one["parameters"]:,}', f'{one["rate"]:g}', f'{one["before"]["held_out"]:.4f}']
            cells += [mean_and_std([run['after'][part] for run in runs], 4) for part in ('held_out', 'choosing')]
            rows.append([*cells, f'{np.mean([run["seconds"] for run in runs]):.0f}'])
    for kind in RATES:
        for run in sorted(runs_of('search', kind), key=lambda run: run['rate']):
            searched.append([TITLES[kind], f'{run["rate"]:g}', f'{run["after"]["choosing"]:.4f}'])
    lines = markdown_table(heads, rows)
    lines += ['', *markdown_table(['what learns', 'learning rate', 'loss after, ninth tenth'], searched)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    configure(globals())
    run(choose('stages', stages, SEEDS))
    if STUDY.read():
        STUDY.fill(make_table())
