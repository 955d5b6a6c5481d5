// One row of weights in Q4_K, Q5_K or Q6_K with R rows of activations: weights are unpacked once for all of them, and each
// row has the same operations as it would have alone. x: [block][row], `step` from block to block.
//
// Q4_K, Q5_K: products of each group of 32 times its 6-bit scale add up in int32; minima are multiplied with the sums of
// the groups' activations. Q6_K: the same for groups of 16 and their 8-bit scales; its -32 is multiplied with the sums of 16.
#pragma once

#include "few.h"

namespace native {
namespace {

// sums += products of 32 bytes with 32 activations, two by two, times their scales
template <int R>
inline void add(__m256i &sums, __m256i q, const int8_t *x, __m256i scales) {
    if (R == 1) {
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(q, load256(x)), scales));
    } else {  // here gcc puts the intrinsics' sums off until products no longer fit its registers: half of the speed
        __m256i t;
        __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                : "+x"(sums), "=&x"(t)
                : "x"(q), "m"(*reinterpret_cast<const __m256i_u *>(x)), "x"(scales));
    }
}

// Accumulates blocks' sums: of products, multiplied by d, and of minima, by -dmin. Each block is reduced to one integer first,
// whose float32 does not depend on the order of additions: that makes the bits equal to those of wide kernels (few_wide.h). It is
// reduced after the next block's sums are computed, when its own have long been there; else their latency would fill the
// processor's reorder buffer.
template <int R, bool MINIMA>
struct RowTotals {
    __m128 sums = _mm_setzero_ps(), minima_sums = _mm_setzero_ps();  // of a row each; R = 1: side by side in the former
    __m256i products[R];
    __m128i minima[R];
    __m128 d_and_dmin = _mm_setzero_ps(), scales = _mm_setzero_ps();

    RowTotals() {
        for (int r = 0; r < R; r++) products[r] = _mm256_setzero_si256(), minima[r] = _mm_setzero_si128();
    }
    // The next block; its `minima` are ignored if there are none.
    void add(const __m256i *next, const __m128i *next_minima, __m128 next_d_and_dmin, const Activations256 *x) {
        reduce();
        for (int r = 0; r < R; r++) {
            products[r] = next[r];
            if (MINIMA) minima[r] = next_minima[r];
        }
        d_and_dmin = next_d_and_dmin;
        if (R == 1) scales = _mm_set1_ps(x[0].scale);
        else scales = _mm_setr_ps(x[0].scale, x[1].scale, R > 2 ? x[2].scale : 0, R > 3 ? x[3].scale : 0);
    }
    void reduce() {
        __m128i four[R];
        for (int r = 0; r < R; r++)
            four[r] = _mm_add_epi32(_mm256_castsi256_si128(products[r]), _mm256_extracti128_si256(products[r], 1));
        if (R == 1) {
            const __m128i pairs = _mm_hadd_epi32(four[0], minima[0]);
            add_floats(_mm_hadd_epi32(pairs, pairs), _mm_mul_ps(d_and_dmin, scales), sums);
            return;
        }
        add_floats(wholes(four), _mm_mul_ps(_mm_permute_ps(d_and_dmin, 0), scales), sums);
        if (MINIMA) add_floats(wholes(minima), _mm_mul_ps(_mm_permute_ps(d_and_dmin, 0x55), scales), minima_sums);
    }
    void store(float *out) {
        reduce();
        alignas(16) float all[4];
        _mm_store_ps(all, _mm_sub_ps(sums, R > 1 ? minima_sums : _mm_movehdup_ps(sums)));
        for (int r = 0; r < R; r++) out[r] = all[r];
    }

private:
    static __m128i wholes(const __m128i *v) {
        const __m128i pairs = _mm_hadd_epi32(v[0], v[R > 1 ? 1 : 0]);
        return R < 3 ? _mm_hadd_epi32(pairs, pairs) : _mm_hadd_epi32(pairs, _mm_hadd_epi32(v[2], v[R > 3 ? 3 : 2]));
    }
    static void add_floats(__m128i whole, __m128 both, __m128 &to) { to = _mm_fmadd_ps(_mm_cvtepi32_ps(whole), both, to); }
};

template <int R, bool FIFTH>
void rows_q45_k(const char *row, const Activations256 *x, int step, int blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    RowTotals<R, true> all;
    for (; blocks > 0; blocks--, row += FIFTH ? 176 : 144, x += step) {
        prefetch<R>(row, FIFTH ? 176 : 144);
        uint64_t groups, least;
        group_scales(reinterpret_cast<const uint8_t *>(row) + 4, groups, least);
        alignas(32) int32_t scales[8];  // each twice, in int16
        _mm256_store_si256(reinterpret_cast<__m256i *>(scales), twice(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(groups))));
        __asm__("" : "+m"(scales));  // broadcast from memory: gcc would shuffle registers, which is slower
        const __m128i lowest = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(least));
        __m256i whole[R];
        for (int r = 0; r < R; r++) whole[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            const __m256i q = load256(row + (FIFTH ? 48 : 16) + 16 * j);
            __m256i a = _mm256_and_si256(q, low), b = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
            if (FIFTH) {
                const __m256i bits = load256(row + 16), sixteen = _mm256_set1_epi8(16);
                a = _mm256_or_si256(a, _mm256_and_si256(moved(bits, 4 - j), sixteen));
                b = _mm256_or_si256(b, _mm256_and_si256(moved(bits, 3 - j), sixteen));
            }
            const __m256i a_scale = _mm256_set1_epi32(scales[j]), b_scale = _mm256_set1_epi32(scales[j + 1]);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const int8_t *values = x[r].values + 32 * j;
                add<R>(whole[r], a, values, a_scale);
                add<R>(whole[r], b, values + 32, b_scale);
            }
        }
        __m128i offsets[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) offsets[r] = _mm_madd_epi16(lowest, load128(x[r].sums));
        int head;
        memcpy(&head, row, 4);
        all.add(whole, offsets, _mm_cvtph_ps(_mm_cvtsi32_si128(head)), x);
    }
    all.store(out);
}

template <int R>
void rows_q6_k(const char *row, const Activations256 *x, int step, int blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
    RowTotals<R, false> all;
    for (; blocks > 0; blocks--, row += 210, x += step) {
        prefetch<R>(row, 210);
        const __m256i scales = _mm256_cvtepi8_epi16(load128(row + 192));  // of 16 groups of 16
        const __m256i halves[2] = {_mm256_permute4x64_epi64(scales, 0x44), _mm256_permute4x64_epi64(scales, 0xee)};
        __m256i whole[R];
        for (int r = 0; r < R; r++) {  // -32 in each value
            const __m256i sums = _mm256_slli_epi32(_mm256_madd_epi16(scales, load256(x[r].halves)), 5);
            whole[r] = _mm256_sub_epi32(_mm256_setzero_si256(), sums);
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const __m256i high = load256(row + 128 + 32 * h);
            // at: picks the scale of a group's first 16 values, and in the other half of the register of its last
            __m256i at = _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302, 0x0302030203020302);
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                __m256i q = load256(row + 64 * h + 32 * (g & 1));
                if (g & 2) q = _mm256_srli_epi16(q, 4);
                q = _mm256_or_si256(_mm256_and_si256(q, low), _mm256_and_si256(moved(high, 4 - 2 * g), two));
                const __m256i scale = _mm256_shuffle_epi8(halves[h], at);
                at = _mm256_add_epi8(at, _mm256_set1_epi8(4));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) add<R>(whole[r], q, x[r].values + 128 * h + 32 * g, scale);
            }
        }
        all.add(whole, nullptr, _mm_set_ss(half(row + 208)), x);
    }
    all.store(out);
}

template <int TYPE, int R>
void multiply_row(const char *row, const Activations256 *x, int step, int blocks, float *out) {
    if (TYPE == Q6_K) rows_q6_k<R>(row, x, step, blocks, out);
    else rows_q45_k<R, TYPE == Q5_K>(row, x, step, blocks, out);
}

}  // namespace
}  // namespace native
