"""Train every combination of config files and settings, one run after another.

    python study/sweep.py config/train_shakespeare_char_nano.py config/train_shakespeare_char_nano_kan.py --seed=1,2,3
    python study/sweep.py config/train_shakespeare_char_nano_kan.py --root=out-pilot --learning_rate=1e-3,2e-3

Flags are those of train.py, where a number may be several, joined by commas. Each run has a folder of its own in --root
(out-sweep), named by its seed and what else sets it apart, and train.txt in it is what train.py printed. The same
command again skips the runs that finished or diverged and resumes the one that was cut off; given twice at once, on two
GPUs or cores, it shares the runs between the two.
"""

import itertools
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the repository

from tqdm import tqdm

from configurator import INCIDENTAL, configure, divide, settings_of
from data import loader
from data.tinyshakespeare import BY_NAME, NINE_PLAYS
from run.records import began_with, complete, read_record
from study.runner import run_script, share

# -----------------------------------------------------------------------------
root = 'out-sweep'  # the folder of the runs' folders
# -----------------------------------------------------------------------------


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
            raise ValueError(f'{arg}: the runs of a sweep start from scratch, in folders of their own (--root=...)')
        else:
            grid[name] = text.split(',') if re.fullmatch(r'[-+.\deE_,]+', text) else [text]
    if not configs:
        raise ValueError('expected at least one config file of train.py')
    return configs, grid


def list_runs(configs, grid):
    """{name: the arguments of train.py}"""
    runs = {}
    for config, values in itertools.product(configs, itertools.product(*grid.values())):
        flags = {name: f'{name}={value}' for name, value in zip(grid, values)}
        varied = sorted(flag for name, flag in flags.items() if name == 'seed' or len(grid[name]) > 1)
        name = ','.join([os.path.basename(config).removesuffix('.py').removeprefix('train_'), *varied])
        if name in runs:
            raise ValueError(f'two of the runs are called {name}: name each config file and each value once')
        runs[name] = [config, *(f'--{flag}' for flag in flags.values())]
    return runs


def read_settings(runs):
    """{name: the settings of train.py}. ValueError for runs that are not trained from scratch, or are the same."""
    settings, known = {name: settings_of('train.py', args) for name, args in runs.items()}, {}
    for name, chosen in settings.items():
        if chosen['init_from'] != 'scratch' or chosen['eval_only']:
            raise ValueError(f'{runs[name][0]}: these runs are trained from scratch, not with init_from or eval_only')
        other = known.setdefault(str({key: value for key, value in chosen.items() if key not in INCIDENTAL}), name)
        if other != name:
            raise ValueError(f'{other} and {name} would be the same run')
    return settings


def check_record(place, record, settings):
    """ValueError where `place` holds a run with other settings than those of this command."""
    settings = settings | dict(dataset=loader.name_from_anywhere(settings['dataset']))
    config = complete(record.get('config', settings))
    free = (*INCIDENTAL, 'dtype') if settings['dtype'] == 'auto' else INCIDENTAL  # a record has what auto took
    others = [f'{name}={value!r}' for name, value in config.items() if name not in free and value != settings.get(name)]
    if record.get('changes'):
        others.append(f'settings that changed when it was resumed ({record["changes"]})')
    if began_with(config):
        others.append(f'init_from={began_with(config)!r}')
    if others:
        raise ValueError(f'{place} holds a run with {", ".join(others)}; move it away first')


def check_texts(settings, records):
    """ValueError where a run without a record ({name: its settings}) would be on another text than the records of its
    data set are on, which is prepared if it is not there.
    """
    for dataset in {chosen['dataset'] for name, chosen in settings.items() if name not in records}:
        loader.prepare_dataset(dataset)
        here = loader.read_meta(dataset)
        splits = loader.splits_of(dataset, here)
        for run in records.values():
            there = run.get('dataset') or {}
            if there.get('name') == dataset and there['splits'] != splits:
                texts = f'{run["name"]!r} is a run on {there["source"]}, data/{dataset} holds {here.get("source")}'
                how = f' by --source={BY_NAME}' if NINE_PLAYS in there['source'] else ''
                raise ValueError(f'{texts}: prepare the text of the record{how}, or move the record away')


def sweep(runs, root):
    """Train what has not finished in root/<name>. Returns the folders of the runs that did not finish."""
    settings = read_settings(runs)
    folders = {name: os.path.join(root, name) for name in runs}
    for name, folder in folders.items():
        check_record(folder, read_record(folder), settings[name])
    missing = [name for name, folder in folders.items() if 'finished' not in read_record(folder)]
    print(f'{len(runs)} runs, {len(runs) - len(missing)} of them finished', flush=True)
    failed, done = [], 0
    with tqdm(total=sum(settings[name]['max_iters'] for name in missing), unit='iter', disable=None) as bar:
        for name in missing:
            last = train(name, runs[name], folders[name], bar)
            record = read_record(folders[name])
            done += settings[name]['max_iters']
            bar.update(done - bar.n)
            if 'finished' in record:
                state = f': best validation loss {record["final"]["best_val_loss"]:.4f}'
            elif last is None and 'failed' not in record:
                state = ' is being trained by another sweep'
            else:
                failed.append(folders[name])
                state = f' did not finish: {record.get("failed", last)}'
            tqdm.write(folders[name] + state)
            sys.stdout.flush()
    return failed


def train(name, args, folder, bar):
    """One run; returns the last line of train.py, or None where it is done already or another sweep is at it."""
    before = bar.n

    def show(line):
        if found := re.match(r'(?:iter|step) (\d+): (.*)', line):
            bar.set_postfix_str(f'{name}: {found[2]}', refresh=False)
            bar.update(before + int(found[1]) - bar.n)

    def is_done(name):
        return bool({'finished', 'failed'} & read_record(folder).keys())

    os.makedirs(folder, exist_ok=True)
    locks = {name: os.path.join(folder, 'sweep.lock')}
    return share(locks, is_done, lambda name: run_script('train.py', args, folder, show)[0], wait=False).get(name)


if __name__ == '__main__':
    own, others = divide(sys.argv[1:], ['root'])
    configure(globals(), own)
    runs = list_runs(*read_grid(others))
    failed = sweep(runs, root)
    if failed:
        sys.exit(f'error: {len(failed)} of {len(runs)} runs did not finish: {", ".join(failed)}')
