"""
The rows of the Stanford Sentiment Treebank in the tab-separated files of Stanford's course CS224N.
Standard library only.
"""

import csv
import io
import sys

LABELS = ('negative', 'somewhat negative', 'neutral', 'somewhat positive', 'positive')  # 0 to 4
FAULTS = {  # why a row is left out
    'missing': 'without an id or a sentence',
    'malformed': 'of another number of columns than the first line',
    'unlabelled': 'without a label',
    'mislabelled': f'with a label other than 0 to {len(LABELS) - 1}',
}


def read_sst(path, labelled=True):
    """
    The rows of a file as (id, sentence, label), sentences in lower case; the label is None where `labelled` is False.
    Rows that cannot be used are left out and named on stderr. ValueError if the file has another format or no row to use.
    """
    with open(path, 'rb') as f:
        rows, left_out = parse_sst(f.read(), path, labelled)
    for line in describe(left_out):
        print(f'{path}: {line}', file=sys.stderr)
    return rows


def parse_sst(content, name, labelled=True):
    """The rows in the bytes `content` of the file called `name`, and the numbers of the lines left out, by FAULTS."""
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is not UTF-8 text: {error}') from None
    # a quotation mark is a character like any other: were it to open a field, an odd one would swallow the lines after it
    reader = csv.reader(io.StringIO(text, newline=''), delimiter='\t', quoting=csv.QUOTE_NONE)
    try:
        (_, columns), *lines = [(reader.line_num, row) for row in reader] or [(1, [])]
    except csv.Error as error:
        raise ValueError(f'{name} is not a tab-separated file: line {reader.line_num}: {error}') from None
    absent = [column for column in ('id', 'sentence', *['sentiment'] * labelled) if column not in columns]
    if absent:
        raise ValueError(f'{name} has no column {" or ".join(absent)}: its first line has {str(columns)[:80]}')
    rows, left_out = [], {fault: [] for fault in FAULTS}
    for number, row in lines:
        fields = {column: field.strip() for column, field in zip(columns, row)}
        fault = find_fault(row, columns, fields, labelled)
        if fault:
            left_out[fault].append(number)
        else:
            rows.append((fields['id'], fields['sentence'].lower(), int(fields['sentiment']) if labelled else None))
    if not rows:
        raise ValueError('; '.join([f'{name} has no row that can be used', *describe(left_out)]))
    return rows, left_out


def find_fault(row, columns, fields, labelled):
    """The key in FAULTS of what keeps a row from use, or ''."""
    if not any(fields.values()):  # an empty line
        return 'missing'
    if len(row) != len(columns):
        return 'malformed'
    if not fields['id'] or not fields['sentence']:
        return 'missing'
    if labelled and not fields['sentiment']:
        return 'unlabelled'
    if labelled and fields['sentiment'] not in [str(i) for i in range(len(LABELS))]:
        return 'mislabelled'
    return ''


def describe(left_out):
    """A line for each kind of rows left out: how many, and the first of them."""
    for fault, lines in left_out.items():
        if lines:
            more = f' and {len(lines) - 5} more' if len(lines) > 5 else ''
            yield f'{len(lines)} row(s) left out, {FAULTS[fault]}: line {", ".join(map(str, lines[:5]))}{more}'
