"""
The Triton kernels against float64 autograd: on a GPU where there is one, else in Triton's interpreter, on the CPU.

    PYTHONPATH=.:tests python tests/layers/test_spline_triton.py 'sm_90|sm_100 even'   what kernels take on such cards
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from helpers import ROOT
from kan import KANLinear
from layers import spline

triton = pytest.importorskip('triton')
from triton_here import DEVICE, run_here, spline_triton  # noqa: E402, F401, a fixture of all tests

TILES, SPLITS = spline_triton.TILES, spline_triton.splits
MODULES = [nn.SiLU(), nn.GELU(), nn.GELU('tanh'), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Identity()]
SHAPE = dict(N=20, I=17, O=5)  # more than one tile of 16 rows and of features, and no multiple of it
ONE_TILE = dict(N=9, I=7, O=5)  # for what does not depend on tiles: the interpreter takes its time
SHARED_MEMORY = {
    'sm_80': 163 << 10,
    'sm_89': 99 << 10,
    'sm_90': 227 << 10,
    'sm_100': 227 << 10,
}  # of one program, bytes


@pytest.fixture(autouse=True)
def small(monkeypatch, seed):
    """Tiles of 16 and two splits, so that small tensors take many; and no table of measured ones."""
    blocks = dict(BLOCK_N=16, BLOCK_I=16, BLOCK_O=16)
    use_tiles(monkeypatch, {key: {**tile, **blocks} for key, tile in TILES.items()})
    monkeypatch.setattr(spline_triton, 'splits', lambda x, programs: 2)


def use_tiles(monkeypatch, tiles):
    monkeypatch.setattr(spline_triton, 'tile_of', lambda kernel, n_bytes, *where: tiles[kernel, n_bytes])


def make_arguments(N, I, O, k=3, G=2, activation=MODULES[0], dtype=torch.float32, x_dtype=None, uneven=()):
    """x, w, knots, k, activation, grad. A quarter of the inputs are outside the knots, each feature's own, which are
    not even for the features `uneven`.
    """
    low, spacing = -1.37 - 0.71 * torch.rand(I, 1), 1.3 / G + 1.1 / G * torch.rand(I, 1)
    knots = low + spacing * torch.arange(-k, G + k + 1)
    for i in uneven:
        knots[i] += (spacing[i] * torch.rand(G + 2 * k + 1)).sort().values
    x = knots[:, 0] + (knots[:, -1] - knots[:, 0]) * (1.3 * torch.rand(N, I) - 0.15)
    w, grad = torch.randn(O, (G + k + 1) * I), torch.randn(N, O)
    return x.to(DEVICE, x_dtype or dtype), w.to(DEVICE, dtype), knots.to(DEVICE), k, activation, grad.to(DEVICE, dtype)


def reference(x, w, knots, k, activation, grad):
    """y, dx and dw in float64, from columns rounded to the dtype of w."""
    dtype, knots, grad = w.dtype, knots.double(), grad.double()
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    columns = spline.columns(x, knots, k, activation, spline.recursive_bases, torch.float64).flatten(1)
    if dtype == torch.float32:
        y = spline.plain_spline_linear(x, w, knots, k, activation, torch.float64)
    else:
        y = (columns + (columns.to(dtype) - columns).detach()) @ w.t()
    return y.detach(), *torch.autograd.grad(y, [x, w], grad)


def results(x, w, knots, k, activation, grad, needed=(True, True)):
    name = spline.name_of(activation)
    return spline_triton.forward(x, w, knots, k, name), *spline_triton.backward(
        grad, x, w, knots, k, name, list(needed)
    )


def close(value, expected, dtype):
    """
    Up to the rounding of the result and of the float32 sum behind it, in which a column may now and then be rounded
    the other way.
    """
    assert value.shape == expected.shape
    if value.numel():
        largest = max(1, expected.abs().max().item())
        atol = 1e-5 * largest if dtype == torch.float32 else torch.finfo(dtype).eps
        rtol = torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol + 2e-6 * largest)


def check(*arguments):
    values, expected = results(*arguments), reference(*arguments)
    x, w = arguments[:2]
    assert [value.dtype for value in values] == [w.dtype, x.dtype, torch.float32]
    for value, target in zip(values, expected):
        close(value, target, w.dtype)


@pytest.mark.parametrize('G', [1, 5])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_orders_and_grids(k, G):
    check(*make_arguments(**SHAPE, k=k, G=G))


@pytest.mark.parametrize('k', [1, 2, 3])
def test_knots_that_are_not_even(k):
    check(*make_arguments(**SHAPE, k=k, G=3, uneven=range(SHAPE['I'])))


def test_one_feature_whose_knots_are_not_even():
    check(*make_arguments(2, 70, 1, k=1, uneven=[69]))


def test_knots_that_coincide():
    x, w, knots, *others = make_arguments(**ONE_TILE, G=4)
    knots[0, 4:7] = knots[0, 4]
    knots[1] = knots[1, 0]
    check(x, w, knots, *others)


def test_whether_knots_are_even():
    for uneven in (), [0], [63], [64], [69]:
        knots = make_arguments(1, 70, 1, G=5, uneven=uneven)[2]
        assert spline.are_uniform(knots) == (not uneven) == bool(spline_triton.find_even(knots).all())
    for G in 5, 10:  # in bfloat16, off by a seventieth and by a fortieth of their spacing
        knots = KANLinear(3, 1, grid_size=G, spline_order=2 + (G == 5)).grid.to(DEVICE, torch.bfloat16)
        assert spline.are_uniform(knots) == (G == 5) == bool(spline_triton.find_even(knots).all())
    knots = KANLinear(3, 1, grid_size=100, grid_range=(1e3, 1e3 + 1)).grid.to(DEVICE)  # spacings of few roundings
    assert spline.are_uniform(knots) and spline_triton.find_even(knots).all()
    knots[0, 5] = knots[0, 5].nextafter(torch.tensor(2e3, device=DEVICE)).add(0.005)
    assert not spline_triton.find_even(knots).any()
    knots[0, 5] = torch.nan
    assert not spline_triton.find_even(knots).any()


def test_a_moved_grid_is_noticed_on_the_card():
    """The processor does not look at the knots: what a capture of the pass plays back has to find out itself."""
    layer, x = KANLinear(3, 2).to(DEVICE), torch.randn(5, 3, device=DEVICE)
    arguments = layer.packed_weight().detach(), layer.grid, 3, 'SiLU()'
    for _ in range(2):
        expected = spline.plain_spline_linear(x, *arguments[:3], nn.SiLU(), torch.float32)
        close(spline_triton.forward(x, *arguments), expected.double(), torch.float32)
        layer.grid.data[:, 4] += 0.1


@pytest.mark.parametrize('activation', MODULES, ids=str)
def test_activations(activation):
    assert spline.name_of(activation) in spline_triton.ACTIVATIONS
    check(*make_arguments(**ONE_TILE, activation=activation))


@pytest.mark.filterwarnings('ignore:overflow encountered in exp')
def test_activations_far_from_zero():
    x = torch.tensor([-1e4, -90.0, -20.0, -1e-4, 1e-4, 20.0, 90.0, 1e4], device=DEVICE).unsqueeze(1)
    for activation in MODULES:
        _, w, knots, k, _, grad = make_arguments(len(x), 1, 1)
        check(x, w, knots, k, activation, grad)


@pytest.mark.parametrize('x_dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, x_dtype):
    check(*make_arguments(**ONE_TILE, dtype=dtype, x_dtype=x_dtype))


@pytest.mark.parametrize(
    'shape', [(0, 5, 3), (1, 5, 3), (20, 1, 3), (20, 3, 1), (1, 1, 1), (16, 32, 16), (17, 33, 17)], ids=str
)
def test_shapes(shape):
    check(*make_arguments(*shape))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_tiles_as_they_are(monkeypatch, dtype):
    use_tiles(monkeypatch, TILES)
    check(*make_arguments(150, 40, 270, dtype=dtype))


def test_a_nan_stays_one():
    for activation in MODULES:
        x, *others = make_arguments(3, 2, 2, activation=activation)
        x[1, 0] = torch.nan
        y, dx, dw = results(x, *others)
        assert y.isnan().any(1).tolist() == [False, True, False] and dw.isnan().any()


def test_only_what_is_needed_is_computed():
    arguments = make_arguments(5, 4, 3)
    _, dx, dw = results(*arguments)
    for needed in (True, False), (False, True), (False, False):
        _, *gradients = results(*arguments, needed)
        for gradient, need, whole in zip(gradients, needed, (dx, dw)):
            assert torch.equal(gradient, whole) if need else gradient.numel() == 0


def test_rows_in_any_number_of_splits(monkeypatch):
    for N, S in (34, 1), (34, 3), (3, 5):
        monkeypatch.setattr(spline_triton, 'splits', lambda x, programs, S=S: S)
        check(*make_arguments(N, 3, 2))
    if DEVICE == 'cpu':  # as if it were a card of one multiprocessor
        x = torch.empty(1024, 1)
        assert [
            SPLITS(x[:rows], programs) for rows, programs in ((0, 1), (1024, 1), (1024, 2), (1024, 9), (600, 1))
        ] == [1, 4, 2, 1, 2]


def test_what_is_not_contiguous():
    x, w, knots, k, activation, grad = make_arguments(5, 4, 3)
    check(
        x.t().contiguous().t(),
        w.t().contiguous().t(),
        knots.t().contiguous().t(),
        k,
        activation,
        grad.t().contiguous().t(),
    )


def test_the_same_bits_again():
    arguments = make_arguments(**SHAPE, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(results(*arguments), results(*arguments)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_percent_of_one_weight_is_seen(dtype):
    """The comparison of the other tests, and what it is worth."""
    x, w, *others = make_arguments(**SHAPE, dtype=dtype)
    y, dx, _ = results(x, w, *others)
    w.view(-1)[w.abs().argmax()] *= (
        1.01 if dtype == torch.float32 else 1 + 2 * torch.finfo(dtype).eps
    )  # as near as it can be
    expected_y, expected_dx, _ = reference(x, w, *others)
    for value, expected in (y, expected_y), (dx, expected_dx):
        with pytest.raises(AssertionError):
            close(value, expected, dtype)


@pytest.mark.parametrize('autocast', [False, True])
def test_the_layer_runs_on_them(monkeypatch, autocast):
    layer, x, grad = (
        KANLinear(7, 5).to(DEVICE),
        torch.randn(4, 9, 7, device=DEVICE),
        torch.randn(4, 9, 5, device=DEVICE),
    )
    calls, outcomes = [], []
    for name in 'forward', 'backward':
        function = getattr(spline_triton, name)
        monkeypatch.setattr(
            spline_triton, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
        )
    for backend in 'triton', 'plain':
        monkeypatch.setattr(spline, 'BACKEND', backend)
        rows = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = layer(rows)
        outcomes.append([y, *torch.autograd.grad(y, [rows, *layer.parameters()], grad.to(y.dtype))])
    assert calls == ['forward', 'backward']
    for ours, theirs in zip(*outcomes):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, **(dict(rtol=2e-2, atol=2e-2) if autocast else dict(rtol=1e-5, atol=1e-5))
        )


def test_higher_derivatives_and_transforms(monkeypatch):
    """What follows a first backward pass takes the plain formula, whatever backend the first one takes."""
    layer, x = KANLinear(3, 2).to(DEVICE), torch.randn(5, 3, device=DEVICE)
    outcomes = []
    for backend, dtype in ('triton', torch.float32), ('plain', torch.float64):
        monkeypatch.setattr(spline, 'BACKEND', backend)
        layer.to(dtype)
        rows = x.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(layer(rows).sum(), rows, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), rows, create_graph=True)
        gradients = torch.autograd.grad(curvature.square().mean(), layer.parameters())
        tangent = torch.func.jvp(layer, (rows,), (rows.cos(),))[1]
        laplacian = torch.func.vmap(torch.func.hessian(lambda row: layer(row).sum()))(rows)
        outcomes.append([slope, curvature, *gradients, tangent, laplacian])
    for ours, expected in zip(*outcomes):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# compiled ahead of time


def compile_kernel(name, arch, dtype, x_dtype, precision, even, k=3, activation='SiLU()'):
    """A kernel with the tile it is launched with, for features that are multiples of 16 as in every GPT."""
    kernel, size = getattr(spline_triton, name + '_kernel'), 4 if dtype == 'fp32' else 2
    constants = dict(k=k, ACTIVATION=activation, PRECISION=precision, PARTS=64, EVEN=even, num_warps=8)
    constants.update(TILES[name, size] if even else spline_triton.ANY_TILE)
    options = {option: constants.pop(option) for option in ('num_warps', 'num_stages')}
    pointers = dict(x=x_dtype, dx=x_dtype, w=dtype, y=dtype, grad=dtype, knots='fp32', even='i32', dw='fp32')
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        signature[argument] = (
            'constexpr' if argument in constants else '*' + pointers[argument] if argument in pointers else 'i32'
        )
        if argument in pointers or argument in ('I', 'O'):
            attributes[index,] = [['tt.divisibility', 16]]
    constants = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget('cuda', int(arch.removeprefix('sm_')), 32)
    return triton.compile(source, target=target, options={**options, 'enable_fp_fusion': True})


def resources(compiled):
    """Bytes of shared memory; where cuobjdump is at hand, also a thread's registers and the bytes it spills."""
    cuobjdump, usage = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump', {}
    if cuobjdump.exists():
        with tempfile.NamedTemporaryFile(suffix='.cubin') as cubin:
            Path(cubin.name).write_bytes(compiled.asm['cubin'])
            lines = subprocess.run(
                [cuobjdump, '-res-usage', cubin.name], capture_output=True, text=True, check=True
            ).stdout
        usage = {name: int(value) for name, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', lines)}
    return {'SHARED': compiled.metadata.shared, **usage}


def test_kernels_compile_and_fit_their_card():
    some = 'sm_80 even .* (bf16 fp32|fp32 fp32 tf32)|sm_90 any .* bf16 fp32'  # all of them take minutes
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    environment = {**os.environ, 'PYTHONPATH': paths, 'TRITON_INTERPRET': '0'}
    done = subprocess.run([sys.executable, __file__, some], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(usages) == 9
    for usage in usages:
        assert usage['SHARED'] <= SHARED_MEMORY[usage['kernel'].split()[0]], usage
        assert usage.get('STACK', 0) == usage.get('LOCAL', 0) == 0, usage


if __name__ == '__main__':
    cases = ('bf16', 'bf16', 'ieee'), ('bf16', 'fp32', 'ieee'), ('fp32', 'fp32', 'ieee'), ('fp32', 'fp32', 'tf32')
    for arch, knots, name, case in itertools.product(SHARED_MEMORY, ('even', 'any'), ('forward', 'dx', 'dw'), cases):
        about = ' '.join([arch, knots, name, *case])  # of w, of x, and how float32 is multiplied
        if re.search(sys.argv[1], about):
            print(json.dumps({'kernel': about, **resources(compile_kernel(name, arch, *case, knots == 'even'))}))
