// One row of weights in Q4_0, Q4_1 or Q8_0 times R rows of activations. Weights are unpacked once for all of them, and each row
// has the same operations as it would have alone. x: [block of 128][row], `step` from one block to the next.
//
// Four blocks at a time, two per register, one in each half: their first 16 values, then their last 16, each times 16
// activations. Nibbles are unsigned; the minimum of Q4_1, and the -8 of Q4_0 as a minimum of -8 * scale, is multiplied with the
// activations' sums. Bytes are signed, but the instruction needs one unsigned factor, so the activations get the signs.
#pragma once

#include "few_reduce.h"

namespace native {
namespace {

constexpr char ZERO_BLOCK[34] = {};

struct BlockPair {  // two blocks
    __m256i low, high;
};

template <int TYPE>
inline BlockPair load_pair(const char *a, const char *b) {
    const auto at = [&](int i) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(a + i)), load128(b + i), 1);
    };
    if (TYPE == Q8_0) return {at(2), at(18)};
    const __m256i bytes = at(TYPE == Q4_1 ? 4 : 2), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
}

template <int TYPE>
inline __m256i products(const BlockPair &w, const int8_t (*low)[16], const int8_t (*high)[16]) {
    const __m256i one = _mm256_set1_epi16(1);
    if (TYPE == Q8_0) {
        const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(load256(low), w.low));
        const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(load256(high), w.high));
        return _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
    }
    const __m256i a = _mm256_maddubs_epi16(w.low, load256(low)), b = _mm256_maddubs_epi16(w.high, load256(high));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), one);  // at most 15 * 127 * 4, fits int16
}

// Load the scales and minima of four blocks.
template <int TYPE>
inline void heads(const char *a, const char *b, const char *c, const char *d, __m128 &scales, __m128 &minima) {
    const auto word = [](const char *p) {
        int v = 0;
        memcpy(&v, p, TYPE == Q4_1 ? 4 : 2);
        return v;
    };
    const __m128i words = _mm_setr_epi32(word(a), word(b), word(c), word(d));  // minima above the scales
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m128i sorted = _mm_shuffle_epi8(words, order);
    scales = _mm_cvtph_ps(sorted);
    if (TYPE == Q4_1) minima = _mm_cvtph_ps(_mm_unpackhi_epi64(sorted, sorted));
    if (TYPE == Q4_0) minima = _mm_mul_ps(scales, _mm_set1_ps(-8));
}

template <int TYPE, int R>
void rows_of_32(const char *row, const Activations128 *x, int step, int blocks, float *out) {
    constexpr int BYTES = block_bytes(TYPE);
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), second = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    __m256 sum[R];
    __m128 minima_sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps(), minima_sum[r] = _mm_setzero_ps();
    const auto add = [&](auto all, const char *a, const char *b, const char *c, const char *d) {
        __m128 weights, minima;
        heads<TYPE>(a, b, c, d, weights, minima);
        const BlockPair p = load_pair<TYPE>(a, b), q = all() == 4 ? load_pair<TYPE>(c, d) : BlockPair();
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Activations128 &part = x[r];
            const __m256 scales = _mm256_castps128_ps256(_mm_mul_ps(weights, _mm_loadu_ps(part.scales)));
            const __m256 p_sums = _mm256_cvtepi32_ps(products<TYPE>(p, part.low, part.high));
            sum[r] = _mm256_fmadd_ps(p_sums, _mm256_permutevar8x32_ps(scales, first), sum[r]);
            if (all() == 4) {
                const __m256 q_sums = _mm256_cvtepi32_ps(products<TYPE>(q, part.low + 2, part.high + 2));
                sum[r] = _mm256_fmadd_ps(q_sums, _mm256_permutevar8x32_ps(scales, second), sum[r]);
            }
            if (TYPE != Q8_0) minima_sum[r] = _mm_fmadd_ps(minima, _mm_loadu_ps(part.sums), minima_sum[r]);
        }
    };
    constexpr std::integral_constant<int, 4> four{};
    constexpr std::integral_constant<int, 2> one_or_two{};
    for (; blocks >= 4; blocks -= 4, row += 4 * BYTES, x += step) {
        prefetch<R>(row, 4 * BYTES);
        add(four, row, row + BYTES, row + 2 * BYTES, row + 3 * BYTES);
    }
    if (blocks == 3) add(four, row, row + BYTES, row + 2 * BYTES, ZERO_BLOCK);
    else if (blocks) add(one_or_two, row, blocks > 1 ? row + BYTES : ZERO_BLOCK, ZERO_BLOCK, ZERO_BLOCK);
    for (int r = 0; r < R; r++) sum[r] = _mm256_add_ps(sum[r], _mm256_set_m128(_mm_setzero_ps(), minima_sum[r]));
    totals<R>(sum, out);
}

template <int R>
void rows(int type, const char *row, const Activations128 *x, int step, int blocks, float *out) {
    if (type == Q4_0) rows_of_32<Q4_0, R>(row, x, step, blocks, out);
    else if (type == Q4_1) rows_of_32<Q4_1, R>(row, x, step, blocks, out);
    else rows_of_32<Q8_0, R>(row, x, step, blocks, out);
}

}  // namespace
}  // namespace native
