"""What the studies share: they run what has no record, in several shells at once where there are several, and resume
what was cut off; and they say the same of several seeds.

    study = Study('nano')
    study.run_all(jobs, make)   # {name: job}; make(name, job, folder) works in a folder of its own, returns the record
    study.read()                # {name: record}

The records lie in results/<study>/runs.jsonl, a line a run with its log. Work under way lies in out-<study>/. Studies
that share a page have a folder together: Study('nano', part='graph') has results/nano/graph.jsonl and out-nano-graph/.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from configurator import ROOT, flags_of
from run.files import write_file
from run.records import read_log, read_record

RESUME = {'train.py': '--init_from=resume', 'finetune.py': '--resume=True'}


def read_runs(path):
    """The records of a runs.jsonl by name, {} where there is none; ValueError where a line is no record."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return {}
    return dict(parse_runs(path, state.st_ino, state.st_mtime_ns, state.st_size))


@functools.lru_cache(8)
def parse_runs(path, *state):
    """read_runs of a file in this state: a change of it is a new file of another number."""
    runs = {}
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            try:
                run = json.loads(line)
                is_second = run['name'] in runs
                runs[run['name']] = run
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}:{number} is damaged ({error!r}): take it from git again') from None
            if is_second:  # as a merge leaves it
                raise ValueError(f'{path}:{number} is a second record of {run["name"]!r}: leave one of them')
    return runs


def add_run(path, run):
    """Add a record to a runs.jsonl, in the order of names. Other processes may do so at the same time."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with FileLock(f'{path}.lock'):
        runs = read_runs(path) | {run['name']: run}
        write_file(path, ''.join(json.dumps(runs[name], allow_nan=False) + '\n' for name in sorted(runs)))


class Study:
    """The records of a study, and how the missing ones are made."""

    def __init__(self, name, root=ROOT, part=''):
        self.name = f'{name}-{part}' if part else name
        self.folder = Path(root, 'results', name)
        self.file = f'{part or "runs"}.jsonl'
        self.work = Path(root, f'out-{self.name}')

    def read(self):
        return read_runs(self.folder / self.file)

    def show(self, table):
        """Print the tables of the study and write them into table.md."""
        write_file(self.folder / 'table.md', table)
        print(table, end='')

    def fill(self, table):
        """Print the table of the study and put it into README.md, between the marks of its script."""
        fill(self.folder / 'README.md', f'study/{self.name}.py', table.splitlines())
        print(table, end='')

    def run_all(self, jobs, make):
        """Make the record of every job that has none; what another shell is at is waited for in the end."""
        # names without what a shell or a file system might stumble over
        folders = {name: self.work / re.sub(r'[^\w.+-]+', '_', name) for name in jobs}
        locks = {name: f'{folder}.lock' for name, folder in folders.items()}

        def run(name):
            add_run(self.folder / self.file, {'name': name, **make(name, jobs[name], folders[name])})
            shutil.rmtree(folders[name], ignore_errors=True)

        self.work.mkdir(exist_ok=True)
        bar = functools.partial(tqdm, desc=self.name, unit='run', disable=None)
        share(locks, lambda name: name in self.read(), run, progress=bar)


def fill(path, script, lines):
    """Put the lines of a table into a page, between the marks of the script that writes it there."""
    begin, end = f'<!-- {script} writes this table -->\n', '<!-- until here -->\n'
    before, is_there, rest = Path(path).read_text(encoding='utf-8').partition(begin)
    old, ends, after = rest.partition(end)
    if not (is_there and ends) or 'writes this table' in old or begin in after:
        raise ValueError(f'{path} wants {begin.strip()} once and {end.strip()} after it, on lines of their own')
    write_file(path, before + begin + '\n'.join(lines) + '\n' + end + after)


def choose(setting, text, choices):
    """The choices in a setting, joined by commas. ValueError for another one."""
    chosen = [choice for choice in text.split(',') if choice]
    if not set(chosen) <= set(choices):
        raise ValueError(f'{setting}: expected any of {", ".join(choices)}, got {text!r}')
    return chosen


def share(locks, is_done, do, wait=True, progress=iter):
    """do(name) for each name that is not done; returns what this shell has done. `locks` are files by name. Of several
    shells each does a part: a name whose lock another one holds is passed over and, with `wait`, come back to in the
    end, when that shell has done it or was stopped. Ctrl-C and SIGTERM end it in a line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = {}
    try:
        for blocking in (False, True) if wait else (False,):
            for name in progress(locks):
                with contextlib.suppress(Timeout), FileLock(locks[name], blocking=blocking):
                    if not is_done(name):
                        done[name] = do(name)
    except KeyboardInterrupt:
        sys.exit('stopped; the same command goes on where it was')
    return done


def run_script(script, args, out_dir, on_line=lambda line: None):
    """Run train.py or finetune.py to its end in out_dir, from its last checkpoint if there is one; returns its last
    line and its exit status. What it prints goes into a file of its name there, and line by line to `on_line`. Ctrl-C
    lets it save first.
    """
    os.makedirs(out_dir, exist_ok=True)
    wait_for_run(out_dir)
    resume = [RESUME[script]] if os.path.exists(os.path.join(out_dir, 'ckpt.pt')) else []
    command = [sys.executable, '-u', os.path.join(ROOT, script), *args, f'--out_dir={out_dir}', *resume]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last, stopped = '', False
    with open(os.path.join(out_dir, script.replace('.py', '.txt')), 'a', buffering=1, encoding='utf-8') as f:
        while process.poll() is None:
            try:
                for line in process.stdout:
                    f.write(line)
                    last = line.strip() or last
                    on_line(line)
                process.wait()
            except KeyboardInterrupt:  # it finishes its step and saves; another one ends it at once
                process.send_signal(signal.SIGTERM)
                stopped = True
    if stopped:
        raise KeyboardInterrupt
    return last, process.returncode


def wait_for_run(out_dir):
    """Until the run in out_dir ends, if there is one: its shell may have been killed alone."""
    lock = FileLock(os.path.join(out_dir, 'run.lock'))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f'waiting for the run that is under way in {out_dir}', flush=True)
        lock.acquire()
    lock.release()


def run_to_end(script, args, folder):
    """The record of a run of train.py or finetune.py in a folder of a study; ValueError where it did not end."""
    last, status = run_script(script, args, str(folder))
    run = read_run(folder)  # which may be that of an earlier try, of other settings
    has_ended = 'finished' in run if status == 0 else 'failed' in run and run['failed'] in last
    if not has_ended:
        raise ValueError(f'{folder} did not finish: {last}; see {folder / script.replace(".py", ".txt")}')
    run['config']['out_dir'] = f'{folder.parent.name}/{folder.name}'  # and no path of this machine
    return run


def run_json(script, **settings):
    """What a script prints in its last line, from JSON."""
    command = [sys.executable, os.path.join(ROOT, script), *flags_of(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f'{" ".join(command[1:])} failed, see above')
    return json.loads(done.stdout.splitlines()[-1])


def read_run(folder):
    """The record and the log of a run in one, as a line of runs.jsonl has them; {} where there is no run."""
    record = read_record(folder)
    return {**record, 'log': read_log(folder)} if record else {}


def deviation(values):
    """The sample standard deviation over the first axis; NaN for one value."""
    values = np.asarray(values, dtype=float)
    return values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], math.nan)


def mean_and_std(values, digits):
    """As text: the mean, and of several values ± the standard deviation."""
    spread = f' ± {deviation(values):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{spread}'


def paired(runs, others, value):
    """The values of runs {seed: run} and those of the others, on the seeds that both have."""
    seeds = sorted(runs.keys() & others.keys())
    return [value(runs[seed]) for seed in seeds], [value(others[seed]) for seed in seeds]


def check_machine(runs):
    """ValueError where records of times {name: record} are of more than one machine; older ones may not name theirs."""
    machines = {}
    for name, run in runs.items():
        machines.setdefault(run.get('device') or run.get('hardware'), name)
    if len(machines) > 1:
        (one, first), (other, second), *_ = machines.items()
        where = f'{first!r} is of {one or "an unnamed one"}, {second!r} of {other or "an unnamed one"}'
        raise ValueError(f'times on different machines do not compare: {where}; move the records of one away')


def holm(tests):
    """The names of the tests {name: p} that hold at 0.05 when all are counted (Holm 1979)."""
    held, tests = [], {name: p for name, p in tests.items() if not math.isnan(p)}
    for place, (name, p) in enumerate(sorted(tests.items(), key=lambda pair: pair[1])):
        if not p <= 0.05 / (len(tests) - place):
            break
        held.append(name)
    return held


def paired_p(values, baseline):
    """p of a two-sided paired t-test; NaN for fewer than two pairs, 1 where no pair differs."""
    from scipy.stats import ttest_rel

    if len(values) > 1 and np.array_equal(values, baseline):
        return 1.0
    return float(ttest_rel(values, baseline).pvalue) if len(values) > 1 else math.nan
