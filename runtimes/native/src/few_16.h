// Float16 weights, as of an adapter, times a few rows of float32 activations, eight columns at a time: one of an adapter's two
// matrices has so short rows that reducing a sum takes longer than adding it up.
#pragma once

#include "few.h"
#include "float8.h"

namespace native {
namespace {

void multiply_halves(const Product &p, int from, int to) {  // columns
    for (int n = from; n < to; n += 8) {
        const int count = std::min(8, to - n);
        const uint16_t *w[8];
        for (int i = 0; i < 8; i++) w[i] = reinterpret_cast<const uint16_t *>(p.w + size_t(n + std::min(i, count - 1)) * p.w_stride);
        for (int m = 0; m < p.rows; m++) {
            const float *x = p.x + m * p.x_stride;
            Float8 parts[8];
            for (Float8 &part : parts) part = Float8::zero();
            for (int k = 0; k < p.inner; k += 8) {
                const Float8 v = Float8::load(x + k);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) parts[i].add(Float8::load(w[i] + k), v);
            }
            float y[8];
            sums(parts).store(y);
            std::copy_n(y, count, p.y + m * p.y_stride + n);
        }
    }
}

}  // namespace
}  // namespace native
