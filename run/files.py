"""Files that are whole or absent: written aside and renamed. Standard library only."""

import contextlib
import errno
import hashlib
import os


@contextlib.contextmanager
def write_atomically(path, mode='wb', encoding=None):
    """`with write_atomically(path) as f:` puts the file at `path` only once all of it is on disk.
    If the body raises, the file that was at `path` stays as it was and the exception goes on.
    """
    path = os.fspath(path)
    temporary = path + '.tmp'  # in the same folder, as a rename is atomic within one file system only
    try:
        with open(temporary, mode, encoding=encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync_folder(os.path.dirname(path) or '.')


def sync_folder(folder):
    """Put a rename inside `folder` on disk too, where the system can open folders (not on Windows)."""
    if hasattr(os, 'O_DIRECTORY'):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some shared folders and network file systems cannot
                raise
        finally:
            os.close(descriptor)


def write_file(path, content):
    """Put text, in UTF-8, or bytes at a path, all of it or nothing."""
    with write_atomically(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)


def decode_text(content, name):
    """The text in the bytes of the file called `name`: UTF-8, without the mark and the ends of lines of Windows."""
    try:
        return content.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is not UTF-8 text: {error}') from None


def sha256_of(path):
    """The sha256 of a file, in hexadecimal."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
