"""Eight ways to fine-tune a small GPT on the four tasks of arXiv 2504.10490, with its follow-up checks.

    python train.py config/train_taskmix.py
    OMP_NUM_THREADS=1 python study/finetune.py                  # in two shells, to share the runs
    OMP_NUM_THREADS=1 python study/finetune.py --stages=time    # in one, when all else is done

`search` looks for the learning rate of each method by the part of SST's train that is held out, `final` trains each on
each task, `rank` LoRA on SST at ranks and alphas, `single` with one KAN layer, `rates` each on CFIMDB at the other
learning rates. `time` measures steps and memory: it wants the machine for itself. Each run is a run of finetune.py, and
what has a record is not run again. Then table.md and curves.png are made from the records, by --stages= without running
anything.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from configurator import configure, flags_of
from run.tables import markdown_table
from study.runner import Study, check_machine, choose, mean_and_std, paired_p, run_to_end

# -----------------------------------------------------------------------------
init_from = 'out-taskmix'  # the model that all runs begin with
seeds = '1,2,3'
stages = 'search,final,rank,single,rates'
# -----------------------------------------------------------------------------

STUDY = Study('finetune')
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
METHODS = {  # settings of finetune.py, and learning rates to try
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
    'LoRA': 'SST 55.2 (test), CFIMDB 99.2, Quora 89.9 (test), sonnets 42.1 (with the prompt)',
    'KAN-base LoRA': 'on no task above LoRA',
    'Graph-LoRA': 'on no task above LoRA; over 18 hours',
}
RATES = [(method, rate) for method, (_, rates) in METHODS.items() for rate in rates]
RANKS, ALPHAS, BLOCKS = (4, 16, 32), (16, 32, 64), (0, 3)


def tune(task, method, rate=None, **others):
    """Settings of finetune.py for a method on a task, at the best of its learning rates for SST or at another one."""
    rate = best_rate(method) if rate is None else rate
    return {**TASKS[task], 'task': task, **METHODS[method][0], 'learning_rate': rate, **others}


def list_runs(stage):
    """{name: settings of finetune.py}; of all stages but search and time for every seed"""
    if stage == 'search':
        short = dict(train_limit=2500, valid_fraction=0.3, seed=0)
        runs = {f'{method}, lr={rate:g}': tune('sst', method, rate, **short) for method, rate in RATES}
    elif stage == 'time':
        short = dict(train_limit=640, epochs=2, seed=1)  # the second epoch is timed
        runs = {method: tune('sst', method, **short) for method in METHODS}
    elif stage == 'final':
        runs = {f'{method}, {task}': tune(task, method) for task in TASKS for method in METHODS}
    elif stage == 'rank':
        grid = [dict(lora_rank=rank, lora_alpha=alpha) for rank in RANKS for alpha in ALPHAS]
        runs = {'rank={lora_rank}, alpha={lora_alpha}'.format(**size): tune('sst', 'LoRA', **size) for size in grid}
    elif stage == 'single':
        runs = {f'block={block}': tune('sst', 'KAN', kan_single_layer=block) for block in BLOCKS}
    else:
        others = [(method, rate) for method, rate in RATES if rate != best_rate(method)]  # the best is in final
        runs = {f'{method}, lr={rate:g}': tune('cfimdb', method, rate) for method, rate in others}
    if stage in ('search', 'time'):
        return {f'{stage}, {name}': settings for name, settings in runs.items()}
    pairs = [(name, seed) for seed in seeds.split(',') for name in runs]
    return {f'{stage}, {name}, seed={seed}': dict(runs[name], seed=int(seed)) for name, seed in pairs}


def make(name, settings, folder):
    """A run of finetune.py; its checkpoints are thrown away."""
    run = run_to_end('finetune.py', flags_of(dict(settings, init_from=init_from, predict_test=False)), folder)
    if 'failed' in run:
        raise ValueError(f'{name} diverged: {run["failed"]}')
    base = dict(name=Path(init_from).name, model_args=run['model_args'])
    about = {key: run[key] for key in ('log', 'device', 'versions', 'commit')}
    return dict(stage=name.split(', ')[0], settings=settings, base=base, **run['final'], **about)


def record_of(stage, name):
    records = STUDY.read()
    if f'{stage}, {name}' not in records:
        raise FileNotFoundError(f'{stage}, {name} is missing: the stage {stage} is not finished')
    return records[f'{stage}, {name}']


def check_records(runs):
    """ValueError for a record of these runs with other settings, and for any that began with another model."""
    records, base = STUDY.read(), Path(init_from).name
    for name in runs.keys() & records.keys():
        then = {'task': records[name]['task'], **records[name]['settings']}
        if then != runs[name]:
            raise ValueError(f'the record {name} was made with {then}, the study has {runs[name]}: move it away')
    for name, run in records.items():  # the stages build on each other
        began = run['base']['name']
        if began != base:
            raise ValueError(f'the record {name} began with {began}, the study begins with {base}: move it away')


def best_rate(method):
    """The learning rate with the lowest loss on what was held out of SST."""
    rates = METHODS[method][1]
    return min(rates, key=lambda lr: record_of('search', f'{method}, lr={lr:g}')['valid']['loss'])


def read_seeds(stage, name):
    return [record_of(stage, f'{name}, seed={seed}') for seed in seeds.split(',')]


def read_cfimdb(method, lr):
    """The runs on CFIMDB at a learning rate; where that is SST's they are in `final`."""
    if lr == best_rate(method):
        return read_seeds('final', f'{method}, cfimdb')
    return read_seeds('rates', f'{method}, lr={lr:g}')


def read_finals(method, task):
    """The runs of a method on a task, of CFIMDB at the learning rate with the lowest loss on what was held out."""
    if task != 'cfimdb':
        return read_seeds('final', f'{method}, {task}')
    found = [read_cfimdb(method, lr) for lr in METHODS[method][1]]
    return min(found, key=lambda records: sum(record['valid']['loss'] for record in records))


def values_of(records, task):
    """The score of a task for each record: percent, of sonnets CHRF of what follows the prompt."""
    return [(1 if task == 'sonnets' else 100) * record['dev'][SCORES[task]] for record in records]


def rate_of(method, task):
    return read_finals(method, task)[0]['settings']['learning_rate']


def against(values, baseline):
    """mean ± standard deviation, and p of a paired t-test over the seeds."""
    p = '' if values == baseline else f' (p = {paired_p(values, baseline):.2g})'
    return mean_and_std(values, 1) + p


def make_main_table():
    heads = 'method, trains, SST, CFIMDB, Quora, sonnets, with the prompt, learning rate, ms / step'.split(', ')
    heads += ['peak memory', 'in the paper']
    rows = []
    check_machine({f'time, {method}': record_of('time', method) for method in METHODS})
    for method in METHODS:
        timed, chrf = record_of('time', method), [run['dev']['chrf'] for run in read_finals(method, 'sonnets')]
        first, second = timed['log'][:2]  # epochs: in the first one some things happen once
        seconds = (second['seconds'] - first['seconds']) / (second['iter'] - first['iter'])
        cells = [method, f'{read_finals(method, "sst")[0]["trained"]:,}']
        for task in TASKS:
            values = values_of(read_finals(method, task), task)
            cells.append(against(values, values_of(read_finals('LoRA', task), task)))
        cells += [mean_and_std(chrf, 1), f'{best_rate(method):g}, CFIMDB {rate_of(method, "cfimdb"):g}']
        cells += [f'{1e3 * seconds:.0f}', f'{timed["peak_memory"] / 1e6:.0f} MB', PAPER.get(method, '')]
        rows.append(cells)
    return markdown_table(heads, rows, 'l' + 'r' * 9 + 'l')


def make_rank_table():
    rows = []
    for rank in RANKS:
        found = [read_seeds('rank', f'rank={rank}, alpha={alpha}') for alpha in ALPHAS]
        rows.append([f'rank {rank}', *(mean_and_std(values_of(records, 'sst'), 1) for records in found)])
    return markdown_table(['LoRA on SST', *(f'alpha {alpha}' for alpha in ALPHAS)], rows)


def make_single_table():
    found = {'in no block (full)': read_finals('full', 'sst'), 'in all blocks (KAN)': read_finals('KAN', 'sst')}
    for block in BLOCKS:
        found[f'in block {block} alone'] = read_seeds('single', f'block={block}')
    baseline = values_of(found['in no block (full)'], 'sst')
    rows = [[name, against(values_of(runs, 'sst'), baseline)] for name, runs in found.items()]
    return markdown_table(['KAN layers, SST', ''], rows)


def make_rates_table():
    rows = []
    for method, (_, rates) in METHODS.items():
        best, cells = rate_of(method, 'cfimdb'), [method]
        for lr in rates:
            cell = f'{lr:g}: {mean_and_std(values_of(read_cfimdb(method, lr), "cfimdb"), 1)}'
            cells.append(f'**{cell}**' if lr == best else cell)
        rows.append(cells)
    return markdown_table(['CFIMDB at learning rate', 'lowest', 'middle', 'highest'], rows)


def draw_curves():
    """Loss per epoch of KAN-LoRA in both forms beside LoRA, where it learns and held out: means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout='constrained')
    panels = figure.subplots(1, len(TASKS))
    colors = {'LoRA': 'tab:blue', 'KAN-LoRA': 'tab:orange', 'KAN-base LoRA': 'tab:green'}
    for task, panel in zip(TASKS, panels):
        ends = []  # of the losses held out
        for method, color in colors.items():
            logs = [record['log'] for record in read_finals(method, task)]
            for key, style, name in ('train_loss', '--', 'train'), ('loss', '-', 'held out'):
                epochs = range(1, 1 + max(map(len, logs)))
                losses = [mean(log[epoch - 1][key] for log in logs if len(log) >= epoch) for epoch in epochs]
                panel.plot(epochs, losses, style, color=color, label=f'{method}, {name}')
            ends.append(losses[-1])
        panel.set_title(f'{task}: held out within {max(ends) - min(ends):.3f}', fontsize=12)
        panel.set_xlabel('epoch')
        panel.set_xticks(epochs)
        panel.grid(alpha=0.3)
    figure.suptitle('How far KAN adapters end from LoRA: losses of train and held out, means over seeds')
    panels[0].set_ylabel('loss, nats per example (sonnets: per token)')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=6, fontsize=11)
    figure.savefig(STUDY.folder / 'curves.png', dpi=110)


if __name__ == '__main__':
    configure(globals())
    if seeds.count(',') < 1:
        raise ValueError(f'seeds={seeds!r}: a spread wants at least two, joined by commas')
    if len(set(seeds.split(','))) <= seeds.count(','):
        raise ValueError(f'seeds={seeds!r}: one is named twice')
    for stage in choose('stages', stages, ('search', 'final', 'rank', 'single', 'rates', 'time')):
        runs = list_runs(stage)
        check_records(runs)
        STUDY.run_all(runs, make)
    try:
        tables = make_main_table(), make_rank_table(), make_single_table(), make_rates_table()
        STUDY.show('\n\n'.join('\n'.join(lines) for lines in tables) + '\n')
        draw_curves()
    except FileNotFoundError as error:
        if not stages:
            raise
        print(f'no page yet: {error}')
