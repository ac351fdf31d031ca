"""What KAN-GPTs have learned, and what can be cut off them: the figures of docs/interpret.md.

    python study/interpret.py   # trains and looks into what has no record; make interpret does the same
    python study/interpret.py --jobs=             # the page from the records alone

Two KAN-GPTs in nano size are trained, with the weights of every evaluation kept. `interpret.py` looks into them and
prunes the first one, by edges and by neurons. The figures are those that it draws.
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import torch

from configurator import ROOT, configure
from inside import faithful, report
from inside.formulas import NAMES, candidates
from kan import KANLinear
from run.checkpoint import versions
from run.device import device_name, peak_memory
from run.records import commit
from study.runner import Study, choose, read_run, run_json, run_to_end

STUDY = Study('interpret')
MODELS = {
    'nano_kan': 'grid -1 to 1, attention and MLP',
    'nano_kan_mlp': 'grid -3 to 3, MLP alone, its hidden layer normalised',
}
FIGURES = {'edges-h.0.mlp.1': 'edges', 'growth': 'growth', 'r2': 'r2', 'pruning': 'pruning'}  # of the first model
JOBS = {name: dict(topk=12) for name in MODELS}
JOBS |= {f'cut {share:.0%} of edges': dict(prune=share, prune_by='edges', tune=100) for share in (0.2, 0.6)}
JOBS |= {f'cut {share:.0%} of neurons': dict(prune=share, prune_by='neurons', tune=100) for share in (0.5,)}
TIMED = '192 -> 768'  # a layer with random weights: seconds and memory of statistics and search
JOBS[TIMED] = dict(features=192, outputs=768, rows=16384)

# -----------------------------------------------------------------------------
jobs = ','.join(JOBS)
# -----------------------------------------------------------------------------


def trained(model):
    """The folder of a trained model, with its history."""
    folder = STUDY.work / 'models' / model
    config = f'{ROOT}/config/train_shakespeare_char_{model}.py'
    if 'finished' not in read_run(folder):
        run_to_end('train.py', [config, '--keep_history=True', '--eval_interval=100'], folder)
    return folder


def time_layer(features, outputs, rows):
    """Seconds and the peak of memory of looking at all edges of a layer."""
    torch.manual_seed(0)
    layer, x = KANLinear(features, outputs), torch.randn(rows, features)
    started = time.perf_counter()
    (found,) = report.look(layer, lambda: layer(x), rows=rows, n_edges=1)
    seconds = time.perf_counter() - started
    return dict(seconds=seconds, edges=found.found.best.numel(), candidates=count_candidates(), peak=peak_memory('cpu'))


def count_candidates():
    return sum(len(candidates(name, torch.device('cpu'))[1]) for name in NAMES)


def make(name, flags, folder):
    about = dict(commit=commit(), versions=versions(), device=device_name('cpu'))
    if name == TIMED:
        return {**time_layer(**flags), **about}
    model = name if name in MODELS else 'nano_kan'
    place = trained(model)
    if 'prune' in flags:
        shutil.rmtree(folder, ignore_errors=True)  # what was cut off
        flags = dict(flags, save=folder / 'pruned')
    found = run_json('interpret.py', out_dir=place, **flags)
    if name == 'nano_kan':
        STUDY.folder.mkdir(exist_ok=True)
        for drawn, shown in FIGURES.items():
            shutil.copy(place / 'interpret' / f'{drawn}.png', STUDY.folder / f'{shown}.png')
    return {**about, **found, 'model': model}


def prune_table(runs):
    """A line for the model as trained, and of each job one for the cut and one for the tuned model."""
    lines = ['| | loss | parameters in use | MB of weights | ms for 1024 tokens |', '|---|--:|--:|--:|--:|']
    for name, run in runs.items():
        for state, cost in run['costs'].items():
            label = f'{name}, tuned' if 'tuned' in state else name
            if state == 'as trained':
                label = state
            row = f'| {cost["loss"]:.4f} | {cost["parameters"]:,} | {cost["mb"]:.2f} | {cost["ms"]:.1f} |'
            if label != 'as trained' or len(lines) == 2:
                lines.append(f'| {label} {row}')
    return lines


def table(records):
    parts = []
    for model, about in MODELS.items():
        if model in records:
            run = records[model]
            parts += [f'## `{model}`: {about}', '', f'{run["data"]}; {run["device"]}.', '']
            parts += [report.table(run['layers']), faithful.table(run['losses'], run['random_losses'])]
    pruned = {name: records[name] for name in JOBS if 'costs' in records.get(name, {})}
    if pruned:
        parts += ['## `nano_kan` pruned', '', *prune_table(pruned), '']
    if TIMED in records:
        run = records[TIMED]
        what = f'All {run["edges"]:,} edges of a layer of 192 x 768 against {run["candidates"]:,} candidates'
        parts += [
            '## Time',
            '',
            f'{what}, with statistics of 16,384 rows: {run["seconds"]:.1f} s, {run["peak"] / 1e9:.2f} GB',
        ]
        parts[-1] += f' for the whole process; {run["device"]}.'
        parts.append('')
    return '\n'.join(parts)


if __name__ == '__main__':
    configure(globals())
    STUDY.run_all({name: JOBS[name] for name in choose('jobs', jobs, JOBS)}, make)
    if STUDY.read():
        STUDY.show(table(STUDY.read()))
