"""sweep.py: every combination once, skipped when finished, resumed when cut off."""

import json
import os
import signal
import time

import pytest

from configurator import settings_of
from helpers import TINY, complaint, finish, flags, load, read_until, run_forked, start_forked
from run.records import ADDED
from study.sweep import check_record, list_runs, read_grid

CONFIGS = {'train_a.py': 'n_layer = 1\n', 'train_b.py': 'n_layer = 2\n'}


@pytest.fixture
def folder(tmp_path, dataset):
    settings = {**TINY, 'dataset': dataset}
    settings.pop('n_layer')
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text + ''.join(f'{key} = {value!r}\n' for key, value in settings.items()))
    return tmp_path


def test_runs_all_then_skips_all(folder):
    command = (*CONFIGS, '--root=runs', '--seed=1,2', '--learning_rate=1e-2')
    done = run_forked(folder, 'study/sweep.py', *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('4 runs, 0 of them finished') and done.stdout.count('best validation loss') == 4
    names = ['a,seed=1', 'a,seed=2', 'b,seed=1', 'b,seed=2']
    assert sorted(os.listdir(folder / 'runs')) == names
    for name in names:
        config = json.loads((folder / 'runs' / name / 'run.json').read_text())['config']
        assert (config['n_layer'], config['seed'], config['learning_rate']) == (
            1 + (name[0] == 'b'),
            int(name[-1]),
            1e-2,
        )
    before = [(folder / 'runs' / name / 'ckpt.pt').stat().st_mtime_ns for name in names]
    assert run_forked(folder, 'study/sweep.py', *command).stdout == '4 runs, 4 of them finished\n'
    assert before == [(folder / 'runs' / name / 'ckpt.pt').stat().st_mtime_ns for name in names]
    more = run_forked(folder, 'study/sweep.py', 'train_a.py', '--root=runs', '--seed=2,3', '--learning_rate=1e-2')
    assert more.stdout.startswith('2 runs, 1 of them finished')
    same = run_forked(folder, 'study/sweep.py', *command[:3], '--learning_rate=1e-2', '--seed=1,2')
    assert same.stdout == '4 runs, 4 of them finished\n'  # in whatever order the flags come
    other = complaint(folder, 'study/sweep.py', 'train_a.py', '--root=runs', '--seed=1,2,4', '--learning_rate=2e-2')
    assert other.startswith(
        'error: runs/a,seed=1 holds a run with learning_rate=0.01;'
    ) and 'a,seed=4' not in os.listdir(folder / 'runs')
    message = complaint(folder, 'study/sweep.py', *command, '--dtype=bfloat16')
    assert message.startswith("error: runs/a,seed=1 holds a run with dtype='float32';")
    assert run_forked(folder, 'study/sweep.py', *command, '--dtype=float32').stdout == '4 runs, 4 of them finished\n'


@pytest.mark.parametrize(
    'send',
    [
        lambda process: os.killpg(process.pid, signal.SIGINT),
        lambda process: os.killpg(process.pid, signal.SIGTERM),
        lambda process: process.terminate(),
    ],
    ids=['Ctrl-C', 'SIGTERM to all', 'SIGTERM to sweep.py'],
)
def test_goes_on_with_the_run_that_was_cut_off(folder, send):
    long = ('train_a.py', '--root=runs', *flags(max_iters=300, eval_interval=50))
    process = start_forked(folder, 'study/sweep.py', *long)
    read_until(process.stdout, '1 runs')
    while not (folder / 'runs/a/ckpt.pt').exists():
        assert process.poll() is None
        time.sleep(0.05)
    send(process)
    done = finish(process)
    assert done.returncode == 1 and 'the same command goes on where it was' in done.stderr
    at = load(folder / 'runs/a')['iter_num']
    assert 0 < at < 300
    done = run_forked(folder, 'study/sweep.py', *long)
    record = json.loads((folder / 'runs/a/run.json').read_text())
    assert f'stopped at iteration {at}' in (folder / 'runs/a/train.txt').read_text()
    assert done.returncode == 0 and record['resumed_at'] == at and 'finished' in record


def test_a_data_set_by_its_path_is_the_same_again(folder, dataset, monkeypatch):
    monkeypatch.chdir(folder)
    record = {'config': settings_of('train.py', [f'--dataset={dataset}'])}
    check_record('runs/a', record, settings_of('train.py', [f'--dataset={os.path.relpath(dataset)}']))
    with pytest.raises(ValueError, match='holds a run with dataset='):
        check_record('runs/a', record, settings_of('train.py', ['--dataset=./another']))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(changes=[{'iter': 3, 'before': {'learning_rate': 9.0}}]), 'settings that changed when it was resumed'),
        (dict(config=dict(init_from='out-base')), "init_from='out-base'"),
    ],
)
def test_a_run_that_began_with_others_or_changed_is_another(change, message):
    settings = settings_of('train.py', [])
    check_record('runs/a', {'config': settings | {'init_from': 'resume'}, 'changes': []}, settings)
    with pytest.raises(ValueError, match=message):
        check_record('runs/a', {**change, 'config': settings | change.get('config', {})}, settings)


def test_a_run_that_fails_is_named_and_the_others_go_on(folder):
    done = run_forked(folder, 'study/sweep.py', *CONFIGS, '--root=runs', '--learning_rate=1e-2,1e30')
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        'error: 2 of 4 runs did not finish: runs/a,learning_rate=1e30, runs/b,learning_rate=1e30'
    )
    assert 'not finite' in done.stdout and done.stdout.count('best validation loss') == 2
    before = (folder / 'runs/a,learning_rate=1e30/train.txt').read_text()
    again = run_forked(folder, 'study/sweep.py', *CONFIGS, '--root=runs', '--learning_rate=1e-2,1e30')
    assert again.returncode == 1 and again.stderr == done.stderr and 'not finite' in again.stdout
    assert (folder / 'runs/a,learning_rate=1e30/train.txt').read_text() == before  # not tried again


def test_two_at_once_share_the_runs(folder):
    """Each is trained once: the second sweep passes over the run that the first holds, and does or finds the others."""
    command = (*CONFIGS, '--root=runs', '--seed=1,2', *flags(max_iters=150, eval_interval=100))
    first = start_forked(folder, 'study/sweep.py', *command)
    read_until(first.stdout, '4 runs')
    while not (folder / 'runs/a,seed=1/run.json').exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = run_forked(folder, 'study/sweep.py', *command)
    first = finish(first)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert 'a,seed=1 is being trained by another sweep' in second.stdout
    for name in ('a,seed=1', 'a,seed=2', 'b,seed=1', 'b,seed=2'):
        said = (folder / 'runs' / name / 'train.txt').read_text()
        assert said.count('number of parameters') == 1 and 'finished' in json.loads(
            (folder / 'runs' / name / 'run.json').read_text()
        )


def test_a_record_from_before_a_setting_is_of_the_value_it_had(folder):
    """It is a run of the same command; one that asks for another value is refused."""
    args = list_runs([str(folder / 'train_a.py')], {})['a']
    settings = settings_of('train.py', args)
    old = {'config': {name: value for name, value in settings.items() if name not in ADDED}}
    assert len(old['config']) == len(settings) - len(ADDED)
    check_record('runs/a', old, settings)
    check_record('runs/a', {}, settings)
    for name, value in {'use_graph': True, 'graph_topk': 3}.items():
        with pytest.raises(ValueError, match=f'runs/a holds a run with {name}={ADDED[name]!r}; move it away'):
            check_record('runs/a', old, {**settings, name: value})
    with pytest.raises(ValueError, match='runs/a holds a run with n_embd=16; move it away'):
        check_record('runs/a', old, {**settings, 'n_embd': 32})


def test_mistakes_are_named_before_anything_runs(folder):
    os.makedirs(folder / 'damaged/a')
    (folder / 'damaged/a/run.json').write_text('{')
    assert 'damaged/a/run.json is damaged' in complaint(folder, 'study/sweep.py', 'train_a.py', '--root=damaged')
    assert 'at least one config file' in complaint(folder, 'study/sweep.py', '--seed=1,2')
    assert "unknown setting 'sed'" in complaint(folder, 'study/sweep.py', *CONFIGS, '--sed=1,2')
    assert 'folders of their own' in complaint(folder, 'study/sweep.py', *CONFIGS, '--out_dir=x')
    assert 'expected a config file or --key=value' in complaint(folder, 'study/sweep.py', *CONFIGS, '-seed=1')
    assert 'name each config file and each value once' in complaint(folder, 'study/sweep.py', *CONFIGS, '--seed=1,1')
    assert 'would be the same run' in complaint(folder, 'study/sweep.py', *CONFIGS, '--learning_rate=1e-3,0.001')
    (folder / 'train_gpt2.py').write_text("init_from = 'gpt2'\n")
    assert 'trained from scratch' in complaint(folder, 'study/sweep.py', 'train_gpt2.py', '--seed=1,2')
    (folder / 'train_eval.py').write_text('eval_only = True\n')
    assert 'trained from scratch' in complaint(folder, 'study/sweep.py', 'train_eval.py')
    assert not (folder / 'out-sweep').exists()


def test_numbers_joined_by_commas_are_several_values_and_words_are_one():
    grid = {'kan_targets': ['attn,mlp'], 'learning_rate': ['1e-3', '2E-3'], 'seed': ['1', '2']}
    args = 'train_a.py', '--kan_targets=attn,mlp', '--learning_rate=1e-3,2E-3', '--seed=1,2'
    assert read_grid(args) == (['train_a.py'], grid)
