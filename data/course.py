"""The data of Stanford's course CS224N: how its tables and sonnets are read, and how their files get into data/<task>,
fetched under a checksum or taken from a folder, and looked through.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from data.download import download
from run.files import decode_text, sha256_of, write_file
from run.records import read_json

COLUMNS = {  # of a table: the columns of text, the column of the label, and how many labels there are
    'sst': (('sentence',), 'sentiment', 5),
    'cfimdb': (('sentence',), 'sentiment', 2),
    'quora': (('sentence1', 'sentence2'), 'is_duplicate', 2),
}
FAULTS = {  # why a row is left out
    'missing': 'without an id or a sentence',
    'malformed': 'of another number of columns than the first line',
    'unlabelled': 'without a label',
    'mislabelled': 'with a label other than 0 to {}',
}


def read_rows(task, path, labelled=True):
    """The rows of a file as (id, sentence, label), or (id, sentence, sentence, label) for pairs, sentences in lower
    case; the label is None where `labelled` is False. Rows that cannot be used are left out and named on stderr.
    ValueError if the file has another format or no row to use.
    """
    return parse_rows(task, Path(path).read_bytes(), path, labelled)[0]


def parse_rows(task, content, name, labelled=True):
    """The rows in the bytes `content` of the file called `name`, and the numbers of the lines left out, by FAULTS."""
    texts, label, _ = COLUMNS[task]
    text = re.sub('\r\n?', '\n', decode_text(content, name)).removesuffix('\n')
    # a quotation mark is a character like any other: were it to open a field, an odd one would swallow the next lines
    columns, *lines = [line.split('\t') for line in text.split('\n')]
    absent = [column for column in ('id', *texts, *[label] * labelled) if column not in columns]
    if absent:
        raise ValueError(f'{name} has no column {" or ".join(absent)}: its first line has {str(columns)[:80]}')
    rows, left_out = [], {fault: [] for fault in FAULTS}
    for number, row in enumerate(lines, 2):
        fields = {column: field.strip() for column, field in zip(columns, row)}
        fault = find_fault(task, row, columns, fields, labelled)
        if fault:
            left_out[fault].append(number)
        else:
            sentences = (fields[column].lower() for column in texts)
            rows.append((fields['id'], *sentences, int(float(fields[label])) if labelled else None))
    remarks = list_left_out(task, left_out)
    if not rows:
        raise ValueError('; '.join([f'{name} has no row that can be used', *remarks]))
    for remark in remarks:
        print(f'{name}: {remark}', file=sys.stderr)
    return rows, left_out


def find_fault(task, row, columns, fields, labelled):
    """The key in FAULTS of what keeps a row from use, or ''."""
    texts, label, n_labels = COLUMNS[task]
    if not any(fields.values()):  # an empty line
        return 'missing'
    if len(row) != len(columns):
        return 'malformed'
    if not all(fields[column] for column in ('id', *texts)):
        return 'missing'
    if labelled and not fields[label]:
        return 'unlabelled'
    if labelled and fields[label].removesuffix('.0') not in [str(i) for i in range(n_labels)]:
        return 'mislabelled'
    return ''


def list_left_out(task, left_out):
    """A line for each kind of rows left out: how many, and the first of them."""
    for fault, lines in left_out.items():
        if lines:
            more = f' and {len(lines) - 5} more' if len(lines) > 5 else ''
            reason = FAULTS[fault].format(COLUMNS[task][2] - 1)
            yield f'{len(lines)} row(s) left out, {reason}: line {", ".join(map(str, lines[:5]))}{more}'


# sonnets

N_LINES, N_PROMPT_LINES = 14, 3


def parse_sonnets(content, name, prompts=False):
    """[(number, text)] of a file of sonnets: after a heading, each under its number on a line of its own. The text is
    its lines without the empty ones. ValueError where there is no sonnet, or one of too few lines: as `prompts` they
    have N_PROMPT_LINES, else N_LINES, or two less (the 126th has twelve).
    """
    parts = re.split(r'^\s*(\d+)\s*$', decode_text(content, name), flags=re.MULTILINE)[1:]
    sonnets = [(number, drop_empty_lines(body)) for number, body in zip(parts[::2], parts[1::2])]
    fewest = N_PROMPT_LINES if prompts else N_LINES - 2
    short = next((number for number, body in sonnets if body.count('\n') + 1 < fewest), None)
    if short or not sonnets:
        found = f'sonnet {short} has fewer than {fewest} lines' if short else 'no line is the number of a sonnet'
        raise ValueError(f'{name} is no file of sonnets: {found}')
    return sonnets


def drop_empty_lines(text):
    return '\n'.join(line.rstrip() for line in re.split('[\r\n\f]', text) if line.strip())


def read_sonnets(path, prompts=False):
    return parse_sonnets(Path(path).read_bytes(), path, prompts)


# how the files get into their folders


def read_pins(text):
    """{name here: (name there, address, sha256, bytes)} of a text: each address, then a line for each file there."""
    files = {}
    for line in text.strip().splitlines():
        if line.startswith('https:'):
            address = line
        else:
            name, original, sha256, size = line.split()
            files[name] = original, address, sha256, int(size)
    return files


def write_splits(task, folder, files, source, divide=None):
    """Write the files of a task as they are, but for the ends of their lines, into `folder`, then meta.json: where it
    is, a preparation was not cut off. ValueError for content that cannot be used.
    files    as of read_pins
    source   a folder that holds them; empty: from their addresses, under their checksums
    divide   {name: content} -> {name: content}, to make other files of them
    """
    contents = {name: read_original(entry, source) for name, entry in files.items()}
    original = all(has_sha256(contents[name], sha256) for name, (_, _, sha256, _) in files.items())
    contents = {name: content.replace(b'\r\n', b'\n') for name, content in contents.items()}
    contents = divide(contents) if divide else contents
    about = {name: inspect_file(task, name, content) for name, content in contents.items()}
    where = f'folder {source}' if source else ', '.join(dict.fromkeys(address for _, address, _, _ in files.values()))
    description = f'{"the files of the course" if original else "files other than those of the course"}, {where}'
    (folder / 'meta.json').unlink(missing_ok=True)
    for name, content in contents.items():
        write_file(folder / name, content)
        print(f'{name}: {about[name]["rows"]:,} rows, sha256 {about[name]["sha256"]}')
    meta = dict(source=description, splits={Path(name).stem: entry for name, entry in about.items()})
    write_file(folder / 'meta.json', json.dumps(meta, indent=1))
    print(f'source: {description}')


def check_file(path):
    """ValueError where a file of a task is not what its meta.json says, if there is one."""
    known = read_json(path.with_name('meta.json'), json.load, {}).get('splits', {}).get(path.stem)
    if known and sha256_of(path) != known['sha256']:
        raise ValueError(f'{path} does not match its checksum in meta.json: prepare the data set again')


def inspect_file(task, name, content):
    """What meta.json says of a file. Of a test table no row has a label, and none is left out for it."""
    about, is_test = {'sha256': hashlib.sha256(content).hexdigest()}, Path(name).stem == 'test'
    if task not in COLUMNS:
        return {**about, 'rows': len(parse_sonnets(content, name, prompts=is_test))}
    rows, left_out = parse_rows(task, content, name, labelled=not is_test)
    counts = {fault: len(lines) for fault, lines in left_out.items()}
    if is_test:
        counts['unlabelled'] = len(rows)
    return {**about, 'rows': len(rows), **counts}


def read_original(entry, source):
    """The bytes of a file, from its address or, with the ends of lines that its checksum wants, from a folder."""
    name, address, sha256, size = entry
    if not source:
        return download(f'{address}/{name}', sha256, size, timeout=120)
    content = (Path(source) / name).read_bytes()
    lf = content.replace(b'\r\n', b'\n')  # git may have changed the ends of its lines
    crlf = lf.replace(b'\n', b'\r\n')
    return next((form for form in (lf, crlf) if has_sha256(form, sha256)), content)


def has_sha256(content, sha256):
    return hashlib.sha256(content).hexdigest() == sha256
