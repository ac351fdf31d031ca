"""What the processes of a run agree on."""

import contextlib
import io
import math
import os
import sys

import pytest
import torch
import torch.distributed as dist

from run import records, session
from run.session import Session


@pytest.fixture(autouse=True)
def leave_the_memory_of_the_tests_alone(monkeypatch):
    monkeypatch.setattr(session, 'set_up', lambda device: None)


@pytest.fixture
def join(monkeypatch):
    """A session of several processes that have these values, of which this is the first."""

    def join(values):
        monkeypatch.setenv('RANK', '0')
        monkeypatch.setenv('WORLD_SIZE', str(len(values)))
        monkeypatch.setattr(dist, 'all_gather_object', lambda gathered, own: gathered.__setitem__(slice(None), values))
        return Session('cpu', 'float32')

    return join


def test_processes_with_the_same_go_on(join):
    join([{'train': 1}, {'train': 1}]).check_same('data set', {'train': 1})
    join([None, None]).check_same('data set', None)


@pytest.mark.parametrize('values, first', [('ab', 1), ('aab', 2), ('abc', 1), ([{'sha256': 'a'}, None], 1)], ids=str)
def test_process_with_another_is_named(join, values, first):
    message = f'data set is not the same on process {first} as on process 0: copy its files from one node to all$'
    with pytest.raises(ValueError, match=message):
        join(list(values)).check_same('data set', values[0])


def test_what_to_do_about_another_is_the_callers_to_say(join):
    with pytest.raises(ValueError, match='the command is not the same on process 1 as on process 0: type it again$'):
        join([{'seed': 1}, {'seed': 2}]).check_same('the command', {'seed': 1}, 'type it again')


def test_a_rank_without_a_number_of_processes_is_a_single_process(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    one = Session('cpu', 'float32')
    assert not one.ddp and one.master and one.world_size == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_a_line_that_cannot_be_written_does_not_end_the_run(monkeypatch):
    one = Session('cpu', 'float32')
    monkeypatch.setattr(sys, 'stdout', None)  # of a daemon
    one.say('a line')
    monkeypatch.undo()
    for one.on_terminal in False, True:
        full = open('/dev/full', 'w')
        monkeypatch.setattr(sys, 'stdout', full)
        one.say('a line')
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_single_process_agrees_with_itself(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(dist, 'all_gather_object', lambda *args: pytest.fail('there is no group'))
    Session('cpu', 'float32').check_same('data set', {'train': 1})


def test_a_record_that_cannot_be_written_ends_the_run_before_it_begins(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError('no space left')

    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(records, 'write_run', fail)
    with pytest.raises(OSError, match='cannot be written: no space left'):
        Session('cpu', 'float32').begin(
            str(tmp_path), [], None, dict(seed=1, log_to='', wandb_log=False, wandb_artifact=False)
        )


# steps that nobody waits for


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    alone = Session('cpu', 'float32')
    monkeypatch.setattr(alone, 'give_up', pytest.fail)
    return alone


def take_steps(session, losses, gradients, fused, scaler=None):
    """The weight, at first 0, before each step of SGD-like updates by AdamW, and after the last; the last loss."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scaler, weights = scaler or torch.amp.GradScaler('cpu', enabled=False), []
    for step, (loss, gradient) in enumerate(zip(losses, gradients)):
        weights.append(weight.item())
        scaler.scale(weight * gradient).backward()
        found = session.update(optimizer, scaler, [weight], torch.tensor(loss), 1.0, step)
    return [*weights, weight.item()], found


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_weights_stay_from_the_first_step_on_that_is_not_finite(alone, what, bad, fused):
    losses, gradients = [3.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]
    (losses if what == 'loss' else gradients)[2] = bad
    weights, loss = take_steps(alone, losses, gradients, fused)
    assert weights[2] == pytest.approx(-0.2, abs=0.01) and weights[2] == weights[3] == weights[4]
    with pytest.raises(pytest.fail.Exception, match='the loss or its gradient is not finite at iteration 2'):
        alone.settle(loss, 'iteration')


@pytest.mark.parametrize('fused', [True, False])
def test_steps_that_are_finite_go_on(alone, fused):
    weights, loss = take_steps(alone, [3.0, 2.0, 1.0], [1.0, 1.0, 1.0], fused)
    assert weights[-1] == pytest.approx(-0.3, abs=0.01) and alone.settle(loss, 'iteration') == 1.0


def test_a_scaler_skips_a_gradient_that_is_not_finite_and_goes_on(alone):
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    weights, loss = take_steps(alone, [3.0, 2.0, 1.0], [1.0, math.inf, 1.0], True, scaler)
    assert weights[1] == weights[2] != weights[3] and scaler.get_scale() == 2.0
    assert alone.settle(loss, 'iteration') == 1.0


@pytest.mark.parametrize('grad_clip, moved', [(1.0, 1.0), (3.0, 3.0), (9.0, 4.0), (0.0, 4.0)])
def test_gradients_are_clipped(alone, grad_clip, moved):
    """By AdamW nobody would see it."""
    weight = torch.nn.Parameter(torch.zeros(()))
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    (4 * weight).backward()
    alone.update(torch.optim.SGD([weight], lr=1.0), scaler, [weight], torch.tensor(1.0), grad_clip, 0)
    assert weight.item() == pytest.approx(-moved, rel=1e-5)


@pytest.mark.parametrize('rank', ['0', '1'])
def test_of_several_processes_on_a_terminal_the_first_draws_a_bar(monkeypatch, rank):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setenv('RANK', rank)
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert list(session.progress([1, 2], 'batch')) == [1, 2]
    assert ('2' in terminal.getvalue()) == (rank == '0')
