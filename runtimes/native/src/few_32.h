// One row of weights in Q4_0, Q4_1 or Q8_0 times R rows of activations. Weights are unpacked once for all of them, and each row
// has the same operations as it would have alone. x: [block of 128][row], `step` from one block to the next.
//
// Four blocks at a time, two per register, one in each half: their first 16 values, then their last 16, each times 16
// activations. Nibbles are unsigned; the minimum of Q4_1, and the -8 of Q4_0 as a minimum of -8 * scale, is multiplied with the
// activations' sums. Bytes are signed, but the instruction needs one unsigned factor, so the activations get the signs.
#pragma once

#include "few.h"

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

// Products of two blocks with 32 activations each: four int32 sums of either.
template <int TYPE>
inline __m256i products(const BlockPair &w, const int8_t (*low)[16], const int8_t (*high)[16]) {
#ifdef __AVX512VNNI__
    const __m256i signs = _mm256_set1_epi8(TYPE == Q8_0 ? -128 : 0);  // multiply_row takes 128 times the activations off
    const __m256i first = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_xor_si256(w.low, signs), load256(low));
    return _mm256_dpbusd_epi32(first, _mm256_xor_si256(w.high, signs), load256(high));
#else
    const __m256i one = _mm256_set1_epi16(1);
    if (TYPE == Q8_0) {
        const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(load256(low), w.low));
        const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(load256(high), w.high));
        return _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
    }
    const __m256i a = _mm256_maddubs_epi16(w.low, load256(low)), b = _mm256_maddubs_epi16(w.high, load256(high));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), one);  // at most 15 * 127 * 4, fits int16
#endif
}

// Sums of four blocks: the first two in the halves of one register, the others in another's.
template <int TYPE>
inline __m128i wholes(__m256i p, __m256i q) {
    const __m256i one = _mm256_set1_epi16(1);
    if (TYPE == Q8_0) {
        p = _mm256_hadd_epi32(p, q), p = _mm256_hadd_epi32(p, p);
    } else {  // the same in fewer steps; at most 15 * 127 * 16, fits int16
        p = _mm256_madd_epi16(_mm256_packs_epi32(p, q), one);
        p = _mm256_madd_epi16(_mm256_packs_epi32(p, p), one);
    }
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256(p, 1));
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
void multiply_row(const char *row, const Activations128 *x, int step, int blocks, float *out) {
    constexpr int BYTES = block_bytes(TYPE);
    __m128 sums[R];
    for (int r = 0; r < R; r++) sums[r] = _mm_setzero_ps();
    const auto add = [&](const char *a, const char *b, const char *c, const char *d) {
        const BlockPair p = load_pair<TYPE>(a, b), q = load_pair<TYPE>(c, d);
        __m128 scales, minima = _mm_setzero_ps();
        heads<TYPE>(a, b, c, d, scales, minima);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Activations128 &part = x[r];
            __m128i dots = wholes<TYPE>(products<TYPE>(p, part.low, part.high), products<TYPE>(q, part.low + 2, part.high + 2));
#ifdef __AVX512VNNI__
            if (TYPE == Q8_0) dots = _mm_add_epi32(dots, load128(part.offsets));
#endif
            const __m128 of = _mm_cvtepi32_ps(dots), scale = _mm_mul_ps(scales, _mm_loadu_ps(part.scales));
            if (TYPE == Q8_0) sums[r] = _mm_fmadd_ps(of, scale, sums[r]);
            else sums[r] = _mm_add_ps(sums[r], _mm_fmadd_ps(of, scale, _mm_mul_ps(minima, _mm_loadu_ps(part.sums))));
        }
    };
    for (; blocks >= 4; blocks -= 4, row += 4 * BYTES, x += step) {
        prefetch<R>(row, 4 * BYTES);
        add(row, row + BYTES, row + 2 * BYTES, row + 3 * BYTES);
    }
    if (blocks) add(row, blocks > 1 ? row + BYTES : ZERO_BLOCK, blocks > 2 ? row + 2 * BYTES : ZERO_BLOCK, ZERO_BLOCK);
    for (int r = 0; r < R; r++) out[r] = Float8{_mm256_zextps128_ps256(sums[r])}.sum();
}

}  // namespace
}  // namespace native
