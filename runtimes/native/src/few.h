// Activations for products of few rows, quantized to int8 with a scale per 32 or 256 of them, as in llama.cpp.
#pragma once

#include <algorithm>

#include "kernels.h"
#ifdef __x86_64__
#include "rounding.h"
#else
#include "arm_rounding.h"
#endif

namespace native {

struct Activations128 {  // 128 activations, for formats of 32 values
    static constexpr int VALUES = 128;
    int8_t low[4][16], high[4][16];  // first and last 16 of each 32
    float scales[4], sums[4];        // sums: scale * sum of each 32
    int offsets[4];                    // -128 * integer sum, for unsigned weights
};

struct alignas(64) Activations256 {  // 256 activations, for formats of 256 values
    static constexpr int VALUES = 256;
    int8_t values[256];
    int16_t sums[8];     // of each 32
    int16_t halves[16];  // of each 16
    float scale;
};

namespace {

// Prefetch weights while a row of them is multiplied with R rows of activations. With R of one or two that makes a Xeon almost
// 1.5 times as fast and costs Zen 4, which saturates memory bandwidth anyway, next to nothing; with more rows the out-of-order
// window covers less of the weights, so the distance is larger.
template <int R>
inline void prefetch(const char *weights, int bytes) {
    constexpr int AHEAD = R > 2 ? 4096 : 2048;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(weights + AHEAD + i);
}

inline void quantize_part(const float *x, int there, Activations128 &part) {  // there: a multiple of 32; the others are zero
    part = {};
    for (int b = 0; b < there / 32; b++) {
        int8_t values[32];
        part.scales[b] = quantize8(x + 32 * b, 32, values);
        memcpy(part.low[b], values, 16);
        memcpy(part.high[b], values + 16, 16);
        const int sum = sum16(values) + sum16(values + 16);
        part.sums[b] = part.scales[b] * sum;
        part.offsets[b] = -128 * sum;
    }
}

inline void quantize_part(const float *x, int, Activations256 &part) {
    part.scale = quantize8(x, 256, part.values);
    for (int i = 0; i < 16; i++) part.halves[i] = int16_t(sum16(part.values + 16 * i));
    for (int j = 0; j < 8; j++) part.sums[j] = int16_t(part.halves[2 * j] + part.halves[2 * j + 1]);
}

// out[R] = a row of weights times R rows of activations, `step` apart from block to block. In few_32.h, few_256.h, arm_few.h.
template <int TYPE, int R>
void multiply_row(const char *row, const Activations128 *x, int step, int blocks, float *out);
template <int TYPE, int R>
void multiply_row(const char *row, const Activations256 *x, int step, int blocks, float *out);

template <int TYPE, int R, class Part>
void multiply_columns_of(const Product &p, const Part *x, int blocks, int from, int to, float *y) {
    for (int n = from; n < to; n++) {
        float out[R];
        multiply_row<TYPE, R>(p.w + size_t(n) * p.w_stride, x, p.rows, blocks, out);
        for (int r = 0; r < R; r++) y[r * p.y_stride + n] = out[r];
    }
}

// Compute columns `from` to `to`, four rows at a time. After the first four the weights of some columns are in a cache.
template <int TYPE, class Part>
void multiply_columns(const Product &p, const Part *x, int blocks, int from, int to) {
    const int some = p.rows > 4 ? 16 : to - from;  // at once
    for (; from < to; from += some)
        for (int m = 0; m < p.rows; m += 4) {
            const int end = std::min(from + some, to), rows = p.rows - m;
            float *const y = p.y + m * p.y_stride;
            if (rows == 1) multiply_columns_of<TYPE, 1>(p, x + m, blocks, from, end, y);
            else if (rows == 2) multiply_columns_of<TYPE, 2>(p, x + m, blocks, from, end, y);
            else if (rows == 3) multiply_columns_of<TYPE, 3>(p, x + m, blocks, from, end, y);
            else multiply_columns_of<TYPE, 4>(p, x + m, blocks, from, end, y);
        }
}

}  // namespace
}  // namespace native
