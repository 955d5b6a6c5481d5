// What both attentions need: which keys a query sees, and softmax of its scores.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int SCORES = 96 << 10;  // floats at once, of a thread: 384 KB, which stay in the second-level cache

// e^x for x <= 0, relative error below 2e-7; 0 below -87. Cephes' polynomial.
inline __m256 exponential(__m256 x) {
    const __m256 none = _mm256_cmp_ps(x, _mm256_set1_ps(-87), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(none, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

inline float largest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline const uint16_t *halves(const char *p) { return reinterpret_cast<const uint16_t *>(p); }

inline __m256 half8(const uint16_t *p, int there) {
    if (there >= 8) return _mm256_cvtph_ps(load128(p));
    uint16_t padded[8] = {};
    for (int i = 0; i < there; i++) padded[i] = p[i];
    return _mm256_cvtph_ps(load128(padded));
}

inline const uint16_t *mask_of(const Attention &a, int query) { return halves(a.mask + query * a.mask_row); }

// First key behind all that queries from `first` on may see.
inline int visible(const Attention &a, int first, int queries) {
    for (int end = a.keys; end > 0; end--)
        for (int i = 0; i < queries; i++)
            if (mask_of(a, first + i)[end - 1] != 0xfc00) return end;
    return 0;
}

// Scores -> e^(score + mask - maximum), in place; returns one over their sum. `all` of the `keys` scores are of keys.
// The sum is the same wherever the keys lie, with hidden ones between them or not, because it is one of whole numbers:
// multiples of 2^-30 of the largest.
inline float soften(const uint16_t *mask, float *row, int keys, int all) {
    __m256 most = _mm256_set1_ps(-INFINITY), lost = _mm256_setzero_ps();  // lost: NaN, which maxima do not show
    for (int j = 0; j < keys; j += 8) {
        const int there = all - j;
        const __m256 hides = half8(mask + j, there), none = _mm256_set1_ps(-INFINITY);
        __m256 s = _mm256_add_ps(_mm256_loadu_ps(row + j), hides);
        s = _mm256_blendv_ps(s, none, _mm256_cmp_ps(hides, none, _CMP_EQ_OQ));  // whatever the score
        if (there < 8) {
            const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const __m256 in = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(there), lane));
            s = _mm256_blendv_ps(none, s, in);
        }
        _mm256_storeu_ps(row + j, s);
        most = _mm256_max_ps(s, most);
        lost = _mm256_or_ps(lost, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
    }
    const float maximum = largest(most);
    const bool nan = _mm256_movemask_ps(lost);
    if (nan || maximum == -INFINITY) {  // the latter: no key is visible
        std::fill(row, row + keys, 0.0f);
        return nan ? NAN : 0;
    }
    __m256i whole = _mm256_setzero_si256();
    for (int j = 0; j < keys; j += 8) {
        const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(row + j), _mm256_set1_ps(maximum)));
        _mm256_storeu_ps(row + j, e);
        const __m256i steps = _mm256_cvtps_epi32(_mm256_mul_ps(e, _mm256_set1_ps(1 << 30)));
        whole = _mm256_add_epi64(whole, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(steps)));
        whole = _mm256_add_epi64(whole, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(steps, 1)));
    }
    alignas(32) int64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i *>(parts), whole);
    return float(double(1 << 30) / double(parts[0] + parts[1] + parts[2] + parts[3]));
}

}  // namespace
}  // namespace native
