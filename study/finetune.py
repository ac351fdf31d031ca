"""
Eight ways to fine-tune a small GPT on the four tasks of arXiv 2504.10490, with its follow-up checks.

    python train.py config/train_taskmix.py
    OMP_NUM_THREADS=1 python study/finetune.py                  # in two shells, to share the runs
    OMP_NUM_THREADS=1 python study/finetune.py --stages=time    # in one, when all else is done

`search` looks for the learning rate of each method by the part of SST's train that is held out, `final` trains each on each task,
`rank` LoRA on SST at ranks and alphas, `single` with one KAN layer, `rates` each on CFIMDB at the other learning rates. `time` measures
steps and memory: it wants the machine for itself. Each run is a run of finetune.py, and what has a record is not run again. Then
table.md and curves.png are made from the records, by --stages= without running anything.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from configurator import configure
from run.files import write_atomically
from study.runner import Study, mean_and_std, paired_p, read_run, run_script

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
    'LoRA': 'SST 55.2, CFIMDB 99.2, Quora 89.9 (test), sonnets 42.1 (with the prompt)',
    'KAN-base LoRA': 'on no task above LoRA',
    'Graph-LoRA': 'on no task above LoRA; over 18 hours',
}
RANKS, ALPHAS, BLOCKS = (4, 16, 32), (16, 32, 64), (0, 3)


# a run


def list_runs(stage):
    """{name: settings of finetune.py}"""
    if stage == 'search':
        short = dict(TASKS['sst'], task='sst', train_limit=2500, valid_fraction=0.3, seed=0)
        runs = {
            f'{method}, lr={lr:g}': dict(short, **settings, learning_rate=lr)
            for method, (settings, rates) in METHODS.items()
            for lr in rates
        }
    elif stage == 'time':
        short = dict(TASKS['sst'], task='sst', train_limit=640, epochs=2, seed=1)  # the second epoch is timed
        runs = {
            method: dict(short, **settings, learning_rate=best_rate(method))
            for method, (settings, _) in METHODS.items()
        }
    elif stage in SEEDED:
        runs = {
            f'{name}, seed={seed}': dict(settings, seed=int(seed))
            for seed in seeds.split(',')
            for name, settings in SEEDED[stage]().items()
        }
    else:
        raise ValueError(f'stages: expected any of search, {", ".join(SEEDED)}, time, got {stage!r}')
    return {f'{stage}, {name}': settings for name, settings in runs.items()}


def list_final():
    return {
        f'{method}, {task}': dict(TASKS[task], task=task, **settings, learning_rate=best_rate(method))
        for task in TASKS
        for method, (settings, _) in METHODS.items()
    }


def list_ranks():
    settings = dict(TASKS['sst'], task='sst', **LORA, learning_rate=best_rate('LoRA'))
    return {
        f'rank={rank}, alpha={alpha}': dict(settings, lora_rank=rank, lora_alpha=alpha)
        for rank in RANKS
        for alpha in ALPHAS
    }


def list_single():
    settings = dict(TASKS['sst'], task='sst', **METHODS['KAN'][0], learning_rate=best_rate('KAN'))
    return {f'block={block}': dict(settings, kan_single_layer=block) for block in BLOCKS}


def list_rates():
    return {
        f'{method}, lr={lr:g}': dict(TASKS['cfimdb'], task='cfimdb', **settings, learning_rate=lr)
        for method, (settings, rates) in METHODS.items()
        for lr in rates
        if lr != best_rate(method)  # that is in final
    }


SEEDED = {'final': list_final, 'rank': list_ranks, 'single': list_single, 'rates': list_rates}  # for every seed


def make(name, settings, folder):
    """A run of finetune.py; its checkpoints are thrown away."""
    flags = dict(settings, init_from=init_from, predict_test=False)
    last = run_script('finetune.py', [f'--{key}={value}' for key, value in flags.items()], str(folder))
    run = read_run(str(folder))
    if 'finished' not in run:
        raise ValueError(f'{name} did not finish: {last}; see {folder}/finetune.txt')
    base = dict(name=Path(init_from).name, model_args=run['model_args'])
    about = {key: run[key] for key in ('log', 'device', 'versions', 'commit')}
    return dict(stage=name.split(', ')[0], settings=settings, base=base, **run['final'], **about)


# reading the records


def read_record(stage, name):
    records = STUDY.read()
    if f'{stage}, {name}' not in records:
        raise FileNotFoundError(f'{stage}, {name} is missing: the stage {stage} is not finished')
    return records[f'{stage}, {name}']


def check_records(runs):
    """ValueError for a record that was made with other settings than the study has, or that began with another model."""
    records, base = STUDY.read(), Path(init_from).name
    for name in runs.keys() & records.keys():
        then, now = ({'task': records[name]['task'], **records[name]['settings']}, runs[name])
        if then != now:
            raise ValueError(f'the record {name} was made with {then}, the study has {now}: move it away')
        if records[name]['base']['name'] != base:
            raise ValueError(
                f'the record {name} began with {records[name]["base"]["name"]}, the study begins with {base}: move it away'
            )


def best_rate(method):
    """The learning rate with the lowest loss on what was held out of SST."""
    rates = METHODS[method][1]
    return min(rates, key=lambda lr: read_record('search', f'{method}, lr={lr:g}')['valid']['loss'])


def read_seeds(stage, name):
    return [read_record(stage, f'{name}, seed={seed}') for seed in seeds.split(',')]


def read_cfimdb(method, lr):
    """The runs on CFIMDB at a learning rate; where that is SST's they are in `final`."""
    return (
        read_seeds('final', f'{method}, cfimdb')
        if lr == best_rate(method)
        else read_seeds('rates', f'{method}, lr={lr:g}')
    )


def read_finals(method, task):
    """The runs of a method on a task, of CFIMDB at the learning rate with the lowest loss on what was held out of it."""
    if task == 'cfimdb':
        return min(
            (read_cfimdb(method, lr) for lr in METHODS[method][1]),
            key=lambda found: sum(record['valid']['loss'] for record in found),
        )
    return read_seeds('final', f'{method}, {task}')


def values_of(records, task):
    """The score of a task for each record: percent, of sonnets CHRF of what follows the prompt."""
    return [(1 if task == 'sonnets' else 100) * record['dev'][SCORES[task]] for record in records]


def rate_of(method, task):
    return read_finals(method, task)[0]['settings']['learning_rate']


# the page


def against(values, baseline):
    """mean ± standard deviation, and p of a paired t-test over the seeds."""
    p = '' if values == baseline else f' (p = {paired_p(values, baseline):.2g})'
    return mean_and_std(values, 1) + p


def second_epoch(record):
    """Seconds of a step, without the first epoch, in which some things happen once."""
    first, second = record['log'][:2]
    return (second['seconds'] - first['seconds']) / (second['iter'] - first['iter'])


def make_main_table():
    lines = [
        '| method | trains | SST | CFIMDB | Quora | sonnets | with the prompt | learning rate | ms / step | peak memory | in the paper |',
        '|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|',
    ]
    for method in METHODS:
        cells, timed = [], read_record('time', method)
        for task in TASKS:
            values = values_of(read_finals(method, task), task)
            cells.append(against(values, values_of(read_finals('LoRA', task), task)))
        cells.append(mean_and_std([record['dev']['chrf'] for record in read_finals(method, 'sonnets')], 1))
        cells += [
            f'{best_rate(method):g}, CFIMDB {rate_of(method, "cfimdb"):g}',
            f'{1e3 * second_epoch(timed):.0f}',
            f'{timed["peak_memory"] / 1e6:.0f} MB',
            PAPER.get(method, ''),
        ]
        lines.append(f'| {method} | {read_finals(method, "sst")[0]["trained"]:,} | {" | ".join(cells)} |')
    return lines


def make_rank_table():
    lines = [
        '| LoRA on SST | ' + ' | '.join(f'alpha {alpha}' for alpha in ALPHAS) + ' |',
        '|---|' + '--:|' * len(ALPHAS),
    ]
    for rank in RANKS:
        cells = []
        for alpha in ALPHAS:
            cells.append(mean_and_std(values_of(read_seeds('rank', f'rank={rank}, alpha={alpha}'), 'sst'), 1))
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
        lines.append(f'| {name} | {against(values, baseline)} |')
    return lines


def make_rates_table():
    lines = ['| CFIMDB at learning rate | lowest | middle | highest |', '|---|--:|--:|--:|']
    for method, (_, rates) in METHODS.items():
        best, cells = rate_of(method, 'cfimdb'), []
        for lr in rates:
            cell = f'{lr:g}: {mean_and_std(values_of(read_cfimdb(method, lr), "cfimdb"), 1)}'
            cells.append(f'**{cell}**' if lr == best else cell)
        lines.append(f'| {method} | {" | ".join(cells)} |')
    return lines


def make_page():
    tables = make_main_table, make_rank_table, make_single_table, make_rates_table
    table = '\n\n'.join('\n'.join(make()) for make in tables) + '\n'
    with write_atomically(STUDY.folder / 'table.md', 'w', 'utf-8') as f:
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
        for method, color in colors.items():
            for i, record in enumerate(read_finals(method, task)):
                epochs = [line['epoch'] for line in record['log']]
                for key, style, name in ('train_loss', '--', 'train'), ('loss', '-', 'held out'):
                    label = f'{method}, {name}' if i == 0 else None
                    panel.plot(
                        epochs, [line[key] for line in record['log']], style, color=color, alpha=0.7, label=label
                    )
        panel.set_title(f'{task}, rates {", ".join(f"{rate_of(method, task):g}" for method in colors)}')
        panel.set_xlabel('epoch')
        panel.set_xticks(epochs)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('loss, nats per example (sonnets: per token)')
    panels[-1].legend(fontsize=8)
    figure.savefig(STUDY.folder / 'curves.png', dpi=110)


if __name__ == '__main__':
    configure(globals())
    if seeds.count(',') < 1:
        raise ValueError(f'seeds={seeds!r}: a spread wants at least two, joined by commas')
    for stage in filter(None, stages.split(',')):
        runs = list_runs(stage)
        check_records(runs)
        STUDY.run_all(runs, make)
    try:
        make_page()
    except FileNotFoundError as error:
        if not stages:
            raise
        print(f'no page yet: {error}')
