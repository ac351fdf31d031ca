"""KANs, efficient-kan's KANs and MLPs of equal parameters that solve differential equations: error and seconds.

    OMP_NUM_THREADS=1 python study/pinn.py   # what has no record, a quarter of an hour; make pinn does the same
    python study/pinn.py --problems=         # the page and the figure from the records alone

A network u(x) learns to satisfy an equation at points of its domain and the solution's values at its boundary (Raissi
et al. 2019, physics-informed neural networks). The loss needs second derivatives of u by x, and its gradient a third.
The problems have known solutions, so that the error is known. The one in two dimensions and the weight of its equation
are those of Liu et al. 2024, section 3.4.
"""

import importlib
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from configurator import configure
from kan import KAN
from run.device import device_name
from run.records import commit
from run.tables import markdown_table
from study.runner import Study, check_machine, choose, mean_and_std

STUDY = Study('pinn')
SEEDS = (1, 2, 3)
WEIGHT = 0.01  # of the equation beside the boundary
RATE = 1e-2  # Adam's, falling to zero by a cosine
STEPS, EVERY = 2000, 50


def wave(x):
    """One dimension, three periods and a half."""
    return torch.sin(3.5 * math.pi * x[:, 0])


def plate(x):
    """sin(pi x) sin(pi y^2), Liu et al."""
    return torch.sin(math.pi * x[:, 0]) * torch.sin(math.pi * x[:, 1] ** 2)


PROBLEMS = {'1-D': (wave, 1, 128), '2-D': (plate, 2, 31)}  # solution, dimensions, points along each


def make_mlp(sizes):
    layers = [module for pair in zip(sizes, sizes[1:]) for module in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make_efficient_kan(sizes):
    layer = importlib.import_module('kan_gpt.efficient_kan.model').KANLinear
    return nn.Sequential(*(layer(I, O) for I, O in zip(sizes, sizes[1:])))


NETWORKS = {  # how it is made of its sizes, and the sizes between input and output, by dimensions
    'KAN': (KAN, {1: [10], 2: [10]}),
    'efficient-kan': (make_efficient_kan, {1: [10], 2: [10]}),
    'MLP': (make_mlp, {1: [12, 12], 2: [15, 15]}),  # as many parameters
}

# -----------------------------------------------------------------------------
problems = ','.join(PROBLEMS)
# -----------------------------------------------------------------------------


def laplacian(function, x):
    """The sum of the second derivatives by the coordinates, with its graph: (N,) of x (N, d) and function(x) (N,)"""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.size(1)))


def make_points(dimensions, n):
    """Evenly spaced ones within [-1, 1]^d, and those of them on its boundary: (N, d) each."""
    axes = torch.linspace(-1, 1, n).expand(dimensions, -1)
    points = torch.cartesian_prod(*axes).view(-1, dimensions)
    return points, points[(points.abs() == 1).any(1)]


def solve(problem, network, seed):
    """The record of a run: the error is that of u relative to the solution, by root mean squares, on other points."""
    solution, dimensions, n = PROBLEMS[problem]
    make, hidden = NETWORKS[network]
    torch.manual_seed(seed)
    model = make([dimensions, *hidden[dimensions], 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    points, boundary = make_points(dimensions, n)
    source, values = laplacian(solution, points).detach(), solution(boundary)
    others, _ = make_points(dimensions, 2 * n + 1)
    points.requires_grad_()

    def u(x):
        return model(x).squeeze(1)

    log, seconds, truth = [], 0.0, solution(others)
    for step in tqdm(range(1, STEPS + 1), desc=f'{problem}, {network}, seed={seed}', leave=False, disable=None):
        t0 = time.perf_counter()
        loss = WEIGHT * (laplacian(u, points) - source).square().mean() + (u(boundary) - values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - t0
        if step % EVERY == 0:
            with torch.no_grad():
                error = (u(others) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
            log.append(dict(step=step, seconds=seconds, loss=loss.item(), error=error.item()))
    sizes = dict(problem=problem, network=network, seed=seed, parameters=sum(p.numel() for p in model.parameters()))
    machine = dict(hardware=device_name('cpu'), torch=torch.__version__, commit=commit())
    return {**sizes, **machine, 'error': log[-1]['error'], 'seconds': seconds, 'log': log}


def list_runs(problems):
    """{name: (problem, network, seed)}, seeds outermost, so that the networks take turns on a noisy machine."""
    runs = [(problem, network, seed) for seed in SEEDS for problem in problems for network in NETWORKS]
    return {'{}, {}, seed={}'.format(*run): run for run in runs}


def read_group(problem, network):
    """The records of all seeds; FileNotFoundError where one is missing."""
    records = STUDY.read()
    names = [f'{problem}, {network}, seed={seed}' for seed in SEEDS]
    missing = [name for name in names if name not in records]
    if missing:
        raise FileNotFoundError(f'{missing[0]} is missing: python study/pinn.py solves it')
    return [records[name] for name in names]


def make_table():
    rows = []
    check_machine(STUDY.read())
    for problem in PROBLEMS:
        for network in NETWORKS:
            runs = read_group(problem, network)
            errors = mean_and_std([100 * run['error'] for run in runs], 2)
            times = mean_and_std([1e3 * run['seconds'] / STEPS for run in runs], 2)
            rows.append([problem, network, runs[0]['parameters'], errors, times])
    heads = ['problem', 'network', 'parameters', 'error, %', 'ms / step']
    return '\n'.join(markdown_table(heads, rows, 'llrrr')) + '\n'


def draw():
    """Error over seconds: a line for each network, the geometric mean over seeds, and a thin one for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout='constrained')
    panels = figure.subplots(1, 2)
    for panel, problem in zip(panels, PROBLEMS):
        for network, color in zip(NETWORKS, ('tab:orange', 'tab:green', 'tab:blue')):
            logs = [run['log'] for run in read_group(problem, network)]
            seconds, errors = (np.array([[line[key] for line in log] for log in logs]) for key in ('seconds', 'error'))
            panel.plot(seconds.T, 100 * errors.T, color=color, alpha=0.25, linewidth=1)
            mean = 100 * np.exp(np.log(errors).mean(0))
            panel.plot(seconds.mean(0), mean, color=color, linewidth=2.5, label=network)
        panel.set(title=f"Poisson's equation, {problem}", xlabel='seconds', xscale='log', yscale='log')
        panel.grid(alpha=0.3, which='both')
    figure.suptitle('With as many parameters, KANs come closer to the solution than MLPs, and take longer for a step')
    panels[0].set_ylabel('error, % of the solution')
    panels[0].legend()
    figure.savefig(STUDY.folder / 'error.png', dpi=110)


if __name__ == '__main__':
    configure(globals())
    STUDY.run_all(list_runs(choose('problems', problems, PROBLEMS)), lambda name, job, folder: solve(*job))
    STUDY.fill(make_table())
    draw()
