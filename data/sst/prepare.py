"""The Stanford Sentiment Treebank, as train.csv, dev.csv, test.csv and meta.json beside this file;
data/course.py reads them.

$ python data/sst/prepare.py
$ python data/sst/prepare.py --source=my_folder   # ids-sst-train.csv, ids-sst-dev.csv and ids-sst-test-student.csv
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data import course
from data.script import main

FILES = course.read_pins("""
https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/f25cd95c73a1ce3f3b88dd7a11df90f0ab488bd9/data
train.csv  ids-sst-train.csv         03b2b625c090f94a6afd59f114cde5282e2053aab0b101e87ed695d8a0c5b1df  1175139
dev.csv    ids-sst-dev.csv           a186ce94577635fbe10beaaddd50f16cccf6c30973221cefdf90deed2a584bfe  151384
test.csv   ids-sst-test-student.csv  bdd5a767faa0c26782117e37767ece154c30d5d04fb8727d09c71e3850a55c7b  313202
""")

source = ''  # a folder with the three files; empty: those of the course, from their address


def prepare(folder, source):
    course.write_splits('sst', folder, FILES, source)


if __name__ == '__main__':
    main(globals())
