"""Triton's kernels on a GPU where there is one, else in Triton's interpreter, on the CPU, taught what it lacks."""

import sys
from pathlib import Path

import pytest
import torch

COMPILES = 'test_spline_triton.py'  # run by itself it compiles kernels for cards, whatever is here

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
with pytest.MonkeyPatch.context() as patch:  # read when triton is imported; not for the scripts that other tests start
    if DEVICE == 'cpu' and Path(sys.argv[0]).name != COMPILES:
        patch.setenv('TRITON_INTERPRET', '1')
    import triton
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from layers import channel_triton, spline_triton  # noqa: F401


def round_as_a_gpu(patch):
    """Triton's interpreter keeps bfloat16 as integers: it multiplies them as such, and truncates where a GPU rounds."""
    dot, cast, language = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, triton.language

    def widen(handle):
        if handle.dtype.scalar != language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype('uint32') << 16).view('float32'), language.float32)

    def exact_dot(self, a, b, *others):
        return dot(self, widen(a), widen(b), *others)

    def rounding_cast(self, handle, dtype):
        if (handle.dtype.scalar, dtype.scalar) != (language.float32, language.bfloat16):
            return cast(self, handle, dtype)
        return TensorHandle(
            torch.tensor(handle.data).bfloat16().view(torch.int16).numpy().view('uint16'), language.bfloat16
        )

    patch.setattr(InterpreterBuilder, 'create_dot', exact_dot)
    patch.setattr(InterpreterBuilder, 'cast_impl', rounding_cast)


def count_with_any_numpy(patch):
    """The interpreter's numbers are arrays of one; numpy from 2.4 on refuses to count with them as Triton 3.6 does."""
    teach = interpreter._patch_lang_tensor

    def teach_better(tensor, *others):
        teach(tensor, *others)
        tensor.__index__ = lambda self: self.handle.data.item()

    patch.setattr(interpreter, '_patch_lang_tensor', teach_better)


def patch_once(patch):
    """The interpreter looks through Triton's language at each call within a kernel, too, a third of its time."""
    call, called = interpreter.InterpretedFunction.__call__, set()

    def call_again(self, *args, **kwargs):
        again = self.fn in called
        called.add(self.fn)
        return self.rewrite()(*args, **kwargs) if again else call(self, *args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, '__call__', call_again)


@pytest.fixture(autouse=True, scope='module')
def run_here(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == 'cpu':
            patch.setenv('TRITON_INTERPRET', '1')
            round_as_a_gpu(patch)
            count_with_any_numpy(patch)
            patch_once(patch)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')
        yield
        torch.set_float32_matmul_precision(precision)
