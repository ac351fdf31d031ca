"""Tinyshakespeare in GPT-2's byte pairs, as train.bin and val.bin (uint16) and meta.json beside this file.

$ python data/shakespeare/prepare.py
$ python data/shakespeare/prepare.py --source=my.txt   # any UTF-8 text
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.loader import write_meta, write_split
from data.prepare import main
from data.tinyshakespeare import read_text
from data.tokenizer import GPT2Tokenizer

source = ''  # a text file; empty: tinyshakespeare


def prepare(folder, source):
    """Write the first 90 % of the text for training and the rest for validation into `folder`."""
    text, description = read_text(source)
    tokenizer = GPT2Tokenizer()
    n = int(len(text) * 0.9)
    for split, part in ('train', text[:n]), ('val', text[n:]):
        ids = tokenizer.encode_ordinary(part)
        write_split(folder, split, ids)
        print(f'{split}.bin: {len(ids):,} tokens')
    write_meta(folder, tokenizer, description)


if __name__ == '__main__':
    main(globals())
