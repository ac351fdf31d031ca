"""runner.py: every record is made once, by however many processes, and what is cut off goes on; statistics of seeds."""

import json
import math
import signal
import statistics
import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats

from helpers import ROOT, TINY, complaint, finish, flags, load, start_forked
from study import runner
from study.runner import (
    Study,
    add_run,
    check_machine,
    choose,
    deviation,
    fill,
    mean_and_std,
    paired,
    paired_p,
    read_run,
    read_runs,
    share,
)

END = '<!-- until here -->\n'
TWO = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
from study.runner import Study, add_run

folder = Path(sys.argv[1])

def meet():
    Path(folder, str(os.getpid())).touch()
    while len([path for path in folder.iterdir() if path.name.isdigit()]) < 2:
        time.sleep(0.01)

def make(name, job, work):
    with open(folder / 'made.txt', 'a') as f:
        f.write(f'{{name}}, {{os.getpid()}}\\n')
    time.sleep(0.1)
    return {{'job': job}}

meet()
if sys.argv[2] == 'run_all':
    Study('x', folder).run_all({{f'run {{i:02}}, "a/b"': i for i in range(12)}}, make)
else:
    for i in range(20):
        add_run(folder / 'runs.jsonl', {{'name': f'{{i:02}} of {{sys.argv[2]}}', 'i': i}})
"""
SLOW = """
import sys, time

sys.path.insert(0, {root!r})
from study.runner import Study

def make(name, job, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'steps', 'a+', buffering=1) as f:
        while f.tell() < job:
            f.write('.')
            f.flush()
            time.sleep(0.05)
        return {{'steps': f.tell()}}

Study('x', '.').run_all({{'a run': 100}}, make)
"""
TRAINED = """
import sys

sys.path.insert(0, {root!r})
from study.runner import Study, read_run, run_script

def make(name, args, folder):
    run_script('train.py', args, str(folder))
    return read_run(str(folder))

Study('x', '.').run_all({{'a run': sys.argv[1:]}}, make)
"""


def start(folder, script, *args):
    (folder / 'script.py').write_text(script.format(root=str(ROOT)))
    return start_forked(folder, folder / 'script.py', *args)


def finish_well(*processes):
    for process in processes:
        done = finish(process)
        assert done.returncode == 0, done.stderr


def test_two_processes_make_each_record_once(tmp_path):
    finish_well(*[start(tmp_path, TWO, str(tmp_path), 'run_all') for _ in range(2)])
    made = [line.rpartition(', ') for line in (tmp_path / 'made.txt').read_text().splitlines()]
    names = [f'run {i:02}, "a/b"' for i in range(12)]
    assert sorted(name for name, _, _ in made) == names and len({process for _, _, process in made}) == 2
    assert Study('x', tmp_path).read() == {name: {'name': name, 'job': i} for i, name in enumerate(names)}
    assert [path.suffix for path in (tmp_path / 'out-x').iterdir()] == ['.lock'] * 12  # nothing else is left


def test_two_processes_lose_no_line_and_keep_the_order(tmp_path):
    finish_well(*[start(tmp_path, TWO, str(tmp_path), who) for who in ('one', 'other')])
    names = [f'{i:02} of {who}' for i in range(20) for who in ('one', 'other')]
    lines = [json.loads(line) for line in (tmp_path / 'runs.jsonl').read_text().splitlines()]
    assert [line['name'] for line in lines] == names == list(read_runs(tmp_path / 'runs.jsonl'))
    assert [line['i'] for line in lines] == [i for i in range(20) for _ in range(2)]
    assert not (tmp_path / 'runs.jsonl.tmp').exists()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_work_that_was_cut_off_is_taken_up_again(tmp_path, number):
    process = start(tmp_path, SLOW)
    steps = tmp_path / 'out-x/a_run/steps'
    while not (steps.exists() and steps.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 1 and done.stderr == 'stopped; the same command goes on where it was\n'
    assert 0 < len(steps.read_text()) < 100 and Study('x', tmp_path).read() == {}
    steps.write_text('.' * 97)
    finish_well(start(tmp_path, SLOW))
    assert Study('x', tmp_path).read() == {'a run': {'name': 'a run', 'steps': 100}}
    assert not steps.parent.exists()


def test_a_run_of_train_that_was_cut_off_goes_on_where_it_was(tmp_path, dataset):
    """The signal goes to the study alone, which hands it on and waits until the run has saved."""
    args = flags(**{**TINY, 'dataset': dataset, 'max_iters': 400, 'eval_interval': 50})
    process = start(tmp_path, TRAINED, *args)
    folder = tmp_path / 'out-x/a_run'
    while not (folder / 'ckpt.pt').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    done = finish(process)
    assert done.returncode == 1
    assert done.stderr.endswith('stopped; the same command goes on where it was\n') and 'Traceback' not in done.stderr
    at = load(folder)['iter_num']
    assert 0 < at < 400 and f'stopped at iteration {at}' in (folder / 'train.txt').read_text()
    assert Study('x', tmp_path).read() == {}
    finish_well(start(tmp_path, TRAINED, *args))
    (run,) = Study('x', tmp_path).read().values()
    assert run['resumed_at'] == at and 'finished' in run
    assert [line['iter'] for line in run['log']] == list(range(0, 401, 50)) and not folder.exists()


def test_what_was_stopped_says_so_in_a_line(tmp_path):
    def do(name):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match='stopped; the same command goes on where it was'):
        share({'a': tmp_path / 'lock'}, lambda name: False, do)


def test_what_another_holds_is_passed_over_and_what_is_done_is_left_alone(tmp_path):
    locks = {name: tmp_path / name for name in 'abc'}
    with FileLock(locks['a']):
        done = share(locks, lambda name: name == 'b', lambda name: f'{name} done', wait=False)
    assert done == {'c': 'c done'}
    assert share(locks, lambda name: name in 'bc', lambda name: f'{name} done') == {'a': 'a done'}


def test_a_run_of_a_script_prints_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'ROOT', str(tmp_path))
    for script in ('train.py', 'finetune.py'):
        (tmp_path / script).write_text(
            'import sys\nprint(*sys.argv[1:])\nprint("the last", file=sys.stderr)\nprint()\n'
        )
    out, lines = tmp_path / 'out', []
    assert runner.run_script('train.py', ['--seed=1'], str(out), lines.append) == ('the last', 0)
    assert lines == [f'--seed=1 --out_dir={out}\n', 'the last\n', '\n']
    (out / 'ckpt.pt').touch()
    runner.run_script('train.py', [], str(out))
    runner.run_script('finetune.py', [], str(out))
    text = ''.join(lines) + f'--out_dir={out} --init_from=resume\nthe last\n\n'
    assert (out / 'train.txt').read_text() == text
    assert (out / 'finetune.txt').read_text() == f'--out_dir={out} --resume=True\nthe last\n\n'


def test_a_run_whose_shell_was_killed_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, 'ROOT', str(tmp_path))
    (tmp_path / 'train.py').write_text('import sys\nprint(sys.argv[-1])\n')
    begun = threading.Event()

    def train():
        with FileLock(tmp_path / 'run.lock'):
            begun.set()
            time.sleep(0.5)
            (tmp_path / 'ckpt.pt').touch()

    thread = threading.Thread(target=train)
    thread.start()
    assert begun.wait(30)
    assert runner.run_script('train.py', [], str(tmp_path)) == ('--init_from=resume', 0)
    thread.join()
    assert capsys.readouterr().out == f'waiting for the run that is under way in {tmp_path}\n'


@pytest.mark.parametrize(
    'ends, record, message',
    [
        ('sys.exit("error: refused")', dict(finished='then'), 'did not finish: error: refused'),
        ('sys.exit("error: refused")', dict(failed='the loss is nan'), 'did not finish: error: refused'),
        ('print("stopped")', dict(), 'did not finish: stopped'),
        ('sys.exit("error: the loss is nan; the checkpoints are untouched")', dict(failed='the loss is nan'), ''),
        ('print("done")', dict(finished='now'), ''),
    ],
)
def test_the_record_of_an_earlier_try_is_not_taken_for_that_of_this_one(tmp_path, monkeypatch, ends, record, message):
    monkeypatch.setattr(runner, 'ROOT', str(tmp_path))
    (tmp_path / 'train.py').write_text(f'import sys\n{ends}\n')
    folder = tmp_path / 'out-x' / 'run'
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps(dict(record, config={})))
    if message:
        with pytest.raises(ValueError, match=message):
            runner.run_to_end('train.py', [], folder)
    else:
        assert runner.run_to_end('train.py', [], folder)['config'] == {'out_dir': 'out-x/run'}


def test_two_records_of_one_name_are_refused(tmp_path):
    (tmp_path / 'runs.jsonl').write_text('{"name": "a", "n": 1}\n{"name": "b"}\n{"name": "a", "n": 2}\n')
    with pytest.raises(ValueError, match="runs.jsonl:3 is a second record of 'a': leave one of them"):
        add_run(tmp_path / 'runs.jsonl', {'name': 'c'})


def test_runs_are_paired_by_seed():
    assert paired({1: 5, 2: 7, 4: 9}, {4: 1, 1: 2, 3: 8}, str) == (['5', '9'], ['2', '1'])


def test_what_a_script_prints_last_is_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'ROOT', str(tmp_path))
    text = 'import sys\nprint("a table")\nprint(\'{"n": 1, "args": "\' + " ".join(sys.argv[1:]) + \'"}\')\n'
    (tmp_path / 'script.py').write_text(text)
    assert runner.run_json('script.py', n=3, only=' a ') == {'n': 1, 'args': '--n=3 --only= a '}
    (tmp_path / 'script.py').write_text('raise SystemExit(3)')
    with pytest.raises(ValueError, match='script.py --n=3 failed, see above'):
        runner.run_json('script.py', n=3)


@pytest.mark.parametrize('line', ['{"name": "b"', '{"nam": "b"}', '["b"]', ''])
def test_a_damaged_line_is_named_in_one_line(tmp_path, line):
    path = tmp_path / 'runs.jsonl'
    path.write_text(f'{{"name": "a"}}\n{line}\n{{"name": "c"}}\n')
    with pytest.raises(ValueError, match=f'{path}:2 is damaged .*: take it from git again') as caught:
        read_runs(path)
    assert '\n' not in str(caught.value)
    assert complaint(tmp_path, 'study/compare.py', 'runs.jsonl').startswith('error: runs.jsonl:2 is damaged ')
    with pytest.raises(ValueError, match='is damaged'):
        add_run(path, {'name': 'd'})
    assert path.read_text().startswith('{"name": "a"}\n' + line)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_refused(tmp_path, value):
    path = tmp_path / 'results/x/runs.jsonl'
    add_run(path, {'name': 'a', 'loss': 1.5})
    before = path.read_bytes()
    with pytest.raises(ValueError, match='JSON compliant'):
        add_run(path, {'name': 'b', 'log': [{'loss': value}]})
    assert path.read_bytes() == before and read_runs(path) == {'a': {'name': 'a', 'loss': 1.5}}
    assert {path.name for path in path.parent.iterdir()} <= {'runs.jsonl', 'runs.jsonl.lock'}


def test_records_are_read_anew_when_they_have_changed(tmp_path):
    path = tmp_path / 'runs.jsonl'
    assert read_runs(path) == {}
    add_run(path, {'name': 'b', 'loss': 1.5})
    runs = read_runs(path)
    runs['c'] = {}
    assert read_runs(path) == {'b': {'name': 'b', 'loss': 1.5}}  # what a caller adds is its own
    add_run(path, {'name': 'b', 'loss': 2.5})
    add_run(path, {'name': 'a'})
    assert read_runs(path) == {'a': {'name': 'a'}, 'b': {'name': 'b', 'loss': 2.5}}


def test_a_run_is_its_record_and_its_log(tmp_path):
    assert read_run(tmp_path / 'nowhere') == {}
    (tmp_path / 'run.json').write_text('{"seed": 1}')
    (tmp_path / 'log.jsonl').write_text('{"iter": 0}\n{"iter": 5}\n{"ite')
    assert read_run(tmp_path) == {'seed': 1, 'log': [{'iter': 0}, {'iter': 5}]}


def test_choices_are_those_that_there_are():
    assert choose('jobs', 'b,a', {'a': 1, 'b': 2}) == ['b', 'a'] and choose('jobs', '', 'ab') == []
    with pytest.raises(ValueError, match="jobs: expected any of a, b, got 'a,c'"):
        choose('jobs', 'a,c', ('a', 'b'))


def test_deviation_is_that_of_a_sample():
    values = np.random.default_rng(0).normal(size=(5, 3))
    assert deviation(values) == pytest.approx([statistics.stdev(column) for column in values.T])
    assert deviation([1, 2, 4]) == pytest.approx(statistics.stdev([1, 2, 4]))
    assert np.isnan(deviation(values[:1])).tolist() == [True] * 3 and math.isnan(deviation([1.0]))


def test_mean_and_deviation_as_text():
    assert mean_and_std([1.0, 2.0, 4.0], 3) == f'{7 / 3:.3f} ± {statistics.stdev([1, 2, 4]):.3f}' == '2.333 ± 1.528'
    assert mean_and_std([1.25], 1) == f'{1.25:.1f}'


def test_p_is_that_of_the_textbook_and_of_scipy():
    ours, theirs = [1.5, 1.54, 1.52, 1.49], [1.45, 1.47, 1.5, 1.5]
    apart = np.subtract(ours, theirs)
    t = apart.mean() / (statistics.stdev(apart) / math.sqrt(4))
    assert paired_p(ours, theirs) == pytest.approx(2 * stats.t.sf(abs(t), 3))
    assert paired_p(ours, theirs) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert paired_p(ours, theirs) != pytest.approx(stats.ttest_ind(ours, theirs).pvalue)
    assert paired_p([1.0, 2.0], [1.0, 2.0]) == 1  # and no NaN, which Holm's correction would not count
    assert math.isnan(paired_p([1.0], [2.0])) and math.isnan(paired_p([], []))


def test_times_of_different_machines_are_refused():
    check_machine({'a': dict(device='Xeon'), 'b': dict(hardware='Xeon')})
    check_machine({'a': {}, 'b': {}})
    with pytest.raises(ValueError, match="'a' is of an unnamed one, 'c' of Xeon; move"):
        check_machine({'a': {}, 'b': {}, 'c': dict(device='Xeon')})


def test_what_holds_when_all_tests_are_counted():
    assert runner.holm({'a': 0.04, 'b': 0.001, 'c': 0.02}) == ['b', 'c', 'a']
    assert runner.holm({'a': 0.04, 'b': 0.001, 'c': 0.03}) == ['b']  # 0.03 is above 0.05 / 2, and so a falls, too
    assert runner.holm({'a': math.nan, 'b': 1e-4}) == runner.holm({'b': 1e-4, 'a': math.nan}) == ['b']
    assert runner.holm({'a': float('nan')}) == runner.holm({}) == []


def test_a_table_is_put_between_its_marks(tmp_path):
    path = tmp_path / 'page.md'
    page = 'a\n<!-- x.py writes this table -->\n{}<!-- until here -->\nb\n'
    path.write_text(page.format('old\n') + page.format('').replace('x.py', 'y.py'))
    for _ in range(2):
        fill(path, 'x.py', ['| one |', '| two |'])
        assert path.read_text() == page.format('| one |\n| two |\n') + page.format('').replace('x.py', 'y.py')


X, Y = (f'<!-- {script} writes this table -->\n' for script in ('x.py', 'y.py'))


@pytest.mark.parametrize('text', ['', X, X + X + END, X + END + X + END, X + 'prose\n' + Y + END])
def test_a_page_without_marks_is_left_alone(text, tmp_path):
    path = tmp_path / 'page.md'
    path.write_text(text)
    with pytest.raises(
        ValueError, match='page.md wants <!-- x.py writes this table --> once and <!-- until here --> after'
    ):
        fill(path, 'x.py', [])
    assert path.read_text() == text
