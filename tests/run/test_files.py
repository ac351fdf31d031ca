"""Files that are whole or absent."""

import contextlib
import errno
import os
import stat

import pytest

from run import files


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


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    for content in 'é\r\n', b'\xff\n':
        files.write_file(tmp_path / 'a', content)
        assert (tmp_path / 'a').read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('number, is_fatal', [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced_are_no_reason_to_stop(tmp_path, monkeypatch, number, is_fatal):
    """Shared folders of virtual machines and some network file systems say EINVAL."""

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, 'cannot')

    monkeypatch.setattr(os, 'fsync', sync)
    with pytest.raises(OSError) if is_fatal else contextlib.nullcontext():
        with files.write_atomically(tmp_path / 'a') as f:
            f.write(b'x')
    assert (tmp_path / 'a').read_bytes() == b'x'
