"""Batches as a pure function of (seed, iteration, index), fixed validation windows, data checked before its use."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.tokenizer import CharTokenizer, GPT2Tokenizer, JsonTokenizer, same_vocabulary
from helpers import ROOT, byte_pairs

TOKENIZER = CharTokenizer('abcdefgh')
KNOWN = 'openwebtext, python, shakespeare, shakespeare_char, shakespeare_char_tuning, taskmix'  # not those of tasks


def write(folder, train, val, tokenizer=TOKENIZER):
    loader.write_split(folder, 'train', train)
    loader.write_split(folder, 'val', val)
    loader.write_meta(folder, tokenizer, 'the alphabet')


@pytest.fixture
def folder(tmp_path):
    """A data set of 100 and 40 tokens below 8."""
    write(tmp_path, np.arange(100) % 8, np.arange(40) % 8)
    return tmp_path


def test_a_test_part_goes_with_its_text(tmp_path):
    for names in (*loader.TOKENS, loader.TEST), loader.TOKENS:
        for split in 'train', 'val', 'test':
            loader.write_split(tmp_path, split, np.arange(100) % 8)
        loader.write_meta(tmp_path, TOKENIZER, 'the alphabet', names)
        assert (tmp_path / 'test.bin').exists() == (loader.TEST in names)
        assert ('test' in loader.read_meta(str(tmp_path))['splits']) == (loader.TEST in names)


def check(folder, block_size=16, vocab_size=8):
    loader.check_dataset(str(folder), block_size, vocab_size)


# batches


def test_starts_are_a_pure_function_of_seed_iteration_and_index():
    data = np.zeros(10**6)
    states = [(seed, iteration, index) for seed in (0, 1, 1337) for iteration in (0, 1, 2) for index in (0, 1, 2)]
    first = [loader.random_starts(data, 64, 8, *state) for state in states]
    np.random.seed(5)
    torch.manual_seed(5)
    again = [loader.random_starts(data, 64, 8, *state) for state in reversed(states)][::-1]
    assert np.array_equal(first, again)
    assert len({tuple(starts) for starts in first}) == len(states)


def test_drawing_a_batch_leaves_the_global_random_states_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    loader.random_starts(np.zeros(100), 8, 4, 1, 2, 3)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_global_batch_is_the_same_on_any_number_of_processes():
    data, accumulation = np.zeros(10**6), 4

    def global_batch(world_size):
        order = [(micro_step, rank) for micro_step in range(accumulation // world_size) for rank in range(world_size)]
        return [
            loader.random_starts(data, 64, 8, 1337, 7, micro_step * world_size + rank) for micro_step, rank in order
        ]

    assert np.array_equal(global_batch(1), global_batch(2)) and np.array_equal(global_batch(1), global_batch(4))
    assert len(np.unique(global_batch(1))) == 32


def test_random_starts_reach_every_window_and_none_beyond_the_end():
    starts = loader.random_starts(np.zeros(20), 16, 1000, 1, 2, 3)
    assert set(starts.tolist()) == {0, 1, 2, 3}
    counts = np.bincount(loader.random_starts(np.zeros(26), 16, 20000, 1, 2, 3))
    assert counts.shape == (10,) and abs(counts / 2000 - 1).max() < 0.15


def test_targets_are_the_tokens_that_follow():
    data = np.arange(1000, dtype=loader.DTYPE) * 60
    x, y = loader.get_batch(data, 16, [0, 5, 983], 'cpu')
    assert x.shape == y.shape == (3, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    for row, start in enumerate((0, 5, 983)):
        assert x[row].tolist() == [60 * i for i in range(start, start + 16)]
        assert y[row].tolist() == [60 * i for i in range(start + 1, start + 17)]


# validation windows


@pytest.mark.parametrize('n_windows', [1, 2, 7, 61, 62, 1000])
@pytest.mark.parametrize('length', [993, 992, 1000])
def test_fixed_windows_neither_overlap_nor_leave_the_data(n_windows, length):
    starts = loader.fixed_starts(np.zeros(length), 16, n_windows)
    assert len(starts) == min(n_windows, (length - 1) // 16)
    assert starts[0] == 0 and (np.diff(starts) >= 16).all()
    assert starts[-1] + 16 + 1 <= length


def test_fixed_windows_spread_over_the_data_evenly():
    data = np.arange(1601)
    starts = loader.fixed_starts(data, 16, 7)
    gaps = np.diff([*starts, 1600])
    assert gaps.max() - gaps.min() <= 16
    everything = loader.fixed_starts(data, 16, 10**9)
    x, y = loader.get_batch(data, 16, everything, 'cpu')
    assert x.flatten().tolist() == list(range(1600)) and y.flatten().tolist() == list(range(1, 1601))


def test_fixed_windows_do_not_depend_on_the_batch_size():
    data = np.zeros(5000)
    expected = loader.fixed_starts(data, 16, 24)
    for batch_size in (1, 3, 8, 24):
        assert np.array_equal(loader.fixed_starts(data, 16, 24 // batch_size * batch_size), expected)
    shares = [expected[rank::2] for rank in range(2)]
    assert sorted(np.concatenate(shares)) == sorted(expected)


# files


def test_files_hold_what_was_written(folder):
    assert loader.open_split(str(folder), 'train').tolist() == [i % 8 for i in range(100)]
    assert (folder / 'val.bin').read_bytes()[:6] == b'\0\0\1\0\2\0'
    meta = loader.read_meta(str(folder))
    assert (meta['source'], meta['vocab_size'], meta['tokenizer']) == ('the alphabet', 8, TOKENIZER.to_dict())
    assert [meta['splits'][split]['tokens'] for split in ('train', 'val')] == [100, 40]
    assert loader.is_prepared(str(folder)) and sorted(path.name for path in folder.iterdir()) == [
        'meta.json',
        'train.bin',
        'val.bin',
    ]
    check(folder)


def test_largest_ids_survive_and_larger_ones_are_refused(tmp_path):
    write(tmp_path, [0, 50257, 65535], [1])
    for ids in ([65536], [-1, 5]):
        with pytest.raises(ValueError, match=f'train: token ids must fit in 16 bits, got {ids[0]}'):
            write(tmp_path, ids, [1])
    assert loader.open_split(str(tmp_path), 'train').tolist() == [0, 50257, 65535]


def test_preparation_that_is_cut_off_is_not_taken_for_done(tmp_path):
    loader.write_split(tmp_path, 'train', [1, 2])
    loader.write_split(tmp_path, 'val', [3])
    assert not loader.is_prepared(str(tmp_path))
    loader.write_meta(tmp_path, TOKENIZER, 'the alphabet')
    assert loader.is_prepared(str(tmp_path))


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('meta', [True, False])
@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda content: content[:-2], r'tokens, meta.json says|checksum'),
        (lambda content: content[:-1], 'missing, empty or cut off'),
        (lambda content: b'', 'missing, empty or cut off'),
        (lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:], 'does not match its checksum'),
        (lambda content: content[2:4] + content[:2] + content[4:], 'does not match its checksum'),
    ],
    ids=['truncated', 'odd', 'empty', 'flipped', 'swapped'],
)
def test_damaged_file_is_named(folder, split, damage, message, meta):
    path = folder / f'{split}.bin'
    path.write_bytes(damage(path.read_bytes()))
    if not meta:
        (folder / 'meta.json').unlink()
    if meta or 'missing' in message:
        with pytest.raises(ValueError, match=message) as error:
            check(folder)
        assert str(path) in str(error.value)
    else:
        check(folder)


def test_characters_of_the_validation_text_are_counted(tmp_path):
    write(tmp_path, [0] * 10, [0, 2, 1, 2], CharTokenizer('aé€'))  # not its 8 bytes
    assert loader.read_meta(str(tmp_path))['val_chars'] == 4


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_file_is_named(folder, split):
    (folder / f'{split}.bin').unlink()
    assert not loader.is_prepared(str(folder))
    with pytest.raises(ValueError, match=f'{split}.bin is missing'):
        check(folder)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_token_outside_the_vocabulary_is_named(folder, split):
    splits = {'train': np.arange(100) % 8, 'val': np.arange(40) % 8}
    splits[split][-1] = 300
    write(folder, **splits, tokenizer=CharTokenizer(''.join(map(chr, range(301)))))
    with pytest.raises(ValueError, match=f'{split}.bin holds token id 300, but the vocabulary ends at 7'):
        check(folder)
    check(folder, vocab_size=301)


def test_block_larger_than_the_data_is_named(folder):
    with pytest.raises(ValueError, match='block_size=40 needs more than 40 tokens, .*val.bin has 40'):
        check(folder, block_size=40)
    check(folder, block_size=39)
    with pytest.raises(ValueError, match='train.bin has 100'):
        check(folder, block_size=1024)


def test_files_of_nanogpt_need_no_meta(folder):
    (folder / 'meta.json').unlink()
    assert loader.read_meta(str(folder)) == {}
    check(folder)
    with pytest.raises(ValueError, match='holds token id 7'):
        check(folder, vocab_size=7)


def write_pickle(folder, meta):
    (folder / 'meta.json').unlink(missing_ok=True)
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def nanogpt_meta(chars):
    """What its prepare.py writes for a text by character."""
    stoi = {char: i for i, char in enumerate(chars)}
    return {'vocab_size': len(chars), 'itos': {i: char for char, i in stoi.items()}, 'stoi': stoi}


def test_characters_of_nanogpt_are_read(folder):
    before = loader.read_meta(str(folder))
    chars = '\n !ab\u00e9xyz'
    write_pickle(folder, nanogpt_meta(chars))
    meta = loader.read_meta(str(folder))
    assert meta['tokenizer'] == {'kind': 'char', 'chars': chars} and meta['vocab_size'] == len(chars) == 9
    assert loader.splits_of(str(folder), meta) == before['splits'] and loader.model_vocab_size(meta) == 9
    assert loader.load_tokenizer({}, 9, str(folder)).decode([3, 5]) == 'a\u00e9'


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize(
    'content',
    [b'', b'nonsense', pickle.dumps([1]), pickle.dumps({'itos': {0: 'a', 2: 'b'}}), pickle.dumps({'itos': {0: 'ab'}})]
    + [pickle.dumps({'itos': {0: 'a', 1: 'a'}}), pickle.dumps({'itos': {0: 1}}), pickle.dumps({'vocab_size': 3})],
    ids=str,
)
def test_other_pickles_are_refused_in_a_line(folder, content):
    write_pickle(folder, {})
    (folder / 'meta.pkl').write_bytes(content)
    with pytest.raises(
        ValueError, match='meta.pkl cannot be used .*: expected that of a data set by character'
    ) as error:
        loader.read_meta(str(folder))
    assert '\n' not in str(error.value)


def test_a_pickle_that_would_run_something_is_refused(folder, tmp_path):
    write_pickle(folder, {'itos': {0: Harmful(str(tmp_path / 'made'))}})
    with pytest.raises(ValueError, match='it holds .*open, which is more than data'):
        loader.read_meta(str(folder))
    assert not (tmp_path / 'made').exists()


def test_a_folder_that_is_a_link_to_another_place_is_prepared_there(tmp_path, capfd):
    """Its prepare.py finds the modules of the repository, which do not lie above it."""
    (tmp_path / 'elsewhere').mkdir()
    script = 'from pathlib import Path\nfrom data.tinyshakespeare import write_text\n'
    script += 'from data.tokenizer import CharTokenizer\n'
    script += "write_text(Path(__file__).resolve().parent, 'a.txt', lambda text: CharTokenizer(''.join(set(text))))\n"
    (tmp_path / 'elsewhere' / 'prepare.py').write_text(script)
    (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        Path('a.txt').write_text('some text')
        loader.prepare_dataset('./link')
    assert loader.is_prepared(str(tmp_path / 'link')) and (tmp_path / 'elsewhere' / 'train.bin').exists()


# a meta.json of one's own


def describe(folder, **meta):
    (folder / 'meta.json').write_text(json.dumps(meta))
    return loader.read_meta(str(folder))


def test_the_number_of_tokens_is_enough(folder):
    before = loader.read_meta(str(folder))
    meta = describe(folder, vocab_size=9)
    assert loader.splits_of(str(folder), meta) == before['splits'] and loader.model_vocab_size(meta) == 9
    assert meta['tokenizer'] == {'kind': 'ids', 'vocab_size': 9} and meta['source'] == 'files of your own'
    check(folder)
    assert loader.load_tokenizer({}, 9, str(folder)).decode([3, 5]) == '3 5 '
    with pytest.raises(ValueError, match='9 different tokens, the model 50304'):
        loader.load_tokenizer({}, 50304, str(folder))


def test_a_tokenizer_may_have_fewer_tokens_than_the_model(folder):
    meta = describe(folder, vocab_size=320, tokenizer=JsonTokenizer(byte_pairs().to_str()).to_dict(), source='mine')
    assert loader.model_vocab_size(meta) == 320 and meta['source'] == 'mine'
    assert loader.load_tokenizer({}, 320, str(folder)).encode('on') == byte_pairs().encode('on').ids


def test_tokens_of_gpt2_have_its_rows(folder, monkeypatch):
    monkeypatch.setattr(GPT2Tokenizer, '__init__', lambda self: None)
    assert loader.model_vocab_size(describe(folder, vocab_size=50257, tokenizer={'kind': 'gpt2'})) == 50304


def test_files_of_ones_own_are_read_when_they_are_asked_for(folder, monkeypatch):
    """Large ones take minutes, and there is nothing to compare them with."""
    meta = describe(folder, vocab_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(loader, 'sha256_of', lambda path: pytest.fail('it was read'))
        assert 'splits' not in loader.read_meta(str(folder))
        check(folder)
    assert loader.splits_of(str(folder), meta)['val'] == loader.describe_split(folder / 'val.bin')


def test_a_text_that_came_after_the_tokens_is_told(folder, capsys):
    (folder / 'input.txt').write_text('mine')
    (folder / 'prepare.py').write_text('')
    for name, age in ('train.bin', 100), ('input.txt', 200):
        os.utime(folder / name, (0, age))
    check(folder)
    assert capsys.readouterr().err == (
        f'warning: {folder}/input.txt is younger than train.bin, which may be of another text: '
        'delete train.bin, and the next run prepares it anew\n'
    )
    (folder / 'prepare.py').unlink()  # and nothing would read it
    check(folder)
    assert capsys.readouterr().err == ''


def test_characters_are_counted_as_ever(folder):
    assert describe(folder, vocab_size=8, tokenizer=TOKENIZER.to_dict())['val_chars'] == 40


@pytest.mark.parametrize(
    'meta, reason',
    [
        (dict(vocab_size='8'), "vocab_size must be a number from 1 to 65536, got '8'"),
        (dict(vocab_size=0), 'vocab_size must be a number from 1 to 65536, got 0'),
        (dict(vocab_size=128256), 'vocab_size must be a number from 1 to 65536, got 128256'),
        (dict(vocab_size=8, tokenizer='tokenizer.json'), 'tokenizer: expected .* got tokenizer.json'),
        (dict(vocab_size=8, tokenizer={'kind': 'tokenizers', 'json': '{}'}), 'tokenizer: expected the JSON of'),
        (dict(vocab_size=7, tokenizer=TOKENIZER.to_dict()), 'vocab_size is 7, and its tokenizer has 8 tokens'),
    ],
    ids=str,
)
def test_what_cannot_be_is_named_in_a_line(folder, meta, reason):
    with pytest.raises(ValueError, match=f'meta.json: {reason}') as error:
        describe(folder, **meta)
    assert '\n' not in str(error.value)


META = {
    'source': 'a',
    'splits': {split: {'tokens': 1, 'sha256': ''} for split in ('train', 'val')},
    'vocab_size': 8,
    'tokenizer': {'kind': 'char'},
}


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'{"source": ',
        b'\xff\xfe',
        b'[]',
        b'null',
        b'3',
        *(
            json.dumps({key: value for key, value in META.items() if key != left_out}).encode()
            for left_out in META
            if left_out != 'splits'
        ),
        json.dumps({**META, 'splits': {'train': META['splits']['train']}}).encode(),
        json.dumps({**META, 'tokenizer': []}).encode(),
        json.dumps({**META, 'tokenizer': 'kind'}).encode(),
        json.dumps({**META, 'vocab_size': '8'}).encode(),
        json.dumps({**META, 'vocab_size': 8.0}).encode(),
        json.dumps({**META, 'splits': {name: [*part.items()] for name, part in META['splits'].items()}}).encode(),
        b'[' * 200_000,
    ],
    ids=lambda content: content[:50].decode('latin-1'),
)
def test_damaged_meta_is_named(folder, content):
    (folder / 'meta.json').write_bytes(content)
    with pytest.raises(ValueError, match='meta.json is damaged'):
        loader.read_meta(str(folder))
    with pytest.raises(ValueError, match='meta.json is damaged'):
        check(folder)


# names of data sets


def test_name_is_a_folder_beside_the_code_and_a_path_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loader.dataset_folder('a') == f'{loader.DATA}/a'
    assert (
        loader.dataset_folder('./a')
        == loader.dataset_folder('./a/')
        == loader.dataset_folder(f'{tmp_path}/a')
        == f'{tmp_path}/a'
    )


@pytest.mark.parametrize('dataset', ['', '.'])
def test_the_folder_of_all_data_sets_is_none_itself(dataset):
    with pytest.raises(ValueError, match=f"no data set '{dataset}': .* known: {KNOWN}$"):
        loader.prepare_dataset(dataset)


@pytest.mark.parametrize('dataset', ['shakespear_char', './nothing', '..'])
def test_unknown_data_set_lists_the_known_ones(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'DATA', str(tmp_path))
    for name, file in (('b', 'prepare.py'), ('a', 'prepare.py'), ('empty', 'readme.md')):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('writes train.bin and val.bin')
    for look in loader.prepare_dataset, lambda dataset: loader.tokenizer_of_dataset(dataset, 65):
        with pytest.raises(ValueError, match=f"no data set '{dataset}': .* known: a, b$"):
            look(dataset)


def test_missing_data_set_is_prepared_once_and_its_failure_is_reported(tmp_path, capfd):
    script = 'from pathlib import Path\nfor name in ("train.bin", "val.bin"):\n'
    script += '    Path(__file__).with_name(name).write_bytes(b"ab")\n'
    (tmp_path / 'prepare.py').write_text(script)
    loader.prepare_dataset(f'{tmp_path}/')
    assert capfd.readouterr().out.count('is missing, preparing it') == 1 and loader.is_prepared(str(tmp_path))
    (tmp_path / 'prepare.py').write_text('raise SystemExit(3)')
    loader.prepare_dataset(str(tmp_path))
    assert capfd.readouterr().out == ''
    (tmp_path / 'val.bin').unlink()
    with pytest.raises(ValueError, match='preparing data set .* failed'):
        loader.prepare_dataset(str(tmp_path))


def test_the_command_that_is_advised_finds_the_repository(tmp_path):
    shutil.copy(ROOT / 'data' / 'shakespeare_char' / 'prepare.py', tmp_path)
    (tmp_path / 'input.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='failed, see above; PYTHONPATH=.* takes files of your own') as caught:
        loader.prepare_dataset(str(tmp_path))
    command = str(caught.value).partition('see above; ')[2].removesuffix(' takes files of your own')
    (tmp_path / 'mine.txt').write_text('a text of my own ' * 9)
    command = command.replace('python', sys.executable, 1).replace('...', str(tmp_path / 'mine.txt'))
    subprocess.run(command, shell=True, check=True, env={'PATH': os.environ['PATH']})
    assert loader.is_prepared(str(tmp_path))


def test_a_checkpoint_does_not_choose_what_runs(tmp_path):
    (tmp_path / 'prepare.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    for name in str(tmp_path), os.path.relpath(tmp_path):
        with pytest.raises(ValueError, match='is not prepared: name its data by --dataset'):
            loader.open_text(dict(config=dict(dataset=name)), '', 'val', 65)
    with pytest.raises(ValueError, match='writes no'):  # by the user's own word
        loader.open_text({}, str(tmp_path), 'val', 65)
    assert (tmp_path / 'ran').exists()


def test_processes_that_wait_for_a_preparation_that_fails_say_so_and_do_not_try_again(tmp_path, capfd):
    script = 'import time\nfrom pathlib import Path\ntime.sleep(1)\n'
    script += "with open(Path(__file__).with_name('tries'), 'a') as f:\n    f.write('x')\nraise SystemExit(3)\n"
    (tmp_path / 'prepare.py').write_text(script)
    with ThreadPoolExecutor(3) as pool:
        tries = [pool.submit(loader.prepare_dataset, str(tmp_path)) for _ in range(3)]
    assert [str(one.exception()).partition(', ')[0] for one in tries] == [f"preparing data set '{tmp_path}' failed"] * 3
    assert (tmp_path / 'tries').read_text() == 'x' and capfd.readouterr().out.count('preparing it') == 1


def test_data_of_another_kind_is_not_trained_on(tmp_path):
    (tmp_path / 'prepare.py').write_text('print("reviews.csv")')
    with pytest.raises(ValueError, match='is not what is wanted here: its prepare.py writes no train.bin and val.bin$'):
        loader.prepare_dataset(str(tmp_path))


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / 'prepare.py').write_text('')
    (tmp_path / 'prepare.lock').mkdir()  # as good as a folder that only others may write to
    with pytest.raises(ValueError, match='cannot be prepared where it would lie: .*prepare.lock'):
        loader.prepare_dataset(str(tmp_path))


def test_a_meta_file_of_ones_own_may_begin_with_windows_mark(folder):
    (folder / 'meta.json').write_text('{"vocab_size": 8}', encoding='utf-8-sig')
    assert loader.read_meta(str(folder))['vocab_size'] == 8


def test_a_model_keeps_its_own_vocabulary(folder):
    checkpoint = {'tokenizer': CharTokenizer('ABCDEFGH').to_dict()}
    with pytest.raises(ValueError, match='has another vocabulary than the model: leave it out, or encode its text'):
        loader.load_tokenizer(checkpoint, 8, str(folder))
    assert loader.load_tokenizer({}, 8, str(folder)).to_dict() == TOKENIZER.to_dict()


def test_a_vocabulary_may_be_spaced_otherwise(folder):
    """The JSON of a tokenizer may come from a file for people, of an older version, with settings of batches."""
    content = byte_pairs().to_str()
    other = json.loads(content)
    other['model']['merges'] = [' '.join(pair) for pair in other['model']['merges']]
    other['truncation'] = dict(direction='Right', max_length=8, strategy='LongestFirst', stride=0)
    spaced = [{'kind': 'tokenizers', 'json': text} for text in (content, json.dumps(other, indent=2))]
    meta = {'vocab_size': byte_pairs().get_vocab_size(), 'tokenizer': spaced[0]}
    (folder / 'meta.json').write_text(json.dumps(meta))
    found = loader.load_tokenizer({'tokenizer': spaced[1]}, meta['vocab_size'], str(folder))
    assert found.decode(found.encode('and so on')) == 'and so on'
    for other in {**spaced[0], 'kind': 'ids'}, {**spaced[0], 'json': content.replace('"b"', '"?"')}:
        assert not same_vocabulary(spaced[0], other)
