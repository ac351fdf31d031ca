"""Shakespeare's sonnets, as train.txt (1 to 131), dev.txt (132 to 143), test.txt (the first three lines of twelve more)
and meta.json beside this file; data/course.py reads them.

$ python data/sonnets/prepare.py
$ python data/sonnets/prepare.py --source=my_folder   # sonnets.txt, TRUE_sonnets_held_out_dev.txt and
                                                      # sonnets_held_out.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data import course
from data.script import main

FILES = course.read_pins("""
https://raw.githubusercontent.com/ziyiw23/public_cs224n_gpt/116d45651c10127963837ba4bd3bb5d132d5c28e/data
train.txt  sonnets.txt                    722836995bea43c112897546c7d09a81458b740bb510596f7e81104ca3ab624e  83269
https://raw.githubusercontent.com/t2d04/CSEG321-Final-Project/153886f621de3744be16df53e6190471a6ce6d7d/data
dev.txt    TRUE_sonnets_held_out_dev.txt  b5842a3a79509a5fb6c5ec47c8d80c6ef69dda639506865332013a53bf0d1e84  7970
https://raw.githubusercontent.com/ziyiw23/public_cs224n_gpt/0102aef7f16720eb61b3096cc322dd42134d9a95/data
test.txt   sonnets_held_out.txt           41417eafa263e822f1bb9e52fbdbe0ff910982d2f7663231afd3b7d6b3174ae6  1970
""")

source = ''  # a folder with the three files; empty: from their addresses


def prepare(folder, source):
    course.write_splits('sonnets', folder, FILES, source)


if __name__ == '__main__':
    main(globals())
