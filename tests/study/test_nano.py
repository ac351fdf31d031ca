"""nano.py: its runs are those that have records, under the settings that train.py has today."""

import functools
import json

import pytest

from configurator import INCIDENTAL, settings_of
from helpers import ROOT, TINY, complaint, flags
from run.records import ADDED, complete
from study import nano
from study.compare import check_run, group_runs
from study.runner import Study, read_runs
from study.sweep import check_record, read_settings


def read_study(study):
    return read_runs(ROOT / 'results/nano' / nano.study_of(study).file)


@pytest.mark.parametrize('study', nano.RUNS)
def test_records_are_those_of_the_runs(study):
    runs = nano.list_all(study)
    assert sorted(runs) == list(read_study(study))
    nano.check_records(study, runs)


@pytest.mark.parametrize('study', nano.RUNS)
def test_records_have_the_settings_of_train(study):
    """A setting that they do not name is in ADDED, with the value it had when there was no choice."""
    wanted = settings_of('train.py', []).keys() - set(INCIDENTAL)
    for name, run in read_study(study).items():
        assert complete(run['config']).keys() - set(INCIDENTAL) == wanted, name


def test_what_is_added_is_what_train_does_by_default():
    assert ADDED.items() <= settings_of('train.py', []).items()


def test_a_new_seed_belongs_to_the_row_of_the_old_ones():
    """Of the KAN-GPT, whose five records name no setting of graph attention."""
    name = 'shakespeare_char_nano_kan,seed='
    runs = [check_run(key, run, 'there') for key, run in read_study('main').items() if key.startswith(name)]
    config = settings_of('train.py', [str(ROOT / 'config/train_shakespeare_char_nano_kan.py'), '--seed=6'])
    assert len(runs) == 5 and config['use_graph'] is False and 'graph_kind' in config
    new = {**read_study('main')[f'{name}1'], 'config': {**config, 'dtype': 'float32'}}
    assert not ADDED.keys() & read_study('main')[f'{name}1']['config'].keys()
    (group,) = group_runs([*runs, check_run(f'{name}6', new, 'here')])
    assert [run['record']['config']['seed'] for run in group['finished']] == [1, 2, 3, 4, 5, 6]
    for seed in range(1, 6):
        old = read_study('main')[f'{name}{seed}']
        check_record('there', old, {**config, 'seed': seed})
        with pytest.raises(ValueError, match='there holds a run with use_graph=False; move it away'):
            check_record('there', old, {**config, 'seed': seed, 'use_graph': True})


def test_a_record_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, 'Study', functools.partial(Study, root=tmp_path))
    run = read_study('longer')['shakespeare_char_nano,seed=1']
    path = tmp_path / 'results/nano/longer.jsonl'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**run, 'config': {**run['config'], 'learning_rate': 0.5}}) + '\n')
    message = 'results/nano/longer.jsonl: shakespeare_char_nano,seed=1 holds a run with learning_rate=0.5; '
    with pytest.raises(ValueError, match=message):
        nano.check_records('longer', nano.list_all('longer'))


def test_every_study_is_shown_and_has_runs_of_its_own():
    assert nano.RUNS.keys() == nano.SHOWN.keys() and {*nano.BESIDE, *nano.FIGURES} <= nano.RUNS.keys()
    files = [nano.study_of(study).file for study in nano.RUNS]
    assert sorted(files) == sorted(path.name for path in ROOT.glob('results/nano/*.jsonl'))
    assert len({nano.study_of(study).work for study in nano.RUNS}) == len(files)
    names = [name for study in nano.RUNS for name in nano.list_all(study)]
    assert len(names) == 80 + 6 + 2 + 2 + 3 + 35 + 1 + 3 + 4 + 6
    for study in nano.RUNS:
        assert len(read_settings(nano.list_all(study))) == len(nano.list_all(study))  # no two are the same


def test_a_run_that_diverged_is_a_record_and_one_that_failed_is_not(tmp_path, dataset, forks):
    args = flags(**{**TINY, 'dataset': dataset})
    run = nano.make('a', args, tmp_path / 'a')
    assert 'finished' in run and [line['iter'] for line in run['log']] == [0, 2, 4]
    run = nano.make('b', [*args, '--learning_rate=1e30', '--max_iters=40'], tmp_path / 'b')
    assert 'not finite' in run['failed'] and 'finished' not in run
    with pytest.raises(ValueError, match='c did not finish: error: .*n_head.*; see .*/train.txt'):
        nano.make('c', [*args, '--n_head=3'], tmp_path / 'c')
    with pytest.raises(ValueError, match='a holds a run with learning_rate=0.01; move it away'):
        nano.make(
            'a', [*args, '--learning_rate=1e-3'], tmp_path / 'a'
        )  # what was cut off does not go on as another run


def test_a_study_that_is_not_there_is_named(tmp_path):
    words = complaint(tmp_path, 'study/nano.py', '--studies=main,graf')
    assert words.startswith('error: studies: expected any of tuning, ') and words.endswith(", got 'main,graf'\n")
