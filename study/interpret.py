"""What KAN-GPTs have learned, and what can be cut off them: the figures of docs/interpret.md.

    python study/interpret.py   # trains and looks into what has no record; make interpret does the same
    python study/interpret.py --jobs=             # the page from the records alone

Two KAN-GPTs in nano size are trained, with the weights of every evaluation kept. `interpret.py` looks into them and
prunes the first one, by edges and by neurons. The figures are those that it draws. Brute force looks for better
formulas of some edges of the first model.
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import scipy.optimize
import torch

from configurator import ROOT, configure, settings_of
from inside import faithful, report
from inside.edges import values
from inside.formulas import FAMILIES, NAMES, candidates, refine
from inside.reading import Text
from kan import KANLinear
from run.checkpoint import load_checkpoint, versions
from run.device import device_name, peak_memory
from run.records import commit, read_record
from study.runner import Study, check_machine, choose, run_json, run_to_end
from study.sweep import check_record

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
CHECKED = 'brute force'  # least squares from many starts, for edges drawn from all layers of the first model
JOBS[CHECKED] = dict(n_edges=200, rows=2048)
STARTS = {  # of alpha and beta, by the kind of a family
    'placed': [(sign, -sign * v) for sign in (1, -1) for v in np.linspace(-0.5, 1.5, 7)],
    'scaled': [(s * w, -s * w * v) for s in (1, -1) for w in (3, 10, 30) for v in np.linspace(-0.1, 1.1, 7)],
    'wave': [(w, phase) for w in (2, 4, 7, 10, 14, 19, 25) for phase in (0, 1.5)],
    'rate': [(sign * w, 0) for sign in (1, -1) for w in (0.5, 3, 10)],
    'bounded': [(sign, v + (sign < 0)) for sign in (1, -1) for v in (0.01, 0.1, 1)],
    'within': [(last - first, first) for first in (-0.99, -0.7, 0.0) for last in (0.1, 0.7, 0.99)],
}

# -----------------------------------------------------------------------------
jobs = ','.join(JOBS)
# -----------------------------------------------------------------------------


def trained(model):
    """The folder of a trained model, with its history."""
    folder = STUDY.work / 'models' / model
    args = [f'{ROOT}/config/train_shakespeare_char_{model}.py', '--keep_history=True', '--eval_interval=100']
    run = read_record(folder)
    check_record(folder, run, settings_of('train.py', args))
    if 'finished' not in run:
        run_to_end('train.py', args, folder)
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


def brute_force(family, t, g):
    """The highest R2 of c f(alpha t + beta) + d for the values g of an edge, both (N,) float64 arrays, that least
    squares find from many starts.
    """
    f, kind, apart = FAMILIES[family].f, FAMILIES[family].kind, g - g.mean()

    def left(numbers):
        z = numbers[0] * t + numbers[1]
        if (kind == 'bounded' and z.min() <= 0) or (kind == 'within' and np.abs(z).max() >= 1):
            return 10 * apart  # no function of the whole domain
        if family == 'exp':  # whose square is to be finite
            z = z.clip(-300, 300)
        h = f(torch.from_numpy(z)).numpy()
        h = h - h.mean()
        return apart - (h @ apart) / max(h @ h, 1e-12) * h

    ranked = sorted(STARTS[kind], key=lambda start: np.square(left(start)).sum())
    least = np.square(left(ranked[0])).sum()
    for start in ranked[:4]:
        least = min(least, 2 * scipy.optimize.least_squares(left, start, max_nfev=60).cost)
    return 1 - least / (apart @ apart)


def check(folder, n_edges, rows):
    """The R2 of refined formulas beside the best of brute force, for edges drawn at random from all layers."""
    source = Text(load_checkpoint(folder), '', 'val', rows, rows, 'cpu')
    layers = report.look(source.model, lambda: source.read(source.model), rows=rows, n_edges=1)
    known = torch.tensor([layer.edges.activity.numel() for layer in layers])
    ends = known.cumsum(0)
    drawn = torch.randperm(int(ends[-1]), generator=torch.Generator().manual_seed(1))
    alive = torch.cat([layer.edges.alive.flatten() for layer in layers])
    drawn = drawn[alive[drawn]][:n_edges]
    found = []
    for n, layer in enumerate(layers):
        seen, edges = layer.seen, layer.edges
        here = drawn[(drawn < ends[n]) & (drawn >= ends[n] - known[n])] - (ends[n] - known[n])
        pairs = [divmod(place, len(edges.low)) for place in here.tolist()]
        g = values(seen, pairs).double().numpy()
        for e, ((o, i), formula) in enumerate(zip(pairs, refine(seen, edges, layer.found, pairs))):
            t = ((seen.x[:, i] - edges.low[i]) / (edges.high[i] - edges.low[i])).double().numpy()
            best = {family: brute_force(family, t, g[:, e]) for family in NAMES}
            family = max(best, key=best.get)
            found.append(dict(layer=layer.name, output=o, feature=i, family=formula.family, r2=formula.r2))
            found[-1].update(brute_family=family, brute_r2=best[family], affine_r2=formula.affine_r2)
            print(found[-1], flush=True)
    return dict(edges=found)


def compare_with_brute_force(edges):
    missed = np.array([edge['brute_r2'] - edge['r2'] for edge in edges])
    below, above = (missed > 1e-3).sum(), (missed < -1e-3).sum()
    return (
        f'The R² of the formulas of {len(edges)} edges, drawn from all layers, beside the best that least squares '
        f'find from many starts: {below} are more than 0.001 below it, the farthest {missed.max():.4f}; '
        f'{above} are more than 0.001 above it.'
    )


def make(name, flags, folder):
    about = dict(commit=commit(), versions=versions(), device=device_name('cpu'))
    if name == TIMED:
        return {**time_layer(**flags), **about}
    if name == CHECKED:
        return {**check(trained('nano_kan'), **flags), **about}
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


def table(records):
    parts = []
    for model, about in MODELS.items():
        if model in records:
            run = records[model]
            parts += [f'## `{model}`: {about}', '', f'{run["data"]}; {run["device"]}.', '']
            parts += [report.table(run['layers']), faithful.table(run['losses'], run['random_losses'])]
    costs, cut = {}, {name: records[name] for name in JOBS if 'costs' in records.get(name, ())}
    check_machine(cut)
    for name, run in cut.items():
        for label, cost in run['costs'].items():
            known = costs.setdefault(label, cost)  # the model as trained is that of the first job
            if (known['loss'], known['parameters']) != (cost['loss'], cost['parameters']):
                raise ValueError(f'{name!r} was cut from another model than the jobs before: move its record away')
    if costs:
        parts += ['## `nano_kan` pruned', '', report.cost_table(costs)]
    if CHECKED in records:
        parts += ['## Beside brute force', '', compare_with_brute_force(records[CHECKED]['edges']), '']
    if TIMED in records:
        run = records[TIMED]
        what = f'All {run["edges"]:,} edges of a layer of 192 x 768 against {run["candidates"]:,} candidates'
        took = f'{run["seconds"]:.1f} s, {run["peak"] / 1e9:.2f} GB for the whole process; {run["device"]}.'
        parts += ['## Time', '', f'{what}, with statistics of 16,384 rows: {took}', '']
    return '\n'.join(parts)


if __name__ == '__main__':
    configure(globals())
    STUDY.run_all({name: JOBS[name] for name in choose('jobs', jobs, JOBS)}, make)
    if STUDY.read():
        STUDY.show(table(STUDY.read()))
