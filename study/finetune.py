"""
Eight ways to fine-tune a small GPT on the four tasks of arXiv 2504.10490, with its follow-up checks.

$ python train.py config/train_taskmix.py
$ OMP_NUM_THREADS=1 python study/finetune.py                  # in two shells, to share the runs
$ OMP_NUM_THREADS=1 python study/finetune.py --stages=time,graph    # in one, when all else is done

`search` looks for the learning rate of each variant by the part of SST's train that is held out, `final` trains each on each task,
`rank` LoRA on SST at ranks and alphas, `single` with one KAN layer, `rates` each on CFIMDB at the other learning rates. `time` measures
steps and memory, `graph` what finding edges takes: these two want the machine for themselves. Each run is a run of finetune.py (of
bench.py for `graph`), its record a file in runs/; what has a record is not run again. Then table.md and curves.png are made from the
records, by --stages= without running anything.
"""

import functools
import json
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from configurator import ROOT, configure
from kan import KANLinear
from layers.spline import name_of, spline_linear_backward
from run.files import write_atomically
from run.records import read_log
from surgery.lora import LoRAConfig

# -----------------------------------------------------------------------------
init_from = 'out-taskmix'  # the model that all runs begin with
seeds = '1,2,3'
stages = 'search,final,rank,single,rates'
# -----------------------------------------------------------------------------
configure(globals())

HERE = Path(ROOT, 'results/finetune')
DROPOUT = dict(dropout=0.0, lora_dropout=0.0)  # none: on a CPU it takes a quarter of the time of a step, and more
TASKS = {  # settings of each task
    'sst': dict(DROPOUT, train_limit=5000, epochs=3, batch_size=32),
    'cfimdb': dict(DROPOUT, train_limit=700, epochs=3, batch_size=16),
    'quora': dict(DROPOUT, train_limit=2500, epochs=3, batch_size=32),
    'sonnets': dict(DROPOUT, epochs=4, batch_size=8),
}
SCORES = {'sst': 'accuracy', 'cfimdb': 'accuracy', 'quora': 'accuracy', 'sonnets': 'chrf_continuation'}
KAN = dict(use_kan=True, grid_size=3, spline_order=1)
LORA = dict(lora_rank=16, lora_alpha=32, lora_targets='mlp')
PLAIN = dict(use_lora=False)
VARIANTS = {  # settings of finetune.py, and learning rates to try
    'full': (dict(PLAIN, finetune_mode='full'), (3e-4, 1e-3, 3e-3)),
    'head': (dict(PLAIN, finetune_mode='head'), (3e-3, 1e-2, 3e-2)),
    'LoRA': (LORA, (1e-3, 3e-3, 1e-2)),
    'LoRA, as many parameters': (dict(LORA, lora_rank=96, lora_alpha=192), (1e-3, 3e-3, 1e-2)),
    'KAN-LoRA': (dict(LORA, lora_kind='kan'), (1e-3, 3e-3, 1e-2)),
    'KAN-base LoRA': (dict(LORA, **KAN, lora_kind='kan_base'), (1e-3, 3e-3, 1e-2)),
    'Graph-LoRA': (dict(LORA, use_graph=True), (1e-3, 3e-3, 1e-2)),
    'KAN': (dict(PLAIN, **KAN, finetune_mode='full'), (3e-4, 1e-3, 3e-3)),
}
PAPER = {  # what it reports, of GPT-2 Large
    'LoRA': 'SST 55.2, CFIMDB 99.2, Quora 89.9 (test), sonnets 42.1 (with the prompt)',
    'KAN-base LoRA': 'on no task above LoRA',
    'Graph-LoRA': 'on no task above LoRA; over 18 hours',
}
RANKS, ALPHAS, BLOCKS = (4, 16, 32), (16, 32, 64), (0, 3)


# a run


def list_runs(stage):
    """[(stage, name, task, settings)]"""
    many = [int(seed) for seed in seeds.split(',')]
    sst = TASKS['sst']
    if stage == 'search':
        short = dict(sst, train_limit=2500, valid_fraction=0.3, seed=0)
        rates = [(name, settings, lr) for name, (settings, rates) in VARIANTS.items() for lr in rates]
        return [
            (stage, f'{name}, lr={lr:g}', 'sst', {**short, **settings, 'learning_rate': lr})
            for name, settings, lr in rates
        ]
    if stage == 'final':
        return [
            (
                stage,
                f'{name}, {task}, seed={seed}',
                task,
                {**TASKS[task], **settings, 'learning_rate': best_rate(name), 'seed': seed},
            )
            for seed in many
            for task in TASKS
            for name, (settings, _) in VARIANTS.items()
        ]
    if stage == 'rank':
        grid = [(rank, alpha, seed) for seed in many for rank in RANKS for alpha in ALPHAS]
        rate = best_rate('LoRA')
        return [
            (
                stage,
                f'rank={rank}, alpha={alpha}, seed={seed}',
                'sst',
                {**sst, **LORA, 'lora_rank': rank, 'lora_alpha': alpha, 'learning_rate': rate, 'seed': seed},
            )
            for rank, alpha, seed in grid
        ]
    if stage == 'single':
        settings, rate = VARIANTS['KAN'][0], best_rate('KAN')
        return [
            (
                stage,
                f'block={block}, seed={seed}',
                'sst',
                {**sst, **settings, 'kan_single_layer': block, 'learning_rate': rate, 'seed': seed},
            )
            for seed in many
            for block in BLOCKS
        ]
    if stage == 'rates':
        return [
            (
                stage,
                f'{name}, lr={lr:g}, seed={seed}',
                'cfimdb',
                {**TASKS['cfimdb'], **VARIANTS[name][0], 'learning_rate': lr, 'seed': seed},
            )
            for seed in many
            for name, (_, rates) in VARIANTS.items()
            for lr in rates
            if lr != best_rate(name)  # that is in final
        ]
    if stage == 'time':
        short = dict(sst, train_limit=640, epochs=2, seed=1)  # the second epoch is timed
        return [
            (stage, name, 'sst', {**short, **settings, 'learning_rate': best_rate(name)})
            for name, (settings, _) in VARIANTS.items()
        ]
    raise ValueError(f'stages: expected any of search, final, rank, single, rates, time, graph, got {stage!r}')


def path_of(stage, name):
    return HERE / 'runs' / f'{stage}, {name}.json'.replace(', ', ',').replace(' ', '_')


def run_all(runs):
    """Run what has no record; what another shell is at is waited for in the end."""
    for blocking in (False, True):
        for stage, name, task, settings in tqdm(runs, desc=runs[0][0], unit='run', disable=None):
            try:
                with FileLock(path_of(stage, name).with_suffix('.lock'), blocking=blocking):
                    if not path_of(stage, name).exists():
                        run_one(stage, name, task, settings)
                    check_record(stage, name, task, settings)
            except Timeout:
                continue


def run_one(stage, name, task, settings):
    """A run of finetune.py, its record kept and its checkpoints thrown away."""
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(task=task, init_from=init_from, out_dir=folder, predict_test=False, **settings)
        process = multiprocessing.get_context('fork').Process(target=finetune, args=(flags,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f'error: {stage} {name} failed, see above')
        metrics, about = (
            json.loads(Path(folder, file).read_text(encoding='utf-8')) for file in ('metrics.json', 'run.json')
        )
        log = read_log(folder)
    base = dict(name=Path(init_from).name, model_args=about['model_args'])
    record = dict(
        stage=stage,
        name=name,
        settings=settings,
        **metrics,
        log=log,
        device=about['device'],
        versions=about['versions'],
        commit=about['commit'],
        base=base,
    )
    write_record(stage, name, record)


def write_record(stage, name, record):
    with write_atomically(path_of(stage, name), 'w', 'utf-8') as f:
        json.dump(record, f, indent=1)
        f.write('\n')


def finetune(flags):
    """Become finetune.py: in a fork of this process, in which torch is there and the splines are compiled."""
    sys.argv[:] = ['finetune.py', *(f'--{key}={value}' for key, value in flags.items())]
    sys.stdout = open(os.devnull, 'w')
    try:
        runpy.run_path(str(Path(ROOT, 'finetune.py')), run_name='__main__')
    except (
        Exception
    ):  # any at all: a fork does not end as Python does, with the one line of the script's excepthook and status 1
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def measure_edges():
    """What finding edges takes of a training step: the last line of bench.py --suite=graph is the record."""
    if not path_of('graph', 'edges').exists():
        flags = ['--suite=graph', '--dtypes=float32', '--only=nano|micro', '--rounds=1']
        done = subprocess.run(
            [sys.executable, Path(ROOT, 'bench.py'), *flags], stdout=subprocess.PIPE, text=True, check=True
        )
        write_record('graph', 'edges', json.loads(done.stdout.split('\n')[-2]))


@functools.cache  # once, by the first run there is
def warm_up():
    """Compile the passes of the KAN layers that the runs have, once for all of them; without autograd, whose threads do not outlive a fork."""
    for grid_size in (KAN['grid_size'], LoRAConfig.grid_size):
        for activation in (torch.nn.SiLU(), torch.nn.Identity(), torch.nn.GELU()):
            for trains in (False, True):  # compiled code is for inputs of one kind
                layer = KANLinear(64, 8, grid_size, spline_order=1).requires_grad_(False)
                x, grad = torch.randn(512, 64, requires_grad=trains), torch.randn(512, 8)
                with torch.no_grad():
                    spline_linear_backward(
                        grad, x, layer.packed_weight(), layer.grid, 1, name_of(activation), x.dtype, [True, True]
                    )


# reading the records


def read_record(stage, name):
    path = path_of(stage, name)
    if not path.exists():
        raise FileNotFoundError(f'{path.name} is missing: the stage {stage} is not finished')
    return json.loads(path.read_text(encoding='utf-8'))


def check_record(stage, name, task, settings):
    """ValueError for a record that was made with other settings than the study has, or that began with another model."""
    record, base = read_record(stage, name), Path(init_from).name
    if record['settings'] != settings:
        raise ValueError(
            f'{path_of(stage, name).name} was made with {record["settings"]}, the study has {settings}: move it away'
        )
    if record['base']['name'] != base:
        raise ValueError(
            f'{path_of(stage, name).name} began with {record["base"]["name"]}, the study begins with {base}: move it away'
        )


def best_rate(variant):
    """The learning rate with the lowest loss on what was held out of SST."""
    rates = VARIANTS[variant][1]
    return min(rates, key=lambda lr: read_record('search', f'{variant}, lr={lr:g}')['valid']['loss'])


def read_seeds(stage, name):
    return [read_record(stage, f'{name}, seed={seed}') for seed in seeds.split(',')]


def read_cfimdb(variant, lr):
    """The runs on CFIMDB at a learning rate; where that is SST's they are in `final`."""
    return (
        read_seeds('final', f'{variant}, cfimdb')
        if lr == best_rate(variant)
        else read_seeds('rates', f'{variant}, lr={lr:g}')
    )


def read_finals(variant, task):
    """The runs of a variant on a task, of CFIMDB at the learning rate with the lowest loss on what was held out of it."""
    if task == 'cfimdb':
        return min(
            (read_cfimdb(variant, lr) for lr in VARIANTS[variant][1]),
            key=lambda found: sum(record['valid']['loss'] for record in found),
        )
    return read_seeds('final', f'{variant}, {task}')


def values_of(records, task):
    """The score of a task for each record: percent, of sonnets CHRF of what follows the prompt."""
    return [(1 if task == 'sonnets' else 100) * record['dev'][SCORES[task]] for record in records]


def rate_of(variant, task):
    return read_finals(variant, task)[0]['settings']['learning_rate']


# the page


def describe(values):
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


def p_value(values, baseline):
    """Of a paired t-test over the seeds."""
    from scipy.stats import ttest_rel

    return '' if values == baseline else f' (p = {ttest_rel(values, baseline).pvalue:.2g})'


def second_epoch(record):
    """Seconds of a step, without the first epoch, in which some things happen once."""
    first, second = record['log'][:2]
    return (second['seconds'] - first['seconds']) / (second['iter'] - first['iter'])


def make_main_table():
    lines = [
        '| variant | trains | SST | CFIMDB | Quora | sonnets | with the prompt | learning rate | ms / step | peak memory | in the paper |',
        '|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|',
    ]
    for variant in VARIANTS:
        cells, timed = [], read_record('time', variant)
        for task in TASKS:
            values = values_of(read_finals(variant, task), task)
            cells.append(describe(values) + p_value(values, values_of(read_finals('LoRA', task), task)))
        cells.append(describe([record['dev']['chrf'] for record in read_finals(variant, 'sonnets')]))
        cells += [
            f'{best_rate(variant):g}, CFIMDB {rate_of(variant, "cfimdb"):g}',
            f'{1e3 * second_epoch(timed):.0f}',
            f'{timed["peak_memory"] / 1e6:.0f} MB',
            PAPER.get(variant, ''),
        ]
        lines.append(f'| {variant} | {read_finals(variant, "sst")[0]["trained"]:,} | {" | ".join(cells)} |')
    return lines


def make_rank_table():
    lines = [
        '| LoRA on SST | ' + ' | '.join(f'alpha {alpha}' for alpha in ALPHAS) + ' |',
        '|---|' + '--:|' * len(ALPHAS),
    ]
    for rank in RANKS:
        cells = []
        for alpha in ALPHAS:
            cells.append(describe(values_of(read_seeds('rank', f'rank={rank}, alpha={alpha}'), 'sst')))
        lines.append(f'| rank {rank} | {" | ".join(cells)} |')
    return lines


def make_single_table():
    lines = ['| KAN layers, SST | |', '|---|--:|']
    rows = {'in no block (full)': read_finals('full', 'sst'), 'in all blocks (KAN)': read_finals('KAN', 'sst')}
    for block in BLOCKS:
        rows[f'in block {block} alone'] = read_seeds('single', f'block={block}')
    baseline = values_of(rows['in no block (full)'], 'sst')
    for name, found in rows.items():
        values = values_of(found, 'sst')
        lines.append(f'| {name} | {describe(values)}{p_value(values, baseline)} |')
    return lines


def make_rates_table():
    lines = ['| CFIMDB at learning rate | lowest | middle | highest |', '|---|--:|--:|--:|']
    for variant, (_, rates) in VARIANTS.items():
        best, cells = rate_of(variant, 'cfimdb'), []
        for lr in rates:
            cell = f'{lr:g}: {describe(values_of(read_cfimdb(variant, lr), "cfimdb"))}'
            cells.append(f'**{cell}**' if lr == best else cell)
        lines.append(f'| {variant} | {" | ".join(cells)} |')
    return lines


def make_edges_table():
    rows = read_record('graph', 'edges')['rows']
    found = {(row['name'].removesuffix(' edges'), row['where']): row['seconds'] for row in rows}
    sizes = sorted({size for _, size in found})
    lines = ['| finding edges | ' + ' | '.join(sizes) + ' |', '|---|' + '--:|' * len(sizes)]
    for edges in dict.fromkeys(edges for edges, _ in found):
        cells = []
        for size in sizes:
            seconds = {part: statistics.median(times) for part, times in found[edges, size].items()}
            cells.append(f'{seconds["edges"] / seconds["total"]:.2%} of {1e3 * seconds["total"]:.0f} ms')
        lines.append(f'| {edges} | {" | ".join(cells)} |')
    return lines


def make_page():
    tables = make_main_table, make_rank_table, make_single_table, make_rates_table, make_edges_table
    table = '\n\n'.join('\n'.join(make()) for make in tables) + '\n'
    with write_atomically(HERE / 'table.md', 'w', 'utf-8') as f:
        f.write(table)
    draw_curves()
    print(table, end='')


def draw_curves():
    """Loss per epoch, on what is learned from and on what is held out, of KAN-LoRA in both forms beside LoRA: a line per seed."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(15, 4), layout='constrained')
    colors = {'LoRA': 'tab:blue', 'KAN-LoRA': 'tab:orange', 'KAN-base LoRA': 'tab:green'}
    for task, panel in zip(TASKS, panels):
        for variant, color in colors.items():
            for i, record in enumerate(read_finals(variant, task)):
                epochs = [line['epoch'] for line in record['log']]
                for key, style, name in ('train_loss', '--', 'train'), ('loss', '-', 'held out'):
                    label = f'{variant}, {name}' if i == 0 else None
                    panel.plot(
                        epochs, [line[key] for line in record['log']], style, color=color, alpha=0.7, label=label
                    )
        panel.set_title(f'{task}, rates {", ".join(f"{rate_of(variant, task):g}" for variant in colors)}')
        panel.set_xlabel('epoch')
        panel.set_xticks(epochs)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('loss, nats per example (sonnets: per token)')
    panels[-1].legend(fontsize=8)
    figure.savefig(HERE / 'curves.png', dpi=110)


if __name__ == '__main__':
    if seeds.count(',') < 1:
        raise ValueError(f'seeds={seeds!r}: a spread wants at least two, joined by commas')
    if stages:
        (HERE / 'runs').mkdir(exist_ok=True)
    for stage in filter(None, stages.split(',')):
        measure_edges() if stage == 'graph' else run_all(list_runs(stage))
    try:
        make_page()
    except FileNotFoundError as error:
        if not stages:
            raise
        print(f'no page yet: {error}')
