// Horizontal sums of registers, for few_256.h and few_32.h.
#pragma once

#include "few.h"

namespace native {
namespace {

// Horizontal sums of R registers; of four at once, in the same order of additions.
template <int R>
inline void totals(const __m256 *v, float *out) {
    if (R < 4) {
        for (int r = 0; r < R; r++) out[r] = Float8{v[r]}.sum();
        return;
    }
    __m128 m[4], pairs[2];
    for (int r = 0; r < 4; r++) m[r] = _mm_add_ps(_mm256_castps256_ps128(v[r]), _mm256_extractf128_ps(v[r], 1));
    for (int i = 0; i < 2; i++)
        pairs[i] = _mm_add_ps(_mm_movelh_ps(m[2 * i], m[2 * i + 1]), _mm_movehl_ps(m[2 * i + 1], m[2 * i]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(pairs[0], pairs[1], 0x88), _mm_shuffle_ps(pairs[0], pairs[1], 0xdd)));
}

}  // namespace
}  // namespace native
