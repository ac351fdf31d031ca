"""Ways to fine-tune a pretrained language model on the tasks of arXiv 2504.10490, beside what its prompts give alone:
SmolLM2-135M, of the size of GPT-2; results/pretrained.

    OMP_NUM_THREADS=1 python study/pretrained.py                 # what has no record; in two shells, to share the runs
    OMP_NUM_THREADS=1 python study/pretrained.py --tasks=sst --methods=head,LoRA,KAN-LoRA
    python study/pretrained.py --stages=                         # the page from the records alone

`prompts` scores the model as it is, with and without answered examples before each prompt. `search` looks for the
learning rate of each method by the part of train that is held out, in shorter runs; `final` trains each with three
seeds at the best. Adapters, graph layers and KAN layers are in the last blocks alone: what the others make of the texts
is computed once for all runs. All of it is meant for two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from filelock import FileLock

from configurator import ROOT, configure, flags_of
from run.tables import markdown_table
from study import smollm2
from study.finetune import against, values_of
from study.runner import Study, choose, mean_and_std, paired, run_json, run_to_end
from tasks.prompts import find_task

STUDY = Study('pretrained')
BASE = Path(ROOT, 'out-smollm2')  # the model in float32, which loads sooner than its four bits
FROZEN = BASE / 'frozen'  # what the blocks below the first trained one make of the texts
BLOCKS = range(24, 30)  # of 30, with adapters
TASKS = {  # settings of finetune.py: how much of each task two cores can learn from
    'sst': dict(train_limit=1000, block_size=64, batch_size=16, epochs=2),
    'cfimdb': dict(train_limit=400, block_size=128, batch_size=16, epochs=2),
    'quora': dict(train_limit=1000, dev_limit=500, block_size=96, batch_size=16, epochs=2),
    'sonnets': dict(block_size=256, batch_size=8, epochs=3),
}
SEARCH = dict(train_limit=400, valid_fraction=0.3, dev_limit=16)
COMMON = dict(dropout=0.0, lora_dropout=0.0, predict_test=False)
MLPS = ','.join(f'layers.{i}.mlp' for i in BLOCKS)
LORA = dict(lora_rank=16, lora_alpha=32, lora_targets=MLPS)
PLAIN = dict(use_lora=False)
KAN = dict(use_kan=True, kan_single_layer=BLOCKS[-1], grid_size=3, spline_order=1)
ADAPTER_RATES, FULL_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-5, 3e-5, 1e-4)
METHODS = {  # settings of finetune.py, and learning rates to try
    'head': (dict(PLAIN, finetune_mode='head'), (1e-3, 3e-3, 1e-2)),
    'LoRA': (LORA, ADAPTER_RATES),
    'LoRA of rank 96': (dict(LORA, lora_rank=96, lora_alpha=192), ADAPTER_RATES),
    'KAN-LoRA': (dict(LORA, lora_kind='kan'), ADAPTER_RATES),
    'KAN-base LoRA': (dict(LORA, **KAN, lora_kind='kan_base', lora_targets=f'layers.{BLOCKS[-1]}.mlp'), ADAPTER_RATES),
    'Graph-LoRA': (dict(LORA, use_graph=True, graph_last=len(BLOCKS)), ADAPTER_RATES),
    'full': (dict(PLAIN, finetune_mode='full'), FULL_RATES),
    'KAN': (dict(PLAIN, **KAN, finetune_mode='full'), FULL_RATES),
}
SHOTS, SHOWN_TO = 5, 500  # answered examples before the prompts of so many of dev, as they take six times as long
SEEDS = (1, 2, 3)

# -----------------------------------------------------------------------------
stages = 'prompts,search,final'
tasks = ','.join(TASKS)
methods = ','.join(METHODS)
# -----------------------------------------------------------------------------


def prepare_base():
    with FileLock(f'{BASE}.lock'):  # of several shells one writes it
        if not (BASE / 'tokenizer.json').exists():  # what is written last
            tokenizer, hf = smollm2.load()
            hf.save_pretrained(BASE)
            tokenizer.save_pretrained(BASE)


def settings_of(task, method, **more):
    """Settings of finetune.py."""
    return {**COMMON, **TASKS[task], 'task': task, **METHODS[method][0], **more}


def jobs_of(stage, task, method):
    """{name: (stage, task and method, settings of finetune.py)}"""
    if stage == 'search':
        runs = [settings_of(task, method, **SEARCH, learning_rate=rate, seed=0) for rate in METHODS[method][1]]
    else:
        rate = best_rate(task, method)
        runs = [settings_of(task, method, learning_rate=rate, seed=seed) for seed in SEEDS]
    about, name = dict(stage=stage, task=task, method=method), '{}, {}, {}, lr={learning_rate:g}, seed={seed}'
    return {name.format(stage, task, method, **run): (about, run) for run in runs}


def prompt_jobs(task):
    """{name: (stage and task, settings of eval.py)}: without shots, and with several draws of them."""
    runs = [dict(shots=0, limit=TASKS[task].get('dev_limit', 0))]
    runs += [dict(shots=SHOTS, limit=SHOWN_TO, seed=seed) for seed in SEEDS if find_task(task).answers]
    texts = [', '.join(f'{key}={value}' for key, value in run.items()) for run in runs]
    return {f'prompts, {task}, {text}': (dict(stage='prompts', task=task), run) for text, run in zip(texts, runs)}


def make(name, job, folder):
    """The record of a run of finetune.py."""
    about, settings = job
    frozen = FROZEN if settings.get('finetune_mode') != 'full' else ''
    places = dict(init_from=BASE, save_base=False, frozen_cache=frozen)
    run = run_to_end('finetune.py', flags_of(settings | places), folder)
    if 'failed' in run:
        return {**about, 'settings': settings, 'failed': run['failed']}
    kept = {key: run[key] for key in ('log', 'device', 'versions', 'commit')}
    return {**about, 'settings': settings, **run['final'], **kept}


def make_prompts(name, job, folder):
    """The record of eval.py on the model as it is."""
    about, settings = job
    found = run_json('eval.py', init_from=BASE, task=about['task'], batch_size=4, **settings)
    dev = {key: found[key] for key in ('loss', 'accuracy', 'macro_f1', 'chrf', 'chrf_continuation') if key in found}
    return {**about, **settings, 'examples': found['examples'], 'dev': dev}


def runs_of(stage, task, method=None):
    """The records there are."""
    found = [run for run in STUDY.read().values() if (run['stage'], run['task']) == (stage, task)]
    return [run for run in found if method in (None, run.get('method'))]


def prompts_of(task, shots):
    """The records of the prompts alone with so many answered examples, scored on as many of dev as the study says."""
    wanted = [name for name, (_, settings) in prompt_jobs(task).items() if settings['shots'] == shots]
    return [run for name, run in STUDY.read().items() if name in wanted]


def finals_of(task, method):
    """{seed: record} of the final runs of a method on a task that did not diverge."""
    runs = [run for run in runs_of('final', task, method) if 'failed' not in run]
    rates = {run['settings']['learning_rate'] for run in runs}
    if len(rates) > 1:
        raise ValueError(
            f'final runs of {method} on {task} have learning rates {sorted(rates)}: move those of one away'
        )
    return {run['settings']['seed']: run for run in runs}


def best_rate(task, method):
    """The learning rate with the lowest loss on the part of train that is held out."""
    found, records = jobs_of('search', task, method), STUDY.read()
    if not found.keys() <= records.keys():
        raise ValueError(f'stage final wants all learning rates of {method} on {task} first: --stages=search')
    whole = [records[name] for name in found if 'failed' not in records[name]]
    if not whole:
        raise ValueError(f'{method} diverged on {task} at all its learning rates: try others')
    return min(whole, key=lambda run: run['valid']['loss'])['settings']['learning_rate']


def check_records():
    """ValueError for a record that was made with other settings than those of the study."""
    for run in STUDY.read().values():
        if run['stage'] != 'prompts':
            settings, (task, method) = run['settings'], (run['task'], run['method'])
            more = SEARCH if run['stage'] == 'search' else {}
            now = settings_of(task, method, **more, learning_rate=settings['learning_rate'], seed=settings['seed'])
            if settings != now:
                raise ValueError(
                    f'the record {run["name"]} was made with {settings}, the study has {now}: move it away'
                )


def run(stages, tasks, methods):
    check_records()
    for task in tasks:
        if 'prompts' in stages:
            STUDY.run_all(prompt_jobs(task), make_prompts)
        for method in methods:
            for stage in 'search', 'final':
                if stage in stages:
                    STUDY.run_all(jobs_of(stage, task, method), make)


def make_table():
    rows = []
    for shots in 0, SHOTS:
        cells = [f'prompt alone, {shots} examples shown (to {SHOWN_TO} of dev)' if shots else 'prompt alone', '0']
        for task in TASKS:
            found = prompts_of(task, shots)
            cells.append(mean_and_std(values_of(found, task), 1) if found else '')
        rows.append([*cells, ''])
    for method in METHODS:
        finals = {task: finals_of(task, method) for task in TASKS}
        if any(finals.values()):
            rows.append(row_of(method, finals))
    heads = ['', 'trains', 'SST', 'CFIMDB', 'Quora', 'sonnets', 'learning rates']
    return '\n'.join(markdown_table(heads, rows, 'lrrrrrl')) + '\n'


def row_of(method, finals):
    firsts = [next(iter(runs.values())) for runs in finals.values() if runs]
    cells = [compare(runs, finals_of(task, 'LoRA'), task) for task, runs in finals.items()]
    rates = [f'{run["settings"]["learning_rate"]:g}' for run in firsts]
    return [method, f'{firsts[0]["trained"]:,}', *cells, ', '.join(rates)]


def compare(runs, others, task):
    """The scores of runs {seed: record} beside those of others with the same seeds; where some are missing alone."""
    if not runs:
        return ''
    values, baseline = paired(runs, others, lambda run: values_of([run], task)[0])
    missing = '' if len(runs) == len(SEEDS) else f' (n = {len(runs)})'
    if len(values) == len(runs) == len(others) > 1:
        return against(values, baseline) + missing
    return mean_and_std(values_of(runs.values(), task), 1) + missing


if __name__ == '__main__':
    configure(globals())
    stages, tasks = choose('stages', stages, ('prompts', 'search', 'final')), choose('tasks', tasks, TASKS)
    if stages:
        prepare_base()
    run(stages, tasks, choose('methods', methods, METHODS))
    if STUDY.read():
        STUDY.fill(make_table())
