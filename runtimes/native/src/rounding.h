// Quantize float32 to integers with a scale, convert it to bfloat16, and transpose.
#pragma once

#include "float8.h"
#include "unpack.h"

namespace native {
namespace {

constexpr float MIN_MAGNITUDE = 1e-30f;  // below it the inverse scale would not be finite: taken for zero

// 32 int16 that fit -> int8, in order
inline __m256i to_int8(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); }

// out = round(v / scale), |out| <= limit; returns scale, NaN if a value is not finite, so that the result is NaN, too.
// count: a multiple of 16; out: aligned to 32 bytes.
inline float quantize(const float *v, int count, float limit, int16_t *out) {
    const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
    // As integers, the bits of floats without sign compare like the floats, with infinity and NaN last.
    __m256i largest_magnitude = _mm256_setzero_si256();
    for (int i = 0; i < count; i += 8)
        largest_magnitude = _mm256_max_epi32(
            largest_magnitude, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(v + i)), sign_off));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(largest_magnitude), _mm256_extracti128_si256(largest_magnitude, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    const int bits = _mm_cvtsi128_si32(m);
    const float magnitude = _mm_cvtss_f32(_mm_castsi128_ps(m));
    if (bits >= 0x7f800000 || magnitude < MIN_MAGNITUDE) {
        for (int i = 0; i < count; i++) out[i] = 0;
        return bits >= 0x7f800000 ? __builtin_nanf("") : 0;
    }
    const __m256 inverse = _mm256_set1_ps(limit / magnitude);
    for (int i = 0; i < count; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(v + i), inverse));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(v + i + 8), inverse));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + i), packed);
    }
    return magnitude / limit;
}

// The same to int8, -127 to 127. count: a multiple of 32, up to 256.
inline float quantize8(const float *v, int count, int8_t *out) {
    alignas(32) int16_t wide[256];
    const float scale = quantize(v, count, 127, wide);
    for (int i = 0; i < count; i += 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i), to_int8(load256(wide + i), load256(wide + i + 16)));
    return scale;
}

inline int sum16(const int8_t *v) {
    const __m128i unsigned_bytes = _mm_xor_si128(load128(v), _mm_set1_epi8(-128));
    const __m128i sums = _mm_sad_epu8(unsigned_bytes, _mm_setzero_si128());
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128;
}

// Transpose 8x8 int32; rows of `in` are `from` apart, rows of `out` `to` apart.
inline void transpose(const int32_t *in, size_t from, int32_t *out, size_t to) {
    Float8 rows[8];
    for (int i = 0; i < 8; i++) rows[i] = Float8::load(reinterpret_cast<const float *>(in + i * from));  // only moves bits
    transpose(rows, reinterpret_cast<float *>(out), to);
}

// 8 floats -> 8 bfloat16, rounded to nearest even; NaN stays NaN
inline __m128i bfloat16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

}  // namespace
}  // namespace native
