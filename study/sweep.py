"""
Train every combination of config files and settings, one run after another.

    python study/sweep.py config/train_shakespeare_char_nano.py config/train_shakespeare_char_nano_kan.py --seed=1,2,3
    python study/sweep.py config/train_shakespeare_char_nano_kan.py --root=out-pilot --learning_rate=1e-3,2e-3 --max_iters=300 --lr_decay_iters=300

Flags are those of train.py, where a number may be several, joined by commas. Each run has a folder of its own in --root (out-sweep),
named by its seed and what else sets it apart, and train.txt in it is what train.py printed. The same command again skips the runs that
finished or diverged and resumes the one that was cut off; given twice at once, on two GPUs or cores, it shares the runs between the two.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from filelock import FileLock, Timeout
from tqdm import tqdm

from configurator import INCIDENTAL, ROOT, configure, divide, settings_of
from run.records import read_record

# -----------------------------------------------------------------------------
root = 'out-sweep'  # the folder of the runs' folders
# -----------------------------------------------------------------------------
own, others = divide(sys.argv[1:], ['root'])
configure(globals(), own)


def read_grid(argv):
    """(config files, {setting: its values as text}) of the arguments for train.py"""
    configs, grid = [], {}
    for arg in argv:
        name, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('-'):
            configs.append(arg)
        elif not arg.startswith('--') or not equals:
            raise ValueError(f'expected a config file or --key=value, got {arg!r}')
        elif name in ('out_dir', 'init_from', 'eval_only'):
            raise ValueError(
                f'{arg}: the runs of a sweep start from scratch and have folders of their own (--root=...)'
            )
        else:
            grid[name] = text.split(',') if re.fullmatch(r'[-+.\deE_,]+', text) else [text]
    if not configs:
        raise ValueError('expected at least one config file of train.py')
    return configs, grid


def list_runs(configs, grid):
    """{out_dir: the arguments of train.py}"""
    runs = {}
    for config, values in itertools.product(configs, itertools.product(*grid.values())):
        flags = [f'--{name}={value}' for name, value in zip(grid, values)]
        varied = sorted(
            flag.removeprefix('--') for flag, name in zip(flags, grid) if name == 'seed' or len(grid[name]) > 1
        )
        name = ','.join([os.path.basename(config).removesuffix('.py').removeprefix('train_'), *varied])
        if os.path.join(root, name) in runs:
            raise ValueError(f'two of the runs are called {name}: name each config file and each value once')
        runs[os.path.join(root, name)] = [config, *flags]
    return runs


def check_record(out_dir, record, settings):
    """ValueError where the folder holds a run with other settings than those of this command."""
    config = record.get('config', {})
    others = [
        f'{name}={config[name]!r}'
        for name in config
        if name not in (*INCIDENTAL, 'dtype') and config[name] != settings.get(name)
    ]
    if others:
        raise ValueError(f'{out_dir} holds a run with {", ".join(others)}; move it away or choose another --root')


def train(out_dir, args, bar):
    """Run train.py to its end, from its last checkpoint if there is one; returns its last line. Ctrl-C lets it save first."""
    started = os.path.exists(os.path.join(out_dir, 'ckpt.pt'))
    command = [
        sys.executable,
        os.path.join(ROOT, 'train.py'),
        *args,
        f'--out_dir={out_dir}',
        *['--init_from=resume'] * started,
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env={**os.environ, 'PYTHONUNBUFFERED': '1'}, **pipes)
    before, last, stopped = bar.n, '', False
    with open(os.path.join(out_dir, 'train.txt'), 'a', buffering=1, encoding='utf-8') as f:
        while process.poll() is None:
            try:
                for line in process.stdout:
                    f.write(line)
                    last = line.strip() or last
                    if found := re.match(r'(?:iter|step) (\d+): (.*)', line):
                        bar.set_postfix_str(f'{os.path.basename(out_dir)}: {found[2]}', refresh=False)
                        bar.update(before + int(found[1]) - bar.n)
                process.wait()
            except KeyboardInterrupt:  # it finishes its step and saves; another one ends it at once
                process.send_signal(signal.SIGTERM)
                stopped = True
    if stopped:
        raise KeyboardInterrupt
    return last


def say(text):
    tqdm.write(text)
    sys.stdout.flush()


signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
configs, grid = read_grid(others)
runs = list_runs(configs, grid)
settings = {out_dir: settings_of('train.py', args) for out_dir, args in runs.items()}
known = {}
for out_dir, chosen in settings.items():
    if chosen['init_from'] != 'scratch' or chosen['eval_only']:
        raise ValueError(
            f'{runs[out_dir][0]}: the runs of a sweep are trained from scratch, not with init_from or eval_only'
        )
    other = known.setdefault(str({key: value for key, value in chosen.items() if key not in INCIDENTAL}), out_dir)
    if other != out_dir:
        raise ValueError(f'{other} and {out_dir} would be the same run')
found = {out_dir: read_record(out_dir) for out_dir in runs}
for out_dir, record in found.items():
    check_record(out_dir, record, settings[out_dir])
missing = [out_dir for out_dir, record in found.items() if 'finished' not in record]
print(f'{len(runs)} runs, {len(runs) - len(missing)} of them finished', flush=True)
failed = []
with tqdm(total=sum(settings[out_dir]['max_iters'] for out_dir in missing), unit='iter', disable=None) as bar:
    for i, out_dir in enumerate(missing, 1):
        os.makedirs(out_dir, exist_ok=True)
        last = ''
        try:
            with FileLock(os.path.join(out_dir, 'sweep.lock'), blocking=False):
                if not {'finished', 'failed'} & read_record(out_dir).keys():
                    last = train(out_dir, runs[out_dir], bar)
        except Timeout:
            last = None
        except KeyboardInterrupt:
            sys.exit('stopped; the same command goes on where it was')
        record = read_record(out_dir)
        bar.update(sum(settings[out_dir]['max_iters'] for out_dir in missing[:i]) - bar.n)
        if last is None:
            say(f'{out_dir} is being trained by another sweep')
        elif 'finished' in record:
            say(f'{out_dir}: best validation loss {record["final"]["best_val_loss"]:.4f}')
        else:
            failed.append(out_dir)
            say(f'{out_dir} did not finish: {record.get("failed", last)}')
if failed:
    sys.exit(f'error: {len(failed)} of {len(runs)} runs did not finish: {", ".join(failed)}')
