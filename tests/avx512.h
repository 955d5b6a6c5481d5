// The AVX-512 intrinsics of the native kernels in plain C++, so that their order of work is tested on processors without them.
//
// Included before what is compiled for AVX-512 (native_kernels.py). Written from the operation sections of Intel's intrinsics
// guide. The compiler's own functions of these names take other types, so these are overloads; those without such an argument
// are renamed.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>


namespace {

struct Integers {  // lane 0 first
    uint32_t v[16];
};
struct Floats16 {
    float v[16];
};

template <class T, class F>
inline T each(F of) {  // of(lane)
    T y;
    for (int i = 0; i < 16; i++) y.v[i] = of(i);
    return y;
}

template <class T>
inline T load(const void *p) {
    T y;
    memcpy(y.v, p, sizeof y.v);
    return y;
}
inline void check_alignment(const void *p) {
    if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
}
template <class T>
inline T load_aligned(const void *p) {
    check_alignment(p);
    return load<T>(p);
}
inline Integers copies(uint32_t x) {
    return each<Integers>([&](int) { return x; });
}
inline Integers copies_of_byte(char x) { return copies(uint8_t(x) * 0x01010101u); }
inline Floats16 copies_of_float(float x) {
    return each<Floats16>([&](int) { return x; });
}
inline void _mm512_storeu_ps(float *p, const Floats16 &a) { memcpy(p, a.v, sizeof a.v); }
inline void _mm512_store_ps(float *p, const Floats16 &a) {
    check_alignment(p);
    _mm512_storeu_ps(p, a);
}

inline Integers _mm512_and_si512(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] & b.v[i]; });
}
inline Integers _mm512_or_si512(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Integers _mm512_xor_si512(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline Integers _mm512_add_epi32(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Integers _mm512_add_epi16(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return ((a.v[i] + b.v[i]) & 0xffff) | ((a.v[i] >> 16) + (b.v[i] >> 16)) << 16; });
}
inline Integers _mm512_sub_epi32(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Integers _mm512_mullo_epi32(const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Integers _mm512_slli_epi32(const Integers &a, int bits) {
    return each<Integers>([&](int i) { return a.v[i] << bits; });
}
inline Integers _mm512_srli_epi32(const Integers &a, int bits) {
    return each<Integers>([&](int i) { return a.v[i] >> bits; });
}
inline Integers _mm512_srai_epi32(const Integers &a, int bits) {
    return each<Integers>([&](int i) { return uint32_t(int32_t(a.v[i]) >> bits); });
}
inline Integers _mm512_rolv_epi32(const Integers &a, const Integers &bits) {
    return each<Integers>([&](int i) { return a.v[i] << (bits.v[i] & 31) | a.v[i] >> (-bits.v[i] & 31); });
}
inline Integers _mm512_mask_blend_epi16(uint32_t mask, const Integers &a, const Integers &b) {  // b where a bit is set
    return each<Integers>([&](int i) {
        const uint32_t from_b = (mask >> 2 * i & 1 ? 0xffffu : 0) | (mask >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
        return (a.v[i] & ~from_b) | (b.v[i] & from_b);
    });
}

// Lane i is lane source[i % 4] of the same 128 bits of a (0 to 3) or b (4 to 7).
inline Integers within_128(const Integers &a, const Integers &b, const int (&source)[4]) {
    return each<Integers>([&](int i) { return (source[i % 4] < 4 ? a : b).v[i / 4 * 4 + source[i % 4] % 4]; });
}
inline Integers _mm512_unpacklo_epi32(const Integers &a, const Integers &b) { return within_128(a, b, {0, 4, 1, 5}); }
inline Integers _mm512_unpackhi_epi32(const Integers &a, const Integers &b) { return within_128(a, b, {2, 6, 3, 7}); }
inline Integers _mm512_unpacklo_epi64(const Integers &a, const Integers &b) { return within_128(a, b, {0, 1, 4, 5}); }
inline Integers _mm512_unpackhi_epi64(const Integers &a, const Integers &b) { return within_128(a, b, {2, 3, 6, 7}); }

// Two of a's four groups of 128 bits, then two of b's
inline Integers _mm512_shuffle_i32x4(const Integers &a, const Integers &b, int order) {
    return each<Integers>([&](int i) { return (i < 8 ? a : b).v[(order >> i / 4 * 2 & 3) * 4 + i % 4]; });
}
inline Integers _mm512_inserti32x4(Integers a, __m128i b, int where) {
    memcpy(a.v + 4 * where, &b, sizeof b);
    return a;
}
inline Integers widened(__m128i a) { return _mm512_inserti32x4(copies(0xaaaaaaaa), a, 0); }  // the rest is undefined

inline Integers _mm512_dpbusd_epi32(const Integers &sum, const Integers &unsigned_bytes, const Integers &signed_bytes) {
    return each<Integers>([&](int i) {
        uint32_t y = sum.v[i];
        for (int at = 0; at < 32; at += 8) y += uint8_t(unsigned_bytes.v[i] >> at) * int8_t(signed_bytes.v[i] >> at);
        return y;
    });
}
inline Integers _mm512_dpwssd_epi32(const Integers &sum, const Integers &a, const Integers &b) {
    return each<Integers>([&](int i) {
        uint32_t y = sum.v[i];
        for (int at = 0; at < 32; at += 16) y += uint32_t(int16_t(a.v[i] >> at) * int16_t(b.v[i] >> at));
        return y;
    });
}
inline __m256i products_of_bytes(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    Integers parts[3] = {};
    memcpy(parts[0].v, &sum, sizeof sum);
    memcpy(parts[1].v, &unsigned_bytes, sizeof sum);
    memcpy(parts[2].v, &signed_bytes, sizeof sum);
    memcpy(&sum, _mm512_dpbusd_epi32(parts[0], parts[1], parts[2]).v, sizeof sum);
    return sum;
}

inline __m256i _mm512_cvtepi32_epi16(const Integers &a) {
    uint16_t y[16];
    for (int i = 0; i < 16; i++) y[i] = uint16_t(a.v[i]);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(y));
}
inline Floats16 from_float16(__m256i a) {
    Floats16 y;
    _mm256_storeu_ps(y.v, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
    _mm256_storeu_ps(y.v + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
    return y;
}
inline Floats16 _mm512_cvtepi32_ps(const Integers &a) {
    return each<Floats16>([&](int i) { return float(int32_t(a.v[i])); });
}
inline Floats16 _mm512_add_ps(const Floats16 &a, const Floats16 &b) {
    return each<Floats16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats16 _mm512_sub_ps(const Floats16 &a, const Floats16 &b) {
    return each<Floats16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats16 _mm512_mul_ps(const Floats16 &a, const Floats16 &b) {
    return each<Floats16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats16 _mm512_fmadd_ps(const Floats16 &a, const Floats16 &b, const Floats16 &c) {
    return each<Floats16>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}

}  // namespace

#define __AVX512VNNI__ 1
#define __m512i Integers
#define __m512 Floats16
#define _mm512_loadu_si512 load<Integers>
#define _mm512_load_si512 load_aligned<Integers>
#define _mm512_load_ps load_aligned<Floats16>
#define _mm512_setzero_ps() copies_of_float(0)
#define _mm512_setzero_si512() copies(0)
#define _mm512_set1_epi32 copies
#define _mm512_set1_epi8 copies_of_byte
#define _mm512_set1_ps copies_of_float
#define _mm512_castsi128_si512 widened
#define _mm512_cvtph_ps from_float16
#undef _mm256_dpbusd_epi32
#define _mm256_dpbusd_epi32 products_of_bytes
