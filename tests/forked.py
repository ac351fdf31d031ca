"""Python scripts in processes that find torch and the compiler imported, which saves each of them five seconds."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('layers', 'surgery', 'inside', 'run', 'data', 'tasks', 'study')
popen, lock = subprocess.Popen, threading.Lock()
STARTED = []  # by the test that runs
SHARED = 'KAN_GPT_FORK_SERVER'  # in the environment: the address of the server of all processes of tests


def fork_server():
    """The process without threads that has imported warm.py, and of which the scripts are forks."""
    context = multiprocessing.get_context('forkserver')
    if SHARED in os.environ:
        join_fork_server(os.environ[SHARED])
        return context
    context.set_forkserver_preload(['warm'])
    with lock, pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')  # read on import
        patch.setenv('PYTHONPATH', str(ROOT / 'tests'))  # a server of Python 3.11 imports from no other path
        forkserver.ensure_running()
    return context


def share_fork_server():
    """The processes of tests that this one starts have its fork server, which ends with this one."""
    fork_server()
    os.environ[SHARED] = forkserver._forkserver._forkserver_address


def join_fork_server(address):
    """multiprocessing has no name for it: another process has started the server, and looks after it."""
    server = forkserver._forkserver
    if server._forkserver_address is None:
        server._forkserver_address = address
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # in place of what keeps the server alive
        server.ensure_running = lambda: None


class Forked:
    """
    A script, used as a subprocess.Popen is. `modules` is a folder of packages for it, `prelude` one of them to import
    before it starts, and `before` a function to call.
    """

    def __init__(self, args, stdout=PIPE, stderr=PIPE, text=True, cwd=None, env=None, start_new_session=False, **how):
        alone = multiprocessing.parent_process() is None
        context = fork_server() if alone else multiprocessing.get_context('fork')
        self.args, self.returncode = args, None
        out = context.Pipe(duplex=False) if stdout == PIPE else (None, None)
        err = context.Pipe(duplex=False) if stderr == PIPE else (None, out[1] if stderr == STDOUT else None)
        argv = [str(arg) for arg in args[1:] if arg != '-u']
        inputs = dict(outputs=(out[1], err[1]), cwd=cwd or os.getcwd(), env=dict(os.environ if env is None else env))
        self.process = context.Process(
            target=enter, args=(argv,), kwargs={**inputs, **how, 'group': alone or start_new_session}
        )
        self.process.start()
        STARTED.append(self)
        self.pid = self.process.pid
        for pipe in filter(None, {out[1], err[1]}):
            pipe.close()
        self.stdout, self.stderr = (pipe and open(os.dup(pipe.fileno()), encoding='utf-8') for pipe in (out[0], err[0]))

    def poll(self):
        return self.wait(0)

    def wait(self, timeout=None):
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        return self.returncode

    def communicate(self, input=None, timeout=None):
        with ThreadPoolExecutor(2) as pool:
            reading = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            self.wait(timeout)
            if self.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)  # what it has started holds the pipes, too
            outputs = [each and each.result() for each in reading]
        self.wait()
        return outputs

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()


def end_what_was_started():
    """A test that fails may leave a script that runs for ever, and Python would wait for it."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # the number of one that has ended may be another's by now
            with contextlib.suppress(ProcessLookupError):  # it ends at this moment
                os.killpg(process.pid, signal.SIGKILL)


def popen_or_fork(args, *more, **options):
    """In place of subprocess.Popen: the scripts that are started are forks, too."""
    script = next((arg for arg in args[1:] if arg != '-u'), '') if args[0] == sys.executable else ''
    if str(script).endswith('.py') and 'site-packages' not in str(script):
        return Forked(args, **{'stdout': None, 'stderr': None, **options})
    return popen(args, *more, **options)


def enter(argv, outputs, cwd, env, group, modules='', prelude='', before=None):
    """Become the script `argv`, and end as Python ends it: an exception goes to the excepthook of the script."""
    if group:
        os.setsid()
    for descriptor, pipe in enumerate(outputs, 1):
        if pipe:
            os.dup2(pipe.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = sys.__excepthook__
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    forget_ourselves()
    sys.argv[:], sys.path[:0] = argv, [*filter(None, [modules]), str(Path(argv[0]).resolve().parent)]
    subprocess.Popen = popen_or_fork
    torch.set_num_threads(1)
    if prelude:
        sys.path += [str(ROOT), str(ROOT / 'tests')]
        importlib.import_module(prelude)
    if before:
        before()
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except Exception:
        # any at all: a fork does not end as Python does, with the one line of the script's excepthook and status 1
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def forget_ourselves():
    """The script may be one of a copy of the repository, and imports its modules as new ones."""
    ours = {*ROOMS, *(path.stem for path in [*ROOT.glob('*.py'), *ROOT.glob('tests/*.py')])}
    for name in [name for name in sys.modules if name.partition('.')[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in ('', str(ROOT), str(ROOT / 'tests'))]
