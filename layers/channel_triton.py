"""Learned activations of channel.py on a GPU, one pass over the data each way; float32, bfloat16 and float16, computed
in float32. Splines, activations and the search for even knots are those of spline_triton.py, and as there each pass is
two kernels, for even knots and for any others, of which the one that is not wanted ends at once.

Legend: N rows; C channels; R numbers in a row of x, C or gated 2 C; K bases of order k; S splits of the rows.
x and dx (N, R), y and grad (N, C), w (C, K), knots (C, P), dw (S, C, K). A tile is (rows, bases, channels).
"""

import torch
import triton
import triton.language as tl

from layers.spline_triton import PART, activate, are_even, find_even, measure_knots, spline, spline_slope, splits

BLOCK_N, BLOCK_C = 16, 32  # rows and channels of a tile


@triton.jit
def load_bases(gate, knots, c, C, K, k: tl.constexpr, EVEN: tl.constexpr, BASES: tl.constexpr):
    """The bases of gates (rows, 1, channels) and their derivatives, (rows, bases, channels), 0 beyond the last base."""
    m = tl.arange(0, BASES)[None, :, None]
    first, per_spacing = measure_knots(knots, c, C, K, k, EVEN)
    t, places, base = (gate - first) * per_spacing, knots + c * (K + k + 1), tl.minimum(m, K - 1)
    bases = tl.where(m < K, spline(t, places, c < C, base, k, EVEN), 0.0)
    slopes = tl.where(m < K, spline_slope(t, places, c < C, base, k, EVEN), 0.0)
    return bases, slopes * per_spacing


@triton.jit
def load_weights(w, c, C, K, BASES: tl.constexpr):
    """(1, bases, channels)"""
    m = tl.arange(0, BASES)[None, :, None]
    return tl.load(w + c * K + m, mask=(m < K) & (c < C), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['N'])
def forward_kernel(
    x, w, knots, even, y, N, C, R, K, k: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, BASES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of y. Where it starts is a number of 64 bits, as N * R may exceed 2^31."""
    if are_even(even, C, PARTS) != EVEN:
        return
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_N)[:, None, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    mask = (row < N - row0) & (c < C)
    x, y = x + row0 * R, y + row0 * C
    gate = tl.load(x + row * R + c, mask=mask, other=0.0).to(tl.float32)
    bases, _ = load_bases(gate, knots, c, C, K, k, EVEN, BASES)
    phi = activate(gate, ACTIVATION)[0] + tl.sum(bases * load_weights(w, c, C, K, BASES), 1, keep_dims=True)
    if GATED:
        phi *= tl.load(x + row * R + C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * C + c, phi, mask=mask)


@triton.jit(do_not_specialize=['N', 'rows'])
def backward_kernel(
    grad, x, w, knots, even, dx, dw, N, C, R, K, rows, k: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, BASES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and the sums of dw, of some channels over a split of `rows` rows."""
    if are_even(even, C, PARTS) != EVEN:
        return
    split = tl.program_id(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    row, m = tl.arange(0, BLOCK_N)[:, None, None], tl.arange(0, BASES)[None, :, None]
    weights = load_weights(w, c, C, K, BASES)
    total = tl.zeros((1, BASES, BLOCK_C), tl.float32)
    last = tl.minimum((split + 1) * rows, N)
    for start in range(split * rows, last, BLOCK_N):
        row0 = tl.cast(start, tl.int64)
        mask = (row < last - start) & (c < C)
        place = row0 * R + row * R + c
        gate = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        dphi = tl.load(grad + row0 * C + row * C + c, mask=mask, other=0.0).to(tl.float32)
        bases, slopes = load_bases(gate, knots, c, C, K, k, EVEN, BASES)
        activated, slope = activate(gate, ACTIVATION)
        if GATED:
            phi = activated + tl.sum(bases * weights, 1, keep_dims=True)
            tl.store(dx + place + C, dphi * phi, mask=mask)
            dphi *= tl.load(x + place + C, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + place, dphi * (slope + tl.sum(slopes * weights, 1, keep_dims=True)), mask=mask)
        total += tl.sum(bases * dphi, 0, keep_dims=True)
    place = split.to(tl.int64) * C * K + c * K + m
    tl.store(dw + place, total, mask=(m < K) & (c < C))


def constants_of(C, K, k, activation, gated, even):
    parts = max(64, triton.next_power_of_2(triton.cdiv(C, PART.value)))
    constants = dict(k=k, ACTIVATION=activation, GATED=gated, PARTS=parts, EVEN=even)
    return dict(constants, BASES=triton.next_power_of_2(K), BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=4)


def forward(x, w, knots, k, activation, gated):
    """x (N, R), w (C, K), knots (C, P) -> (N, C) in the dtype of x."""
    x, w, knots = x.contiguous(), w.contiguous(), knots.contiguous()
    (N, R), (C, K) = x.shape, w.shape
    y = x.new_empty(N, C)
    with torch.cuda.device_of(x):
        even = find_even(knots)
        for is_even in True, False:
            grid = triton.cdiv(N, BLOCK_N), triton.cdiv(C, BLOCK_C)
            constants = constants_of(C, K, k, activation, gated, is_even)
            forward_kernel[grid](x, w, knots, even, y, N, C, R, K, **constants)
    return y


def backward(grad, x, w, knots, k, activation, gated):
    """grad (N, C) -> dx (N, R) and dw (C, K), in the dtypes of x and w."""
    grad, x, w, knots = (tensor.contiguous() for tensor in (grad, x, w, knots))
    (N, R), (C, K) = x.shape, w.shape
    blocks = triton.cdiv(C, BLOCK_C)
    S = splits(x, blocks)
    dx, dw = torch.empty_like(x), x.new_empty(S, C, K, dtype=torch.float32)
    with torch.cuda.device_of(x):
        even = find_even(knots)
        for is_even in True, False:
            constants = constants_of(C, K, k, activation, gated, is_even)
            sizes = N, C, R, K, triton.cdiv(N, S)
            backward_kernel[(S, blocks)](grad, x, w, knots, even, dx, dw, *sizes, **constants)
    return dx, dw.sum(0).to(w.dtype)
