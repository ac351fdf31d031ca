"""Bytes from an address under a checksum, and files of a package out of its wheel."""

import hashlib
import importlib
import socket
import sys
import time
import zipfile

import pytest

from data import download
from helpers import write_wheel
from run.files import sha256_of

# addresses


@pytest.fixture
def page(tmp_path):
    """Address, sha256 and size of a file."""
    (tmp_path / 'page').write_bytes(b'content')
    return (tmp_path / 'page').as_uri(), hashlib.sha256(b'content').hexdigest(), 7


def test_download_returns_the_expected_bytes(page):
    assert download.download(*page) == b'content'


def test_download_refuses_other_bytes(page):
    url, sha256, size = page
    with pytest.raises(ValueError, match='has sha256 ' + sha256):
        download.download(url, '0' * 64, size)
    with pytest.raises(ValueError, match='more than 6 bytes, expected 6'):
        download.download(url, sha256, size - 1)
    with pytest.raises(ValueError, match='7 bytes, expected 8'):
        download.download(url, sha256, size + 1)


def test_download_of_nothing_is_an_os_error(page):
    with pytest.raises(OSError, match='page-that-is-not-there'):
        download.download(page[0] + '-that-is-not-there', *page[1:])


def test_download_has_a_deadline():
    with socket.create_server(('127.0.0.1', 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match='0.3 seconds|timed out'):
            download.download(f'http://127.0.0.1:{silent.getsockname()[1]}/', '0' * 64, 7, timeout=0.3)
        assert time.monotonic() - start < 3


# wheels


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds without a network."""
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    return write_wheel(tmp_path)


def test_wheel_is_read_through_pip(wheel):
    members = ['tiny_text/b.txt', 'tiny_text/a.txt']
    assert download.read_from_wheel('tiny-text', '1.0', sha256_of(wheel), members) == [b'text b', b'text a']


def test_wheel_of_another_hash_is_refused(wheel):
    with pytest.raises(OSError, match='pip cannot download tiny-text 1.0: ERROR: .*HASHES'):
        download.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt'])


def test_wheel_that_is_not_there_is_one_line(wheel):
    with pytest.raises(OSError, match='pip cannot download tiny-text 2.0: ERROR: .*') as error:
        download.read_from_wheel('tiny-text', '2.0', '0' * 64, ['tiny_text/a.txt'])
    assert '\n' not in str(error.value)


def test_wheel_without_pip_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path / 'pip.py').write_text('raise SystemExit("No module named pip")')
    with pytest.raises(OSError, match='pip cannot download tiny-text 1.0: No module named pip'):
        download.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt'])


def test_installed_package_is_read_in_place(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / 'site')
    monkeypatch.syspath_prepend(tmp_path / 'site')
    importlib.invalidate_caches()
    monkeypatch.setattr(download, 'download_wheel', lambda *args: pytest.fail('pip was asked'))
    assert download.read_from_wheel('tiny-text', '1.0', '0' * 64, ['tiny_text/a.txt']) == [b'text a']
    assert 'tiny_text' not in sys.modules
