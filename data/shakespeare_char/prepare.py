"""Tinyshakespeare by character, as train.bin and val.bin (uint16) and meta.json beside this file.

$ python data/shakespeare_char/prepare.py
$ python data/shakespeare_char/prepare.py --source=my.txt   # any UTF-8 text
$ python data/shakespeare_char/prepare.py --source=plays    # the nine plays, the text of the records in results/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.script import main
from data.tinyshakespeare import write_text
from data.tokenizer import TINYSHAKESPEARE_CHARS, CharTokenizer

source = ''  # a text file, or 'plays' for the nine plays; empty: tinyshakespeare


def tokenizer_of(text):
    """Tinyshakespeare's 65 characters where they are enough, else those of the text."""
    chars = set(text)
    return CharTokenizer(''.join(sorted(chars)) if chars - set(TINYSHAKESPEARE_CHARS) else TINYSHAKESPEARE_CHARS)


def prepare(folder, source):
    write_text(folder, source, tokenizer_of)


if __name__ == '__main__':
    main(globals())
