"""Pairs of questions from Quora, as train.csv, dev.csv and meta.json beside this file; data/course.py reads them.

$ python data/quora/prepare.py
$ python data/quora/prepare.py --source=my_folder   # quora-dev.csv of your own
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data import course
from data.script import main

FILES = course.read_pins("""
https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/571f43439d622b9443b984b09b1ee439b7f873df/data
quora-dev.csv  quora-dev.csv  12f4b7b77ed4546b29dc204441e39d3c25588bc8345534dc4f9b1294f91cb643  3225536
""")

source = ''  # a folder with quora-dev.csv; empty: that of the course, from its address


def divide(contents):
    """A tenth of the lines for dev, by the sha256 of their ids: a pair is on the same side wherever it stands."""
    header, *lines = contents['quora-dev.csv'].splitlines(keepends=True) or [b'']
    column = header.decode('utf-8-sig', errors='replace').rstrip().split('\t')
    place = column.index('id') if 'id' in column else 0  # without the column, reading the rows complains
    splits = {'train.csv': [header], 'dev.csv': [header]}
    for line in lines:
        fields = line.split(b'\t')
        digest = hashlib.sha256(fields[place].strip() if place < len(fields) else line).digest()
        splits['dev.csv' if digest[0] * 256 + digest[1] < 6554 else 'train.csv'].append(line)  # of 65536
    return {name: b''.join(part) for name, part in splits.items()}


def prepare(folder, source):
    course.write_splits('quora', folder, FILES, source, divide)


if __name__ == '__main__':
    main(globals())
