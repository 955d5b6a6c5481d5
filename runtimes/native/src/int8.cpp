// Products in int8, as exact as llama.cpp's: weights stay the whole numbers that their format stores, and activations are
// rounded to 7 bits and a sign with a scale for 32 of them (Q4_0, Q4_1, Q8_0) or for 256 (the others), as llama.cpp does.
//
// Weights are taken as unsigned bytes, what a format subtracts is a minimum: y = sum over groups of (scale * sum of bytes *
// activations + minimum * sum of activations). A panel has, for each four inner values, the four bytes of each of its columns
// next to each other: one lane of 32 bits for each column, so that sums need no shuffling. A tile has, for each four, the
// bytes of each of its rows, to be broadcast.
//
// AVX2 adds up pairs of products in int16, which hold four bits times 8 * 2 activations and five bits times 4 * 2: groups of
// 32 or 16, then they are widened. Six bits would have to be widened after 8 values, which costs what it wins: Q6_K is left to
// int16.cpp there, and Q8_0. VNNI adds up four products in int32. AVX2: 6 rows x 16 columns are 12 sums; two registers of
// weights, one broadcast and one product make 16. AVX-512: 12 x 32.

#include "bytes.h"
#include "kernels.h"
#include "processor.h"
#include "rounding.h"
#include "unpack.h"

namespace native {
namespace {

#if defined(NATIVE_WIDE) || defined(__AVXVNNI__)
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif
constexpr int INNER = 256, STEPS = INNER / 4, MOST_GROUPS = INNER / 16;
constexpr int COLUMNS = 2 * Bytes::count;
constexpr int ROWS = Bytes::count == 8 ? 6 : 12;
constexpr int PLACES = 16;  // room for ROWS floats that keeps 64 bytes' alignment

bool takes(int type) {
    return type == Q4_0 || type == Q4_1 || type == Q4_K || type == Q5_K || (VNNI && (type == Q6_K || type == Q8_0));
}
int group_values(int type) { return type == Q6_K || (type == Q5_K && !VNNI) ? 16 : 32; }
bool own_scales(int type) { return block_values(type) == 32; }  // one for each group of activations

struct Tile {
    float scales[8][PLACES];           // of activations; the first ones alone if they are not each group's own
    float sums[MOST_GROUPS][PLACES];   // of each group; times its scale if that is its own
    int32_t bytes[STEPS][ROWS];
};

struct Panel {
    float scales[MOST_GROUPS][COLUMNS], minima[MOST_GROUPS][COLUMNS];
    int32_t bytes[STEPS][COLUMNS];
};

void pack(int type, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    const int group = group_values(type), scaled = own_scales(type) ? 32 : inner;
    alignas(32) int8_t row[INNER];
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < inner; k += scaled)
            tile.scales[k / 32][i] = i < rows ? quantize8(x + i * stride + k, scaled, row + k) : 0;
        if (i >= rows) memset(row, 0, sizeof row);
        for (int g = 0; g * group < inner; g++) {
            int sum = 0;
            for (int k = 0; k < group; k++) sum += row[g * group + k];
            tile.sums[g][i] = own_scales(type) ? sum * tile.scales[g][i] : float(sum);
        }
        for (int s = 0; s < inner / 4; s++) memcpy(&tile.bytes[s][i], row + 4 * s, 4);
    }
}

// One column: bytes, and a scale and a minimum for each group.
void unpack_column(int type, const char *row, int k, int inner, uint8_t *bytes, float *scales, float *minima) {
    const uint8_t *b = reinterpret_cast<const uint8_t *>(row);
    const auto put = [&](__m256i v) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(bytes), v);
        bytes += 32;
    };
    if (type == Q4_0 || type == Q4_1 || type == Q8_0) {
        const int size = type == Q4_0 ? 18 : type == Q4_1 ? 20 : 34;
        b += k / 32 * size;
        for (int g = 0; g < inner / 32; g++, b += size) {
            scales[g] = half(b);
            minima[g] = type == Q4_1 ? half(b + 2) : scales[g] * (type == Q4_0 ? -8 : -128);
            put(type == Q8_0 ? _mm256_xor_si256(load256(b + 2), _mm256_set1_epi8(-128)) : nibbles(b + (type == Q4_1 ? 4 : 2)));
        }
        return;
    }
    const __m256i low = _mm256_set1_epi8(15);
    if (type == Q6_K) {
        b += k / 256 * 210;
        const float d = half(b + 208);
        for (int g = 0; g < 16; g++) {
            scales[g] = d * int8_t(b[192 + g]);
            minima[g] = -32 * scales[g];
        }
        for (int g = 0; g < 8; g++) {
            const __m256i x = load256(b + g / 4 * 64 + g % 2 * 32), high = load256(b + 128 + g / 4 * 32);
            const __m256i four = _mm256_and_si256(g & 2 ? _mm256_srli_epi16(x, 4) : x, low);
            const __m256i two = _mm256_srl_epi16(high, _mm_cvtsi32_si128(g % 4 * 2));
            put(_mm256_or_si256(four, _mm256_slli_epi16(_mm256_and_si256(two, _mm256_set1_epi8(3)), 4)));
        }
        return;
    }
    b += k / 256 * (type == Q4_K ? 144 : 176);
    const float d = half(b), dmin = half(b + 2);
    const int each = 32 / group_values(type);  // groups with one scale
    for (int j = 0; j < 8; j++) {
        int scale, minimum;
        group_scale(b + 4, j, scale, minimum);
        for (int i = 0; i < each; i++) scales[j * each + i] = d * scale, minima[j * each + i] = -(dmin * minimum);
        const __m256i x = load256(b + (type == Q4_K ? 16 : 48) + j / 2 * 32);
        const __m256i four = _mm256_and_si256(j & 1 ? _mm256_srli_epi16(x, 4) : x, low);
        if (type == Q4_K) {
            put(four);
            continue;
        }
        const __m256i bit = _mm256_and_si256(_mm256_srl_epi16(load256(b + 16), _mm_cvtsi32_si128(j)), _mm256_set1_epi8(1));
        put(_mm256_or_si256(four, _mm256_slli_epi16(bit, 4)));
    }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Panel &panel = *static_cast<Panel *>(out);
    alignas(32) uint8_t rows[8][INNER];
    for (int n = 0; n < COLUMNS; n += 8) {
        for (int i = 0; i < 8; i++) {
            float scales[MOST_GROUPS] = {}, minima[MOST_GROUPS] = {};
            if (n + i < columns)
                unpack_column(product.type, product.w + (column + n + i) * product.w_stride, k, inner, rows[i], scales, minima);
            else
                memset(rows[i], 0, sizeof rows[i]);
            for (int g = 0; g < inner / group_values(product.type); g++) {
                panel.scales[g][n + i] = scales[g];
                panel.minima[g][n + i] = minima[g];
            }
        }
        for (int s = 0; s < inner / 4; s += 8)
            transpose(reinterpret_cast<const int32_t *>(rows[0]) + s, INNER / 4, &panel.bytes[s][n], COLUMNS);
    }
}

template <int GROUP, bool OWN>
void multiply_groups(const Tile &tile, const Panel &panel, int groups, bool first, float *sums) {
    alignas(64) float own[ROWS][COLUMNS];
    Floats left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) left[i] = right[i] = Floats::zero();
    for (int g = 0; g < groups; g++) {
        const Floats a = Floats::load(panel.minima[g]), b = Floats::load(panel.minima[g] + Bytes::count);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) left[i].add(a, tile.sums[g][i]), right[i].add(b, tile.sums[g][i]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) left[i].store(own[i]), right[i].store(own[i] + Bytes::count);
    for (int g = 0; g < groups; g++) {
        Bytes low[ROWS], high[ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) low[i] = high[i] = Bytes::zero();
#pragma GCC unroll 2
        for (int s = g * GROUP / 4; s < (g + 1) * GROUP / 4; s++) {
            const Bytes a = Bytes::load(panel.bytes[s]), b = Bytes::load(panel.bytes[s] + Bytes::count);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) {
                const Bytes x = Bytes::same(tile.bytes[s][i]);
                low[i].add(a, x);
                high[i].add(b, x);
            }
        }
        const Floats a = Floats::load(panel.scales[g]), b = Floats::load(panel.scales[g] + Bytes::count);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            Floats p = low[i].whole(), q = high[i].whole();
            if (OWN) p.scale(tile.scales[g][i]), q.scale(tile.scales[g][i]);
            Floats s = Floats::load(own[i]), t = Floats::load(own[i] + Bytes::count);
            s.add(p, a), t.add(q, b);
            s.store(own[i]), t.store(own[i] + Bytes::count);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++, sums += COLUMNS)
        for (int n = 0; n < COLUMNS; n += Bytes::count) {
            Floats s = first ? Floats::zero() : Floats::load(sums + n);
            s.add(Floats::load(own[i] + n), OWN ? 1 : tile.scales[0][i]);
            s.store(sums + n);
        }
}

void multiply(int type, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    const Panel &panel = *static_cast<const Panel *>(panel_memory);
    if (own_scales(type)) multiply_groups<32, true>(tile, panel, inner / 32, first, sums);
    else if (group_values(type) == 32) multiply_groups<32, false>(tile, panel, inner / 32, first, sums);
    else multiply_groups<16, false>(tile, panel, inner / 16, first, sums);
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int i = 0; i < rows; i++) memcpy(y + i * stride, sums + i * COLUMNS, columns * sizeof(float));
}

}  // namespace

extern const Kernel KERNEL(int8);
const Kernel KERNEL(int8) = {
    INSTRUCTIONS "-int8",
    works, takes, ROWS, COLUMNS, INNER, 64 / COLUMNS, (sizeof(Tile) + 63) / 64 * 64, sizeof(Panel),
    pack, unpack, multiply, store, nullptr, nullptr,
};

}  // namespace native
