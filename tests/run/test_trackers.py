"""What wandb and TensorBoard are told, and what happens where they fail."""

import sys
from types import ModuleType

import pytest

from configurator import settings_of
from helpers import FAKE_WANDB, read_points
from run import records
from run.checkpoint import set_aside
from run.trackers import Trackers, names_of_trackers


@pytest.fixture
def said():
    return []


@pytest.fixture
def begin(tmp_path, said):
    """Trackers of a run in out/, or of an evaluation alone."""

    def begin(log, resumed_at=None, is_run=True, **settings):
        config = {**settings_of('train.py', []), 'out_dir': 'out', **settings}
        record = dict(config=config, resumed_at=resumed_at)
        return Trackers(str(tmp_path / 'out') if is_run else None, record, log, said.append)

    return begin


@pytest.fixture
def wandb(monkeypatch):
    """The module in place of wandb's; `calls` is what it was told."""
    wandb = ModuleType('wandb')
    exec(FAKE_WANDB, wandb.__dict__)
    wandb.calls = []
    wandb.print = lambda *words: wandb.calls.append(words)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    return wandb


@pytest.fixture
def tensorboard(monkeypatch):
    """Files of the same second sort by a counter, as names do: 10 would come before 9."""
    module = pytest.importorskip('tensorboard.summary.writer.event_file_writer')
    monkeypatch.setattr(module, '_global_uid', module.AtomicCounter(0))


def line(i, loss):
    return dict(iter=i, val_loss=loss, tokens_per_s=None if i == 0 else 7)


def show(trackers, *lines):
    """The lines as a run logs them: one takes the place of an earlier one of the same iteration."""
    log = trackers.log
    for new in lines:
        log[:] = [before for before in log if before['iter'] < new['iter']] + [new]
        trackers.show()


# which


@pytest.mark.parametrize(
    'settings, names',
    [
        ({}, set()),
        (dict(wandb_log=True), {'wandb'}),
        (dict(log_to='wandb'), {'wandb'}),
        (dict(log_to='tensorboard', wandb_log=True), {'wandb', 'tensorboard'}),
        (dict(log_to='wandb, tensorboard', wandb_artifact=True), {'wandb', 'tensorboard'}),
    ],
)
@pytest.mark.parametrize('script', ['train.py', 'finetune.py'])
def test_names(script, settings, names):
    assert names_of_trackers({**settings_of(script, []), **settings}) == names


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(log_to='tensorbord'), "log_to='tensorbord': expected any of wandb, tensorboard joined by commas"),
        (dict(log_to='wandb;tensorboard'), 'expected any of wandb, tensorboard joined by commas'),
        (dict(log_to='tensorboard', wandb_artifact=True), 'wandb_artifact=True does nothing without wandb'),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        names_of_trackers({**settings_of('train.py', []), **settings})


def test_nothing_is_imported_that_is_not_asked_for(begin, monkeypatch, said):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    trackers = begin([])
    show(trackers, line(0, 4.0))
    trackers.finish()
    assert said == []


# TensorBoard


def test_points_are_the_numbers_of_the_lines(begin, tmp_path, tensorboard, said):
    show(begin([], log_to='tensorboard'), line(0, 4.0), line(2, 3.5))
    assert read_points(tmp_path / 'out') == {'val_loss': [(0, 4.0), (2, 3.5)], 'tokens_per_s': [(2, 7.0)]}
    assert said == []


@pytest.mark.parametrize('is_evaluated_again', [True, False], ids=['as train.py', 'as finetune.py'])
def test_a_resumed_run_has_each_point_once(begin, tmp_path, tensorboard, is_evaluated_again):
    """It was cut off after iteration 6, and goes on from the checkpoint of iteration 4."""
    show(begin([], log_to='tensorboard'), *(line(i, 4.0 - i / 4) for i in (0, 2, 4, 6)))
    log = [line(0, 4.0), line(2, 3.5), line(4, 3.0)]
    resumed = begin(log, resumed_at=4, log_to='tensorboard')
    if is_evaluated_again:
        show(resumed, line(4, 3.25))
    show(resumed, line(7, 1.0), line(9, 0.5))
    points = read_points(tmp_path / 'out')
    assert points['val_loss'] == [(each['iter'], each['val_loss']) for each in log]
    assert [i for i, _ in points['val_loss']] == [0, 2, 4, 7, 9]
    assert points['tokens_per_s'] == [(i, 7.0) for i in (2, 4, 7, 9)]


def test_a_stretch_without_tensorboard_is_shown_later(begin, tmp_path, tensorboard):
    show(begin([], log_to='tensorboard'), line(0, 4.0))
    log = [line(0, 4.0), line(2, 3.5), line(4, 3.0)]
    show(begin(log, resumed_at=4, log_to='tensorboard'), line(6, 2.5))
    assert [i for i, _ in read_points(tmp_path / 'out')['val_loss']] == [0, 2, 4, 6]


def test_a_new_run_does_not_mix_with_the_one_before(begin, tmp_path, tensorboard):
    show(begin([], log_to='tensorboard'), line(0, 4.0), line(2, 3.5))
    earlier = set_aside(str(tmp_path / 'out'))
    show(begin([], log_to='tensorboard'), line(0, 3.0))
    assert read_points(earlier)['val_loss'] == [(0, 4.0), (2, 3.5)]
    assert read_points(tmp_path / 'out')['val_loss'] == [(0, 3.0)]


# wandb


def test_a_resumed_run_goes_on_in_wandb(begin, tmp_path, wandb):
    first = begin([], wandb_log=True)
    show(first, line(0, 4.0), line(2, 3.5))
    assert wandb.calls == [('wandb run', None, None), ('logged', 0), ('logged', 2)]
    assert first.record['wandb_id'] == 'abc'
    (tmp_path / 'out').mkdir()
    records.write_record(str(tmp_path / 'out'), {**first.record, 'wandb_id': 'xyz'})
    unlogged = begin([line(0, 4.0)], resumed_at=2)
    assert unlogged.record['wandb_id'] == 'xyz'  # for a part of the run after it
    for settings, wanted in (
        (dict(resumed_at=2), ('wandb run', 'xyz', 'allow')),
        (dict(), ('wandb run', None, None)),
        (dict(resumed_at=2, is_run=False), ('wandb run', None, None)),
    ):
        wandb.calls, wandb.run = [], None
        show(begin([], log_to='wandb', **settings), line(2, 3.5))
        assert wandb.calls == [wanted, ('logged', 2)]


def test_the_best_is_uploaded_when_asked_for(begin, tmp_path, wandb, said):
    uploaded = [('artifact', 'model-abc', 'model'), ('with', str(tmp_path / 'out/best.pt')), ('uploaded',)]
    begin([], log_to='wandb').finish()
    begin([], log_to='wandb', wandb_artifact=True, is_run=False).finish()
    assert wandb.calls == []
    trackers = begin([], log_to='wandb', wandb_artifact=True)
    show(trackers, line(0, 4.0))
    assert wandb.calls == [('wandb run', None, None), ('logged', 0)]
    trackers.finish()
    assert wandb.calls[2:] == uploaded and said == []
    wandb.calls, wandb.run = [], None  # a process in which nothing was left to log
    begin([], log_to='wandb', wandb_artifact=True).finish()
    assert wandb.calls == [('wandb run', None, None), *uploaded]


# failures


@pytest.mark.parametrize('broken', ['init', 'log', 'Artifact', 'log_artifact'])
def test_one_warning_and_the_other_goes_on(begin, tmp_path, tensorboard, wandb, monkeypatch, said, broken):
    def fail(*args, **settings):
        raise OSError('no network')

    monkeypatch.setattr(wandb, broken, fail)
    trackers = begin([], log_to='wandb,tensorboard', wandb_artifact=True)
    show(trackers, line(0, 4.0), line(2, 3.5))
    trackers.finish()
    assert said == ['warning: no wandb from here on: OSError: no network']
    assert read_points(tmp_path / 'out')['val_loss'] == [(0, 4.0), (2, 3.5)]


def test_no_tensorboard_is_one_warning(begin, tmp_path, wandb, said):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'tensorboard').write_text('not a folder')
    show(begin([], log_to='wandb,tensorboard'), line(0, 4.0), line(2, 3.5))
    assert len(said) == 1 and said[0].startswith('warning: no tensorboard from here on: ')
    assert wandb.calls == [('wandb run', None, None), ('logged', 0), ('logged', 2)]


def test_a_run_that_is_first_shown_when_it_is_resumed_has_all_points(begin, tmp_path, tensorboard):
    resumed = begin([line(0, 4.0), line(2, 3.5)], resumed_at=2, log_to='tensorboard')
    show(resumed, line(2, 3.5), line(4, 3.0))
    assert read_points(tmp_path / 'out')['val_loss'] == [(0, 4.0), (2, 3.5), (4, 3.0)]
