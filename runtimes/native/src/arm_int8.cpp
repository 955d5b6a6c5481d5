// Products in int8 on ARM processors, as accurate as llama.cpp's: weights stay the integers of their format, and
// activations are rounded to int8 (-127 to 127) with a scale for 32 of them (Q4_0, Q4_1, Q8_0) or for 256 (the others), as
// llama.cpp does.
//
// The instructions (arm.h) multiply signed bytes and add up in int32. All formats fit: 4 and 5 bits are positive, Q4_0 and Q6_K
// have their 8 and 32 subtracted, so that only what a format calls a minimum is left:
//
//   Q4_0, Q8_0     y = sum over groups of d * x_scale * (sum of w * x)
//   Q4_1           y = sum over groups of d * x_scale * (sum of w * x) + m * x_scale * (sum of x)
//   Q4_K, Q5_K     y = x_scale * (d * sum over groups of scale * (sum of w * x) - dmin * sum over groups of min * (sum of x))
//   Q6_K           y = x_scale * d * sum over groups of scale * (sum of w * x)
//
// Sums over 256 values are integers: at most 16 * 16 * 32 * 127 * 128 < 2^31 in Q6_K, less in the others. The eight minima
// of 256 values meet the eight sums of activations like one more step of the product, twice: a sum of 32 has 13 bits, the high
// ones in one byte and the low six in another.
//
// 8 rows x 4 columns are 8 registers of sums, 8 of totals and 6 of operands, of 32. A tile has, for each eight inner values, the
// bytes of each of its rows, a panel those of each of four columns.

#include "arm.h"
#include "arm_rounding.h"
#include "formats.h"
#include "kernels.h"
#include "processor.h"

namespace native {
namespace {

constexpr int INNER = 256, STEPS = INNER / 8, BLOCKS = INNER / 32;
constexpr int COLUMNS = 16, QUADS = COLUMNS / 4;

bool supports(int type) { return is_supported_type(type) && type != F16; }
bool by_blocks(int type) { return block_values(type) == 32; }  // activations have a scale per 32 values

struct alignas(64) Tile {
    float scales[BLOCKS][ROWS][2];  // of activations, twice, as arm.h needs it; the first ones alone if there is one for 256
    float scaled_sums[BLOCKS][ROWS][2];  // Q4_1: scale * sum
    int8_t high[ROWS][BLOCKS], low[ROWS][BLOCKS];  // sum of each 32 = 64 * high + low
    int8_t bytes[STEPS][ROWS][8];
};

struct alignas(64) Panel {
    float scales[BLOCKS][COLUMNS];         // by blocks: d; else: d, once
    float minima[BLOCKS][COLUMNS];         // Q4_1: m; else: -dmin, once
    int32_t factors[2 * BLOCKS][COLUMNS];  // scale of each group
    int8_t least[QUADS][4][BLOCKS];        // min of each group
    int8_t bytes[QUADS][STEPS][4][8];
};

void pack(int type, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    const int scaled = by_blocks(type) ? 32 : inner;
    int8_t row[INNER];
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < inner; k += scaled) {
            float *scale = tile.scales[k / 32][i];
            scale[0] = scale[1] = i < rows ? quantize8(x + i * stride + k, scaled, row + k) : 0;
        }
        if (i >= rows) memset(row, 0, sizeof row);
        for (int b = 0; b < inner / 32; b++) {
            const int sum = vaddlvq_s8(vld1q_s8(row + 32 * b)) + vaddlvq_s8(vld1q_s8(row + 32 * b + 16));
            if (by_blocks(type)) tile.scaled_sums[b][i][0] = tile.scaled_sums[b][i][1] = tile.scales[b][i][0] * sum;
            else tile.high[i][b] = int8_t(sum >> 6), tile.low[i][b] = int8_t(sum & 63);
        }
        for (int s = 0; s < inner / 8; s++) memcpy(tile.bytes[s][i], row + 8 * s, 8);
    }
}

// Column n of a panel; w: its values, as they follow each other
void unpack_by_blocks(int type, const uint8_t *b, int blocks, int8_t *w, Panel &panel, int n) {
    const int size = block_bytes(type), zero = type == Q4_0 ? 8 : 0;
    for (int g = 0; g < blocks; g++, b += size, w += 32) {
        const uint8_t *q = b + (type == Q4_1 ? 4 : 2);
        panel.scales[g][n] = half(b);
        panel.minima[g][n] = type == Q4_1 ? half(b + 2) : 0;
        if (type == Q8_0) memcpy(w, q, 32);
        else for (int i = 0; i < 16; i++) w[i] = int8_t((q[i] & 15) - zero), w[i + 16] = int8_t((q[i] >> 4) - zero);
    }
}

void unpack_six(const uint8_t *b, int8_t *w, Panel &panel, int n) {
    panel.scales[0][n] = half(b + 208);
    for (int g = 0; g < 16; g++) panel.factors[g][n] = int8_t(b[192 + g]);
    for (int g = 0; g < 8; g++, w += 32) {
        const uint8_t *four = b + g / 4 * 64 + g % 2 * 32, *two = b + 128 + g / 4 * 32;
        const int left = g & 2 ? 4 : 0, right = g % 4 * 2;
        for (int i = 0; i < 32; i++) w[i] = int8_t((four[i] >> left & 15) + (two[i] >> right & 3) * 16 - 32);
    }
}

void unpack_four_or_five(int type, const uint8_t *b, int8_t *w, Panel &panel, int n) {
    panel.scales[0][n] = half(b), panel.minima[0][n] = -half(b + 2);
    uint64_t scales, minima;  // eight bytes each
    group_scales(b + 4, scales, minima);
    memcpy(panel.least[n / 4][n % 4], &minima, 8);
    for (int g = 0; g < 8; g++, w += 32) {
        panel.factors[g][n] = int32_t(scales >> 8 * g & 255);
        const uint8_t *four = b + (type == Q4_K ? 16 : 48) + g / 2 * 32, *fifth = b + 16;
        const int left = g % 2 * 4;
        for (int i = 0; i < 32; i++) w[i] = int8_t(four[i] >> left & 15);
        if (type == Q5_K)
            for (int i = 0; i < 32; i++) w[i] = int8_t(w[i] + (fifth[i] >> g & 1) * 16);
    }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Panel &panel = *static_cast<Panel *>(out);
    const int type = product.type;
    int8_t w[INNER];
    if (columns < COLUMNS) memset(&panel, 0, sizeof panel);
    for (int n = 0; n < columns; n++) {
        const char *row = product.w + (column + n) * product.w_stride;
        const uint8_t *b = reinterpret_cast<const uint8_t *>(row) + k / block_values(type) * block_bytes(type);
        if (by_blocks(type)) unpack_by_blocks(type, b, inner / 32, w, panel, n);
        else if (type == Q6_K) unpack_six(b, w, panel, n);
        else unpack_four_or_five(type, b, w, panel, n);
        for (int s = 0; s < inner / 8; s++) memcpy(panel.bytes[n / 4][s][n % 4], w + 8 * s, 8);
    }
}

// sums += v * what rows and columns say
inline __attribute__((always_inline)) void add_scaled(const Whole &v, const float (*rows)[2], const float *columns, Floats &sums) {
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i++)
        sums[i] = vfmaq_f32(sums[i], vcvtq_f32_s32(v[i]), vmulq_f32(rows_of(i, rows), columns_of(i, columns)));
}

template <bool MINIMA>
void multiply_by_blocks(const Tile &tile, const Panel &panel, int q, int blocks, Floats &sums) {
    for (int g = 0; g < blocks; g++) {
        Whole part{};
        add<4>(tile.bytes + 4 * g, panel.bytes[q] + 4 * g, part);
        add_scaled(part, tile.scales[g], panel.scales[g] + 4 * q, sums);
#pragma GCC unroll 8
        for (int i = 0; i < SUMS && MINIMA; i++)
            sums[i] = vfmaq_f32(sums[i], rows_of(i, tile.scaled_sums[g]), columns_of(i, panel.minima[g] + 4 * q));
    }
}

// SCALED: values per scale
template <int SCALED, bool MINIMA>
void multiply_by_256(const Tile &tile, const Panel &panel, int q, Floats &sums) {
    if (MINIMA) {
        Whole least{};
        add<1>(&tile.high, &panel.least[q], least);
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i++) least[i] = vshlq_n_s32(least[i], 6);
        add<1>(&tile.low, &panel.least[q], least);
        add_scaled(least, tile.scales[0], panel.minima[0] + 4 * q, sums);
    }
    Whole totals{};
    for (int g = 0; g < INNER / SCALED; g++) {
        Whole part{};
        add<SCALED / 8>(tile.bytes + g * (SCALED / 8), panel.bytes[q] + g * (SCALED / 8), part);
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i++) totals[i] = vmlaq_s32(totals[i], part[i], columns_of(i, panel.factors[g] + 4 * q));
    }
    add_scaled(totals, tile.scales[0], panel.scales[0] + 4 * q, sums);
}

void multiply(int type, const void *tile_memory, const void *panel_memory, int inner, bool first, float *memory) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    const Panel &panel = *static_cast<const Panel *>(panel_memory);
    for (int q = 0; q < QUADS; q++, memory += 4 * SUMS) {
        Floats sums;
        for (int i = 0; i < SUMS; i++) sums[i] = first ? vdupq_n_f32(0) : vld1q_f32(memory + 4 * i);
        if (type == Q6_K) multiply_by_256<16, false>(tile, panel, q, sums);
        else if (type == Q4_K || type == Q5_K) multiply_by_256<32, true>(tile, panel, q, sums);
        else if (type == Q4_1) multiply_by_blocks<true>(tile, panel, q, inner / 32, sums);
        else multiply_by_blocks<false>(tile, panel, q, inner / 32, sums);
        for (int i = 0; i < SUMS; i++) vst1q_f32(memory + 4 * i, sums[i]);
    }
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int n = 0; n < columns; n += 4)
        for (int i = 0; i < rows; i++) {
            const float *pair = sums + n * ROWS + first_pair(i);
            const float row[4] = {pair[0], pair[1], pair[NEXT_PAIR], pair[NEXT_PAIR + 1]};
            if (n + 4 <= columns) memcpy(y + i * stride + n, row, sizeof row);  // constant size: one move
            else memcpy(y + i * stride + n, row, (columns - n) * sizeof(float));
        }
}

}  // namespace

extern const Kernel KERNEL(int8);
const Kernel KERNEL(int8) = {
    INSTRUCTIONS "-int8",
    available, supports, ROWS, COLUMNS, INNER, 64 / COLUMNS, sizeof(Tile), sizeof(Panel),
    pack, unpack, multiply, store, nullptr, nullptr,
};

}  // namespace native
