"""The fastest tiles of the Triton kernels on a card: of each kernel at each shape a few dozen are tried, beside the
bare matrix product of the same size and what the card could do at best. gpu.py calls it, and keeps what it finds.
"""

import contextlib
import itertools
import multiprocessing
import os
import statistics
import time

import torch
from tqdm import tqdm

from layers import spline, spline_triton
from run.device import flops_promised

KERNELS = ('forward', 'dx', 'dw')
SHAPES = [(192, 768, 16384), (768, 192, 16384), (192, 576, 16384), (192, 192, 16384)]  # features in, out, rows
SHAPES += [(768, 3072, 8192), (3072, 768, 8192)]
TINY_SHAPES = [(16, 16, 16)]
K, ORDER, ACTIVATION = 8, 3, 'SiLU()'  # five intervals
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))  # that compile


def candidates(kernel, n_bytes, tiny=False):
    """Tiles worth a try: what is summed in registers is 64 to 128 numbers a thread (dx sums twice and keeps x, so half
    of it), and what waits in shared memory fits a card of 227 KiB. The card says which of them fit it.
    """
    if tiny:
        return [dict(BLOCK_N=16, BLOCK_I=16, BLOCK_O=16, num_stages=2, num_warps=4)]
    sides = {  # of a tile: two of what is summed, and the one that is summed over
        'forward': ('BLOCK_N', 'BLOCK_O', 'BLOCK_I'),
        'dx': ('BLOCK_N', 'BLOCK_I', 'BLOCK_O'),
        'dw': ('BLOCK_I', 'BLOCK_O', 'BLOCK_N'),
    }[kernel]
    least, most = (32, 64) if kernel == 'dx' else (64, 128)
    found, sizes = [], itertools.product((64, 128, 256), (32, 64, 128, 256), (32, 64), (4, 8), (3, 4))
    for large, other, inner, warps, stages in sizes:
        a_thread = large * other / (32 * warps)
        waiting = stages * inner * (large + other) * n_bytes
        if least <= a_thread <= most and waiting <= 227 << 10:
            found.append(dict(zip(sides, (large, other, inner)), num_stages=stages, num_warps=warps))
    return found


def make_inputs(I, O, N, dtype, device):
    """x, w, knots and grad as a layer of a GPT under autocast has them."""
    knots = torch.linspace(-2.2, 2.2, K + ORDER + 1, device=device).repeat(I, 1)
    x = torch.randn(N, I, device=device)
    w = torch.randn(O, (K + 1) * I, device=device, dtype=dtype) / (I * K) ** 0.5
    return x, w, knots, torch.randn(N, O, device=device, dtype=dtype)


def launch(kernel, x, w, knots, grad):
    """A function that runs one of the kernels."""
    if kernel == 'forward':
        return lambda: spline_triton.forward(x, w, knots, ORDER, ACTIVATION)
    run = spline_triton.input_gradient if kernel == 'dx' else spline_triton.weight_gradient
    return lambda: run(grad, x, w, knots, spline_triton.find_even(knots), ORDER, ACTIVATION)


def bare_product(kernel, x, w, knots, grad):
    """A function that runs the matrix product alone, on columns that are ready."""
    columns = spline.columns(x, knots, ORDER, torch.nn.SiLU(), spline.uniform_bases, w.dtype).flatten(1)
    return {'forward': lambda: columns @ w.t(), 'dx': lambda: grad @ w, 'dw': lambda: grad.t() @ columns}[kernel]


@contextlib.contextmanager
def using(kernel, n_bytes, tile):
    """Inside, the kernel has this tile, whatever was measured."""
    known = spline_triton.tile_of
    spline_triton.tile_of = lambda name, size, *where: (
        tile if (name, size) == (kernel, n_bytes) else known(name, size, *where)
    )
    try:
        yield
    finally:
        spline_triton.tile_of = known


def microseconds(run, device):
    """The median of many runs, each with a cold cache."""
    if device.startswith('cuda'):
        from triton.testing import do_bench

        return 1e3 * do_bench(run, warmup=5, rep=20, return_mode='median')
    times = []
    for _ in range(2):
        t0 = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - t0))
    return statistics.median(times)


def compile_tile(job):
    """Compile a kernel with a tile, so that the process that measures finds it in Triton's cache."""
    kernel, dtype, tile, device = job
    torch.set_float32_matmul_precision('high')
    arguments = make_inputs(256, 256, 256, dtype, device)  # no less than a tile
    with contextlib.suppress(Exception), using(kernel, arguments[1].element_size(), tile):  # told where it is measured
        launch(kernel, *arguments)()


def search(dtype, shapes, device, tiny=False):
    """[{kernel, bytes, I, O, N, tile, us ...}]: the fastest tile of each kernel at each shape, and its microseconds."""
    tiles = {kernel: candidates(kernel, dtype.itemsize, tiny) for kernel in KERNELS}
    if device.startswith('cuda'):
        jobs = [(kernel, dtype, tile, device) for kernel in KERNELS for tile in tiles[kernel]]
        with multiprocessing.get_context('spawn').Pool(WORKERS) as pool:
            list(tqdm(pool.imap_unordered(compile_tile, jobs), 'compiling', len(jobs), disable=None))
    pairs = tqdm(list(itertools.product(KERNELS, shapes)), 'tiles', disable=None)
    return [find_fastest(kernel, dtype, shape, tiles[kernel], device) for kernel, shape in pairs]


def find_fastest(kernel, dtype, shape, tiles, device):
    I, O, N = shape
    arguments, n_bytes = make_inputs(I, O, N, dtype, device), dtype.itemsize
    run, times, errors = launch(kernel, *arguments), [], []
    for tile in [spline_triton.TILES[kernel, n_bytes], *tiles]:
        with using(kernel, n_bytes, tile):
            try:
                times.append((microseconds(run, device), tile))
            except Exception as error:  # a tile that does not fit the card, for the most part
                errors.append(f'{tile}: {type(error).__name__}: {error}'.splitlines()[0])
    if not times:
        return dict(kernel=kernel, bytes=n_bytes, I=I, O=O, N=N, failed=errors)
    guess, (best, tile) = times[0], min(times, key=lambda pair: pair[0])
    with using(kernel, n_bytes, tile):
        found = run().double()
    expected = reference(kernel, *arguments)
    error = ((found - expected).norm() / expected.norm()).item()
    about = dict(kernel=kernel, bytes=n_bytes, I=I, O=O, N=N, tile=tile, us=best, tried=len(times), failed=errors[:5])
    about.update(guess_us=guess[0] if guess[1] is spline_triton.TILES[kernel, n_bytes] else None, error=error)
    bare = microseconds(bare_product(kernel, *arguments), device)
    return dict(about, matmul_us=bare, floor_us=floor(shape, dtype, device))


def reference(kernel, x, w, knots, grad):
    """The result in float64, of weights and gradients as they are."""
    x, knots, w, grad = (tensor.double() for tensor in (x, knots, w, grad))
    if kernel == 'dx':
        name = spline.name_of(torch.nn.SiLU())
        return spline.plain_gradients(grad, x, w, knots, ORDER, name, torch.float64, [True, False])[0]
    columns = spline.columns(x, knots, ORDER, torch.nn.SiLU(), spline.uniform_bases, torch.float64).flatten(1)
    return columns @ w.t() if kernel == 'forward' else grad.t() @ columns


def floor(shape, dtype, device):
    """Microseconds that the multiplications of a kernel take at the card's promised speed; None for an unknown card."""
    I, O, N = shape
    promised = flops_promised(device, 'bfloat16')
    peak = promised and promised / (1 if dtype.itemsize == 2 else 2)  # TF32 has half of bfloat16's
    return peak and 1e6 * 2 * N * I * (K + 1) * O / peak


def make_table(rows):
    """What tiles.json holds of these rows: the tiles whose results were right."""
    tolerance, keys = {2: 2e-2, 4: 2e-3}, ('kernel', 'bytes', 'I', 'O', 'tile')
    right = [row for row in rows if row.get('error') is not None and row['error'] < tolerance[row['bytes']]]
    return [{key: row[key] for key in keys} for row in right]
