"""
How the data of Stanford's course CS224N gets into data/<task>: fetched under a checksum or taken from a folder, and looked through.
tasks.py reads it.
"""

import hashlib
import json
import sys
from pathlib import Path

from configurator import configure
from run.files import download, write_atomically
from tasks.prompts import describe, parse_rows

REPOSITORY = 'https://raw.githubusercontent.com/gpoesia/minbert-default-final-project'


def inspect(task, split, content):
    """What meta.json says of a table. Of a test split no row has a label, and none is left out for it."""
    rows, left_out = parse_rows(task, content, f'{split}.csv', labelled=split != 'test')
    for line in describe(task, left_out):
        print(f'{split}.csv: {line}', file=sys.stderr)
    counts = {'rows': len(rows), **{fault: len(lines) for fault, lines in left_out.items()}}
    if split == 'test':
        counts['unlabelled'] = len(rows)
    return counts


def prepare(folder, files, source, inspect, divide=None):
    """
    Write the files as they are, but for the ends of their lines, into `folder`, then meta.json: where it is, a preparation was not cut off.
    files    {name here: (name there, address, sha256, bytes)}
    source   a folder that holds them; empty: from their addresses, under their checksums
    inspect  (name here, content) -> what meta.json says of it; ValueError for content that cannot be used
    divide   {name: content} -> {name: content}, to make other files of them
    """
    contents = {name: read_original(entry, source) for name, entry in files.items()}
    original = all(hashlib.sha256(contents[name]).hexdigest() == sha256 for name, (_, _, sha256, _) in files.items())
    contents = {name: content.replace(b'\r\n', b'\n') for name, content in contents.items()}
    contents = divide(contents) if divide else contents
    about = {name: dict(sha256=hashlib.sha256(content).hexdigest(), **inspect(name, content)) for name, content in contents.items()}
    where = f'folder {source}' if source else ', '.join(dict.fromkeys(address for _, address, _, _ in files.values()))
    description = f'{"the files of the course" if original else "files other than those of the course"}, {where}'
    (folder / 'meta.json').unlink(missing_ok=True)
    for name, content in contents.items():
        with write_atomically(folder / name) as f:
            f.write(content)
        print(f'{name}: {about[name]["rows"]:,} rows, sha256 {about[name]["sha256"]}')
    with write_atomically(folder / 'meta.json', 'w', encoding='utf-8') as f:
        json.dump(dict(source=description, splits={Path(name).stem: entry for name, entry in about.items()}), f, indent=1)
    print(f'source: {description}')


def read_original(entry, source):
    """The bytes of a file from its address or, with whichever ends of lines its checksum wants, from the folder `source`."""
    name, address, sha256, size = entry
    if not source:
        return download(f'{address}/{name}', sha256, size, timeout=120)
    content = (Path(source) / name).read_bytes()
    lf = content.replace(b'\r\n', b'\n')  # git may have changed the ends of its lines
    return next((form for form in (lf, lf.replace(b'\n', b'\r\n')) if hashlib.sha256(form).hexdigest() == sha256), content)


def main(variables, task, prepare):
    """Run a prepare.py: settings from the command line, and one line for what goes wrong."""
    configure(variables)
    try:
        prepare(Path(variables['__file__']).resolve().parent, variables['source'])
    except OSError as error:
        sys.exit(f'cannot prepare {task}: {error} (--source=FOLDER takes the files from a folder)')
