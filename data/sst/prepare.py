"""
The Stanford Sentiment Treebank, as train.csv, dev.csv, test.csv and meta.json beside this file; data/sentiment.py reads them.

$ python data/sst/prepare.py
$ python data/sst/prepare.py --source=my_folder   # ids-sst-train.csv, ids-sst-dev.csv and ids-sst-test-student.csv of your own
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/

from configurator import configure
from files import download, write_atomically
from sentiment import describe, parse_sst

URL = 'https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/f25cd95c73a1ce3f3b88dd7a11df90f0ab488bd9/data'
FILES = {  # name, sha256 and bytes in the course
    'train': ('ids-sst-train.csv', '03b2b625c090f94a6afd59f114cde5282e2053aab0b101e87ed695d8a0c5b1df', 1175139),
    'dev': ('ids-sst-dev.csv', 'a186ce94577635fbe10beaaddd50f16cccf6c30973221cefdf90deed2a584bfe', 151384),
    'test': ('ids-sst-test-student.csv', 'bdd5a767faa0c26782117e37767ece154c30d5d04fb8727d09c71e3850a55c7b', 313202),
}

source = ''  # a folder with the three files; empty: those of the course, from their address


def prepare(folder, source):
    """Write the three files as they are into `folder`, then meta.json: where it is, a preparation was not cut off."""
    contents = {split: read_split(split, source) for split in FILES}
    splits = {split: inspect_split(split, content) for split, content in contents.items()}
    original = all(splits[split]['sha256'] == sha256 for split, (_, sha256, _) in FILES.items())
    name = "the course's files" if original else "files other than the course's"
    description = f'{name}, folder {source}' if source else f'{name}, {URL}'
    (folder / 'meta.json').unlink(missing_ok=True)
    for split, content in contents.items():
        with write_atomically(folder / f'{split}.csv') as f:
            f.write(content)
    with write_atomically(folder / 'meta.json', 'w', encoding='utf-8') as f:
        json.dump(dict(source=description, splits=splits), f, indent=1)
    print(f'source: {description}')


def read_split(split, source):
    """The bytes of a file: from the folder `source` as they are, else from its address under its checksum."""
    name, sha256, size = FILES[split]
    return (Path(source) / name).read_bytes() if source else download(f'{URL}/{name}', sha256, size)


def inspect_split(split, content):
    """What meta.json says of a file. Of test no row has a label, and none is left out for it."""
    name = FILES[split][0]
    rows, left_out = parse_sst(content, name, labelled=split != 'test')
    for line in describe(left_out):
        print(f'{name}: {line}', file=sys.stderr)
    counts = {'rows': len(rows), **{fault: len(lines) for fault, lines in left_out.items()}}
    if split == 'test':
        counts['unlabelled'] = len(rows)
    sha256 = hashlib.sha256(content).hexdigest()
    print(f'{split}.csv: {len(rows):,} rows, sha256 {sha256}')
    return dict(file=name, sha256=sha256, **counts)


if __name__ == '__main__':
    configure(globals())
    try:
        prepare(Path(__file__).resolve().parent, source)
    except OSError as error:
        sys.exit(f'cannot prepare sst: {error} (--source=FOLDER takes the three files from a folder)')
