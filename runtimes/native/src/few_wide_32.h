// 16 columns of weights in Q4_0, Q4_1 or Q8_0 with a few rows of activations (few_wide_avx512.cpp).
//
// Four blocks at a time, each in its own accumulator: each column has the operations of multiply_row.
#pragma once

#include "few_32.h"
#include "few_wide_transpose.h"

namespace native {
namespace {

struct FourBlocks {  // blocks of 16 columns
    __m512i bytes[4][8];
    __m512 scales[4], minima[4];
};

template <int TYPE>
void unpack_four(const char *w, size_t stride, FourBlocks &four) {
    constexpr int BYTES = block_bytes(TYPE), HEAD = TYPE == Q4_1 ? 4 : 2;
    const auto head = [&](const char *block) {
        int v = 0;
        memcpy(&v, block, HEAD);
        return v;
    };
    __m512i heads[4], t[4];
    transpose_16x4([&](int n) {
        const char *row = w + n * stride;
        return _mm_setr_epi32(head(row), head(row + BYTES), head(row + 2 * BYTES), head(row + 3 * BYTES));
    }, heads);
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const auto turned = [&](int at) { transpose_16x4([&](int n) { return load128(w + n * stride + b * BYTES + at); }, t); };
        four.scales[b] = halves(heads[b]);
        if (TYPE == Q4_1) four.minima[b] = halves(_mm512_srli_epi32(heads[b], 16));
        if (TYPE == Q4_0) four.minima[b] = _mm512_mul_ps(four.scales[b], _mm512_set1_ps(-8));
        turned(HEAD);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            four.bytes[b][i] = TYPE == Q8_0 ? _mm512_xor_si512(t[i], all(0x80)) : and_(t[i], all(15));
            if (TYPE != Q8_0) four.bytes[b][4 + i] = and_(_mm512_srli_epi32(t[i], 4), all(15));
        }
        if (TYPE != Q8_0) continue;
        turned(HEAD + 16);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) four.bytes[b][4 + i] = _mm512_xor_si512(t[i], all(0x80));
    }
}

// sums[4][rows][16] += products of four blocks with R rows of activations
template <int TYPE, int R>
void add_four(const FourBlocks &w, const Activations128 *x, float *sums, size_t next) {
    constexpr int PARALLEL = R > 4 ? 1 : R > 2 ? 2 : 4;  // blocks at a time: enough independent accumulators to hide the latency
    for (int b = 0; b < 4; b += PARALLEL) {
        __m512i of[PARALLEL][R];
#pragma GCC unroll 4
        for (int e = 0; e < PARALLEL; e++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) of[e][r] = _mm512_set1_epi32(TYPE == Q8_0 ? x[r].offsets[b + e] : 0);
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++)
#pragma GCC unroll 4
            for (int e = 0; e < PARALLEL; e++) {
                const __m512i bytes = w.bytes[b + e][s];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    add_dot_int8(of[e][r], bytes, (s < 4 ? x[r].low : x[r].high)[b + e] + s % 4 * 4);
            }
#pragma GCC unroll 4
        for (int e = 0; e < PARALLEL; e++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                float *to = sums + (b + e) * next + r * WIDE_COLUMNS;
                const __m512 scale = _mm512_mul_ps(w.scales[b + e], _mm512_set1_ps(x[r].scales[b + e]));
                const __m512 products = _mm512_cvtepi32_ps(of[e][r]), sum = _mm512_load_ps(to);
                if (TYPE == Q8_0) {
                    _mm512_store_ps(to, _mm512_fmadd_ps(products, scale, sum));
                } else {
                    const __m512 minima_term = _mm512_mul_ps(w.minima[b + e], _mm512_set1_ps(x[r].sums[b + e]));
                    _mm512_store_ps(to, _mm512_add_ps(sum, _mm512_fmadd_ps(products, scale, minima_term)));
                }
            }
    }
}

// y: 16 results of each row
template <int TYPE>
void multiply_wide(const char *w, size_t stride, const Activations128 *x, int rows, int blocks, float *y, size_t y_stride) {
    constexpr int BYTES = 4 * block_bytes(TYPE);
    constexpr decltype(&add_four<TYPE, 1>) adds[MAX_ROWS_AT_ONCE] = {add_four<TYPE, 1>, add_four<TYPE, 2>, add_four<TYPE, 3>,
                                                             add_four<TYPE, 4>, add_four<TYPE, 5>, add_four<TYPE, 6>,
                                                             add_four<TYPE, 7>, add_four<TYPE, 8>};
    alignas(64) float sums[4 * MAX_FEW * WIDE_COLUMNS];
    const size_t next = rows * WIDE_COLUMNS;
    memset(sums, 0, 4 * next * sizeof *sums);
    FourBlocks four;
    const auto add = [&](const char *from, size_t step) {
        unpack_four<TYPE>(from, step, four);
        for_row_chunks<MAX_ROWS_AT_ONCE>(rows, [&](int some, int r) { adds[some - 1](four, x + r, sums + r * WIDE_COLUMNS, next); });
    };
    const char *later = w + WIDE_COLUMNS * stride;
    int left = blocks;
    for (; left >= 4; left -= 4, x += rows, w += BYTES, later += WIDE_COLUMNS * BYTES) {
        prefetch(later, WIDE_COLUMNS * BYTES);
        add(w, stride);
    }
    if (left) {
        alignas(64) char last[WIDE_COLUMNS][BYTES] = {};
        prefetch(later, WIDE_COLUMNS * BYTES * left / 4);
        for (int n = 0; n < WIDE_COLUMNS; n++) memcpy(last[n], w + n * stride, left * BYTES / 4);
        add(last[0], BYTES);
    }
    for (int r = 0; r < rows; r++, y += y_stride) {  // as in Float8::sum()
        const float *of = sums + r * WIDE_COLUMNS;
        const __m512 even = _mm512_add_ps(_mm512_load_ps(of), _mm512_load_ps(of + 2 * next));
        _mm512_storeu_ps(y, _mm512_add_ps(even, _mm512_add_ps(_mm512_load_ps(of + next), _mm512_load_ps(of + 3 * next))));
    }
}

}  // namespace
}  // namespace native
