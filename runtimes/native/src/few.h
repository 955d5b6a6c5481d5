// Activations for products of few rows: rounded to 8 bits and a scale for 32 or 256 of them, as llama.cpp does.
#pragma once

#include "unpack.h"

namespace native {
namespace {

constexpr int AHEAD = 2048;  // bytes prefetched

struct Part128 {  // 128 activations, for formats of 32 values
    static constexpr int BLOCKS = 4;  // of 32 values
    struct Pair {  // 64 of them: halves of a register belong to the first 32 and to the others
        int8_t low[2][16], high[2][16];
    } pairs[2];
    float scales[4], sums[4];  // sums: of each 32, as rounded
};

struct Part256 {  // 256 activations, for formats of 256 values
    static constexpr int BLOCKS = 8;
    int8_t values[256];
    int16_t sums[8];     // of each 32
    int16_t halves[16];  // of each 16
    float scale;
};

// What activations are multiplied with to get bytes, and back, for `count` of them; 0 and NaN if one is not finite.
void find_scale(const float *x, int count, float &inverse, float &scale) {
    const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
    __m256i m = _mm256_setzero_si256();  // as integers, magnitudes of floats order like the floats, infinity and NaN last
    for (int i = 0; i < count; i += 8)
        m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), sign_off));
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    const float magnitude = _mm_cvtss_f32(_mm_castsi128_ps(most));
    const bool finite = _mm_cvtsi128_si32(most) < 0x7f800000, some = finite && magnitude > 1e-30f;  // 127 / it is finite
    inverse = some ? 127 / magnitude : 0;
    scale = some ? magnitude / 127 : finite ? 0 : __builtin_nanf("");
}

inline __m256i bytes(const float *x, float inverse) {  // 32 of them
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
        q[i] = inverse != 0 ? v : _mm256_setzero_si256();
    }
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void take(const float *x, int blocks, Part128 &part) {  // up to 4 blocks; the others are zero
    part = {};
    for (int b = 0; b < blocks; b++) {
        Part128::Pair &pair = part.pairs[b / 2];
        float inverse;
        find_scale(x + 32 * b, 32, inverse, part.scales[b]);
        const __m256i both = bytes(x + 32 * b, inverse);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(pair.low[b % 2]), _mm256_castsi256_si128(both));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(pair.high[b % 2]), _mm256_extracti128_si256(both, 1));
        int sum = 0;
        for (int i = 0; i < 16; i++) sum += pair.low[b % 2][i] + pair.high[b % 2][i];
        part.sums[b] = part.scales[b] * sum;
    }
}

void take(const float *x, int, Part256 &part) {
    float inverse;
    find_scale(x, 256, inverse, part.scale);
    for (int j = 0; j < 8; j++) {
        const __m256i q = bytes(x + 32 * j, inverse);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(part.values + 32 * j), q);
        int sums[2] = {0, 0};
        for (int i = 0; i < 32; i++) sums[i / 16] += part.values[32 * j + i];
        for (int i = 0; i < 2; i++) part.halves[2 * j + i] = int16_t(sums[i]);
        part.sums[j] = int16_t(sums[0] + sums[1]);
    }
}

inline float total(__m256 v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace
}  // namespace native
