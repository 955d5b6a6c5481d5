// Transposes weights of 16 columns so that each has its own 32-bit lane (few_wide_avx512.cpp).
#pragma once

#include "few.h"
#include "few_wide.h"

namespace native {
namespace {

constexpr int MAX_ROWS_AT_ONCE = 8;  // their accumulators and totals take 16 of 32 registers

// 16 rows of 64 bytes, `stride` bytes apart -> 16 registers with four bytes of each row
inline __attribute__((always_inline)) void transpose_16x16(const char *from, size_t stride, __m512i *out) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        out[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        out[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// The same for rows of 16 bytes; from(row) returns __m128i
template <class F>
inline __attribute__((always_inline)) void transpose_16x4(F from, __m512i *out) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_castsi128_si512(from(i));
        r[i] = _mm512_inserti32x4(r[i], from(4 + i), 1);
        r[i] = _mm512_inserti32x4(r[i], from(8 + i), 2);
        r[i] = _mm512_inserti32x4(r[i], from(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

inline __m512i all(int byte) { return _mm512_set1_epi8(char(byte)); }
inline __m512i and_(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
inline __m512 halves(__m512i low) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(low)); }

#ifdef NATIVE_REFUSED_COMPUTED  // tests: in plain C++

inline __m512i broadcast(const void *x) {
    int32_t v;
    memcpy(&v, x, sizeof v);
    return _mm512_set1_epi32(v);
}
inline void add_dot_int8(__m512i &sum, __m512i w, const void *x) { sum = _mm512_dpbusd_epi32(sum, w, broadcast(x)); }
inline void add_dot_int16(__m512i &sum, __m512i w, const void *x) { sum = _mm512_dpwssd_epi32(sum, w, broadcast(x)); }

#else

inline void add_dot_int8(__m512i &sum, __m512i w, const void *x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*static_cast<const int32_t *>(x)));
}
inline void add_dot_int16(__m512i &sum, __m512i w, const void *x) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*static_cast<const int32_t *>(x)));
}

#endif

// Prefetch the next columns in memory order: the hardware prefetcher cannot follow 16 streams at once.
inline void prefetch(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
}

}  // namespace
}  // namespace native
