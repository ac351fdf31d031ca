"""Tinyshakespeare in GPT-2's byte pairs, as train.bin and val.bin (uint16) and meta.json beside this file.

$ python data/shakespeare/prepare.py
$ python data/shakespeare/prepare.py --source=my.txt   # any UTF-8 text
$ python data/shakespeare/prepare.py --source=plays    # the nine plays
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.script import main
from data.tinyshakespeare import write_text
from data.tokenizer import GPT2Tokenizer

source = ''  # a text file, or 'plays' for the nine plays; empty: tinyshakespeare


def prepare(folder, source):
    write_text(folder, source, lambda text: GPT2Tokenizer())


if __name__ == '__main__':
    main(globals())
