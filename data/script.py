"""What every prepare.py shares: settings from the command line, its own folder, one line for what goes wrong."""

import contextlib
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from configurator import configure
from data.loader import HELD


def main(variables):
    """Run the prepare() of a prepare.py in its own folder, with its settings. An OSError ends it in one line."""
    settings = configure(variables)
    folder = Path(variables['__file__']).resolve().parent
    try:
        with alone_in(folder):
            variables['prepare'](folder, **settings)
    except OSError as error:
        sys.exit(f'cannot prepare {folder.name}: {error} (--source=... takes files of your own)')


@contextlib.contextmanager
def alone_in(folder):
    """With the lock that `prepare_dataset` takes, unless that holds it for this process, or a file system has none."""
    with contextlib.ExitStack() as stack:
        if os.environ.get(HELD) != str(folder):
            try:
                stack.enter_context(FileLock(folder / 'prepare.lock', blocking=False))
            except Timeout:
                sys.exit(f'cannot prepare {folder.name}: another process is preparing it')
            except (OSError, NotImplementedError):  # a file system without locks
                pass
        yield
