"""What every prepare.py shares: settings from the command line, its own folder, one line for what goes wrong."""

import sys
from pathlib import Path

from configurator import configure


def main(variables):
    """Run the prepare() of a prepare.py in its own folder, with its settings. An OSError ends it in one line."""
    settings = configure(variables)
    folder = Path(variables['__file__']).resolve().parent
    try:
        variables['prepare'](folder, **settings)
    except OSError as error:
        sys.exit(f'cannot prepare {folder.name}: {error} (--source=... takes files of your own)')
