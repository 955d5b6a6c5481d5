// Products in int8 by the matrix unit (AMX): twice as many per cycle as in bfloat16, and less exact. Opt-in.
//
// Both sides are rounded to int8 (-127 to 127), with one float32 scale for 256 values of a row; sums of 256 products are
// scaled and added up in float32. Outliers among activations cost accuracy: with a few channels 30 times as large as the rest
// the relative error of a product is 3 %, against 1 % without (bfloat16: 0.24 and 0.26 %).
//
// Tiles as in amx_bf16.cpp, with 64 inner values instead of 32 in a row. An inner block is 1024: 32 KB for a panel.

#include "kernels.h"
#include "rounding.h"
#include "tiles.h"

namespace native {

void store_tiles(const float *sums, float *y, size_t stride, int rows, int columns);

namespace {

constexpr int INNER = 1024, STEP = 64, SCALED = 256;  // SCALED: values with one scale
constexpr int CHUNKS = INNER / SCALED, STEPS = SCALED / STEP;
constexpr int ROWS = 32, COLUMNS = 32;

struct Step {
    int8_t tile[2][16][STEP];
};

struct Block {  // of activations or of weights
    float scales[CHUNKS][32];
    Step steps[CHUNKS][STEPS];
};

// Up to 256 values, a multiple of 32; the rest of the last step zero
float take(const float *v, int count, int8_t *out) {
    for (int i = count; i < (count + STEP - 1) / STEP * STEP; i++) out[i] = 0;
    return quantize8(v, count, out);
}

inline int steps_of(int values) { return (values + STEP - 1) / STEP; }
inline int values_of(int inner, int chunk) { return inner - chunk * SCALED < SCALED ? inner - chunk * SCALED : SCALED; }

void pack(int, const float *x, size_t stride, int rows, int inner, void *out) {
    Block &block = *static_cast<Block *>(out);
    alignas(32) int8_t values[16][SCALED];
    for (int c = 0; c * SCALED < inner; c++)
        for (int t = 0; t < 2; t++) {
            const int count = values_of(inner, c);
            for (int i = 0; i < 16; i++) {
                const int row = 16 * t + i;
                block.scales[c][row] = 0;
                if (row < rows) block.scales[c][row] = take(x + row * stride + c * SCALED, count, values[i]);
                else memset(values[i], 0, SCALED);
            }
            for (int s = 0; s < steps_of(count); s++)
                for (int i = 0; i < 16; i += 8)
                    for (int p = 0; p < 16; p += 8)
                        transpose(reinterpret_cast<int32_t *>(values[i] + s * STEP) + p, SCALED / 4,
                                  reinterpret_cast<int32_t *>(block.steps[c][s].tile[t][p]) + i, STEP / 4);
        }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Block &block = *static_cast<Block *>(out);
    alignas(32) float values[INNER];
    alignas(32) int8_t small[SCALED];
    for (int n = 0; n < COLUMNS; n++) {
        if (n < columns) unpack_row(product.type, product.w + (column + n) * product.w_stride, k, inner, values);
        for (int c = 0; c * SCALED < inner; c++) {
            const int count = values_of(inner, c);
            block.scales[c][n] = 0;
            if (n < columns) block.scales[c][n] = take(values + c * SCALED, count, small);
            else memset(small, 0, SCALED);
            for (int s = 0; s < steps_of(count); s++)
                memcpy(block.steps[c][s].tile[n / 16][n % 16], small + s * STEP, STEP);
        }
    }
}

// sums: [weights' tile][activations' tile][16 columns][16 rows]
void multiply(int, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Block &x = *static_cast<const Block *>(tile_memory), &w = *static_cast<const Block *>(panel_memory);
    alignas(64) int32_t whole[4][16][16];
    for (int c = 0; c * SCALED < inner; c++, first = false) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        multiply_steps<INT8>(w.steps[c], x.steps[c], steps_of(values_of(inner, c)), x.steps[c]);
        tile_store<0>(whole[0], 64), tile_store<1>(whole[1], 64), tile_store<2>(whole[2], 64), tile_store<3>(whole[3], 64);
        for (int q = 0; q < 4; q++)
            for (int n = 0; n < 16; n++) {
                const __m256 scale = _mm256_set1_ps(w.scales[c][q / 2 * 16 + n]);
                for (int m = 0; m < 16; m += 8) {
                    float *sum = sums + 256 * q + 16 * n + m;
                    const __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(&x.scales[c][q % 2 * 16 + m]));
                    const __m256 value = _mm256_cvtepi32_ps(load256(&whole[q][n][m]));
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(value, both, first ? _mm256_setzero_ps() : _mm256_loadu_ps(sum)));
                }
            }
    }
}

bool available() { return has_amx(INT8_BIT); }

}  // namespace

extern const Kernel amx_int8;
const Kernel amx_int8 = {
    "amx-int8", available, is_supported_type, ROWS, COLUMNS, INNER, 8, sizeof(Block), sizeof(Block),
    pack, unpack, multiply, store_tiles, configure_tiles, restore_tiles,
};

}  // namespace native
