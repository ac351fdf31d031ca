// The passes of the spline layer on a CPU: see spline.py, whose formulas these are. Those named _any are for knots that
// are not evenly spaced.
//
// ORDER of the splines (1 to 3), ACTIVATION (a struct of activations.h) and NUMBER (float or bfloat16, of the columns)
// are given when this is compiled.
//
// Legend: N rows of I features; K bases, so that a row has (K + 1) I columns, basis-major, the activation last;
// P = K + ORDER + 1 knots of a feature.

#include <vector>

#include "activations.h"

namespace {

constexpr int64_t TILE = 256;  // features at a time, whose numbers stay in the nearest cache
constexpr int64_t ROWS = 16;   // that a thread takes at once

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float x) {  // to the nearest, of two as near the even one; NaN stays
        uint32_t wide;
        std::memcpy(&wide, &x, sizeof wide);
        const uint32_t rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
        bits = static_cast<uint16_t>(x == x ? rounded : wide >> 16 | 0x40);
    }
    explicit operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
    }
};

inline float positive(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

// The B-spline of order k >= 1 on the integers, d behind its centre: cardinal_spline of spline.py.
template <int k>
inline float spline(float d) {
    d = std::abs(d);
    if (k == 1) return positive(1.0f - d);
    if (k == 2) {
        const float a = positive(1.5f - d), b = positive(0.5f - d);
        return 0.5f * a * a - 1.5f * b * b;
    }
    const float a = positive(2.0f - d), b = positive(1.0f - d);
    const float sixth = 1.0f / 6.0f, four_sixths = 4.0f / 6.0f;
    return sixth * a * a * a - four_sixths * b * b * b;
}

// Places in knot spacings.
inline void place(const float *x, const float *first, const float *per_spacing, int64_t n, float *t) {
    for (int64_t i = 0; i < n; i++) t[i] = (x[i] - first[i]) * per_spacing[i];
}

// Any knots, and the recursion of Cox and de Boor over them: recursive_bases of spline.py.
struct Knots {
    int64_t I, P;
    std::vector<float> t, r;  // (P, I), and for each order (P, I): one over the supports of the order below, 0 for none

    Knots(const float *knots, int64_t I, int64_t K) : I(I), P(K + ORDER + 1), t(P * I), r((ORDER + 1) * P * I, 0.0f) {
        for (int64_t m = 0; m < P; m++) {
            for (int64_t i = 0; i < I; i++) t[m * I + i] = knots[i * P + m];
        }
        for (int64_t p = 1; p <= ORDER; p++) {
            for (int64_t j = 0; j < (P - p) * I; j++) {
                const float width = t[j + p * I] - t[j];
                r[p * P * I + j] = width > 0.0f ? 1.0f / width : 0.0f;
            }
        }
    }

    // b (P - 1 - order, TILE): the bases of n features from i0 on at x; b has room for P - 1 of them.
    void bases(const float *x, int64_t i0, int64_t n, int order, float *b) const {
        for (int64_t m = 0; m < P - 1; m++) {
            const float *knot = t.data() + m * I + i0;
            for (int64_t i = 0; i < n; i++) b[m * TILE + i] = x[i] >= knot[i] && x[i] < knot[i + I] ? 1.0f : 0.0f;
        }
        for (int64_t p = 1; p <= order; p++) {
            for (int64_t m = 0; m < P - 1 - p; m++) {
                const float *knot = t.data() + m * I + i0, *per = r.data() + (p * P + m) * I + i0;
                float *low = b + m * TILE;
                for (int64_t i = 0; i < n; i++) {
                    const float rise = (x[i] - knot[i]) * per[i], fall = (knot[(p + 1) * I + i] - x[i]) * per[I + i];
                    low[i] = rise * low[i] + fall * low[TILE + i];
                }
            }
        }
    }
};

// body(row, i0, n) for each row, and in it for each tile of features i0 ... i0 + n
template <class Body>
void for_tiles(int64_t N, int64_t I, int64_t threads, const Body &body) {
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < N; start += ROWS) {
        for (int64_t row = start; row < std::min(N, start + ROWS); row++) {
            for (int64_t i0 = 0; i0 < I; i0 += TILE) body(row, i0, std::min(TILE, I - i0));
        }
    }
}

// Room for n numbers, of each thread its own.
float *room(int64_t n) {
    static thread_local std::vector<float> numbers;
    if (static_cast<int64_t>(numbers.size()) < n) numbers.resize(n);
    return numbers.data();
}

}  // namespace

extern "C" {

#if ORDER > 1  // the slopes of order 1 jump at the knots, where a rounded place may be on the other side

// out (N, K + 1, I): the bases of x (N, I) on the knots first + m / per_spacing, (I,) each, and then its activation
void columns(const float *x, const float *first, const float *per_spacing, NUMBER *out, int64_t N, int64_t I,
             int64_t K, int64_t threads) {
    for_tiles(N, I, threads, [&](int64_t row, int64_t i0, int64_t n) {
        const float *in = x + row * I + i0;
        NUMBER *to = out + row * (K + 1) * I + i0;
        float t[TILE];
        place(in, first + i0, per_spacing + i0, n, t);
        for (int64_t m = 0; m < K; m++, to += I) {
            const float centre = m + 0.5f * (ORDER + 1);
            for (int64_t i = 0; i < n; i++) to[i] = NUMBER(spline<ORDER>(t[i] - centre));
        }
        for (int64_t i = 0; i < n; i++) to[i] = NUMBER(ACTIVATION::value(in[i]));
    });
}

// dx (N, I): the gradient dcolumns (N, K + 1, I) of the columns taken back to x
void input_gradient(const NUMBER *dcolumns, const float *x, const float *first, const float *per_spacing, float *dx,
                    int64_t N, int64_t I, int64_t K, int64_t threads) {
    for_tiles(N, I, threads, [&](int64_t row, int64_t i0, int64_t n) {
        const float *in = x + row * I + i0;
        const NUMBER *from = dcolumns + row * (K + 1) * I + i0;
        float t[TILE], lower[TILE], slope[TILE];
        place(in, first + i0, per_spacing + i0, n, t);
        for (int64_t i = 0; i < n; i++) {
            lower[i] = spline<ORDER - 1>(t[i] - 0.5f * ORDER);
            slope[i] = 0.0f;
        }
        for (int64_t m = 0; m < K; m++, from += I) {  // dB_m/dt = B'_m - B'_{m+1}, B' of one order less
            const float centre = m + 1 + 0.5f * ORDER;
            for (int64_t i = 0; i < n; i++) {
                const float next = spline<ORDER - 1>(t[i] - centre);
                slope[i] += float(from[i]) * (lower[i] - next);
                lower[i] = next;
            }
        }
        float *to = dx + row * I + i0;
        for (int64_t i = 0; i < n; i++) {
            to[i] = slope[i] * per_spacing[i0 + i] + float(from[i]) * ACTIVATION::slope(in[i]);
        }
    });
}

#endif

void columns_any(const float *x, const float *knots, NUMBER *out, int64_t N, int64_t I, int64_t K, int64_t threads) {
    const Knots any(knots, I, K);
    for_tiles(N, I, threads, [&](int64_t row, int64_t i0, int64_t n) {
        const float *in = x + row * I + i0;
        NUMBER *to = out + row * (K + 1) * I + i0;
        float *b = room((any.P - 1) * TILE);
        any.bases(in, i0, n, ORDER, b);
        for (int64_t m = 0; m < K; m++, to += I) {
            for (int64_t i = 0; i < n; i++) to[i] = NUMBER(b[m * TILE + i]);
        }
        for (int64_t i = 0; i < n; i++) to[i] = NUMBER(ACTIVATION::value(in[i]));
    });
}

void input_gradient_any(const NUMBER *dcolumns, const float *x, const float *knots, float *dx, int64_t N, int64_t I,
                        int64_t K, int64_t threads) {
    const Knots any(knots, I, K);
    for_tiles(N, I, threads, [&](int64_t row, int64_t i0, int64_t n) {
        const float *in = x + row * I + i0;
        const NUMBER *from = dcolumns + row * (K + 1) * I + i0;
        float *b = room((any.P - 1) * TILE), slope[TILE] = {};
        any.bases(in, i0, n, ORDER - 1, b);
        for (int64_t m = 0; m < K; m++, from += I) {
            const float *low = b + m * TILE, *per = any.r.data() + (ORDER * any.P + m) * I + i0;
            for (int64_t i = 0; i < n; i++) {
                slope[i] += float(from[i]) * ORDER * (low[i] * per[i] - low[TILE + i] * per[I + i]);
            }
        }
        float *to = dx + row * I + i0;
        for (int64_t i = 0; i < n; i++) to[i] = slope[i] + float(from[i]) * ACTIVATION::slope(in[i]);
    });
}
}
