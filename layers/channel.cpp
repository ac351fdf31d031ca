// Learned activations on a CPU, forward and backward, in one pass over the data each: see channel.py.
//
// ORDER of the splines (1 to 3), GATED (0 or 1), ACTIVATION (a struct of activations.h) and SPARE (numbers behind the
// last coefficient, for loads of four) are given when this is compiled. A spline of that order is a polynomial on each
// interval between two knots, made of ORDER + 1 neighbouring coefficients. Here these have ORDER zeros on both sides, so
// that every interval has its neighbours.
//
// Legend: N rows of C channels; R numbers in a row of x: C, or gated 2 C; K coefficients of a channel, S with the
// zeros; P knots, evenly spaced.

#include <vector>

#include "activations.h"
#include "lines.h"

#ifdef __clang__  // the numbers of a loop do not depend on each other, whatever the pointers
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

constexpr int64_t TILE = 256;  // channels at a time, whose numbers stay in the nearest cache
constexpr int64_t ROWS = 64;   // of a block of the forward pass
constexpr int NEAR = ORDER + 1;

// The bases that are not zero at u in [0, 1], the place in an interval, and their derivatives by u.
inline void bases(float u, float *b) {
    const float v = 1.0f - u;
    if (ORDER == 1) {
        b[0] = v;
        b[1] = u;
    } else if (ORDER == 2) {
        b[0] = 0.5f * v * v;
        b[1] = 0.5f + u * v;
        b[2] = 0.5f * u * u;
    } else {
        const float sixth = 1.0f / 6.0f;  // a compiler does not put a product in place of a division by itself
        b[0] = sixth * v * v * v;
        b[1] = sixth * (4.0f + u * u * (3.0f * u - 6.0f));
        b[2] = sixth * (4.0f + v * v * (3.0f * v - 6.0f));
        b[3] = sixth * u * u * u;
    }
}

inline void slopes(float u, float *d) {
    const float v = 1.0f - u;
    if (ORDER == 1) {
        d[0] = -1.0f;
        d[1] = 1.0f;
    } else if (ORDER == 2) {
        d[0] = -v;
        d[1] = v - u;
        d[2] = u;
    } else {
        d[0] = -0.5f * v * v;
        d[1] = u * (1.5f * u - 2.0f);
        d[2] = -v * (1.5f * v - 2.0f);
        d[3] = 0.5f * u * u;
    }
}

struct Functions {
    int64_t S, P;
    const float *knots;
    std::vector<float> w, first, per;  // (C, S); first knots and intervals per unit of x, (C,)

    Functions(const float *weight, const float *knots, int64_t C, int64_t K)
        : S(K + 2 * ORDER), P(K + ORDER + 1), knots(knots), w(C * S + SPARE, 0.0f), first(C), per(C) {
        for (int64_t c = 0; c < C; c++) {
            std::copy_n(weight + c * K, K, w.data() + c * S + ORDER);
            first[c] = knots[c * P];
            per[c] = (P - 1) / (knots[c * P + P - 1] - knots[c * P]);
        }
    }
};

struct Tile {
    float u[TILE];            // place in the interval
    float per_spacing[TILE];  // intervals per unit of x, 0 outside the knots
    int32_t at[TILE];         // of the first neighbour in w

    // Find the intervals of the channels c0 ... c0 + n of a row. Outside the knots the neighbours are the zeros at the
    // ends. NaN is at NaN of the first interval, so that no result hides it.
    template <bool SLOPES>
    void place(const float *x, const Functions &functions, int64_t c0, int32_t n) {
        const float *first = functions.first.data() + c0, *per = functions.per.data() + c0;
        const int32_t S = functions.S, P = functions.P;
        const float *knots = functions.knots + c0 * P;
        const float last = S - ORDER;  // intervals between all the knots
        int32_t line = 0;
        for (int32_t c = 0; c < n; c++, line += S) {
            const float t = (x[c] - first[c]) * per[c];
            const float above = t > 0.0f ? t : 0.0f;
            const float clamped = above < last ? above : last;
            float interval = std::min(std::floor(clamped), last - 1.0f);
            bool inside = clamped == t && t < last;
            if (ORDER == 1) {  // the slope jumps at the knots, where a rounded place may be on the other side
                const float *knot = knots + c * P;
                const int32_t i = static_cast<int32_t>(interval);
                const float up = x[c] >= knot[i + 1] ? 1.0f : 0.0f, down = x[c] < knot[i] ? 1.0f : 0.0f;
                inside = (x[c] >= knot[0]) & (x[c] < knot[P - 1]);
                interval += inside ? up - down : 0.0f;
            }
            u[c] = t == t ? clamped - interval : t;
            if (SLOPES) per_spacing[c] = inside ? per[c] : 0.0f;
            at[c] = static_cast<int32_t>(interval) + line;
        }
    }
};

// y of the channels from c on, W at a time, as far as they go; returns the first that is left. The next row is fetched
// while this one is computed.
template <int W>
inline int64_t forward_by(int64_t c, int64_t n, int64_t C, const Tile &tile, const float *w, const float *x, float *y) {
    const int64_t R = GATED ? 2 * C : C;
    for (; c + W <= n; c += W) {
        __builtin_prefetch(x + R + c);
        if (GATED) __builtin_prefetch(x + R + C + c);
        __builtin_prefetch(y + C + c, 1);
        float near[NEAR][W];
        gather<NEAR, W>(w, tile.at + c, near);
        INDEPENDENT
        for (int j = 0; j < W; j++) {
            float b[NEAR], phi = ACTIVATION::value(x[c + j]);
            bases(tile.u[c + j], b);
            for (int i = 0; i < NEAR; i++) phi += b[i] * near[i][j];
            y[c + j] = GATED ? phi * x[C + c + j] : phi;
        }
    }
    return c;
}

// dx of the same channels, gated with that of the values, and the part of the sums for dw.
template <int W>
inline int64_t backward_by(int64_t c, int64_t n, int64_t C, const Tile &tile, const float *w, const float *x,
                           const float *dy, float *dx, float *sums) {
    const int64_t R = GATED ? 2 * C : C;
    for (; c + W <= n; c += W) {
        __builtin_prefetch(x + R + c);
        if (GATED) __builtin_prefetch(x + R + C + c);
        __builtin_prefetch(dy + C + c);
        __builtin_prefetch(dx + R + c, 1);
        if (GATED) __builtin_prefetch(dx + R + C + c, 1);
        float near[NEAR][W], added[NEAR][W];
        gather<NEAR, W>(w, tile.at + c, near);
        INDEPENDENT
        for (int j = 0; j < W; j++) {
            float b[NEAR], d[NEAR], phi = 0.0f, slope = 0.0f;
            bases(tile.u[c + j], b);
            slopes(tile.u[c + j], d);
            for (int i = 0; i < NEAR; i++) {
                phi += b[i] * near[i][j];
                slope += d[i] * near[i][j];
            }
            const float in = x[c + j], grad = dy[c + j], dphi = GATED ? grad * x[C + c + j] : grad;
            dx[c + j] = dphi * (ACTIVATION::slope(in) + slope * tile.per_spacing[c + j]);
            if (GATED) dx[C + c + j] = grad * (ACTIVATION::value(in) + phi);
            for (int i = 0; i < NEAR; i++) added[i][j] = dphi * b[i];
        }
        scatter<NEAR, W>(added, tile.at + c, sums);
    }
    return c;
}

}  // namespace

extern "C" {

// y (N, C) = phi(x), or gated phi(x[:, :C]) * x[:, C:], of x (N, R), weight (C, K), knots (C, P)
void forward(const float *x, const float *weight, const float *knots, float *y, int64_t N, int64_t C, int64_t K,
             int64_t threads) {
    const Functions functions(weight, knots, C, K);
    const int64_t R = GATED ? 2 * C : C;
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < N; start += ROWS) {
        Tile tile;
        for (int64_t c0 = 0; c0 < C; c0 += TILE) {
            const int64_t n = std::min(TILE, C - c0);
            const float *w = functions.w.data() + c0 * functions.S;
            for (int64_t row = start; row < std::min(N, start + ROWS); row++) {
                const float *in = x + row * R + c0;
                float *out = y + row * C + c0;
                tile.place<false>(in, functions, c0, n);
                int64_t c = forward_by<WIDE>(0, n, C, tile, w, in, out);
                c = forward_by<HALF>(c, n, C, tile, w, in, out);
                forward_by<1>(c, n, C, tile, w, in, out);
            }
        }
    }
}

// dx (N, R) and dw (C, K) of grad (N, C). Each block of `rows` rows has its part of `partial`, zero at first, so that the
// order of the sums does not depend on the threads.
void backward(const float *grad, const float *x, const float *weight, const float *knots, float *partial, float *dx,
              float *dw, int64_t N, int64_t C, int64_t K, int64_t rows, int64_t threads) {
    const Functions functions(weight, knots, C, K);
    const int64_t R = GATED ? 2 * C : C, S = functions.S, blocks = (N + rows - 1) / rows;
    const int64_t size = C * S + SPARE;  // of the sums of a block
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < N; start += rows) {
        Tile tile;
        for (int64_t c0 = 0; c0 < C; c0 += TILE) {
            const int64_t n = std::min(TILE, C - c0);
            const float *w = functions.w.data() + c0 * S;
            float *sums = partial + start / rows * size + c0 * S;
            for (int64_t row = start; row < std::min(N, start + rows); row++) {
                const float *in = x + row * R + c0, *dy = grad + row * C + c0;
                float *out = dx + row * R + c0;
                tile.place<true>(in, functions, c0, n);
                int64_t c = backward_by<WIDE>(0, n, C, tile, w, in, dy, out, sums);
                c = backward_by<HALF>(c, n, C, tile, w, in, dy, out, sums);
                backward_by<1>(c, n, C, tile, w, in, dy, out, sums);
            }
        }
    }
    std::fill_n(dw, C * K, 0.0f);
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t c = 0; c < C; c++) {
            const float *from = partial + block * size + c * S + ORDER;
            for (int64_t m = 0; m < K; m++) dw[c * K + m] += from[m];
        }
    }
}
}
