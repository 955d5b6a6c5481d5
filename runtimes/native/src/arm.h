// Sums of 8 rows x 4 columns in eight registers, for arm_int8.cpp, as the compiler's flags say: by smmla (FEAT_I8MM), which
// multiplies 2 rows x 8 signed bytes by 2 columns x 8, so that a register has two rows with two columns each; or by sdot
// (FEAT_DotProd), which multiplies four bytes of a row by those of 4 columns, so that a register has one row.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace native {
namespace {

constexpr int ROWS = 8, SUMS = 8;
using Whole = int32x4_t[SUMS];
using Floats = float32x4_t[SUMS];

// columns_of(i, p): of the columns of register i, for each of its lanes. rows_of: of its rows, of each of which p has two.
// first_pair(i): where the first two columns of row i are among the sums of all registers; the others are NEXT_PAIR behind.
// add<COUNT>: sums += products of COUNT steps of eight values.

#ifdef __ARM_FEATURE_MATMUL_INT8

inline float32x4_t columns_of(int i, const float *p) { return vcombine_f32(vld1_f32(p + i % 2 * 2), vld1_f32(p + i % 2 * 2)); }
inline int32x4_t columns_of(int i, const int32_t *p) { return vcombine_s32(vld1_s32(p + i % 2 * 2), vld1_s32(p + i % 2 * 2)); }
inline float32x4_t rows_of(int i, const float (*p)[2]) { return vld1q_f32(p[i / 2 * 2]); }
constexpr int NEXT_PAIR = 4;
inline int first_pair(int i) { return i / 2 * 8 + i % 2 * 2; }

template <int COUNT>
inline __attribute__((always_inline)) void add(const int8_t (*x)[ROWS][8], const int8_t (*w)[4][8], Whole &sums) {
#pragma GCC unroll 4
    for (int s = 0; s < COUNT; s++) {
        const int8x16_t columns[2] = {vld1q_s8(w[s][0]), vld1q_s8(w[s][2])};
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i++) sums[i] = vmmlaq_s32(sums[i], vld1q_s8(x[s][i / 2 * 2]), columns[i % 2]);
    }
}

#else

inline float32x4_t columns_of(int, const float *p) { return vld1q_f32(p); }
inline int32x4_t columns_of(int, const int32_t *p) { return vld1q_s32(p); }
inline float32x4_t rows_of(int i, const float (*p)[2]) { return vld1q_dup_f32(p[i]); }
constexpr int NEXT_PAIR = 2;
inline int first_pair(int i) { return 4 * i; }

template <int COUNT>
inline __attribute__((always_inline)) void add(const int8_t (*x)[ROWS][8], const int8_t (*w)[4][8], Whole &sums) {
#pragma GCC unroll 4
    for (int s = 0; s < COUNT; s++) {
        const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(w[s][0])), b = vreinterpretq_s32_s8(vld1q_s8(w[s][2]));
        const int8x16_t first = vreinterpretq_s8_s32(vuzp1q_s32(a, b)), second = vreinterpretq_s8_s32(vuzp2q_s32(a, b));
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i++) {
            const int8x16_t rows = vld1q_s8(x[s][i / 2 * 2]);  // lanes 0 and 1 of one row, 2 and 3 of the next
            sums[i] = i % 2 ? vdotq_laneq_s32(sums[i], first, rows, 2) : vdotq_laneq_s32(sums[i], first, rows, 0);
            sums[i] = i % 2 ? vdotq_laneq_s32(sums[i], second, rows, 3) : vdotq_laneq_s32(sums[i], second, rows, 1);
        }
    }
}

#endif

}  // namespace
}  // namespace native
