"""C++ beside the Python of this folder, compiled for this machine when it is first called and kept for the next time.

    functions = compile('channel.cpp', ORDER=3, GATED=1, ACTIVATION='silu')   # None where there is no compiler

The functions take pointers and integers, by ctypes. A library is kept under a digest of all that it depends on, which
is the source with the headers beside it, the definitions, the compiler and the processor that it found, and under a
digest of its own bytes.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

FLAGS = '-O3 -march=native -fno-math-errno -fno-trapping-math -std=c++17 -shared -fPIC -x c++'
if platform.machine() in ('x86_64', 'AMD64'):  # vectors as long as there are: some compilers prefer shorter ones
    FLAGS += ' -mprefer-vector-width=512'
ACTIVATIONS = {  # names in spline.py and in activations.h
    'SiLU()': 'silu',
    "GELU(approximate='none')": 'gelu',
    "GELU(approximate='tanh')": 'gelu_tanh',
    'ReLU()': 'relu',
    'Tanh()': 'hyperbolic',
    'Sigmoid()': 'logistic',
    'Identity()': 'identity',
}
PARALLEL = '-fopenmp', ''  # without it one thread does the work
LOCK = threading.Lock()


def compile(name, **definitions):
    """The library of a C++ file of this folder. Where none can be built, None and a warning."""
    defined = tuple(f'-D{key}={value}' for key, value in definitions.items())
    with LOCK:  # threads that ask at the same time
        return compile_once(name, defined)


@functools.cache
def compile_once(name, defined):
    problems = []
    for parallel in PARALLEL:
        try:
            command = [*shlex.split(f'{os.environ.get("CXX") or "c++"} {FLAGS} {parallel}'), *defined]
            return load(Path(__file__).with_name(name), command)
        except subprocess.CalledProcessError as error:
            problems.append(error.stderr)
        except (OSError, ValueError) as error:  # no folder where anything can be written and run; a CXX of no words
            problems.append(str(error))
    first = (problems[0].strip().splitlines() or ['no reason given'])[0]
    warnings.warn(f'C++ cannot be compiled and run here, KAN layers do without it, slower: {first}', stacklevel=3)
    return None


def load(source, command):
    """The library in the user's cache; where none can be there, one in a folder of this process, with a warning."""
    try:
        return ctypes.CDLL(str(build(source, command, own_folder())))
    except OSError as error:  # a folder where nothing can be written, or run
        library = ctypes.CDLL(str(build(source, command, temporary_folder(os.getpid()))))
        tell_once(f'compiled C++ is not kept, each process takes seconds to compile it: {error}')
        return library


@functools.cache
def tell_once(message):
    warnings.warn(message, stacklevel=5)


def build(source, command, folder):
    """The path of the library, compiled if it is not there. Several processes may do so at the same time."""
    asked = subprocess.run([*command, '-E', '-v', os.devnull], capture_output=True, text=True, check=True)
    code = b''.join(file.read_bytes() for file in (source, *sorted(source.parent.glob('*.h'))))
    name = f'{source.stem}-{digest(repr([command, asked.stderr]).encode() + code)}'
    for path in folder.glob(f'{name}-*.so'):
        if path.stem.endswith(digest(path.read_bytes())):  # a part of a file, loaded, would end this process
            return path
    with tempfile.TemporaryDirectory(dir=folder) as part:
        made = Path(part, 'made.so')
        subprocess.run([*command, source, '-o', made], capture_output=True, text=True, check=True)
        path = folder / f'{name}-{digest(made.read_bytes())}.so'
        os.replace(made, path)
    return path


def digest(data):
    return hashlib.sha256(data).hexdigest()[:24]


def own_folder():
    """A folder in the user's cache that nobody else can write into, or put another one in the place of: whoever could
    might have this process run anything. OSError where there is none.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    path = cache / 'kan-gpt'
    if not cache.is_absolute():
        raise OSError(f'{cache} is no absolute path')
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve()
    if hasattr(os, 'getuid'):
        own, *parents = map(os.stat, (path, *path.parents))
        if own.st_uid != os.getuid() or own.st_mode & 0o022 or not all(map(is_safe, parents)):
            raise OSError(f'others can write into {path}')
    return path


def is_safe(state):
    """Whether nobody else can rename what is in a folder of this state."""
    is_shared = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not state.st_mode & stat.S_ISVTX
    return state.st_uid in (0, os.getuid()) and not is_shared


@functools.cache
def temporary_folder(process):
    """A folder of this process, gone at its end."""
    path = Path(tempfile.mkdtemp(prefix='kan-gpt-'))
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(path, ignore_errors=True))  # and not in a fork
    return path


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def integers(*numbers):
    return [ctypes.c_int64(number) for number in numbers]


def to_floats(*tensors):
    return [tensor.float().contiguous().resolve_neg() for tensor in tensors]
