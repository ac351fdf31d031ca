import contextlib
import os
import signal
import subprocess

import pytest
import torch

from data.tokenizer import GPT2Tokenizer
from forked import end_what_was_started, popen_or_fork, share_fork_server
from helpers import write_dataset

os.fsync = lambda descriptor: None  # no test is about a machine that crashes

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        # for test_spline_triton.py; read when triton is imported, which other packages do, too
        patch.setenv('TRITON_INTERPRET', '1')
        import triton  # noqa: F401

# as in the background of a shell, or under nohup; what the tests start would inherit it
for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    share_fork_server()


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """A small data set by character, as the path that --dataset takes."""
    return write_dataset(tmp_path_factory.mktemp('dataset'))


@pytest.fixture(scope='session')
def gpt2():
    """GPT-2's tokenizer; a machine that cannot get its vocabulary skips what needs it."""
    try:
        return GPT2Tokenizer()
    except OSError as error:
        pytest.skip(f'no network and no package to read the vocabulary from: {error}')


@pytest.fixture(scope='module')
def one_thread():
    """On small tensors the threads of torch and numpy only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_runs_on():
    yield
    end_what_was_started()


@pytest.fixture
def forks(monkeypatch):
    """The scripts that the test starts are forks."""
    monkeypatch.setattr(subprocess, 'Popen', popen_or_fork)


@pytest.fixture
def seed():
    torch.manual_seed(0)
