"""C++ beside the Python of this folder, compiled for this machine when it is first called and kept for the next time.

    functions = compile('channel.cpp', ORDER=3, GATED=1, ACTIVATION='silu')   # None where there is no compiler

The functions take pointers and integers, by ctypes. A library is kept under a name made of all that it depends on: the
source with the headers beside it, the definitions, the compiler and the processor that it found.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

FLAGS = '-O3 -march=native -fno-math-errno -fno-trapping-math -std=c++17 -shared -fPIC -x c++'
ACTIVATIONS = {  # names in spline.py and in activations.h
    'SiLU()': 'silu',
    "GELU(approximate='none')": 'gelu',
    "GELU(approximate='tanh')": 'gelu_tanh',
    'ReLU()': 'relu',
    'Tanh()': 'hyperbolic',
    'Sigmoid()': 'logistic',
    'Identity()': 'identity',
}
LOCK = threading.Lock()
PARALLEL = ('-fopenmp', '')  # without it one thread does the work


def compile(name, **definitions):
    """The library of a C++ file of this folder. Where no compiler works, None and a warning."""
    defined = tuple(f'-D{key}={value}' for key, value in definitions.items())
    with LOCK:  # threads that ask at the same time
        return compile_once(name, defined)


@functools.cache
def compile_once(name, defined):
    source = Path(__file__).with_name(name)
    problem = ''
    for parallel in PARALLEL:
        command = shlex.split(f'{os.environ.get("CXX", "c++")} {FLAGS} {parallel}') + [*defined]
        try:
            return ctypes.CDLL(str(build(source, command)))
        except (OSError, subprocess.CalledProcessError) as error:
            problem = getattr(error, 'stderr', '') or str(error)
    first = (problem.strip().splitlines() or ['no reason given'])[0]
    warnings.warn(f'no C++ compiler works here, KAN layers run without it, slower: {first}', stacklevel=3)
    return None


def build(source, command):
    """The path of the library, compiled if it is not there. Several processes may do so at the same time."""
    asked = subprocess.run([*command, '-E', '-v', os.devnull], capture_output=True, text=True, check=True)
    code = b''.join(file.read_bytes() for file in (source, *sorted(source.parent.glob('*.h'))))
    key = hashlib.sha256(repr([command, asked.stderr]).encode() + code).hexdigest()[:24]
    path = folder() / f'{source.stem}-{key}.so'
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as part:
            subprocess.run([*command, source, '-o', f'{part}/{path.name}'], capture_output=True, text=True, check=True)
            os.replace(f'{part}/{path.name}', path)
    return path


@functools.cache
def folder():
    """A folder of the user's own: whoever could write there could have this process run anything."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    path = Path(cache, 'kan-gpt')
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = not hasattr(os, 'getuid') or (path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o022)
    except OSError:
        is_own = False
    return path if is_own and os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix='kan-gpt-'))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def integers(*numbers):
    return [ctypes.c_int64(number) for number in numbers]


def to_floats(*tensors):
    return [tensor.float().contiguous() for tensor in tensors]
