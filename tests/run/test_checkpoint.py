"""Checkpoints: plain data, whole at every moment, and refused with the file's name where they are damaged or code."""

import contextlib
import errno
import os
import pickle
import random
import resource
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

from forked import fork_server
from helpers import SHAPE, TOKENIZER, make_checkpoint
from model import GPT, GPTConfig
from run import checkpoint as ckpt

PLAIN = (bool, int, float, str, type(None), torch.Tensor)


def leaves(value):
    """The values inside nested dictionaries, lists and tuples, keys included."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]


def same(a, b):
    a, b = leaves(a), leaves(b)
    equal = (
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(a, b)
    )
    return len(a) == len(b) and all(equal)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def save(folder, iter_num, is_best=False, size=1000, again=False):
    ckpt.save_checkpoint(
        str(folder),
        {'model': {'w': torch.full((size,), float(iter_num))}, 'model_args': {}, 'iter_num': iter_num},
        is_best,
        again,
    )


def iterations(folder):
    """Which state each file of a folder holds."""
    return {path.name: torch.load(path, weights_only=True)['iter_num'] for path in Path(folder).iterdir()}


# round trip


def test_checkpoint_comes_back_equal_and_plain(tmp_path):
    saved = make_checkpoint(tmp_path)
    loaded = ckpt.load_checkpoint(str(tmp_path))
    assert same(saved, loaded)
    assert same(loaded, torch.load(tmp_path / 'ckpt.pt', weights_only=True))
    assert all(type(leaf) in PLAIN for leaf in leaves(loaded))


@pytest.mark.parametrize('use_kan', [False, True])
def test_model_comes_back_equal(tmp_path, use_kan):
    saved = make_checkpoint(tmp_path, use_kan=use_kan)
    model = ckpt.build_model(ckpt.load_checkpoint(str(tmp_path)), dropout=0.5)
    assert same(saved['model'], model.state_dict()) and model.config.dropout == 0.5


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.'])
def test_checkpoint_of_nanogpt_builds(prefix):
    model = GPT(GPTConfig(**SHAPE, vocab_size=65, bias=True))
    state = {prefix + name: p for name, p in model.state_dict().items()}
    state[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    built = ckpt.build_model({'model': state, 'model_args': dict(**SHAPE, vocab_size=65, bias=True, dropout=0.2)})
    assert same(model.state_dict(), built.state_dict())


@pytest.mark.parametrize('grid_size, spline_order', [(5, 3), (3, 2), (8, 1)])
def test_checkpoint_of_nanogpkant_builds(grid_size, spline_order):
    sizes = dict(**SHAPE, vocab_size=65, bias=False, dropout=0.2)
    model = GPT(
        GPTConfig(**sizes, use_kan=True, kan_targets='attn,mlp', grid_size=grid_size, spline_order=spline_order)
    )
    built = ckpt.build_model({'model': model.state_dict(), 'model_args': sizes})
    assert same(model.state_dict(), built.state_dict())
    assert (built.config.grid_size, built.config.spline_order) == (grid_size, spline_order)


@pytest.mark.parametrize('change', [{'n_embd': 32}, {'n_layer': 2}, {'colour': 'red'}])
def test_checkpoint_that_contradicts_itself_is_named_so(tmp_path, change):
    saved = make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='does not fit its own model_args'):
        ckpt.build_model({**saved, 'model_args': {**saved['model_args'], **change}})


# the three files


def test_latest_previous_and_best(tmp_path):
    save(tmp_path, 1)
    assert iterations(tmp_path) == {'ckpt.pt': 1}
    save(tmp_path, 2, is_best=True)
    assert iterations(tmp_path) == {'ckpt.pt': 2, 'ckpt_prev.pt': 1, 'best.pt': 2}
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert iterations(tmp_path) == {'ckpt.pt': 4, 'ckpt_prev.pt': 3, 'best.pt': 2}
    save(tmp_path, 4, is_best=True, again=True)
    assert iterations(tmp_path) == {'ckpt.pt': 4, 'ckpt_prev.pt': 3, 'best.pt': 4}


def test_a_state_copied_over_the_latest_leaves_the_best(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, is_best=True)
    shutil.copyfile(tmp_path / 'ckpt_prev.pt', tmp_path / 'ckpt.pt')
    assert iterations(tmp_path) == {'ckpt.pt': 1, 'ckpt_prev.pt': 1, 'best.pt': 2}
    assert ckpt.saved_after(str(tmp_path), 1) == ['best.pt'] and ckpt.saved_after(str(tmp_path), 2) == []
    content = (tmp_path / 'best.pt').read_bytes()
    middle = len(content) // 2  # within the weights, where torch.load alone does not see it
    damaged = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for content in damaged, b'damaged':
        (tmp_path / 'best.pt').write_bytes(content)
        assert ckpt.saved_after(str(tmp_path), 2) == ['best.pt']
    (tmp_path / 'best.pt').unlink()
    assert ckpt.saved_after(str(tmp_path), 1) == []
    with pytest.raises(ValueError, match='no best.pt in .*: copy ckpt.pt or ckpt_prev.pt to best.pt to use it'):
        ckpt.load_checkpoint(str(tmp_path), ['best.pt'])


def test_weights_are_kept_in_a_folder_that_is_there(tmp_path):
    for iter_num in 1, 2:
        ckpt.save_weights(str(tmp_path), {'iter_num': iter_num})
    assert sorted(os.listdir(tmp_path / 'history')) == ['00000001.pt', '00000002.pt']
    with pytest.raises(FileNotFoundError):  # one that was moved away is not made anew
        ckpt.save_weights(str(tmp_path / 'moved'), {'iter_num': 3})
    assert not (tmp_path / 'moved').exists()


def test_best_is_preferred_unless_asked_otherwise(tmp_path):
    save(tmp_path, 1, is_best=True)
    save(tmp_path, 2)
    assert ckpt.load_checkpoint(str(tmp_path))['iter_num'] == 1
    assert ckpt.load_checkpoint(str(tmp_path), ['ckpt.pt'])['iter_num'] == 2
    os.remove(tmp_path / 'best.pt')
    assert ckpt.load_checkpoint(str(tmp_path))['iter_num'] == 2


def test_copies_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *paths: (_ for _ in ()).throw(OSError('no links here')))
    for iter_num in 1, 2, 3:
        save(tmp_path, iter_num, is_best=iter_num == 2)
    assert iterations(tmp_path) == {'ckpt.pt': 3, 'ckpt_prev.pt': 2, 'best.pt': 2}


class Crash(BaseException):
    """The end of a process, which nothing catches."""


@pytest.mark.parametrize('links', [True, False])
@pytest.mark.parametrize('is_best', [True, False])
def test_a_crash_at_any_change_of_the_folder_loses_no_saved_state(tmp_path, monkeypatch, is_best, links):
    """Both states that were there stay, or one of them and the next; and what is best is never an older state."""
    names, calls = ('replace', 'link', 'remove'), {name: getattr(os, name) for name in ('replace', 'link', 'remove')}
    for n in range(20):
        folder = tmp_path / str(n)
        folder.mkdir()
        save(folder, 1, is_best=True)
        save(folder, 2)
        left = [n]

        def counted(name, *paths, left=left):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            if name == 'link' and not links:
                raise OSError('no links here')
            return calls[name](*paths)

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, lambda *paths, name=name: counted(name, *paths))
            try:
                save(folder, 3, is_best=is_best)
                ended = True
            except Crash:
                ended = False
        found = {name: load_iter(folder / name) for name in ('ckpt.pt', 'ckpt_prev.pt', 'best.pt')}
        assert found['ckpt.pt'] in (2, 3) and found['ckpt_prev.pt'] in (1, 2) and 2 in found.values()
        assert found['best.pt'] in ((1, 3) if is_best else (1,))
        if is_best and found['ckpt.pt'] == 3:
            assert found['best.pt'] == 3
        save(folder, 4, is_best=True)  # and the run goes on
        assert load_iter(folder / 'ckpt.pt') == load_iter(folder / 'best.pt') == 4
        if ended:
            return
    pytest.fail('the save changes the folder more than twenty times')


def load_iter(path):
    return torch.load(path, weights_only=True)['iter_num']


def test_no_checkpoint_is_an_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path}.*best.pt or ckpt.pt'):
        ckpt.load_checkpoint(str(tmp_path))


# damage


def check_refused(folder, match=None):
    """Loading ckpt.pt is a ValueError that names it, and leaves all files alone."""
    before = contents(folder)
    with pytest.raises(ValueError, match=match) as caught:
        ckpt.load_checkpoint(str(folder), ['ckpt.pt'])
    assert str(Path(folder, 'ckpt.pt')) in str(caught.value) and '\n' not in str(caught.value)
    assert contents(folder) == before
    return str(caught.value)


@pytest.mark.parametrize('share', [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, share):
    save(tmp_path, 1, is_best=True)
    save(tmp_path, 2)
    path = tmp_path / 'ckpt.pt'
    os.truncate(path, int(path.stat().st_size * share))
    assert 'ckpt_prev.pt, best.pt' in check_refused(tmp_path, 'to use another in its place')
    assert ckpt.load_checkpoint(str(tmp_path))['iter_num'] == 1


@pytest.mark.parametrize('content', [b'hello\n', b'PK\x03\x04', b'\x80\x02', b'\n' * 100])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    check_refused(tmp_path)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as archive:
        archive.writestr('a.txt', 'hello')
    check_refused(tmp_path)


@pytest.mark.parametrize('value', [[1, 2], {'model': {}}, torch.zeros(2)])
def test_data_of_another_kind(tmp_path, value):
    torch.save(value, tmp_path / 'ckpt.pt')
    check_refused(tmp_path, "'model' and 'model_args' are missing")


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize('record', ['data.pkl', 'data/0', 'version'])
def test_flipped_bit_in_a_record(tmp_path, record):
    path = tmp_path / 'ckpt.pt'
    save(tmp_path, 1)
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith('/' + record))
        content = archive.read(info)
    begin = path.read_bytes().index(content, info.header_offset)
    for i in range(0, len(content), max(1, len(content) // 20)):
        flip(path, begin + i, i % 8)
        check_refused(tmp_path)
        flip(path, begin + i, i % 8)
    assert ckpt.load_checkpoint(str(tmp_path))['iter_num'] == 1


def test_flipped_bit_outside_the_records_is_refused_or_harmless(tmp_path):
    """One bit of every byte of the directory and the local headers, and all bits of a tensor's entry."""
    path = tmp_path / 'ckpt.pt'
    save(tmp_path, 1, size=8)
    content = path.read_bytes()
    whole, harmless = torch.load(path, weights_only=True), 0
    with zipfile.ZipFile(path) as archive:
        begin, headers = archive.start_dir, [info.header_offset for info in archive.infolist()]
    bits = [
        (place, place % 8)
        for place in [*range(begin, len(content)), *(header + i for header in headers for i in range(30))]
    ]
    name = content.index(b'/data/0', begin)
    bits += [(place, bit) for place in range(name - 50, name + 10) for bit in range(8)]
    for place, bit in bits:
        flip(path, place, bit)
        try:
            loaded = ckpt.load_checkpoint(str(tmp_path))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert same(whole, loaded), f'bit {bit} of byte {place - begin} of the directory'  # a date, for instance
            harmless += 1
        path.write_bytes(content)
    assert harmless < len(bits) / 2


# malice


@pytest.mark.parametrize(
    'program',
    [b'', b'h\x61.', b'.', b'0.', b'X\xff\xff\xff\x7f', b'U\x01\xff.', b'\x80\x63.', b'Rq\x00', b'}(u.', b'((sb.'],
)
def test_nonsense_instead_of_the_pickle(tmp_path, program):
    """Pickles that no program wrote, under a right checksum: whatever the unpickler stumbles over."""
    save(tmp_path, 1)
    with zipfile.ZipFile(tmp_path / 'ckpt.pt') as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as archive:
        for name, content in records.items():
            archive.writestr(name, b'\x80\x02' + program if name.endswith('data.pkl') else content)
    check_refused(tmp_path)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def dump_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def dump_old_format(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize('dump', [torch.save, dump_old_format, dump_pickle])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path, dump):
    marker, folder = tmp_path / 'marker', tmp_path / 'out'
    folder.mkdir()
    dump({'model': Payload(marker), 'model_args': {}}, folder / 'ckpt.pt')
    check_refused(folder, 'refused' if dump is torch.save else None)
    assert not marker.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(folder / 'ckpt.pt', weights_only=False) if dump is not dump_pickle else pickle.loads(
            (folder / 'ckpt.pt').read_bytes()
        )
    assert marker.exists()  # the payload is real


# whole at every moment


def save_for_ever(folder, connection):
    """Save state after state, announcing each before and after."""
    for iter_num in range(ckpt.load_checkpoint(folder, ['ckpt.pt'])['iter_num'] + 1, 10**6):
        connection.send(iter_num)
        save(folder, iter_num, is_best=iter_num % 3 == 0, size=2**20)
        connection.send(iter_num)


def test_killed_at_random_points_of_the_save(tmp_path):
    save(tmp_path, 0, size=2**20)
    reached = []
    for _ in range(15):
        receiver, sender = fork_server().Pipe(duplex=False)
        child = fork_server().Process(target=save_for_ever, args=(str(tmp_path), sender))
        child.start()
        sender.close()
        announced = [receiver.recv() for _ in range(2)]
        time.sleep(random.uniform(0, 0.05))
        child.kill()
        child.join()
        with contextlib.suppress(EOFError):
            while True:
                announced.append(receiver.recv())
        for name in ('ckpt.pt', 'ckpt_prev.pt', 'best.pt'):
            if (tmp_path / name).exists():
                loaded = ckpt.load_checkpoint(str(tmp_path), [name])
                assert loaded['model']['w'].eq(loaded['iter_num']).all()
        iter_num = ckpt.load_checkpoint(str(tmp_path), ['ckpt.pt'])['iter_num']
        assert iter_num == announced[-1] or (announced.count(announced[-1]) == 1 and iter_num == announced[-1] - 1)
        reached.append(iter_num)
    assert reached == sorted(reached) and reached[-1] >= 15


# no room


@contextlib.contextmanager
def files_up_to(size):
    """As if the disk was full: no file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99])
def test_full_disk_keeps_the_older_files(tmp_path, share):
    for iter_num in 1, 2:
        save(tmp_path, iter_num, is_best=True, size=20000)
    before = contents(tmp_path)
    with files_up_to(int(share * len(before['ckpt.pt']))), pytest.raises(OSError):
        save(tmp_path, 3, is_best=True, size=20000)
    assert contents(tmp_path) == before


def test_full_disk_and_no_links(tmp_path, monkeypatch):
    """The checkpoint fits, the copy of the one before does not."""
    for iter_num in 1, 2:
        save(tmp_path, iter_num, size=20000)
    monkeypatch.setattr(os, 'link', lambda *paths: (_ for _ in ()).throw(OSError('no links here')))
    before = contents(tmp_path)
    with files_up_to(len(before['ckpt.pt']) // 2), pytest.raises(OSError):
        save(tmp_path, 3, size=1000)
    assert contents(tmp_path) == before


def test_room_for_the_best_state_but_not_for_its_copy(tmp_path, monkeypatch):
    for iter_num in 1, 2:
        save(tmp_path, iter_num, is_best=True)
    monkeypatch.setattr(shutil, 'copyfileobj', lambda *files: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
    save(tmp_path, 3, is_best=True)
    assert iterations(tmp_path) == {'best.pt': 3, 'ckpt.pt': 3, 'ckpt_prev.pt': 2}
    monkeypatch.undo()
    save(tmp_path, 4)
    assert iterations(tmp_path) == {'best.pt': 3, 'ckpt.pt': 4, 'ckpt_prev.pt': 3}


# the vocabulary


def test_vocabulary_is_in_the_checkpoint(tmp_path):
    make_checkpoint(tmp_path)
    assert ckpt.load_checkpoint(str(tmp_path))['tokenizer'] == TOKENIZER.to_dict()
