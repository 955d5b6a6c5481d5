// Products in int16, for processors without a matrix unit.
//
// Both sides are rounded to integers with one float32 scale for 256 values of a row: weights to 10 bits and a sign (12 with 64 or fewer),
// activations to 13 and a sign. 256 products then add up in int32 without overflow (1024 * 8191 * 256 < 2^31), so
// scales are applied once per 256 values and not per block of 32, and the result is nearer to the exact one than with
// the 8-bit activations that llama.cpp uses. The multiply-add of int16 pairs does as many products per cycle with AVX2 as
// the one of bytes does, which needs two instructions; bytes would be twice as fast with VNNI alone.
//
// A panel has, for each pair of inner values, the two int16 of each of its columns next to each other: one int32 lane for
// each column, so that sums need no shuffling. A tile has, for each pair, the two int16 of each of its rows, to be
// broadcast. AVX2: 6 rows x 16 columns are 12 sums; two registers of weights, one broadcast and one product make 16.
// AVX-512: 12 x 32 are 24 of 32 registers. A panel has 8 or 16 KB and stays in the first-level cache; the activations of
// one inner block (300 KB at 576 rows) and the sums of four panels (150 KB) stay in the second-level cache.

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "processor.h"
#include "rounding.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int INNER = 256, PAIRS = INNER / 2;
constexpr int COLUMNS = 2 * Lanes::count;
constexpr int ROWS = Lanes::count == 8 ? 6 : 12;
constexpr int SCALES = 16;  // room for ROWS scales that keeps 64 bytes' alignment
constexpr int ACTIVATION_LIMIT = 8191;

// 10 bits and a sign with 256 inner values, 12 with 64 or fewer.
float weight_limit(int inner) { return float(std::min(4095, INT32_MAX / ACTIVATION_LIMIT / inner)); }

struct Tile {
    float scales[SCALES];
    int32_t pairs[PAIRS][ROWS];
};

struct Panel {
    float scales[COLUMNS];
    int32_t pairs[PAIRS][COLUMNS];
};

void pack(int, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    alignas(64) int16_t row[INNER];
    for (int i = 0; i < ROWS; i++) {
        tile.scales[i] = 0;
        if (i < rows) tile.scales[i] = quantize(x + i * stride, inner, ACTIVATION_LIMIT, row);
        const int32_t *pairs = reinterpret_cast<const int32_t *>(row);
        for (int p = 0; p < inner / 2; p++) tile.pairs[p][i] = i < rows ? pairs[p] : 0;
    }
}

bool takes(int type) { return type == BYTES_ACROSS || type == F32 || unpacks(type); }

// Two rows of bytes, of two inner values -> pairs of int16
void unpack_across(const Product &product, int column, int columns, int k, int inner, Panel &panel) {
    for (int n = 0; n < COLUMNS; n++) panel.scales[n] = 1;
    for (int n = 0; n < COLUMNS; n += 16) {
        const char *w = product.w + k * product.w_stride + column + n;
        for (int p = 0; p < inner / 2; p++, w += 2 * product.w_stride) {
            alignas(16) char padded[2][16] = {};
            const char *first = w, *second = w + product.w_stride;
            if (n + 16 > columns) {
                const int there = columns > n ? columns - n : 0;
                memcpy(padded[0], first, there);
                memcpy(padded[1], second, there);
                first = padded[0], second = padded[1];
            }
            const __m256i a = _mm256_cvtepi8_epi16(load128(first)), b = _mm256_cvtepi8_epi16(load128(second));
            const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
            __m256i *out = reinterpret_cast<__m256i *>(&panel.pairs[p][n]);
            _mm256_store_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_store_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
        }
    }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Panel &panel = *static_cast<Panel *>(out);
    if (product.type == BYTES_ACROSS) return unpack_across(product, column, columns, k, inner, panel);
    alignas(64) float values[INNER];
    alignas(64) int16_t rows[8][INNER];
    for (int n = 0; n < COLUMNS; n += 8) {
        for (int i = 0; i < 8; i++) {
            panel.scales[n + i] = 0;
            if (n + i < columns) {
                unpack_row(product.type, product.w + (column + n + i) * product.w_stride, k, inner, values);
                panel.scales[n + i] = quantize(values, inner, weight_limit(inner), rows[i]);
            } else {
                memset(rows[i], 0, sizeof rows[i]);
            }
        }
        for (int p = 0; p < inner / 2; p += 8)
            transpose(reinterpret_cast<const int32_t *>(rows[0]) + p, PAIRS, &panel.pairs[p][n], COLUMNS);
    }
}

void multiply(int, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    const Panel &panel = *static_cast<const Panel *>(panel_memory);
    Lanes left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) left[i] = right[i] = Lanes::zero();
    for (int p = 0; p < inner / 2; p++) {
        const Lanes a = Lanes::load(panel.pairs[p]), b = Lanes::load(panel.pairs[p] + Lanes::count);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Lanes x = Lanes::same(tile.pairs[p][i]);
            left[i].add_pairs(a, x);
            right[i].add_pairs(b, x);
        }
    }
    const Floats a = Floats::load(panel.scales), b = Floats::load(panel.scales + Lanes::count);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++, sums += COLUMNS) {
        add_scaled(left[i].floats(), a, tile.scales[i], first, sums);
        add_scaled(right[i].floats(), b, tile.scales[i], first, sums + Lanes::count);
    }
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int i = 0; i < rows; i++, y += stride, sums += COLUMNS)
        if (columns == COLUMNS) memcpy(y, sums, COLUMNS * sizeof(float));  // known to the compiler, which makes it two moves
        else memcpy(y, sums, columns * sizeof(float));
}

}  // namespace

extern const Kernel KERNEL(int16);
const Kernel KERNEL(int16) = {
    INSTRUCTIONS,
    works, takes, ROWS, COLUMNS, INNER, 64 / COLUMNS, (sizeof(Tile) + 63) / 64 * 64, sizeof(Panel),
    pack, unpack, multiply, store, nullptr, nullptr,
};

}  // namespace native
