"""torchrun, as a script that can be forked and whose processes are forks, too."""

import subprocess

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main

subprocess_handler.Popen = subprocess.Popen  # the one of today
main()
