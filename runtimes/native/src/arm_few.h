// One row of weights with R rows of activations, by sdot (FEAT_DotProd): weights are unpacked once for all of them, and each
// row has the same operations as it would have alone. x: [block of 128][row], `step` from one block to the next.
//
// Integers are those of arm_int8.cpp: 8 and 32 are subtracted in Q4_0 and Q6_K, minima are multiplied with the activations'
// sums.
#pragma once

#include "arm_rounding.h"
#include "few.h"
#include "formats.h"

namespace native {
namespace {

struct Bytes32 {  // 32 weights
    int8x16_t low, high;
};

inline Bytes32 bytes32(uint8x16_t low, uint8x16_t high, int zero) {
    const int8x16_t none = vdupq_n_s8(int8_t(zero));
    return {vsubq_s8(vreinterpretq_s8_u8(low), none), vsubq_s8(vreinterpretq_s8_u8(high), none)};
}

template <int TYPE>
inline Bytes32 block_of_32(const uint8_t *b) {
    if (TYPE == Q8_0) return bytes32(vld1q_u8(b + 2), vld1q_u8(b + 18), 0);
    const uint8x16_t bytes = vld1q_u8(b + (TYPE == Q4_1 ? 4 : 2));
    return bytes32(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4), TYPE == Q4_0 ? 8 : 0);
}

inline int32x4_t products(const Bytes32 &w, const int8_t *low, const int8_t *high) {
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.low, vld1q_s8(low)), w.high, vld1q_s8(high));
}

template <int TYPE, int R>
void multiply_row(const char *weights, const Activations128 *x, int step, int blocks, float *out) {
    const uint8_t *row = reinterpret_cast<const uint8_t *>(weights);
    float32x4_t sums[R];
    float minima_sum[R] = {};
    for (int r = 0; r < R; r++) sums[r] = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++, row += block_bytes(TYPE)) {
        prefetch<R>(reinterpret_cast<const char *>(row), block_bytes(TYPE));
        const Activations128 *const part = x + b / 4 * step;
        const Bytes32 w = block_of_32<TYPE>(row);
        const float scale = half(row), minimum = TYPE == Q4_1 ? half(row + 2) : 0;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const int32x4_t whole = products(w, part[r].low[b % 4], part[r].high[b % 4]);
            sums[r] = vfmaq_n_f32(sums[r], vcvtq_f32_s32(whole), scale * part[r].scales[b % 4]);
            if (TYPE == Q4_1) minima_sum[r] = __builtin_fmaf(minimum, part[r].sums[b % 4], minima_sum[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = vaddvq_f32(sums[r]) + minima_sum[r];
}

// Group j of 32 values of a block
template <int TYPE>
inline Bytes32 group(const uint8_t *b, int j) {
    const uint8_t *four = b + (TYPE == Q6_K ? j / 4 * 64 + j % 2 * 32 : (TYPE == Q4_K ? 16 : 48) + j / 2 * 32);
    const bool upper = TYPE == Q6_K ? j & 2 : j & 1;
    uint8x16_t parts[2];
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vld1q_u8(four + 16 * i);
        parts[i] = upper ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
        if (TYPE == Q5_K) {
            const uint8x16_t bit = vshlq_u8(vld1q_u8(b + 16 + 16 * i), vdupq_n_s8(int8_t(-j)));
            parts[i] = vorrq_u8(parts[i], vshlq_n_u8(vandq_u8(bit, vdupq_n_u8(1)), 4));
        }
        if (TYPE == Q6_K) {
            const uint8x16_t two = vshlq_u8(vld1q_u8(b + 128 + j / 4 * 32 + 16 * i), vdupq_n_s8(int8_t(-2 * (j % 4))));
            parts[i] = vorrq_u8(parts[i], vshlq_n_u8(vandq_u8(two, vdupq_n_u8(3)), 4));
        }
    }
    return bytes32(parts[0], parts[1], TYPE == Q6_K ? 32 : 0);
}

template <int TYPE, int R>
void multiply_row(const char *weights, const Activations256 *x, int step, int blocks, float *out) {
    const uint8_t *row = reinterpret_cast<const uint8_t *>(weights);
    float32x4_t sums[R];
    float minima_sum[R] = {};
    for (int r = 0; r < R; r++) sums[r] = vdupq_n_f32(0);
    for (; blocks > 0; blocks--, row += block_bytes(TYPE), x += step) {
        prefetch<R>(reinterpret_cast<const char *>(row), block_bytes(TYPE));
        uint64_t scales = 0, minima = 0;  // eight bytes each
        if (TYPE != Q6_K) group_scales(row + 4, scales, minima);
        const int8_t *const of_16 = reinterpret_cast<const int8_t *>(row + 192);
        int32x4_t whole[R];
        for (int r = 0; r < R; r++) whole[r] = vdupq_n_s32(0);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const Bytes32 w = group<TYPE>(row, j);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const int8_t *values = x[r].values + 32 * j;
                if (TYPE == Q6_K) {
                    const int32x4_t none = vdupq_n_s32(0);
                    whole[r] = vmlaq_n_s32(whole[r], vdotq_s32(none, w.low, vld1q_s8(values)), of_16[2 * j]);
                    whole[r] = vmlaq_n_s32(whole[r], vdotq_s32(none, w.high, vld1q_s8(values + 16)), of_16[2 * j + 1]);
                } else {
                    whole[r] = vmlaq_n_s32(whole[r], products(w, values, values + 16), int32_t(scales >> 8 * j & 255));
                }
            }
        }
        const float d = half(row + (TYPE == Q6_K ? 208 : 0)), dmin = TYPE == Q6_K ? 0 : half(row + 2);
        const int16x8_t lowest = vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(minima)));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            sums[r] = vfmaq_n_f32(sums[r], vcvtq_f32_s32(whole[r]), d * x[r].scale);
            if (TYPE == Q6_K) continue;
            const int16x8_t of_x = vld1q_s16(x[r].sums);
            const int32x4_t low = vmull_s16(vget_low_s16(lowest), vget_low_s16(of_x));
            minima_sum[r] = __builtin_fmaf(-dmin * x[r].scale, float(vaddvq_s32(vmlal_high_s16(low, lowest, of_x))), minima_sum[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = vaddvq_f32(sums[r]) + minima_sum[r];
}

}  // namespace
}  // namespace native
