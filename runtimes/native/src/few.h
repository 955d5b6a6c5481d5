// Activations for products of few rows, quantized to int8 with a scale per 32 or 256 of them, as in llama.cpp.
#pragma once

#include <type_traits>

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

// Compute column `n` of a product, four rows at a time: with(R, m, y) computes R of them from row m on. After the first four the
// weights are in the L1 cache.
template <class F>
inline void column(const Product &p, int n, F with) {
    for (int m = 0; m < p.rows; m += 4) {
        const int count = p.rows - m < 4 ? p.rows - m : 4;
        float y[4];
        if (count == 4) with(std::integral_constant<int, 4>(), m, y);
        else if (count == 3) with(std::integral_constant<int, 3>(), m, y);
        else if (count == 2) with(std::integral_constant<int, 2>(), m, y);
        else with(std::integral_constant<int, 1>(), m, y);
        for (int i = 0; i < count; i++) p.y[(m + i) * p.y_stride + n] = y[i];
    }
}

}  // namespace
}  // namespace native
