// Products in int8, as accurate as llama.cpp's: weights stay the integers of their format, and activations are
// rounded to int8 (-127 to 127) with a scale for 32 of them (Q4_0, Q4_1, Q8_0) or for 256 (the others), as llama.cpp does.
//
// Weights are taken as unsigned bytes w. A group of them is added up in integers, as many as lanes.h holds, and
//
//   Q4_0, Q8_0           y = sum over groups of d * x_scale * (sum of w * x - zero * sum of x), zero = 8 or 128
//   Q4_1                 y = sum over groups of d * x_scale * (sum of w * x) + m * x_scale * (sum of x)
//   Q4_K, Q5_K, Q6_K     y = x_scale * (d * sum over groups of scale * (sum of w * x) - dmin * sum over groups of min * (sum of x))
//
// of which the last has sums over 256 values in integers, too; Q6_K has min = 32 * scale and dmin = d.
//
// A panel has, for each four inner values, the four bytes of each of its columns next to each other: one 32-bit lane for
// each column, so that sums need no shuffling. A tile has, for each four, the bytes of each of its rows, to be broadcast.
// 6 rows x 16 columns are 12 sums; two registers of weights, one broadcast and one product make the 16 of AVX2. AVX-512 has 32,
// and room for the 12 sums of scaled groups as well.
// Q8_0 is left to int16.cpp where there is no VNNI: two products of eight bits do not fit int16.

#include "kernels.h"
#include "lanes.h"
#include "processor.h"
#include "rounding.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int INNER = 256, STEPS = INNER / 4, BLOCKS = INNER / 32;
constexpr int COLUMNS = 2 * Lanes::count;
constexpr int ROWS = 6;
constexpr int PADDED_ROWS = 8;  // rows in a tile, which are transposed at once

bool supports(int type) {
    return type == Q4_0 || type == Q4_1 || type == Q4_K || type == Q5_K || type == Q6_K || (VNNI && type == Q8_0);
}
bool by_blocks(int type) { return block_values(type) == 32; }  // activations have a scale per 32 values
int scale_values(int type) { return type == Q6_K ? 16 : 32; }  // weights per scale
int zero_point(int type) { return type == Q4_0 ? 8 : type == Q8_0 ? 128 : 0; }

struct Tile {
    float scales[BLOCKS][ROWS];  // of activations; the first ones alone if there is one for 256
    float scaled_sums[BLOCKS][ROWS];  // Q4_1: scale * sum
    // By blocks: where the sum of products starts, -zero * sum. Else: sums of the values with two scales, a pair of int16.
    int32_t sums[BLOCKS][ROWS];
    alignas(64) int32_t bytes[STEPS][PADDED_ROWS];
};

struct Panel {
    float scales[BLOCKS][COLUMNS];         // by blocks: d; else: d and -dmin, once
    float minima[BLOCKS][COLUMNS];         // Q4_1: m
    int32_t factors[2 * BLOCKS][COLUMNS];  // scale of each group, as Totals needs it
    int32_t pairs[BLOCKS][COLUMNS];        // min of two groups, int16
    int32_t bytes[STEPS][COLUMNS];
};

int32_t pair(int low, int high) { return int32_t(uint32_t(high) << 16 | (uint32_t(low) & 0xffff)); }

// Sums of 16 values: of the first two of each four, and of the others
__m128i lane_sums(const int8_t *x) {
    __m128i sums = _mm_maddubs_epi16(_mm_set1_epi8(1), load128(x));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
    return _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
}
int sum_of(__m128i lanes) { return int16_t(_mm_extract_epi16(lanes, 0)) + int16_t(_mm_extract_epi16(lanes, 1)); }

void pack_block(int type, const int8_t *row, int b, int i, Tile &tile) {
    const __m128i first = lane_sums(row + 32 * b), second = lane_sums(row + 32 * b + 16), both = _mm_add_epi16(first, second);
    if (type == Q6_K) {
        tile.sums[b][i] = pair(sum_of(first), sum_of(second));
    } else if (!by_blocks(type)) {
        const int16_t sum = sum_of(both);
        memcpy(reinterpret_cast<char *>(&tile.sums[b / 2][i]) + b % 2 * sizeof sum, &sum, sizeof sum);
    } else {
        tile.scaled_sums[b][i] = tile.scales[b][i] * sum_of(both);
        const __m128i initial_sums = _mm_mullo_epi16(both, _mm_set1_epi16(-zero_point(type)));
        tile.sums[b][i] = VNNI ? -zero_point(type) * sum_of(both) : _mm_cvtsi128_si32(initial_sums);
    }
}

void pack(int type, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    const int scaled = by_blocks(type) ? 32 : inner;
    alignas(64) int8_t values[PADDED_ROWS][INNER];
    memset(values, 0, sizeof values);
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < inner; k += scaled)
            tile.scales[k / 32][i] = i < rows ? quantize8(x + i * stride + k, scaled, values[i] + k) : 0;
        for (int b = 0; b < inner / 32; b++) pack_block(type, values[i], b, i, tile);
    }
    for (int i = 0; i < PADDED_ROWS; i += 8)
        for (int s = 0; s < inner / 4; s += 8)
            transpose(reinterpret_cast<const int32_t *>(values[i]) + s, STEPS, &tile.bytes[s][i], PADDED_ROWS);
}

// Columns as they are unpacked, to be transposed.
struct EightColumns {
    uint8_t bytes[8][INNER];
    int32_t factors[8][2 * BLOCKS], pairs[8][BLOCKS];
};

void unpack_by_blocks(int type, const uint8_t *b, int blocks, int i, EightColumns &eight, Panel &panel, int n) {
    const int size = block_bytes(type);
    for (int g = 0; g < blocks; g++, b += size) {
        panel.scales[g][n] = half(b);
        panel.minima[g][n] = type == Q4_1 ? half(b + 2) : 0;
        const __m256i v = type == Q8_0 ? _mm256_xor_si256(load256(b + 2), _mm256_set1_epi8(-128)) : nibbles(b + size - 16);
        put256(v, eight.bytes[i] + 32 * g);
    }
}

void unpack_six(const uint8_t *b, int i, EightColumns &eight, Panel &panel, int n) {
    panel.scales[0][n] = panel.scales[1][n] = half(b + 208);
    const __m128i scales = load128(b + 192);
    put256(Totals::factors(_mm256_cvtepi8_epi32(scales)), eight.factors[i]);
    put256(Totals::factors(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(scales, scales))), eight.factors[i] + 8);
    put256(_mm256_mullo_epi16(_mm256_cvtepi8_epi16(scales), _mm256_set1_epi16(-32)), eight.pairs[i]);
    for (int g = 0; g < 8; g++) {
        const __m256i x = load256(b + g / 4 * 64 + g % 2 * 32), high = load256(b + 128 + g / 4 * 32);
        const __m256i four = _mm256_and_si256(g & 2 ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
        const __m256i two = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(g % 4 * 2)), _mm256_set1_epi8(3));
        put256(_mm256_or_si256(four, _mm256_slli_epi16(two, 4)), eight.bytes[i] + 32 * g);
    }
}

void unpack_four_or_five(int type, const uint8_t *b, int i, EightColumns &eight, Panel &panel, int n) {
    panel.scales[0][n] = half(b);
    panel.scales[1][n] = -half(b + 2);
    uint64_t scales, minima;  // eight bytes each
    group_scales(b + 4, scales, minima);
    put256(Totals::factors(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(scales))), eight.factors[i]);
    put256(_mm256_castsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(minima))), eight.pairs[i]);
    for (int g = 0; g < 8; g++) {
        const __m256i x = load256(b + (type == Q4_K ? 16 : 48) + g / 2 * 32);
        __m256i v = _mm256_and_si256(g & 1 ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
        if (type == Q5_K) {
            const __m256i bit = _mm256_and_si256(_mm256_srl_epi16(load256(b + 16), _mm_cvtsi32_si128(g)), _mm256_set1_epi8(1));
            v = _mm256_or_si256(v, _mm256_slli_epi16(bit, 4));
        }
        put256(v, eight.bytes[i] + 32 * g);
    }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Panel &panel = *static_cast<Panel *>(out);
    const int type = product.type;
    alignas(32) EightColumns eight;
    if (columns < COLUMNS) memset(&panel, 0, sizeof panel), memset(&eight, 0, sizeof eight);
    for (int n = 0; n < COLUMNS; n += 8) {
        for (int i = 0; i < 8 && n + i < columns; i++) {
            const char *row = product.w + (column + n + i) * product.w_stride;
            const uint8_t *b = reinterpret_cast<const uint8_t *>(row) + k / block_values(type) * block_bytes(type);
            const int bytes = inner / block_values(type) * block_bytes(type);  // the next ones are read after this block's columns
            for (int at = 0; at < bytes; at += 64) _mm_prefetch(b + bytes + at, _MM_HINT_T1);
            if (by_blocks(type)) unpack_by_blocks(type, b, inner / 32, i, eight, panel, n + i);
            else if (type == Q6_K) unpack_six(b, i, eight, panel, n + i);
            else unpack_four_or_five(type, b, i, eight, panel, n + i);
        }
        const int32_t *bytes = reinterpret_cast<const int32_t *>(eight.bytes[0]);
        for (int s = 0; s < inner / 4; s += 8) transpose(bytes + s, INNER / 4, &panel.bytes[s][n], COLUMNS);
        if (by_blocks(type)) continue;
        for (int g = 0; g < INNER / scale_values(type); g += 8)
            transpose(eight.factors[0] + g, 2 * BLOCKS, &panel.factors[g][n], COLUMNS);
        transpose(eight.pairs[0], BLOCKS, &panel.pairs[0][n], COLUMNS);
    }
}

// low, high = (starts ? themselves : 0) + products of COUNT steps from s on
template <int COUNT, bool STARTS>
inline __attribute__((always_inline)) void add_steps(const Tile &tile, const Panel &panel, int s, Lanes *low, Lanes *high) {
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; j++) {
        const Lanes a = Lanes::load(panel.bytes[s + j]), b = Lanes::load(panel.bytes[s + j] + Lanes::count);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const Lanes x = Lanes::broadcast(tile.bytes[s + j][i]);
            if (j || STARTS) low[i].add_dot_int8(a, x), high[i].add_dot_int8(b, x);
            else low[i] = Lanes::bytes(a, x), high[i] = Lanes::bytes(b, x);
        }
    }
}

// sums = (first ? 0 : sums) + minima * scaled_sums
void start_with_minima(const Tile &tile, const Panel &panel, int blocks, bool first, float *sums) {
    for (int n = 0; n < COLUMNS; n += Lanes::count) {
        Floats s[ROWS];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) s[i] = first ? Floats::zero() : Floats::load(sums + i * COLUMNS + n);
        for (int g = 0; g < blocks; g++) {
            const Floats a = Floats::load(panel.minima[g] + n);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) s[i].add(a, tile.scaled_sums[g][i]);
        }
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) s[i].store(sums + i * COLUMNS + n);
    }
}

template <bool MINIMA>
void multiply_by_blocks(const Tile &tile, const Panel &panel, int blocks, bool first, float *sums) {
    if (MINIMA) start_with_minima(tile, panel, blocks, first, sums);
    else if (first) memset(sums, 0, ROWS * COLUMNS * sizeof(float));
    for (int g = 0; g < blocks; g++) {
        Lanes low[ROWS], high[ROWS];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS && !MINIMA; i++) low[i] = high[i] = Lanes::broadcast(tile.sums[g][i]);
        add_steps<8, !MINIMA>(tile, panel, 8 * g, low, high);
        const Floats a = Floats::load(panel.scales[g]), b = Floats::load(panel.scales[g] + Lanes::count);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            add_scaled(whole(low[i]), a, tile.scales[g][i], false, sums + i * COLUMNS);
            add_scaled(whole(high[i]), b, tile.scales[g][i], false, sums + i * COLUMNS + Lanes::count);
        }
    }
}

// SCALED: values per scale. GROUP: how many of these accumulate before they are multiplied by it
template <int SCALED, int GROUP>
void multiply_by_256(const Tile &tile, const Panel &panel, bool first, float *sums) {
    Lanes low[ROWS], high[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) low[i] = high[i] = Lanes::zero();
    for (int g = 0; g < INNER / SCALED / 2; g++) {
        const Lanes a = Lanes::load(panel.pairs[g]), b = Lanes::load(panel.pairs[g] + Lanes::count);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const Lanes x = Lanes::broadcast(tile.sums[g][i]);
            low[i].add_dot_int16(a, x), high[i].add_dot_int16(b, x);
        }
    }
    const Floats c = Floats::load(panel.scales[1]), d = Floats::load(panel.scales[1] + Lanes::count);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        add_scaled(low[i].floats(), c, tile.scales[0][i], first, sums + i * COLUMNS);
        add_scaled(high[i].floats(), d, tile.scales[0][i], first, sums + i * COLUMNS + Lanes::count);
    }
    Totals low_totals[ROWS], high_totals[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) low_totals[i] = high_totals[i] = Totals::zero();
    for (int g = 0; g < INNER / GROUP; g++) {
        add_steps<GROUP / 4, false>(tile, panel, g * GROUP / 4, low, high);
        const int32_t *factors = panel.factors[g * GROUP / SCALED];
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) low_totals[i].add(low[i], factors), high_totals[i].add(high[i], factors + Lanes::count);
    }
    const Floats a = Floats::load(panel.scales[0]), b = Floats::load(panel.scales[0] + Lanes::count);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        add_scaled(low_totals[i].floats(), a, tile.scales[0][i], false, sums + i * COLUMNS);
        add_scaled(high_totals[i].floats(), b, tile.scales[0][i], false, sums + i * COLUMNS + Lanes::count);
    }
}

void multiply(int type, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    const Panel &panel = *static_cast<const Panel *>(panel_memory);
    if (type == Q4_1) multiply_by_blocks<true>(tile, panel, inner / 32, first, sums);
    else if (by_blocks(type)) multiply_by_blocks<false>(tile, panel, inner / 32, first, sums);
    else if (type == Q4_K) multiply_by_256<32, 32>(tile, panel, first, sums);
    else if (type == Q5_K) multiply_by_256<32, VNNI ? 32 : 16>(tile, panel, first, sums);
    else multiply_by_256<16, VNNI ? 16 : 8>(tile, panel, first, sums);
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int i = 0; i < rows; i++, y += stride, sums += COLUMNS)
        if (columns == COLUMNS) memcpy(y, sums, COLUMNS * sizeof(float));  // constant size: two moves
        else memcpy(y, sums, columns * sizeof(float));
}

}  // namespace

extern const Kernel KERNEL(int8);
const Kernel KERNEL(int8) = {
    INSTRUCTIONS "-int8",
    available, supports, ROWS, COLUMNS, INNER, 64 / COLUMNS, (sizeof(Tile) + 63) / 64 * 64, sizeof(Panel),
    pack, unpack, multiply, store, nullptr, nullptr,
};

}  // namespace native
