"""The studies of nano GPTs, by train.py on Shakespeare's characters: which runs they have, and how these are shown.

    OMP_NUM_THREADS=1 python study/nano.py   # trains what has no record, in two shells to share it; hours on two cores
    OMP_NUM_THREADS=1 python study/nano.py --studies=graph
    python study/nano.py --train=False       # their pages from the records, without training anything

`tuning` searches for learning rate and initial scale in short runs, `finalists` tries the best of them over all
iterations, `main` compares the families over five seeds, `longer` gives the vanilla GPT the seconds of the KAN-GPT,
`scaling` varies the width, and `graph` adds graph attention. The records of `main` are results/nano/runs.jsonl, those
of the others results/nano/<study>.jsonl. Each has a section in table.md there, and all but `finalists` a figure.
out-nano/compare.html, of the others out-nano-<study>/compare.html, shows the same, to zoom and to sort.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from configurator import ROOT, configure
from study.compare import check_run, compare
from study.runner import Study, choose, fill, read_run, run_to_end
from study.sweep import check_record, check_texts, list_runs, read_settings

FAMILIES = ('nano', 'nano_kan', 'nano_kan_mlp', 'nano_balanced', 'nano_swiglu')
SHORT = dict(max_iters='300', lr_decay_iters='300', warmup_iters='30', eval_interval='300')
WHOLE = dict(eval_interval='1000')
LONG = dict(max_iters='7800', lr_decay_iters='7800', eval_interval='1300')
RUNS = {  # study: [(families, settings, of several values all combinations)]
    'tuning': [(FAMILIES, dict(SHORT, learning_rate='2e-3,4e-3,8e-3,1.6e-2', init_std='0.02,0.04,0.08,0.16'))],
    'finalists': [
        (('nano', 'nano_balanced'), dict(WHOLE, learning_rate='2e-3,4e-3,8e-3', init_std='0.08')),
        (('nano_kan',), dict(WHOLE, learning_rate='4e-3,8e-3', init_std='0.04')),
        (('nano_kan_mlp',), dict(WHOLE, learning_rate='8e-3,1.6e-2', init_std='0.04')),
        (('nano_swiglu',), dict(WHOLE, learning_rate='2e-3,4e-3,1.6e-2', init_std='0.08')),
    ],
    'main': [((*FAMILIES, 'nano_by_flops', 'nano_by_seconds'), dict(seed='1,2,3,4,5'))],
    'longer': [(('nano',), dict(LONG, seed='1'))],
    'scaling': [
        (('nano',), dict(seed='1', n_embd='24,48,192')),
        (('nano_kan', 'nano_kan_mlp'), dict(seed='1', n_embd='24,48')),
    ],
    'graph': [(('nano', 'nano_graph'), dict(seed='1,2,3'))],
}
SHOWN = {  # study: arguments of compare
    'tuning': dict(over='learning_rate,init_std'),
    'finalists': dict(),
    'main': dict(baseline='nano_kan'),
    'longer': dict(baseline='nano_kan', mix=True),
    'scaling': dict(scaling=True),
    'graph': dict(baseline='nano'),
}
BESIDE = {  # study: families of the study `main` that are shown beside its own runs
    'longer': ('nano_kan',),
    'scaling': ('nano', 'nano_kan', 'nano_kan_mlp'),
}
FIGURES = {  # study: the figure of compare that the page shows, and its name there
    'tuning': ('grids.png', 'tuning.png'),
    'main': ('curves.png', 'curves.png'),
    'longer': ('curves.png', 'longer.png'),
    'scaling': ('scaling.png', 'scaling.png'),
    'graph': ('curves.png', 'graph.png'),
}
PREFIX = 'shakespeare_char_'

# -----------------------------------------------------------------------------
studies = ','.join(RUNS)
train = True  # train what has no record; False: make the pages alone
# -----------------------------------------------------------------------------


def study_of(study):
    """The records of a study, and where it works."""
    return Study('nano', part='' if study == 'main' else study)


def list_all(study):
    """{name: the arguments of train.py} of the runs of a study"""
    runs = {}
    for families, grid in RUNS[study]:
        configs = [f'{ROOT}/config/train_{PREFIX}{family}.py' for family in families]
        runs.update(list_runs(configs, {name: values.split(',') for name, values in grid.items()}))
    return runs


def make(name, args, folder):
    """Train one run; returns its record and log. One that diverged has a record, too, any other failure is an error."""
    check_record(folder, read_run(folder), read_settings({name: args})[name])
    return run_to_end('train.py', args, folder)


def check_records(study, runs):
    """ValueError for a record of other settings than those that the study has."""
    records, file = study_of(study).read(), study_of(study).file
    for name, settings in read_settings(runs).items():
        if name in records:
            check_record(f'results/nano/{file}: {name}', records[name], settings)


def show(study):
    """The section of a study in table.md and its figure, from the records."""
    own, main = study_of(study), study_of('main')
    records = own.read()
    for family in BESIDE.get(study, ()):
        records |= {name: run for name, run in main.read().items() if name.startswith(f'{PREFIX}{family},')}
    if not records:
        print(f'{study}: no records yet, no page')
        return
    runs = [check_run(name, run, f'results/nano/{own.file}') for name, run in records.items()]
    table = compare(runs, str(own.work), **SHOWN[study])
    parts = [part for part in table.strip().split('\n\n') if not part.startswith('![')]  # the figures are in README.md
    fill(own.folder / 'table.md', f'study/nano.py, {study}', ['\n\n'.join(parts)])
    if study in FIGURES:
        drawn, shown = FIGURES[study]
        shutil.copy(own.work / drawn, own.folder / shown)


if __name__ == '__main__':
    configure(globals())
    for study in choose('studies', studies, RUNS):
        runs = list_all(study)
        check_records(study, runs)
        if train:
            check_texts(read_settings(runs), study_of(study).read())
            study_of(study).run_all(runs, make)
        show(study)
