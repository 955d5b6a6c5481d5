// 16 columns of weights in Q4_K, Q5_K or Q6_K with a few rows of activations (few_wide_avx512.cpp).
//
// Sums are integers up to the end of a block; after that each column has the operations of few_256.h.
#pragma once

#include "few_wide_transpose.h"

namespace native {
namespace {

constexpr int STEPS = 64;  // of four values

struct Block {  // of 16 columns
    __m512i bytes[STEPS];
    __m512i factors[16];  // of each group of 32 or, in Q6_K, of 16
    __m512i pairs[8];     // two int16 for sums of activations: Q4_K, Q5_K: minima, Q6_K: scales
    __m512 d, dmin;
};

template <bool FIFTH>
void unpack_q45_k(const char *w, size_t stride, Block &block) {
    __m512i heads[4], t[16], fifths[16];
    if (FIFTH) transpose_16x16(w + 16, stride, fifths);  // the first eight are the fifth bits
    for (int h = 0; h < 2; h++) {
        transpose_16x16(w + (FIFTH ? 48 : 16) + 64 * h, stride, t);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int group = 4 * h + i / 8 * 2, at = 8 * group + i % 8;
            block.bytes[at] = and_(t[i], all(15));
            block.bytes[at + 8] = and_(_mm512_srli_epi32(t[i], 4), all(15));
            if (!FIFTH) continue;
            const auto fifth = [&](int j) {  // of group j, where its 16 is
                return and_(_mm512_rolv_epi32(fifths[i % 8], _mm512_set1_epi32(36 - j)), all(16));
            };
            block.bytes[at] = _mm512_or_si512(block.bytes[at], fifth(group));
            block.bytes[at + 8] = _mm512_or_si512(block.bytes[at + 8], fifth(group + 1));
        }
    }
    transpose_16x4([&](int n) { return load128(w + n * stride); }, heads);
    block.d = halves(heads[0]);
    block.dmin = halves(_mm512_srli_epi32(heads[0], 16));
    // As in group_scales
    const __m512i scales[2] = {and_(heads[1], all(63)), _mm512_or_si512(and_(heads[3], all(15)),
                                                                        and_(_mm512_srli_epi32(heads[1], 2), all(48)))};
    const __m512i minima[2] = {and_(heads[2], all(63)), _mm512_or_si512(and_(_mm512_srli_epi32(heads[3], 4), all(15)),
                                                                        and_(_mm512_srli_epi32(heads[2], 2), all(48)))};
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
        block.factors[g] = and_(_mm512_srli_epi32(scales[g / 4], g % 4 * 8), _mm512_set1_epi32(255));
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        const __m512i two = _mm512_srli_epi32(minima[p / 2], p % 2 * 16);
        block.pairs[p] = _mm512_or_si512(and_(two, _mm512_set1_epi32(0xff)),
                                         and_(_mm512_slli_epi32(two, 8), _mm512_set1_epi32(0xff0000)));
    }
}

void unpack_q6_k(const char *w, size_t stride, Block &block) {
    __m512i scales[4], low[2][16], high[16];
    transpose_16x16(w, stride, low[0]);
    transpose_16x16(w + 64, stride, low[1]);
    transpose_16x16(w + 128, stride, high);
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
            for (int s = 0; s < 8; s++) {
                const __m512i four = low[h][g % 2 * 8 + s], two = high[8 * h + s];
                const __m512i bits = g < 2 ? _mm512_slli_epi32(two, 4 - 2 * g) : _mm512_srli_epi32(two, 2 * g - 4);
                block.bytes[32 * h + 8 * g + s] =
                    _mm512_or_si512(and_(g < 2 ? four : _mm512_srli_epi32(four, 4), all(15)), and_(bits, all(48)));
            }
    transpose_16x4([&](int n) { return load128(w + n * stride + 192); }, scales);
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++)
        block.factors[g] = _mm512_srai_epi32(_mm512_slli_epi32(scales[g / 4], 24 - g % 4 * 8), 24);
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++)
        block.pairs[p] = _mm512_mask_blend_epi16(0xaaaaaaaa, block.factors[2 * p],
                                                 _mm512_slli_epi32(block.factors[2 * p + 1], 16));
    alignas(32) uint16_t d[WIDE_COLUMNS];
    for (int n = 0; n < WIDE_COLUMNS; n++) memcpy(d + n, w + n * stride + 208, 2);
    block.d = _mm512_cvtph_ps(load256(d));
}

inline void scale_up(__m512i total, __m512 d, float scale, float *sums) {
    const __m512 both = _mm512_mul_ps(d, _mm512_set1_ps(scale));
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), both, _mm512_load_ps(sums)));
}

// sums[R][16] += products of a block with R rows of activations; minima likewise
template <bool SIX, int R>
void add_block(const Block &w, const Activations256 *x, float *sums, float *minima) {
    constexpr int GROUPS = SIX ? 16 : 8, LENGTH = STEPS / GROUPS;
    constexpr int PARALLEL = R > 4 ? 1 : R > 2 ? 2 : 4;  // groups at a time: enough independent accumulators to hide the latency
    __m512i totals[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        totals[r] = _mm512_setzero_si512();
        if (!SIX) continue;
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) add_dot_int16(totals[r], w.pairs[p], x[r].halves + 2 * p);
        totals[r] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(totals[r], 5));
    }
    for (int g = 0; g < GROUPS; g += PARALLEL) {
        __m512i of[PARALLEL][R];
#pragma GCC unroll 4
        for (int e = 0; e < PARALLEL; e++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) of[e][r] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int s = 0; s < LENGTH; s++)
#pragma GCC unroll 4
            for (int e = 0; e < PARALLEL; e++) {
                const int at = (g + e) * LENGTH + s;
                const __m512i four = w.bytes[at];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) add_dot_int8(of[e][r], four, x[r].values + 4 * at);
            }
#pragma GCC unroll 4
        for (int e = 0; e < PARALLEL; e++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                totals[r] = _mm512_add_epi32(totals[r], _mm512_mullo_epi32(of[e][r], w.factors[g + e]));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        scale_up(totals[r], w.d, x[r].scale, sums + r * WIDE_COLUMNS);
        if (SIX) continue;
        __m512i minima_sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) add_dot_int16(minima_sum, w.pairs[p], x[r].sums + 2 * p);
        scale_up(minima_sum, w.dmin, x[r].scale, minima + r * WIDE_COLUMNS);
    }
}

// y: 16 results of each row
template <int TYPE>
void multiply_wide(const char *w, size_t stride, const Activations256 *x, int rows, int blocks, float *y, size_t y_stride) {
    constexpr bool SIX = TYPE == Q6_K;
    constexpr int BYTES = block_bytes(TYPE);
    constexpr decltype(&add_block<SIX, 1>) adds[MAX_ROWS_AT_ONCE] = {add_block<SIX, 1>, add_block<SIX, 2>, add_block<SIX, 3>,
                                                             add_block<SIX, 4>, add_block<SIX, 5>, add_block<SIX, 6>,
                                                             add_block<SIX, 7>, add_block<SIX, 8>};
    alignas(64) float sums[MAX_FEW * WIDE_COLUMNS], minima[MAX_FEW * WIDE_COLUMNS];
    memset(sums, 0, rows * WIDE_COLUMNS * sizeof *sums);
    memset(minima, 0, rows * WIDE_COLUMNS * sizeof *minima);
    Block block;
    for (int b = 0; b < blocks; b++, x += rows) {
        prefetch(w + WIDE_COLUMNS * stride + b * WIDE_COLUMNS * BYTES, WIDE_COLUMNS * BYTES);
        if (SIX) unpack_q6_k(w + b * BYTES, stride, block);
        else unpack_q45_k<TYPE == Q5_K>(w + b * BYTES, stride, block);
        for_row_chunks<MAX_ROWS_AT_ONCE>(rows, [&](int count, int r) {
            adds[count - 1](block, x + r, sums + r * WIDE_COLUMNS, minima + r * WIDE_COLUMNS);
        });
    }
    for (int r = 0; r < rows; r++, y += y_stride) {
        const __m512 sum = _mm512_load_ps(sums + r * WIDE_COLUMNS);
        _mm512_storeu_ps(y, SIX ? sum : _mm512_sub_ps(sum, _mm512_load_ps(minima + r * WIDE_COLUMNS)));
    }
}

}  // namespace
}  // namespace native
