"""The text of data/shakespeare_char without its last tenth, to choose settings on: the first 80 % for training, the
next 10 % for validation. The last tenth, which is val of shakespeare_char, stays unseen until the end. It
writes train.bin, val.bin and meta.json, as there.

$ python data/shakespeare_char_tuning/prepare.py
$ python data/shakespeare_char_tuning/prepare.py --source=my.txt   # any UTF-8 text
$ python data/shakespeare_char_tuning/prepare.py --source=plays    # the nine plays, the text of the records in results/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.script import main
from data.shakespeare_char.prepare import tokenizer_of
from data.tinyshakespeare import write_text

source = ''  # a text file, or 'plays' for the nine plays; empty: tinyshakespeare


def prepare(folder, source):
    write_text(folder, source, tokenizer_of, train=0.8, end=0.9)


if __name__ == '__main__':
    main(globals())
