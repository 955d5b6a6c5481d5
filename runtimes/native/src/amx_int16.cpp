// Products of CLIP's int8 weights, (inner, columns) as in vision.onnx, by the matrix unit (AMX).
//
// Activations need more bits than bfloat16 has (linear.cpp), and the unit multiplies bytes twice as fast, so they are
// two terms: rounded to 14 bits and a sign, with one float32 scale for 512 values of a row, an activation is
// scale * (128 * high + low) with bytes high and low. As many tiles are multiplied as in bfloat16, and all sums of an inner
// block are exact in int32.
//
// Activations are the unit's first operand, in their natural order: the high terms of 16 rows are one tile, the low ones another.
// Weights are the second, four inner values of 16 columns in a row of a tile, which is how four rows of vision.onnx come out
// when their bytes are interleaved. Sums are rows x columns as in the result.
//
// As in amx_bf16.cpp, a panel of 32 columns has 16 KB and stays in the L1 cache together with a tile of activations, 16 KB too;
// the activations of one inner block (610 KB at 577 rows) stay in the L2 cache with the sums of 8 panels (606 KB). With a block
// of 1024 panel and tile would exceed the L1 cache (48 KB).

#include <cstring>

#include "kernels.h"
#include "rounding.h"
#include "tiles.h"

namespace native {
namespace {

constexpr int INNER = 512, STEP = 64, STEPS = INNER / STEP;
constexpr int ROWS = 16, COLUMNS = 32;
constexpr int LIMIT = 127 * 128 + 63;  // of activations: then high is at most 127

struct Step {
    int8_t tile[2][16][STEP];  // of activations: high and low; of weights: the first and the other 16 columns
};

struct Tile {
    float scales[ROWS];
    Step steps[STEPS];
};

// 16 lanes: a register of AVX-512, or two of AVX2 in tests on other processors
using Ints = int32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));

int steps_of(int inner) { return (inner + STEP - 1) / STEP; }

// 32 integers -> 128 * high + low, low from -64 to 63
void split(const int16_t *q, int8_t *high, int8_t *low) {
    const __m256i half = _mm256_set1_epi16(64), a = load256(q), b = load256(q + 16);
    const __m256i a_high = _mm256_srai_epi16(_mm256_add_epi16(a, half), 7);
    const __m256i b_high = _mm256_srai_epi16(_mm256_add_epi16(b, half), 7);
    put256(to_int8(a_high, b_high), high);
    put256(to_int8(_mm256_sub_epi16(a, _mm256_slli_epi16(a_high, 7)), _mm256_sub_epi16(b, _mm256_slli_epi16(b_high, 7))), low);
}

void pack(int, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    alignas(32) int16_t values[INNER];
    for (int i = 0; i < ROWS; i++) {
        memset(values, 0, sizeof values);
        tile.scales[i] = i < rows ? quantize(x + i * stride, inner, LIMIT, values) : 0;
        for (int k = 0; k < steps_of(inner) * STEP; k += 32) {
            Step &step = tile.steps[k / STEP];
            split(values + k, step.tile[0][i] + k % STEP, step.tile[1][i] + k % STEP);
        }
    }
}

bool supports(int type) { return type == INT8_TRANSPOSED; }

// 32 bytes of a row, of which `there` are valid
__m256i bytes32(const char *row, int there) {
    if (there >= COLUMNS) return load256(row);
    alignas(32) char padded[COLUMNS] = {};
    memcpy(padded, row, there);
    return load256(padded);
}

// Bytes of four rows of 32 columns -> four of each column. In each half of a register are 16 columns: a tile's row.
void interleave(const __m256i (&v)[4], int8_t *left, int8_t *right) {
    const __m256i a = _mm256_unpacklo_epi8(v[0], v[1]), b = _mm256_unpacklo_epi8(v[2], v[3]);
    const __m256i c = _mm256_unpackhi_epi8(v[0], v[1]), d = _mm256_unpackhi_epi8(v[2], v[3]);
    const __m256i fours[4] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b), _mm256_unpacklo_epi16(c, d),
                              _mm256_unpackhi_epi16(c, d)};
    for (int i = 0; i < 4; i++) {
        _mm_store_si128(reinterpret_cast<__m128i *>(left) + i, _mm256_castsi256_si128(fours[i]));
        _mm_store_si128(reinterpret_cast<__m128i *>(right) + i, _mm256_extracti128_si256(fours[i], 1));
    }
}

// Rows of bytes are far apart: what the next panel and the next inner block read is prefetched.
void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Step *steps = static_cast<Step *>(out);
    const size_t stride = product.w_stride;
    const char *w = product.w + k * stride + column;
    for (int i = 0; i < steps_of(inner) * STEP; i += 4, w += 4 * stride) {
        __m256i v[4];
        for (int j = 0; j < 4; j++) {
            v[j] = bytes32(w + j * stride, i < inner ? columns : 0);
            _mm_prefetch(w + j * stride + COLUMNS, _MM_HINT_T1);
            _mm_prefetch(w + (INNER + j) * stride, _MM_HINT_T1);
        }
        Step &step = steps[i / STEP];
        interleave(v, step.tile[0][i % STEP / 4], step.tile[1][i % STEP / 4]);
    }
}

// sums: [rows][columns]
void multiply(int, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    Ints high[2][16], low[2][16];
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    multiply_steps<INT8>(tile.steps, static_cast<const Step *>(panel_memory), steps_of(inner), tile.steps);
    tile_store<0>(high[0], 64), tile_store<1>(high[1], 64), tile_store<2>(low[0], 64), tile_store<3>(low[1], 64);
    for (int i = 0; i < ROWS; i++)
        for (int t = 0; t < 2; t++, sums += 16) {
            Floats &sum = *reinterpret_cast<Floats *>(sums);
            const Floats scaled = __builtin_convertvector(128 * high[t][i] + low[t][i], Floats) * tile.scales[i];
            sum = first ? scaled : sum + scaled;
        }
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int i = 0; i < rows; i++) memcpy(y + i * stride, sums + i * COLUMNS, columns * sizeof(float));
}

bool available() { return has_amx(INT8_BIT); }

}  // namespace

extern const Kernel amx_int16;
const Kernel amx_int16 = {
    "amx-int16", available, supports, ROWS, COLUMNS, INNER, 8, sizeof(Tile), STEPS * sizeof(Step),
    pack, unpack, multiply, store, configure_tiles, restore_tiles,
};

}  // namespace native
