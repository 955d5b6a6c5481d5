// One row of float16 weights, as of an adapter, times R rows of float32 activations. Weights are converted once for all of them,
// and each row has the same operations as it would have alone.
#pragma once

#include "float8.h"
#include "few.h"

namespace native {
namespace {

template <int R>
inline void rows_of_halves(const uint16_t *w, const float *x, size_t next, int inner, float *out) {
    Float8 even[R], odd[R];
    for (int r = 0; r < R; r++) even[r] = odd[r] = Float8::zero();
    const auto eight = [&](int k, Float8 (&sums)[R]) {
        const Float8 v = Float8::load(w + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r].add(v, Float8::load(x + r * next + k));
    };
    int k = 0;
    for (; k + 16 <= inner; k += 16) eight(k, even), eight(k + 8, odd);
    if (k < inner) eight(k, even);
    for (int r = 0; r < R; r++) out[r] = (even[r] + odd[r]).sum();
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
