// Lines of four neighbouring numbers, of W channels at once.
//
//     gather<n, W>(w, at, near)       near[i][j] = w[at[j] + i], for i < n and j < W
//     scatter<n, W>(added, at, sums)  sums[at[j] + i] += added[i][j], one j after the other
//
// n is 4 at most. On x86 a line is one load of four numbers, whatever n is, and four vectors of lines are transposed,
// lane by lane. W is WIDE, or HALF for what is left, or 1.

#pragma once

#include <cstdint>
#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

template <int W>
struct Lanes {  // any machine
    static constexpr bool has_vectors = false;
};

#ifdef __SSE__
template <>
struct Lanes<4> {
    using V = __m128;
    static constexpr bool has_vectors = true;
    static V load(const float *x) { return _mm_loadu_ps(x); }
    static void store(float *x, V a) { _mm_storeu_ps(x, a); }
    static V unpack_low(V a, V b) { return _mm_unpacklo_ps(a, b); }
    static V unpack_high(V a, V b) { return _mm_unpackhi_ps(a, b); }
    static V low_pairs(V a, V b) { return _mm_shuffle_ps(a, b, 0x44); }
    static V high_pairs(V a, V b) { return _mm_shuffle_ps(a, b, 0xee); }
    static V lines(const float *w, const int32_t *at) { return load(w + *at); }
    static void add_lines(V a, const int32_t *at, float *sums) { store(sums + *at, _mm_add_ps(load(sums + *at), a)); }
};
#endif

#ifdef __AVX__
template <>
struct Lanes<8> {
    using V = __m256;
    static constexpr bool has_vectors = true;
    static V load(const float *x) { return _mm256_loadu_ps(x); }
    static void store(float *x, V a) { _mm256_storeu_ps(x, a); }
    static V unpack_low(V a, V b) { return _mm256_unpacklo_ps(a, b); }
    static V unpack_high(V a, V b) { return _mm256_unpackhi_ps(a, b); }
    static V low_pairs(V a, V b) { return _mm256_shuffle_ps(a, b, 0x44); }
    static V high_pairs(V a, V b) { return _mm256_shuffle_ps(a, b, 0xee); }
    static V lines(const float *w, const int32_t *at) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(Lanes<4>::lines(w, at)), Lanes<4>::lines(w, at + 4), 1);
    }
    static void add_lines(V a, const int32_t *at, float *sums) {
        Lanes<4>::add_lines(_mm256_castps256_ps128(a), at, sums);
        Lanes<4>::add_lines(_mm256_extractf128_ps(a, 1), at + 4, sums);
    }
};
#endif

#ifdef __AVX512F__
template <>
struct Lanes<16> {
    using V = __m512;
    static constexpr bool has_vectors = true;
    static V load(const float *x) { return _mm512_loadu_ps(x); }
    static void store(float *x, V a) { _mm512_storeu_ps(x, a); }
    static V unpack_low(V a, V b) { return _mm512_unpacklo_ps(a, b); }
    static V unpack_high(V a, V b) { return _mm512_unpackhi_ps(a, b); }
    static V low_pairs(V a, V b) { return _mm512_shuffle_ps(a, b, 0x44); }
    static V high_pairs(V a, V b) { return _mm512_shuffle_ps(a, b, 0xee); }
    static V lines(const float *w, const int32_t *at) {
        const __m256d low = _mm256_castps_pd(Lanes<8>::lines(w, at));
        const __m256d high = _mm256_castps_pd(Lanes<8>::lines(w, at + 8));
        return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1));
    }
    static void add_lines(V a, const int32_t *at, float *sums) {
        Lanes<8>::add_lines(_mm512_castps512_ps256(a), at, sums);
        Lanes<8>::add_lines(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)), at + 8, sums);
    }
};
#endif

#if defined(__AVX512F__)
constexpr int WIDE = 16, HALF = 8;
#elif defined(__AVX__)
constexpr int WIDE = 8, HALF = 4;
#elif defined(__SSE__)
constexpr int WIDE = 4, HALF = 1;
#else
constexpr int WIDE = 8, HALF = 4;
#endif

// The four by four numbers of each lane.
template <class L, class V>
inline void transpose(V *r) {
    const V a = L::unpack_low(r[0], r[1]), b = L::unpack_high(r[0], r[1]);
    const V c = L::unpack_low(r[2], r[3]), d = L::unpack_high(r[2], r[3]);
    r[0] = L::low_pairs(a, c);
    r[1] = L::high_pairs(a, c);
    r[2] = L::low_pairs(b, d);
    r[3] = L::high_pairs(b, d);
}

template <int n, int W>
inline void gather(const float *w, const int32_t *at, float near[n][W]) {
    using L = Lanes<W>;
    if constexpr (L::has_vectors) {
        typename L::V r[4];
        for (int j = 0; j < 4; j++) r[j] = L::lines(w, at + j);  // of channels j, j + 4, ...
        transpose<L>(r);
        for (int i = 0; i < n; i++) L::store(near[i], r[i]);
    } else {
        for (int j = 0; j < W; j++) {
            for (int i = 0; i < n; i++) near[i][j] = w[at[j] + i];
        }
    }
}

template <int n, int W>
inline void scatter(const float added[n][W], const int32_t *at, float *sums) {
    using L = Lanes<W>;
    if constexpr (L::has_vectors) {
        typename L::V r[4] = {};
        for (int i = 0; i < n; i++) r[i] = L::load(added[i]);
        transpose<L>(r);
        for (int j = 0; j < 4; j++) L::add_lines(r[j], at + j, sums);
    } else {
        for (int j = 0; j < W; j++) {
            for (int i = 0; i < n; i++) sums[at[j] + i] += added[i][j];
        }
    }
}

}  // namespace
