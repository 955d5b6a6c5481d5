// Products of a few rows with quantized weights (few_wide.h), for processors without AVX-512 VNNI.
//
// 16 columns take two registers. Products of 4, 5 or 6 bits and 8 add up in int16, two sums in a lane, and are taken together
// as seldom as those sums allow: a group of 32 values of 4 bits takes one more multiplication per lane for that, while few_256.h
// and few_32.h need one for each product. Products of two bytes do not add up in int16: both are widened.

#include "few_32.h"
#include "few_wide.h"
#include "lanes.h"
#include "processor.h"

namespace native {
namespace {

constexpr int REGISTERS = WIDE_COLUMNS / Lanes::count;
constexpr int MAX_ROWS_AT_ONCE = 4;  // their sums take 8 of 16 registers

using Wide = __m256i[REGISTERS];  // 32 bits of each column
using WideFloats = __m256[REGISTERS];

inline __m256i all(int byte) { return _mm256_set1_epi8(char(byte)); }
inline __m256i and_(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
inline Lanes lanes(__m256i v) { return {v}; }

inline Lanes broadcast(const void *four) {
    int32_t x;
    memcpy(&x, four, 4);
    return Lanes::broadcast(x);
}

// The low 16 bits of each lane
inline __m256 halves(__m256i v) {
    v = and_(v, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

// 8 rows of 16 bytes, `stride` bytes apart -> register `c` of out[0..4), each with four bytes of every row
inline __attribute__((always_inline)) void transpose_8x4(const char *from, size_t stride, Wide *out, int c) {
    __m256i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(from + i * stride)), load128(from + (4 + i) * stride), 1);
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i e = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0][c] = _mm256_unpacklo_epi64(a, e), out[1][c] = _mm256_unpackhi_epi64(a, e);
    out[2][c] = _mm256_unpacklo_epi64(b, d), out[3][c] = _mm256_unpackhi_epi64(b, d);
}

// Call with(first column of the weights, register) for the columns of each register.
template <class F>
inline void for_registers(const char *w, size_t stride, F with) {
    for (int c = 0; c < REGISTERS; c++) with(w + c * Lanes::count * stride, c);
}

// Prefetches the next columns in memory order, because the hardware prefetcher cannot follow 16 streams at once; a little at a
// time, because a processor can wait for about 20 lines at once.
struct Prefetch {
    const char *at, *const end;
    void step(int bytes) {
        for (const char *to = at + bytes; at < to && at < end; at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// of[r][c] = sums of STEPS products of four bytes with four of row r's activations: values(r, s) points to them
template <int R, int STEPS, class F>
inline __attribute__((always_inline)) void dots(const Wide *bytes, F values, Lanes (&of)[R][REGISTERS]) {
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; s++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Lanes x = broadcast(values(r, s));
#pragma GCC unroll 2
            for (int c = 0; c < REGISTERS; c++) {
                if (s == 0) of[r][c] = Lanes::bytes(lanes(bytes[s][c]), x);
                else of[r][c].add_dot_int8(lanes(bytes[s][c]), x);
            }
        }
}

// ---- Q4_K, Q5_K, Q6_K ----

constexpr int STEPS = 64;  // of four values

struct Block {
    Wide bytes[STEPS];
    Wide factors[16];  // of each group of 32 or, in Q6_K, of 16, each twice
    Wide pairs[8];     // two int16 for sums of activations: Q4_K, Q5_K: minima, Q6_K: scales
    WideFloats d, dmin;
};

template <bool FIFTH>
void unpack_q45_k(const char *w, size_t stride, Block &block, Prefetch &ahead) {
    for_registers(w, stride, [&](const char *w, int c) {
        Wide heads[4], fifths[8];
        transpose_8x4(w, stride, heads, c);
        if (FIFTH) transpose_8x4(w + 16, stride, fifths, c), transpose_8x4(w + 32, stride, fifths + 4, c);
#pragma GCC unroll 8
        for (int i = 0; i < 32; i += 4) {
            ahead.step((FIFTH ? 176 : 144) / 2);
            Wide t[4];
            transpose_8x4(w + (FIFTH ? 48 : 16) + 4 * i, stride, t, c);
            const int group = i / 8 * 2, at = 8 * group + i % 8;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m256i low = and_(t[j][c], all(15)), high = and_(_mm256_srli_epi32(t[j][c], 4), all(15));
                if (FIFTH) {
                    const __m256i bits = fifths[i % 8 + j][c];
                    low = _mm256_or_si256(low, and_(moved(bits, 4 - group), all(16)));
                    high = _mm256_or_si256(high, and_(moved(bits, 3 - group), all(16)));
                }
                block.bytes[at + j][c] = low, block.bytes[at + 8 + j][c] = high;
            }
        }
        block.d[c] = halves(heads[0][c]);
        block.dmin[c] = halves(_mm256_srli_epi32(heads[0][c], 16));
        // As in group_scales
        const __m256i a = heads[1][c], b = heads[2][c], both = heads[3][c];
        const __m256i scales[2] = {and_(a, all(63)),
                                   _mm256_or_si256(and_(both, all(15)), and_(_mm256_srli_epi32(a, 2), all(48)))};
        const __m256i minima[2] = {
            and_(b, all(63)),
            _mm256_or_si256(and_(_mm256_srli_epi32(both, 4), all(15)), and_(_mm256_srli_epi32(b, 2), all(48)))};
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++)
            block.factors[g][c] = twice(and_(_mm256_srli_epi32(scales[g / 4], g % 4 * 8), _mm256_set1_epi32(255)));
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            const __m256i two = _mm256_srli_epi32(minima[p / 2], p % 2 * 16);
            block.pairs[p][c] = _mm256_or_si256(and_(two, _mm256_set1_epi32(0xff)),
                                                and_(_mm256_slli_epi32(two, 8), _mm256_set1_epi32(0xff0000)));
        }
    });
}

void unpack_q6_k(const char *w, size_t stride, Block &block, Prefetch &ahead) {
    for_registers(w, stride, [&](const char *w, int c) {
        Wide scales[4];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                ahead.step(210);
                Wide first[4], second[4], high[4];
                transpose_8x4(w + 64 * h + 4 * i, stride, first, c);
                transpose_8x4(w + 64 * h + 32 + 4 * i, stride, second, c);
                transpose_8x4(w + 128 + 32 * h + 4 * i, stride, high, c);
#pragma GCC unroll 4
                for (int g = 0; g < 4; g++)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const __m256i four = (g % 2 ? second : first)[j][c];
                        block.bytes[32 * h + 8 * g + i + j][c] =
                            _mm256_or_si256(and_(g < 2 ? four : _mm256_srli_epi32(four, 4), all(15)),
                                            and_(moved(high[j][c], 4 - 2 * g), all(48)));
                    }
            }
        transpose_8x4(w + 192, stride, scales, c);
#pragma GCC unroll 16
        for (int g = 0; g < 16; g++)
            block.factors[g][c] = twice(_mm256_srai_epi32(_mm256_slli_epi32(scales[g / 4][c], 24 - g % 4 * 8), 24));
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++)
            block.pairs[p][c] = _mm256_blend_epi16(block.factors[2 * p][c], block.factors[2 * p + 1][c], 0xaa);
        alignas(32) int32_t d[Lanes::count] = {};
        for (int n = 0; n < Lanes::count; n++) memcpy(d + n, w + n * stride + 208, 2);
        block.d[c] = halves(load256(d));
    });
}

inline void scale_up(Lanes total, __m256 d, float scale, float *sums) {
    const __m256 both = _mm256_mul_ps(d, _mm256_set1_ps(scale));
    _mm256_store_ps(sums, _mm256_fmadd_ps(total.floats().v, both, _mm256_load_ps(sums)));
}

// sums[R][16] += products of a block with R rows of activations; minima likewise
template <int TYPE, int R>
void add_block(const Block &w, const Activations256 *x, float *sums, float *minima, Prefetch &ahead) {
    constexpr int LENGTH = TYPE == Q6_K ? 4 : 8;  // steps of a group
    constexpr int TOGETHER = TYPE == Q4_K ? 8 : TYPE == Q5_K ? 4 : 2;  // steps whose sums fit int16: 30,480, 31,496, 32,004
    Lanes totals[R][REGISTERS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int c = 0; c < REGISTERS; c++) {
            totals[r][c] = Lanes::zero();
            if (TYPE != Q6_K) continue;  // -32 in each value
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) totals[r][c].add_dot_int16(lanes(w.pairs[p][c]), broadcast(x[r].halves + 2 * p));
            totals[r][c].v = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(totals[r][c].v, 5));
        }
    for (int at = 0; at < STEPS; at += TOGETHER) {
        ahead.step(WIDE_COLUMNS * block_bytes(TYPE) * TOGETHER / STEPS / 2);
        Lanes of[R][REGISTERS];
        dots<R, TOGETHER>(w.bytes + at, [&](int r, int s) { return x[r].values + 4 * (at + s); }, of);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int c = 0; c < REGISTERS; c++) totals[r][c].add_dot_int16(of[r][c], lanes(w.factors[at / LENGTH][c]));
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < REGISTERS; c++) {
            const int to = r * WIDE_COLUMNS + c * Lanes::count;
            scale_up(totals[r][c], w.d[c], x[r].scale, sums + to);
            if (TYPE == Q6_K) continue;
            Lanes minima_sum = Lanes::zero();
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) minima_sum.add_dot_int16(lanes(w.pairs[p][c]), broadcast(x[r].sums + 2 * p));
            scale_up(minima_sum, w.dmin[c], x[r].scale, minima + to);
        }
}

// y: 16 results of each row
template <int TYPE>
void multiply_wide(const char *w, size_t stride, const Activations256 *x, int rows, int blocks, float *y, size_t y_stride) {
    constexpr int BYTES = block_bytes(TYPE);
    constexpr decltype(&add_block<TYPE, 1>) adds[] = {add_block<TYPE, 1>, add_block<TYPE, 2>, add_block<TYPE, 3>,
                                                      add_block<TYPE, 4>};
    alignas(64) float sums[MAX_FEW * WIDE_COLUMNS], minima[MAX_FEW * WIDE_COLUMNS];
    memset(sums, 0, rows * WIDE_COLUMNS * sizeof *sums);
    memset(minima, 0, rows * WIDE_COLUMNS * sizeof *minima);
    Block block;
    for (int b = 0; b < blocks; b++, x += rows) {
        const char *later = w + WIDE_COLUMNS * stride + b * WIDE_COLUMNS * BYTES;
        Prefetch ahead{later, later + WIDE_COLUMNS * BYTES};
        if (TYPE == Q6_K) unpack_q6_k(w + b * BYTES, stride, block, ahead);
        else unpack_q45_k<TYPE == Q5_K>(w + b * BYTES, stride, block, ahead);
        for_row_chunks<MAX_ROWS_AT_ONCE>(rows, [&](int count, int r) {
            adds[count - 1](block, x + r, sums + r * WIDE_COLUMNS, minima + r * WIDE_COLUMNS, ahead);
        });
    }
    for (int r = 0; r < rows; r++, y += y_stride)
        for (int n = 0; n < WIDE_COLUMNS; n += Lanes::count) {
            const __m256 sum = _mm256_load_ps(sums + r * WIDE_COLUMNS + n);
            _mm256_storeu_ps(y + n, TYPE == Q6_K ? sum : _mm256_sub_ps(sum, _mm256_load_ps(minima + r * WIDE_COLUMNS + n)));
        }
}

// ---- Q4_0, Q4_1, Q8_0 ----

struct FourBlocks {  // blocks of 16 columns
    Wide values[4][16];  // 8 times four bytes or, in Q8_0, 16 times two int16
    WideFloats scales[4], minima[4];
};

inline __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }  // signed -> int16
inline __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }

template <int TYPE>
void unpack_four(const char *w, size_t stride, FourBlocks &four, Prefetch &ahead) {
    constexpr int BYTES = block_bytes(TYPE), HEAD = TYPE == Q4_1 ? 4 : 2;
    for_registers(w, stride, [&](const char *w, int c) {
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++, w += BYTES) {
            ahead.step(BYTES * WIDE_COLUMNS / 4);
            alignas(32) int32_t heads[Lanes::count];
            for (int n = 0; n < Lanes::count; n++) memcpy(heads + n, w + n * stride, sizeof *heads);
            const __m256i head = load256(heads);
            four.scales[b][c] = halves(head);
            if (TYPE == Q4_1) four.minima[b][c] = halves(_mm256_srli_epi32(head, 16));
            if (TYPE == Q4_0) four.minima[b][c] = _mm256_mul_ps(four.scales[b][c], _mm256_set1_ps(-8));
#pragma GCC unroll 2
            for (int at = 0; at < (TYPE == Q8_0 ? 8 : 4); at += 4) {
                Wide t[4];
                transpose_8x4(w + HEAD + 4 * at, stride, t, c);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    if (TYPE == Q8_0) {
                        four.values[b][2 * (at + i)][c] = even_bytes(t[i][c]);
                        four.values[b][2 * (at + i) + 1][c] = odd_bytes(t[i][c]);
                    } else {
                        four.values[b][i][c] = and_(t[i][c], all(15));
                        four.values[b][4 + i][c] = and_(_mm256_srli_epi32(t[i][c], 4), all(15));
                    }
                }
            }
        }
    });
}

// of[r][c] = sums of 32 products of bytes, in int32
template <int R>
inline __attribute__((always_inline)) void dots_of_nibbles(const Wide *values, const Activations128 *x, int b,
                                                           Lanes (&of)[R][REGISTERS]) {
    dots<R, 8>(values, [&](int r, int s) { return (s < 4 ? x[r].low : x[r].high)[b] + s % 4 * 4; }, of);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
        for (int c = 0; c < REGISTERS; c++) of[r][c].v = _mm256_madd_epi16(of[r][c].v, _mm256_set1_epi16(1));
}

// The same for signed bytes, whose products do not add up in int16: as int16 themselves
template <int R>
inline __attribute__((always_inline)) void dots_of_bytes(const Wide *values, const Activations128 *x, int b,
                                                         Lanes (&of)[R][REGISTERS]) {
    alignas(32) int32_t pairs[R][2][8];  // of even and of odd bytes
    for (int r = 0; r < R; r++) {
        const __m256i bytes = _mm256_set_m128i(load128(x[r].high[b]), load128(x[r].low[b]));
        put256(even_bytes(bytes), pairs[r][0]), put256(odd_bytes(bytes), pairs[r][1]);
        for (int c = 0; c < REGISTERS; c++) of[r][c] = Lanes::zero();
    }
#pragma GCC unroll 8
    for (int s = 0; s < 16; s++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Lanes two = Lanes::broadcast(pairs[r][s % 2][s / 2]);
#pragma GCC unroll 2
            for (int c = 0; c < REGISTERS; c++) of[r][c].add_dot_int16(lanes(values[s][c]), two);
        }
}

// sums[4][rows][16] += products of four blocks with R rows of activations; `next` floats from block to block
template <int TYPE, int R>
void add_four(const FourBlocks &w, const Activations128 *x, float *sums, size_t next, Prefetch &ahead) {
    for (int b = 0; b < 4; b++) {
        ahead.step(block_bytes(TYPE) * WIDE_COLUMNS / 2);
        Lanes of[R][REGISTERS];
        if (TYPE == Q8_0) dots_of_bytes<R>(w.values[b], x, b, of);
        else dots_of_nibbles<R>(w.values[b], x, b, of);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int c = 0; c < REGISTERS; c++) {
                float *to = sums + b * next + r * WIDE_COLUMNS + c * Lanes::count;
                const __m256 scale = _mm256_mul_ps(w.scales[b][c], _mm256_set1_ps(x[r].scales[b]));
                const __m256 products = of[r][c].floats().v, sum = _mm256_load_ps(to);
                if (TYPE == Q8_0) {
                    _mm256_store_ps(to, _mm256_fmadd_ps(products, scale, sum));
                } else {
                    const __m256 minima_term = _mm256_mul_ps(w.minima[b][c], _mm256_set1_ps(x[r].sums[b]));
                    _mm256_store_ps(to, _mm256_add_ps(sum, _mm256_fmadd_ps(products, scale, minima_term)));
                }
            }
    }
}

// y: 16 results of each row
template <int TYPE>
void multiply_wide(const char *w, size_t stride, const Activations128 *x, int rows, int blocks, float *y, size_t y_stride) {
    constexpr int BYTES = 4 * block_bytes(TYPE);
    constexpr decltype(&add_four<TYPE, 1>) adds[] = {add_four<TYPE, 1>, add_four<TYPE, 2>, add_four<TYPE, 3>,
                                                     add_four<TYPE, 4>};
    alignas(64) float sums[4 * MAX_FEW * WIDE_COLUMNS];
    const size_t next = rows * WIDE_COLUMNS;
    memset(sums, 0, 4 * next * sizeof *sums);
    FourBlocks four;
    const auto add = [&](const char *from, size_t step, Prefetch ahead) {
        unpack_four<TYPE>(from, step, four, ahead);
        for_row_chunks<MAX_ROWS_AT_ONCE>(rows, [&](int some, int r) {
            adds[some - 1](four, x + r, sums + r * WIDE_COLUMNS, next, ahead);
        });
    };
    const char *later = w + WIDE_COLUMNS * stride;
    int left = blocks;
    for (; left >= 4; left -= 4, x += rows, w += BYTES, later += WIDE_COLUMNS * BYTES)
        add(w, stride, {later, later + WIDE_COLUMNS * BYTES});
    if (left) {
        alignas(64) char last[WIDE_COLUMNS][BYTES] = {};
        for (int n = 0; n < WIDE_COLUMNS; n++) memcpy(last[n], w + n * stride, left * BYTES / 4);
        add(last[0], BYTES, {later, later + WIDE_COLUMNS * BYTES * left / 4});
    }
    for (int r = 0; r < rows; r++, y += y_stride)
        for (int n = 0; n < WIDE_COLUMNS; n += Lanes::count) {  // as in Float8::sum()
            const float *of = sums + r * WIDE_COLUMNS + n;
            const __m256 even = _mm256_add_ps(_mm256_load_ps(of), _mm256_load_ps(of + 2 * next));
            _mm256_storeu_ps(y + n, _mm256_add_ps(even, _mm256_add_ps(_mm256_load_ps(of + next), _mm256_load_ps(of + 3 * next))));
        }
}

// 16 columns at a time, if there are enough rows; returns the first column not computed.
template <int TYPE, class Part>
int multiply_wide_blocks(const Product &p, const Part *x, int blocks, int from, int to) {
    constexpr int MIN_ROWS = TYPE == Q4_K ? 2 : TYPE == Q6_K ? 5 : TYPE == Q8_0 ? 6 : MIN_WIDE_ROWS;  // measured
    if (p.rows < MIN_ROWS) return from;
    for (; from + WIDE_COLUMNS <= to; from += WIDE_COLUMNS)
        multiply_wide<TYPE>(p.w + size_t(from) * p.w_stride, p.w_stride, x, p.rows, blocks, p.y + from, p.y_stride);
    return from;
}

int of_32(const Product &p, const Activations128 *x, int blocks, int from, int to) {
    if (p.type == Q4_0) return multiply_wide_blocks<Q4_0>(p, x, blocks, from, to);
    if (p.type == Q4_1) return multiply_wide_blocks<Q4_1>(p, x, blocks, from, to);
    return multiply_wide_blocks<Q8_0>(p, x, blocks, from, to);
}

int of_256(const Product &p, const Activations256 *x, int blocks, int from, int to) {
    if (p.type == Q4_K) return multiply_wide_blocks<Q4_K>(p, x, blocks, from, to);
    if (p.type == Q5_K) return multiply_wide_blocks<Q5_K>(p, x, blocks, from, to);
    return multiply_wide_blocks<Q6_K>(p, x, blocks, from, to);
}

}  // namespace

extern const WideKernel few_wide_avx2;
const WideKernel few_wide_avx2 = {available, of_32, of_256};

}  // namespace native
