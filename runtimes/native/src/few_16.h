// One row of float16 weights, as of an adapter, with R rows of activations in float32: what is widened meets all of them, and
// each gets what it would get alone, operation by operation.
#pragma once

#include "few.h"

namespace native {
namespace {

template <int R>
inline void rows_of_halves(const uint16_t *w, const float *x, size_t next, int inner, float *out) {
    __m256 even[R], odd[R];
    for (int r = 0; r < R; r++) even[r] = odd[r] = _mm256_setzero_ps();
    const auto eight = [&](int k, __m256 (&sum)[R]) {
        const __m256 v = _mm256_cvtph_ps(load128(w + k));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * next + k), sum[r]);
    };
    int k = 0;
    for (; k + 16 <= inner; k += 16) eight(k, even), eight(k + 8, odd);
    if (k < inner) eight(k, even);
    for (int r = 0; r < R; r++) out[r] = total(_mm256_add_ps(even[r], odd[r]));
}

void multiply_halves(const Product &p, int from, int to) {  // columns
    for (int n = from; n < to; n++) {
        const uint16_t *w = reinterpret_cast<const uint16_t *>(p.w + size_t(n) * p.w_stride);
        column(p, n, [&](auto rows, int m, float *y) {
            rows_of_halves<rows()>(w, p.x + m * p.x_stride, p.x_stride, p.inner, y);
        });
    }
}

}  // namespace
}  // namespace native
