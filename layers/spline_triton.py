"""The spline layer of spline.py on a GPU, as three matrix products whose columns [B_0(x) ... B_{K-1}(x), act(x)] are
computed from x where they are needed and never reach the memory of the GPU. float32, bfloat16 and float16, with sums in
float32. Fastest where I and O are multiples of 16. There is no autotuning and there are no atomics: the same input on
the same card gives the same bits. The loops are those of Triton's matrix multiplication tutorial.

Knots may lie anywhere, and move between two passes. Each product is two kernels: one for even knots, by the closed
form, and one for any others. Both are launched, and the one that is not wanted ends at once: whether the knots are even
is found on the card in each pass, so that the processor never waits for the answer.

Legend: I, O features in and out; K = G + k bases of order k, column K is the activation; N rows; S splits of the rows.
x (N, I), w (O, K + 1, I), grad (N, O), knots (I, P) with P = K + k + 1. In the kernels these are pointers, xs, ws and
gs tiles of them; row, i, o are vectors of indices; t is (x - first knot) / spacing on even knots, elsewhere x.
"""

import functools
import json
import math
from pathlib import Path

import torch
import triton
import triton.language as tl

GELUS = ("GELU(approximate='none')", "GELU(approximate='tanh')")
ACTIVATIONS = ('SiLU()', *GELUS, 'ReLU()', 'Tanh()', 'Sigmoid()', 'Identity()')

# The tile of one program, by kernel and by the bytes of a number in w, on even knots, for cards of which tiles.json
# says nothing (study/tiles.py searches for better ones). Guesses: a column costs about ten instructions a number each
# time it is computed, O / BLOCK_O times in the forward pass and in dw, so there BLOCK_O is as wide as the registers
# allow; dx has no such cost but needs three tiles in registers. Stages: what fits into the 99 KiB of a consumer's card.
TILES = {
    ('forward', 2): dict(BLOCK_N=128, BLOCK_I=32, BLOCK_O=256, num_stages=4),
    ('forward', 4): dict(BLOCK_N=64, BLOCK_I=32, BLOCK_O=128, num_stages=3),
    ('dx', 2): dict(BLOCK_N=128, BLOCK_I=64, BLOCK_O=32, num_stages=4),
    ('dx', 4): dict(BLOCK_N=64, BLOCK_I=64, BLOCK_O=16, num_stages=3),
    ('dw', 2): dict(BLOCK_N=32, BLOCK_I=128, BLOCK_O=256, num_stages=3),
    ('dw', 4): dict(BLOCK_N=32, BLOCK_I=64, BLOCK_O=128, num_stages=3),
}
MEASURED = Path(__file__).with_name('tiles.json')  # {family of cards: [{kernel, bytes, I, O, tile}]}
ANY_TILE = dict(BLOCK_N=64, BLOCK_I=32, BLOCK_O=64, num_stages=2)  # on any knots: their recursion takes registers
PART = tl.constexpr(64)  # features that one program of evenness_kernel looks at


@triton.jit
def even_spline(t, m, k: tl.constexpr):
    """B_m at t: spline.cardinal_spline with the factor of each power moved inside it, so that it costs nothing."""
    d = tl.abs(t - (m + (k + 1) / 2))
    if k == 2:  # a^2 / 2 - 3 c^2 / 2
        a, c = tl.maximum(1.5 * 0.5**0.5 - 0.5**0.5 * d, 0), tl.maximum(0.5 * 1.5**0.5 - 1.5**0.5 * d, 0)
        return a * a - c * c
    else:  # a^3 / 6 - 2 c^3 / 3
        tl.static_assert(k == 3)
        p: tl.constexpr = (1 / 6) ** (1 / 3)
        q: tl.constexpr = (2 / 3) ** (1 / 3)
        a, c = tl.maximum(2 * p - p * d, 0), tl.maximum(q - q * d, 0)
        return a * a * a - c * c * c


@triton.jit
def even_slope(t, m, k: tl.constexpr):
    """The derivative of B_m by t."""
    u = t - (m + (k + 1) / 2)
    a, c = tl.maximum((k + 1) / 2 - tl.abs(u), 0), tl.maximum((k - 1) / 2 - tl.abs(u), 0)
    fall = a - 3 * c if k == 2 else 0.5 * a * a - 2 * c * c
    return tl.where(u < 0, fall, -fall)


@triton.jit
def reciprocal(width):
    """1 / width, and 0 where knots coincide, as spline.reciprocal."""
    return tl.where(width > 0, 1 / width, 0.0)


@triton.jit
def load_knot(knots, place, mask):
    """Knot `place` of features; where there is no feature, knots a unit apart."""
    return tl.load(knots + place, mask=mask, other=0.0).to(tl.float32) + tl.where(mask, 0.0, place)


@triton.jit
def any_spline(x, knots, mask, m, k: tl.constexpr):
    """B_m of order k at x by the recursion of Cox and de Boor; `knots` points to those of the features."""
    low, next_low = load_knot(knots, m, mask), load_knot(knots, m + 1, mask)
    if k == 0:
        return tl.where((x >= low) & (x < next_low), 1.0, 0.0)
    else:
        next_high, high = load_knot(knots, m + k, mask), load_knot(knots, m + k + 1, mask)
        rise, fall = (x - low) * reciprocal(next_high - low), (high - x) * reciprocal(high - next_low)
        return rise * any_spline(x, knots, mask, m, k - 1) + fall * any_spline(x, knots, mask, m + 1, k - 1)


@triton.jit
def any_slope(x, knots, mask, m, k: tl.constexpr):
    """The derivative of B_m by x, from the two splines of order k - 1 below it."""
    rise = reciprocal(load_knot(knots, m + k, mask) - load_knot(knots, m, mask))
    fall = reciprocal(load_knot(knots, m + k + 1, mask) - load_knot(knots, m + 1, mask))
    lower, upper = any_spline(x, knots, mask, m, k - 1), any_spline(x, knots, mask, m + 1, k - 1)
    return k * (rise * lower - fall * upper)


@triton.jit
def spline(t, knots, mask, m, k: tl.constexpr, EVEN: tl.constexpr):
    return even_spline(t, m, k) if EVEN and k > 1 else any_spline(t, knots, mask, m, k)


@triton.jit
def spline_slope(t, knots, mask, m, k: tl.constexpr, EVEN: tl.constexpr):
    """The derivative by t."""
    return even_slope(t, m, k) if EVEN and k > 1 else any_slope(t, knots, mask, m, k)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative; the compiler drops the one that is not used. tanh(x) = 2 sigmoid(2 x) - 1, to 1e-7."""
    if ACTIVATION == 'SiLU()':
        s = tl.sigmoid(x)
        return x * s, s + x * s * (1 - s)
    elif ACTIVATION == "GELU(approximate='none')":
        s = 0.5 + 0.5 * tl.erf(0.5**0.5 * x)
        return x * s, s + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    elif ACTIVATION == "GELU(approximate='tanh')":
        c: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        s = tl.sigmoid(c * x * (1 + 0.044715 * x * x))
        return x * s, s + c * x * s * (1 - s) * (1 + 3 * 0.044715 * x * x)
    elif ACTIVATION == 'ReLU()':
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == 'Tanh()':
        s = tl.sigmoid(2 * x)
        return 2 * s - 1, 4 * s * (1 - s)
    elif ACTIVATION == 'Sigmoid()':
        s = tl.sigmoid(x)
        return s, s * (1 - s)
    else:
        tl.static_assert(ACTIVATION == 'Identity()')
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def measure_knots(knots, i, I, K, k: tl.constexpr, EVEN: tl.constexpr):
    """What places are counted from, and one over their unit: the first knot of features i and the spacing, where knots
    are even. Anything finite where there is no feature. The slopes of order 1 jump at the knots, where a place in
    spacings may be rounded to the other side: it is for any knots alone.
    """
    if EVEN and k > 1:
        first = tl.load(knots + i * (K + k + 1), mask=i < I, other=0.0).to(tl.float32)
        last = tl.load(knots + i * (K + k + 1) + K + k, mask=i < I, other=1.0).to(tl.float32)
        return first, (K + k) / (last - first)
    else:
        return tl.zeros(i.shape, tl.float32), tl.full(i.shape, 1.0, tl.float32)


@triton.jit
def evenness_kernel(knots, even, I, P, TOLERANCE: tl.constexpr):
    """Whether the knots of a part of the features are even, up to rounding, as spline.are_uniform finds it."""
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    first = tl.load(knots + i * P, mask=i < I, other=0.0).to(tl.float32)
    last = tl.load(knots + i * P + P - 1, mask=i < I, other=1.0).to(tl.float32)
    is_even, largest = last > first, tl.maximum(tl.abs(first), tl.abs(last))
    for p in range(1, P - 1):
        place = first + (last - first) * (p / (P - 1))
        knot = tl.load(knots + i * P + p, mask=i < I, other=0.0).to(tl.float32)
        tolerance = tl.minimum(TOLERANCE * largest, (last - first) / (50 * (P - 1)))
        is_even = is_even & ((tl.abs(knot - place) <= tolerance) | (i >= I))  # no NaN is even
    tl.store(even + tl.program_id(0), tl.min(is_even.to(tl.int32)))


@triton.jit
def are_even(even, I, PARTS: tl.constexpr):
    """Whether all knots are, from what evenness_kernel wrote."""
    part = tl.arange(0, PARTS)
    return tl.min(tl.load(even + part, mask=part < tl.cdiv(I, PART), other=1)) == 1


# The three products. N * I, N * O and the sizes of w and dw may exceed 2^31: where a tile starts is one number of 64
# bits, the places in it have 32. (64 bits for every place cost so many registers that they spill.)
@triton.jit(do_not_specialize=['N'])
def forward_kernel(
    x, w, knots, even, y, N, I, O, K,
    k: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of y (N, O). Rows vary fastest over the programs: they share a slice of w."""
    if are_even(even, I, PARTS) != EVEN:
        return
    row0, o0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_O
    row, o = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_O)
    x, y, w = x + row0.to(tl.int64) * I, y + row0.to(tl.int64) * O + o0, w + o0.to(tl.int64) * (K + 1) * I
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        xs = tl.load(x + (row * I + i), mask=(row < N - row0) & (i < I), other=0.0).to(tl.float32)
        first, per_spacing = measure_knots(knots, i, I, K, k, EVEN)
        t = (xs - first) * per_spacing
        activated = activate(xs, ACTIVATION)[0].to(w.dtype.element_ty)
        for m in range(K + 1):
            place = o * ((K + 1) * I) + m * I + i[:, None]
            ws = tl.load(w + place, mask=(o < O - o0) & (i[:, None] < I), other=0.0)
            column = spline(t, knots + i * (K + k + 1), i < I, tl.minimum(m, K - 1), k, EVEN)
            column = tl.where(m == K, activated, column.to(ws.dtype))
            total = tl.dot(column, ws, total, input_precision=PRECISION)
    tl.store(y + (row * O + o), total, mask=(row < N - row0) & (o < O - o0))


@triton.jit(do_not_specialize=['N'])
def dx_kernel(
    grad, x, w, knots, even, dx, N, I, O, K,
    k: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of dx (N, I), column by column. Features vary fastest over the programs: they share rows of grad."""
    if are_even(even, I, PARTS) != EVEN:
        return
    row0, i0 = tl.program_id(0) // tl.cdiv(I, BLOCK_I) * BLOCK_N, tl.program_id(0) % tl.cdiv(I, BLOCK_I) * BLOCK_I
    row, i = tl.arange(0, BLOCK_N), i0 + tl.arange(0, BLOCK_I)
    grad, x, dx = grad + row0.to(tl.int64) * O, x + row0.to(tl.int64) * I, dx + row0.to(tl.int64) * I
    offset, mask = row[:, None] * I + i, (row[:, None] < N - row0) & (i < I)
    xs = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    first, per_spacing = measure_knots(knots, i, I, K, k, EVEN)
    t, places = (xs - first) * per_spacing, knots + i * (K + k + 1)
    total = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for m in range(K):
        slope = spline_slope(t, places, i < I, m, k, EVEN)
        total += column_gradient(grad, w, row, i, m, N - row0, I, O, K, PRECISION, BLOCK_O) * slope
    activated = column_gradient(grad, w, row, i, K, N - row0, I, O, K, PRECISION, BLOCK_O) * activate(xs, ACTIVATION)[1]
    tl.store(dx + offset, total * per_spacing + activated, mask=mask)


@triton.jit
def column_gradient(grad, w, row, i, m, N, I, O, K, PRECISION: tl.constexpr, BLOCK_O: tl.constexpr):
    """The gradient of column m, grad @ w[:, m]: (BLOCK_N, BLOCK_I)."""
    total = tl.zeros((row.shape[0], i.shape[0]), tl.float32)
    row, o = row[:, None], tl.arange(0, BLOCK_O)
    for start in range(0, O, BLOCK_O):
        gs = tl.load(grad + start + (row * O + o), mask=(row < N) & (o < O - start), other=0.0)
        ws = w + tl.cast(start, tl.int64) * (K + 1) * I + (o[:, None] * ((K + 1) * I) + m * I + i)
        ws = tl.load(ws, mask=(o[:, None] < O - start) & (i < I), other=0.0)
        total = tl.dot(gs, ws, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=['N', 'rows'])
def dw_kernel(
    grad, x, knots, even, dw, N, I, O, K, rows,
    k: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of a column of dw (S, O, K + 1, I) over a split of `rows` rows. Columns vary fastest: they share x."""
    if are_even(even, I, PARTS) != EVEN:
        return
    m, i0 = tl.program_id(0) % (K + 1), tl.program_id(0) // (K + 1) * BLOCK_I
    o0, s = tl.program_id(1) * BLOCK_O, tl.program_id(2)
    i, o = i0 + tl.arange(0, BLOCK_I), o0 + tl.arange(0, BLOCK_O)
    low, high = s * rows, tl.minimum((s + 1) * rows, N)
    if m < K:
        total = column_product(grad, x, knots, i, o, m, low, high, I, O, K, k, None, PRECISION, EVEN, BLOCK_N)
    else:
        total = column_product(grad, x, knots, i, o, m, low, high, I, O, K, k, ACTIVATION, PRECISION, EVEN, BLOCK_N)
    dw += ((s.to(tl.int64) * O + o0) * (K + 1) + m) * I
    tl.store(dw + ((o - o0) * ((K + 1) * I) + i[:, None]), total, mask=(o < O) & (i[:, None] < I))


@triton.jit
def column_product(
    grad, x, knots, i, o, m, low, high, I, O, K,
    k: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """column_m^T @ grad over the rows from low to high, (BLOCK_I, BLOCK_O); column m is the activation, if given."""
    first, per_spacing = measure_knots(knots, i, I, K, k, EVEN)
    first, per_spacing, i = first[:, None], per_spacing[:, None], i[:, None]
    total = tl.zeros((i.shape[0], o.shape[0]), tl.float32)
    row = tl.arange(0, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        row0 = tl.cast(start, tl.int64)
        xs = tl.load(x + row0 * I + (row * I + i), mask=(row < high - start) & (i < I), other=0.0).to(tl.float32)
        gs = tl.load(grad + row0 * O + (row[:, None] * O + o), mask=(row[:, None] < high - start) & (o < O), other=0.0)
        if ACTIVATION is None:
            column = spline((xs - first) * per_spacing, knots + i * (K + k + 1), i < I, m, k, EVEN)
        else:
            column = activate(xs, ACTIVATION)[0]
        total = tl.dot(column.to(gs.dtype), gs, total, input_precision=PRECISION)
    return total


def settings(kernel, w, k, activation, N, I, O, even):
    """The constants of a kernel: its tile, no larger than the tensors need, and how float32 is multiplied."""
    precision = 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'ieee'  # by old settings or new
    is_measured = w.element_size() == 2 or precision == 'tf32'  # others take far more registers and shared memory
    family = card_family(w.device) if is_measured else ''
    tile = dict(tile_of(kernel, w.element_size(), I, O, family) if even else ANY_TILE)
    for name, size in dict(BLOCK_N=N, BLOCK_I=I, BLOCK_O=O).items():
        tile[name] = min(tile[name], max(16, triton.next_power_of_2(size)))  # tl.dot wants 16
    parts = max(64, triton.next_power_of_2(triton.cdiv(I, PART.value)))  # one kernel for all I up to 4096
    constants = dict(k=k, ACTIVATION=activation, PRECISION=precision, PARTS=parts, EVEN=even)
    return {**constants, 'num_warps': 8, 'enable_fp_fusion': True, **tile}


@functools.cache
def card_family(device):
    """sm_90 and the like; '' for a CPU."""
    return 'sm_{}{}'.format(*torch.cuda.get_device_capability(device)) if device.type == 'cuda' else ''


@functools.cache
def measured_tiles():
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


@functools.cache
def tile_of(kernel, n_bytes, I, O, family):
    """The tile that was the fastest on such a card at the shape nearest to this one, or else the guess."""
    rows = [row for row in measured_tiles().get(family, ()) if (row['kernel'], row['bytes']) == (kernel, n_bytes)]

    def distance(row):
        return abs(math.log2(row['I'] / I)) + abs(math.log2(row['O'] / O))

    return min(rows, key=distance)['tile'] if rows else TILES[kernel, n_bytes]


def find_even(knots):
    """For each part of the features whether their knots (I, P) are even, int32, on the card."""
    (I, P), tolerance = knots.shape, 2 * (torch.finfo(knots.dtype).eps + torch.finfo(torch.float32).eps)
    even = torch.empty(triton.cdiv(I, PART.value), dtype=torch.int32, device=knots.device)
    evenness_kernel[(len(even),)](knots, even, I, P, TOLERANCE=tolerance, num_warps=2)
    return even


def forward(x, w, knots, k, activation):
    """x (N, I), w (O, (K + 1) * I), knots (I, P) -> (N, O) in the dtype of w."""
    x, w, knots = x.contiguous(), w.contiguous(), knots.contiguous()
    (N, I), O, K = x.shape, w.size(0), knots.size(1) - 1 - k
    y = x.new_empty(N, O, dtype=w.dtype)
    with torch.cuda.device_of(x):
        even = find_even(knots)
        for is_even in True, False:
            constants = settings('forward', w, k, activation, N, I, O, is_even)
            grid = triton.cdiv(N, constants['BLOCK_N']), triton.cdiv(O, constants['BLOCK_O'])
            forward_kernel[grid](x, w, knots, even, y, N, I, O, K, **constants)
    return y


def backward(grad, x, w, knots, k, activation, needed):
    """grad (N, O) and w in one dtype -> dx (N, I) in that of x, dw (O, (K + 1) * I) in float32; empty if not needed."""
    grad, x, w, knots = (tensor.contiguous() for tensor in (grad, x, w, knots))
    dx, dw = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(x):
        even = find_even(knots)
        if needed[0]:
            dx = input_gradient(grad, x, w, knots, even, k, activation)
        if needed[1]:
            dw = weight_gradient(grad, x, w, knots, even, k, activation)
    return dx, dw


def input_gradient(grad, x, w, knots, even, k, activation):
    (N, I), O, K = x.shape, w.size(0), knots.size(1) - 1 - k
    dx = torch.empty_like(x)
    for is_even in True, False:
        constants = settings('dx', w, k, activation, N, I, O, is_even)
        programs = triton.cdiv(N, constants['BLOCK_N']) * triton.cdiv(I, constants['BLOCK_I'])
        dx_kernel[(programs,)](grad, x, w, knots, even, dx, N, I, O, K, **constants)
    return dx


def weight_gradient(grad, x, w, knots, even, k, activation):
    (N, I), O, K = x.shape, w.size(0), knots.size(1) - 1 - k
    partial = None
    for is_even in True, False:
        constants = settings('dw', w, k, activation, N, I, O, is_even)
        tiles = triton.cdiv(I, constants['BLOCK_I']) * (K + 1), triton.cdiv(O, constants['BLOCK_O'])
        if partial is None:  # both kernels fill the same splits
            partial = x.new_empty(splits(x, tiles[0] * tiles[1]), O, (K + 1) * I, dtype=torch.float32)
        S = len(partial)
        dw_kernel[(*tiles, S)](grad, x, knots, even, partial, N, I, O, K, triton.cdiv(N, S), **constants)
    return partial.sum(0) if len(partial) > 1 else partial[0]


def splits(x, programs):
    """As many as give every multiprocessor four programs, of no fewer than 256 rows each."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return max(1, min(4 * multiprocessors // programs, x.size(0) // 256))
