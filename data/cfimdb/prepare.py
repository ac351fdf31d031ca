"""Counterfactually revised film reviews (CFIMDB), as train.csv, dev.csv, test.csv and meta.json beside this file;
data/course.py reads them.

$ python data/cfimdb/prepare.py
$ python data/cfimdb/prepare.py --source=my_folder   # ids-cfimdb-train.csv, ids-cfimdb-dev.csv and
                                                     # ids-cfimdb-test-student.csv
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data import course
from data.script import main

FILES = course.read_pins("""
https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/f25cd95c73a1ce3f3b88dd7a11df90f0ab488bd9/data
train.csv  ids-cfimdb-train.csv         140fc513045a966109faed46a5c7a898767b96714d71bcb9c15f659129fadcea  1693182
dev.csv    ids-cfimdb-dev.csv           3087f571b66860fe5d035b5a018d08202ad3fd3720e4821c04b2acf6c7ded559  249095
test.csv   ids-cfimdb-test-student.csv  7ae611548c9eac879e9ebb406cc9f8ae68ff12f78090e4965af5cbdfa06240f4  495595
""")

source = ''  # a folder with the three files; empty: those of the course, from their address


def prepare(folder, source):
    course.write_splits('cfimdb', folder, FILES, source)


if __name__ == '__main__':
    main(globals())
