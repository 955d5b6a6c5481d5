// Dequantize blocks of a GGUF file (formats.h) to float32 with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "formats.h"

namespace native {
namespace {

inline float half(const void *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

inline __m128i load128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
inline __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline void put256(__m256i v, void *to) { _mm256_store_si256(static_cast<__m256i *>(to), v); }  // aligned to 32 bytes

// out[0..16) = values * scale + offset, of 16 bytes; signed or not
template <bool Signed>
inline void widen(__m128i bytes, __m256 scale, __m256 offset, float *out) {
    const __m128i high = _mm_unpackhi_epi64(bytes, bytes);
    const __m256i a = Signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    const __m256i b = Signed ? _mm256_cvtepi8_epi32(high) : _mm256_cvtepu8_epi32(high);
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), scale, offset));
    _mm256_storeu_ps(out + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), scale, offset));
}

template <bool Signed>
inline void widen32(__m256i bytes, float scale, float offset, float *out) {
    const __m256 s = _mm256_set1_ps(scale), o = _mm256_set1_ps(offset);
    widen<Signed>(_mm256_castsi256_si128(bytes), s, o, out);
    widen<Signed>(_mm256_extracti128_si256(bytes, 1), s, o, out + 16);
}

// The 6-bit scale and minimum of group j (0..7) of a Q4_K or Q5_K block, out of its 12 bytes.
inline void group_scale(const uint8_t *s, int j, int &scale, int &minimum) {
    if (j < 4) {
        scale = s[j] & 63;
        minimum = s[j + 4] & 63;
    } else {
        scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        minimum = s[j + 4] >> 4 | (s[j] >> 6) << 4;
    }
}

// Shift left, or right if negative; the caller masks bits that cross bytes.
inline __m256i moved(__m256i x, int left) { return left < 0 ? _mm256_srli_epi16(x, -left) : _mm256_slli_epi16(x, left); }

// int32 -> the same as int16, twice
inline __m256i twice(__m256i x) { return _mm256_blend_epi16(x, _mm256_slli_epi32(x, 16), 0xaa); }

// 16 bytes of nibbles -> 32 bytes, low ones first
inline __m256i nibbles(const void *p) {
    const __m128i x = load128(p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set1_epi8(15));
}

inline void unpack_q4_k(const uint8_t *b, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    const float d = half(b), dmin = half(b + 2);
    for (int j = 0; j < 8; j += 2) {
        int s0, m0, s1, m1;
        group_scale(b + 4, j, s0, m0);
        group_scale(b + 4, j + 1, s1, m1);
        const __m256i x = load256(b + 16 + 16 * j);
        widen32<false>(_mm256_and_si256(x, low), d * s0, -(dmin * m0), out + 32 * j);
        widen32<false>(_mm256_and_si256(_mm256_srli_epi16(x, 4), low), d * s1, -(dmin * m1), out + 32 * j + 32);
    }
}

inline void unpack_q5_k(const uint8_t *b, float *out) {
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(1);
    const __m256i high = load256(b + 16);
    const float d = half(b), dmin = half(b + 2);
    for (int j = 0; j < 8; j += 2) {
        int s0, m0, s1, m1;
        group_scale(b + 4, j, s0, m0);
        group_scale(b + 4, j + 1, s1, m1);
        const __m256i x = load256(b + 48 + 16 * j);
        const __m256i h0 = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(j)), bit);
        const __m256i h1 = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(j + 1)), bit);
        const __m256i q0 = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_slli_epi16(h0, 4));
        const __m256i q1 = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x, 4), low), _mm256_slli_epi16(h1, 4));
        widen32<false>(q0, d * s0, -(dmin * m0), out + 32 * j);
        widen32<false>(q1, d * s1, -(dmin * m1), out + 32 * j + 32);
    }
}

// 32 values of Q6_K. Each half of 128 has 64 bytes of low bits and 32 of high ones; group g of 32 has the high bits 2g, 2g + 1.
inline __m256i six_bits(const uint8_t *b, int half, int g) {
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(3);
    const __m256i x = load256(b + 64 * half + 32 * (g & 1)), high = load256(b + 128 + 32 * half);
    const __m256i y = _mm256_and_si256(_mm256_srli_epi16(high, 2 * g), two);
    const __m256i q = _mm256_or_si256(_mm256_and_si256(g & 2 ? _mm256_srli_epi16(x, 4) : x, low), _mm256_slli_epi16(y, 4));
    return _mm256_sub_epi8(q, _mm256_set1_epi8(32));
}

inline void unpack_q6_k(const uint8_t *b, float *out) {
    const int8_t *scales = reinterpret_cast<const int8_t *>(b) + 192;
    const float d = half(b + 208);
    const __m256 zero = _mm256_setzero_ps();
    for (int h = 0; h < 2; h++)
        for (int g = 0; g < 4; g++, out += 32) {
            const __m256i x = six_bits(b, h, g);
            const int8_t *s = scales + 8 * h + 2 * g;
            widen<true>(_mm256_castsi256_si128(x), _mm256_set1_ps(d * s[0]), zero, out);
            widen<true>(_mm256_extracti128_si256(x, 1), _mm256_set1_ps(d * s[1]), zero, out + 16);
        }
}

// out[0..inner) = values k to k + inner of a row; both multiples of the type's block.
inline void unpack_row(int type, const char *row, int k, int inner, float *out) {
    const uint8_t *b = reinterpret_cast<const uint8_t *>(row);
    switch (type) {
        case F32:
            memcpy(out, b + 4 * size_t(k), inner * sizeof(float));
            break;
        case F16:
            for (int i = 0; i < inner; i += 8)
                _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load128(b + 2 * (k + i))));
            break;
        case Q4_0:
            b += k / 32 * 18;
            for (int i = 0; i < inner; i += 32, b += 18) {
                const float d = half(b);
                widen32<true>(_mm256_sub_epi8(nibbles(b + 2), _mm256_set1_epi8(8)), d, 0, out + i);
            }
            break;
        case Q4_1:
            b += k / 32 * 20;
            for (int i = 0; i < inner; i += 32, b += 20) widen32<false>(nibbles(b + 4), half(b), half(b + 2), out + i);
            break;
        case Q8_0:
            b += k / 32 * 34;
            for (int i = 0; i < inner; i += 32, b += 34) widen32<true>(load256(b + 2), half(b), 0, out + i);
            break;
        case Q4_K:
            b += k / 256 * 144;
            for (int i = 0; i < inner; i += 256, b += 144) unpack_q4_k(b, out + i);
            break;
        case Q5_K:
            b += k / 256 * 176;
            for (int i = 0; i < inner; i += 256, b += 176) unpack_q5_k(b, out + i);
            break;
        case Q6_K:
            b += k / 256 * 210;
            for (int i = 0; i < inner; i += 256, b += 210) unpack_q6_k(b, out + i);
            break;
    }
}

}  // namespace
}  // namespace native
