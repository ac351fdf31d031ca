"""What the processes of a run agree on."""

import pytest
import torch.distributed as dist

from run import session
from run.session import Session


@pytest.fixture(autouse=True)
def leave_the_memory_of_the_tests_alone(monkeypatch):
    monkeypatch.setattr(session, 'set_up', lambda device: None)


@pytest.fixture
def join(monkeypatch):
    """A session of several processes that have these values, of which this is the first."""

    def join(values):
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


def test_single_process_agrees_with_itself(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setattr(dist, 'all_gather_object', lambda *args: pytest.fail('there is no group'))
    Session('cpu', 'float32').check_same('data set', {'train': 1})
