"""The measurements of bench.py that the docs quote, with a record of each and a page made from them.

    python study/speed.py            # measures what this machine has no record of, an hour on two cores: leave it alone
    python study/speed.py --jobs=layer,adapter
    python study/speed.py --jobs=    # the page from the records alone

A machine is named by its processor or card, its threads and torch; figures of different machines stand in different
tables, as ratios hold within one run alone.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

import numpy as np
import torch

from configurator import configure
from run.device import device_name, pick_device
from run.records import commit
from run.tables import markdown_table
from study.runner import Study, choose, run_json
from study.win import cases_of

STUDY = Study('speed')
STEP, ONCE = dict(suite='step', only='micro'), dict(rounds=2, repeats=1)
JOBS = {  # settings of bench.py
    'layer': dict(suite='layer', only=' 192 768 16384', rounds=2),
    'activation': dict(suite='activation', rounds=4, repeats=10),
    'step': dict(STEP, **ONCE),
    'step without dropout': dict(STEP, dropout=0, **ONCE),
    'step with memory given back': dict(STEP, keep=False, rounds=1, repeats=1),
    'nano step': dict(suite='step', only='nano', rounds=2),
    'mlp': dict(suite='mlp', only=cases_of('0.23M'), rounds=20, repeats=5),
    'sample': dict(suite='sample', **ONCE),
    'adapter': dict(suite='adapter', rounds=1, repeats=5),
    'adapter without dropout': dict(suite='adapter', dropout=0, rounds=1, repeats=5),
    'graph layers': dict(suite='graph', only=' 8 ', **ONCE),
    'graph edges': dict(suite='graph', only='micro|nano', **ONCE),
}

# -----------------------------------------------------------------------------
jobs = ','.join(JOBS)
device = 'auto'  # 'cuda', 'cuda:0', 'mps', 'cpu'; auto takes the first there is
dtypes = 'float32'  # or 'float32,bfloat16', where the machine has bfloat16
# -----------------------------------------------------------------------------


def make(name, settings, folder):
    """What bench.py measures under these settings."""
    return {'commit': commit(), **run_json('study/bench.py', **settings, device=device, dtypes=dtypes)}


def make_table(rows):
    """A line for each case: median milliseconds (p20 to p80), as a multiple of the first of its group, peak memory."""
    shown, first = [], {}
    for row in rows:
        group = f'{row["where"]}, {row["dtype"]}'
        if 'error' in row:
            first.setdefault(group, math.nan)
            shown.append([f'{group}: {row["name"]}', f'failed: {row["error"]}', '', ''])
            continue
        low, median, high = 1e3 * np.percentile(row['seconds']['total'], [20, 50, 80])
        edges = 1e3 * np.median(row['seconds'].get('edges', 0))
        note = f', {edges / median:.2%} finds edges' if edges else ''
        ratio = median / first.setdefault(group, median)
        times = '' if math.isnan(ratio) else f'{ratio:.3g}'
        took = f'{median:.4g} ({low:.4g} to {high:.4g}){note}'
        shown.append([f'{group}: {row["name"]}', took, times, f'{row["peak_bytes"] / 2**20:,.0f} MiB'])
    return '\n'.join(markdown_table(['case', 'ms', 'times the first', 'peak memory'], shown))


def make_page():
    """table.md: for each machine its jobs."""
    parts = []
    for name, run in STUDY.read().items():
        job, _, machine = name.partition(' on ')
        about = f'{run["rounds"]} round(s) of {run["repeats"]}, commit {run["commit"] or "unknown"}'
        parts.append(f'### {job}\n\n{machine}; {about}\n\n{make_table(run["rows"])}\n')
    STUDY.show('\n'.join(parts))


if __name__ == '__main__':
    configure(globals())
    machine = f'{device_name(pick_device(device))}, torch {torch.__version__}, {dtypes}'
    STUDY.run_all({f'{job} on {machine}': JOBS[job] for job in choose('jobs', jobs, JOBS)}, make)
    make_page()
