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
#ifdef __SSE__
#include <xmmintrin.h>
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
    float near[NEAR][TILE];

    // Find the intervals of the channels c0 ... c0 + n of a row, and the coefficients of the neighbours. Outside these
    // are the zeros at the ends. NaN is at NaN of the first interval, so that no result hides it.
    void place(const float *x, const Functions &functions, int64_t c0, int64_t n) {
        const float *first = functions.first.data() + c0, *per = functions.per.data() + c0;
        const int64_t S = functions.S;
        const float last = S - ORDER;  // intervals between all the knots
        const float *w = functions.w.data() + c0 * S;
        for (int64_t c = 0; c < n; c++) {
            const float t = (x[c] - first[c]) * per[c];
            const float above = t > 0.0f ? t : 0.0f;
            const float clamped = above < last ? above : last;
            float interval = std::min(std::floor(clamped), last - 1.0f);
            bool inside = clamped == t && t < last;
            if (ORDER == 1) {  // the slope jumps at the knots, where a rounded place may be on the other side
                const float *knot = functions.knots + (c0 + c) * functions.P;
                inside = x[c] >= knot[0] && x[c] < knot[functions.P - 1];
                const int64_t i = static_cast<int64_t>(interval);
                interval += inside ? (x[c] >= knot[i + 1]) - (x[c] < knot[i]) : 0;
            }
            u[c] = t == t ? clamped - interval : t;
            per_spacing[c] = inside ? per[c] : 0.0f;
            at[c] = static_cast<int32_t>(interval) + static_cast<int32_t>(c * S);
        }
        gather(w, n);
    }

    // near[i][c] = w[at[c] + i]
    void gather(const float *w, int64_t n) {
        int64_t c = 0;
#ifdef __SSE__  // of four channels at a time, by four loads
        for (; ORDER > 1 && c + 4 <= n; c += 4) {
            __m128 row[4];
            for (int j = 0; j < 4; j++) row[j] = _mm_loadu_ps(w + at[c + j]);
            _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
            for (int i = 0; i < NEAR; i++) _mm_storeu_ps(near[i] + c, row[i]);
        }
#endif
        for (; c < n; c++) {
            for (int i = 0; i < NEAR; i++) near[i][c] = w[at[c] + i];
        }
    }

    // sums[at[c] + i] += added[i][c]
    void scatter(const float added[NEAR][TILE], float *sums, int64_t n) const {
        int64_t c = 0;
#ifdef __SSE__
        for (; ORDER > 1 && c + 4 <= n; c += 4) {
            __m128 row[4] = {};
            for (int i = 0; i < NEAR; i++) row[i] = _mm_loadu_ps(added[i] + c);
            _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
            for (int j = 0; j < 4; j++) {
                float *to = sums + at[c + j];
                _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), row[j]));
            }
        }
#endif
        for (; c < n; c++) {
            for (int i = 0; i < NEAR; i++) sums[at[c] + i] += added[i][c];
        }
    }
};

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
            for (int64_t row = start; row < std::min(N, start + ROWS); row++) {
                const float *in = x + row * R + c0;
                float *out = y + row * C + c0;
                tile.place(in, functions, c0, n);
                for (int64_t c = 0; c < n; c++) {
                    float b[NEAR], phi = ACTIVATION::value(in[c]);
                    bases(tile.u[c], b);
                    for (int i = 0; i < NEAR; i++) phi += b[i] * tile.near[i][c];
                    out[c] = GATED ? phi * in[c + C] : phi;
                }
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
        float added[NEAR][TILE];
        for (int64_t c0 = 0; c0 < C; c0 += TILE) {
            const int64_t n = std::min(TILE, C - c0);
            float *sums = partial + start / rows * size + c0 * S;
            for (int64_t row = start; row < std::min(N, start + rows); row++) {
                const float *in = x + row * R + c0, *dy = grad + row * C + c0;
                float *out = dx + row * R + c0;
                tile.place(in, functions, c0, n);
                for (int64_t c = 0; c < n; c++) {
                    float b[NEAR], d[NEAR], phi = 0.0f, slope = 0.0f;
                    bases(tile.u[c], b);
                    slopes(tile.u[c], d);
                    for (int i = 0; i < NEAR; i++) {
                        phi += b[i] * tile.near[i][c];
                        slope += d[i] * tile.near[i][c];
                    }
                    const float dphi = GATED ? dy[c] * in[c + C] : dy[c];
                    out[c] = dphi * (ACTIVATION::slope(in[c]) + slope * tile.per_spacing[c]);
                    if (GATED) out[c + C] = dy[c] * (ACTIVATION::value(in[c]) + phi);
                    for (int i = 0; i < NEAR; i++) added[i][c] = dphi * b[i];
                }
                tile.scatter(added, sums, n);
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
