// Products in bfloat16 by the matrix unit (AMX).
//
// Weights are the unit's first operand: 16 columns of the result, 32 inner values each, in their natural order, so that
// unpacking a row of blocks writes whole 64-byte rows and needs no transposition. Activations are the second operand, pairs
// of inner values for 16 rows, and are transposed once when they are packed. Four sums of 16 x 16 use each operand twice.
//
// An inner block is 256: a panel of 32 columns then has 16 KB and stays in the L1 cache (48 KB where there is AMX)
// together with a tile of activations, 16 KB too, and its sums. The activations of one inner block (300 KB at 576 rows) stay
// in the L2 cache, which has 2 MB there, and so do the sums of 8 panels (590 KB).
//
// 4-bit blocks become bfloat16 by a table: the 16 possible values of a block are computed once, and one instruction of AVX-512,
// which all processors with AMX have, picks 32 of them.

#include "kernels.h"
#include "rounding.h"
#include "tiles.h"

namespace native {
namespace {

constexpr int INNER = 256, STEP = 32, STEPS = INNER / STEP;
constexpr int ROWS = 32, COLUMNS = 32;

struct Step {  // of one inner block: two tiles of 16 x 64 bytes
    uint16_t tile[2][16][STEP];
};

inline void store256(void *p, __m256i v) { _mm256_store_si256(static_cast<__m256i *>(p), v); }

#if defined(__AVX512BF16__)

inline __m256i sixteen(const float *v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(v))); }

// 32 signed bytes: the first 16 times one scale, the others times the other
inline void put_scaled(__m256i bytes, float first, float second, uint16_t *out) {
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    const __m512 scaled = _mm512_mul_ps(a, _mm512_set1_ps(first));
    _mm512_store_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, _mm512_set1_ps(second)), scaled)));
}

// The values q * scale + offset of q = 0..15
struct Table {
    __m512i values;  // in the lower half: no index is larger than 15
    Table(float scale, float offset) {
        const __m512 q = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 v = _mm512_fmadd_ps(q, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
        values = _mm512_castsi256_si512(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    }
    void look_up(__m256i q, uint16_t *out) const {
        _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(q), values));
    }
};

#else  // tests, on other processors

inline __m256i sixteen(const float *v) {
    return _mm256_set_m128i(bfloat16(_mm256_loadu_ps(v + 8)), bfloat16(_mm256_loadu_ps(v)));
}

inline void put_scaled(__m256i bytes, float first, float second, uint16_t *out) {
    alignas(32) float values[32];
    widen<true>(_mm256_castsi256_si128(bytes), _mm256_set1_ps(first), _mm256_setzero_ps(), values);
    widen<true>(_mm256_extracti128_si256(bytes, 1), _mm256_set1_ps(second), _mm256_setzero_ps(), values + 16);
    store256(out, sixteen(values));
    store256(out + 16, sixteen(values + 16));
}

// The values q * scale + offset of q = 0..15, as tables of low and high bytes
struct Table {
    __m256i low, high;
    Table(float scale, float offset) {
        const __m256 s = _mm256_set1_ps(scale), o = _mm256_set1_ps(offset);
        const __m128i a = bfloat16(_mm256_fmadd_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), s, o));
        const __m128i b = bfloat16(_mm256_fmadd_ps(_mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15), s, o));
        const __m128i bytes = _mm_set1_epi16(0xff);
        low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, bytes), _mm_and_si128(b, bytes)));
        high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    void look_up(__m256i q, uint16_t *out) const {
        q = _mm256_permute4x64_epi64(q, 0xd8);  // so that the two halves of the interleaving come out in order
        const __m256i l = _mm256_shuffle_epi8(low, q), h = _mm256_shuffle_epi8(high, q);
        store256(out, _mm256_unpacklo_epi8(l, h));
        store256(out + 16, _mm256_unpackhi_epi8(l, h));
    }
};

#endif

inline __m256 bytes_as_floats(uint64_t bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
}

// One row of weights: `out` is its place in the first step, those of the following ones are sizeof(Step) apart.
void unpack_row_bf16(int type, const char *row, int k, int inner, uint16_t *out) {
    constexpr int NEXT = sizeof(Step) / sizeof(uint16_t);
    const uint8_t *b = reinterpret_cast<const uint8_t *>(row);
    const __m256i mask = _mm256_set1_epi8(15);
    if (type == Q4_0) {
        b += k / 32 * 18;
        for (int i = 0; i < inner; i += 32, b += 18, out += NEXT) {
            const float d = half(b);
            Table(d, -8 * d).look_up(nibbles(b + 2), out);
        }
    } else if (type == Q4_1) {
        b += k / 32 * 20;
        for (int i = 0; i < inner; i += 32, b += 20, out += NEXT) Table(half(b), half(b + 2)).look_up(nibbles(b + 4), out);
    } else if (type == Q4_K) {
        b += k / 256 * 144;
        for (int i = 0; i < inner; i += 256, b += 144) {
            uint64_t scales, minima;  // eight bytes each
            group_scales(b + 4, scales, minima);
            alignas(32) float scale[8], offset[8];
            _mm256_store_ps(scale, _mm256_mul_ps(_mm256_set1_ps(half(b)), bytes_as_floats(scales)));
            _mm256_store_ps(offset, _mm256_mul_ps(_mm256_set1_ps(-half(b + 2)), bytes_as_floats(minima)));
            for (int j = 0; j < 8; j++, out += NEXT) {
                const __m256i q = load256(b + 16 + 32 * (j / 2));
                Table(scale[j], offset[j]).look_up(_mm256_and_si256(j & 1 ? _mm256_srli_epi16(q, 4) : q, mask), out);
            }
        }
    } else if (type == Q6_K) {
        b += k / 256 * 210;
        for (int i = 0; i < inner; i += 256, b += 210) {
            const __m128i bytes = load128(b + 192);
            const __m256 d = _mm256_set1_ps(half(b + 208));
            alignas(32) float scales[16];
            _mm256_store_ps(scales, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))));
            const __m128i others = _mm_unpackhi_epi64(bytes, bytes);
            _mm256_store_ps(scales + 8, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(others))));
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++, out += NEXT) put_scaled(six_bits(b, g / 4, g % 4), scales[2 * g], scales[2 * g + 1], out);
        }
    } else if (type == Q8_0) {
        b += k / 32 * 34;
        for (int i = 0; i < inner; i += 32, b += 34, out += NEXT) put_scaled(load256(b + 2), half(b), half(b), out);
    } else {
        alignas(32) float values[INNER];
        unpack_row(type, row, k, inner, values);
        for (int i = 0; i < inner; i += 32, out += NEXT) {
            store256(out, sixteen(values + i));
            store256(out + 16, sixteen(values + i + 16));
        }
    }
}

void pack(int, const float *x, size_t stride, int rows, int inner, void *out) {
    Step *steps = static_cast<Step *>(out);
    alignas(32) uint16_t values[16][STEP];
    for (int k = 0; k < inner; k += STEP, steps++)
        for (int t = 0; t < 2; t++) {
            for (int i = 0; i < 16; i++) {
                const bool there = 16 * t + i < rows;
                const float *row = x + (16 * t + i) * stride + k;
                store256(values[i], there ? sixteen(row) : _mm256_setzero_si256());
                store256(values[i] + 16, there ? sixteen(row + 16) : _mm256_setzero_si256());
            }
            for (int i = 0; i < 16; i += 8)
                for (int p = 0; p < 16; p += 8)
                    transpose(reinterpret_cast<int32_t *>(values[i]) + p, STEP / 2,
                              reinterpret_cast<int32_t *>(steps->tile[t][p]) + i, STEP / 2);
        }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Step *steps = static_cast<Step *>(out);
    for (int n = 0; n < COLUMNS; n++) {
        uint16_t *row = steps->tile[n / 16][n % 16];
        if (n < columns) {
            const int values = block_values(product.type), size = product.type == F16 ? 64 : block_bytes(product.type);
            const char *next = product.w + (column + n) * product.w_stride + size_t(k + inner) / values * size;
            for (int at = 0; at < inner / values * size; at += 64) _mm_prefetch(next + at, _MM_HINT_T1);
            unpack_row_bf16(product.type, product.w + (column + n) * product.w_stride, k, inner, row);
        } else {
            for (int s = 0; s < inner / STEP; s++) memset(steps[s].tile[n / 16][n % 16], 0, STEP * sizeof(uint16_t));
        }
    }
}

// sums: [weights' tile][activations' tile][16 columns][16 rows]
void multiply(int, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Step *x = static_cast<const Step *>(tile_memory), *w = static_cast<const Step *>(panel_memory);
    if (first) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(sums, 64), tile_load<1>(sums + 256, 64), tile_load<2>(sums + 512, 64), tile_load<3>(sums + 768, 64);
    }
    multiply_steps<BFLOAT16>(w, x, inner / STEP, x);
    tile_store<0>(sums, 64), tile_store<1>(sums + 256, 64), tile_store<2>(sums + 512, 64), tile_store<3>(sums + 768, 64);
}

bool available() { return has_amx(BF16_BIT); }

}  // namespace

void store_tiles(const float *sums, float *y, size_t stride, int rows, int columns) {
    alignas(32) int32_t turned[16][16];
    for (int q = 0; q < 4; q++, sums += 256) {
        const int column = q / 2 * 16, row = q % 2 * 16;
        if (column >= columns || row >= rows) continue;
        for (int i = 0; i < 16; i += 8)
            for (int j = 0; j < 16; j += 8)
                transpose(reinterpret_cast<const int32_t *>(sums) + 16 * i + j, 16, &turned[j][i], 16);
        const int width = columns - column < 16 ? columns - column : 16;
        for (int i = 0; i < 16 && row + i < rows; i++)
            memcpy(y + (row + i) * stride + column, turned[i], width * sizeof(float));
    }
}

extern const Kernel amx_bf16;
const Kernel amx_bf16 = {
    "amx-bf16", available, is_supported_type, ROWS, COLUMNS, INNER, 8, STEPS * sizeof(Step), STEPS * sizeof(Step),
    pack, unpack, multiply, store_tiles, configure_tiles, restore_tiles,
};

}  // namespace native
