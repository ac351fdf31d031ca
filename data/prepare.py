"""
What the prepare.py of every data set shares: settings from the command line, its own folder, one line for what goes wrong.
"""

import sys
from pathlib import Path

from configurator import configure


def main(variables):
    """
    Run a prepare.py: `main(globals())` calls its `prepare(folder, source, ...)` with its own folder and with its settings.
    An OSError ends it in one line, and so do all mistakes that configure() reports.
    """
    settings = configure(variables)
    folder = Path(variables['__file__']).resolve().parent
    try:
        variables['prepare'](folder, **settings)
    except OSError as error:
        sys.exit(f'cannot prepare {folder.name}: {error} (--source=... takes files of your own)')
