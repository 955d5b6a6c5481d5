// Products in int16, for processors without a matrix unit.
//
// Both sides are rounded to integers with one float32 scale for 256 values of a row: weights to 10 bits and a sign (12 with
// 64 or fewer), activations to 13 and a sign. 256 products then add up in int32 without overflow (1024 * 8191 * 256 < 2^31),
// so scales are applied once per 256 values and not per block of 32, and the result is nearer to the exact one than with
// the 8-bit activations that llama.cpp uses.
//
// A panel has, for each pair of inner values, the two int16 of each of its columns next to each other: one int32 lane for
// each column, so that sums need no shuffling. A tile has, for each pair, the two int16 of each of its rows, to be
// broadcast. AVX-VNNI: 6 rows x 16 columns are 12 sums; two registers of weights and one broadcast make 15. A panel has 8 or
// 16 KB and stays in the L1 cache; the activations of one inner block (300 KB at 576 rows) and the sums of four panels
// (150 KB) stay in the L2 cache.
//
// With AVX2 alone, and with AVX-512 on AMD's Zen 4, multiplications are the bottleneck, because half of the ports have a
// multiplier, and additions are cheap. So half of the multiplications are saved (S. Winograd, "A new algorithm
// for inner product", 1968): with inner values in pairs,
//
//   sum of x0 * w0 + x1 * w1 = sum of (x0 + w1) * (x1 + w0) - sum of x0 * x1 - sum of w0 * w1
//
// where the last two sums depend on the row or the column alone and initialize the accumulators. All are integers, and
// overflow on the way wraps around: the result is that of plain products, bit for bit. Pairs are here of two values'
// firsts, then of their seconds; 4 rows x 16 columns are 8 sums, which four registers of weights, two broadcasts and two
// factors make 16. AVX-512: 8 rows x 32 columns are 16 sums, and as many others leave room.
//
// With 512 bits there are two ports, one of which multiplies: a plain product occupies that one for two cycles, one with half of
// the multiplications both for one and a half. So three of eight rows use plain products.

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "processor.h"
#include "rounding.h"
#include "unpack.h"

namespace native {
namespace {

constexpr bool TWOS = !VNNI || Lanes::count == 16;
constexpr int INNER = 256, PAIRS = INNER / 2;
constexpr int COLUMNS = 2 * Lanes::count;
constexpr int ROWS = TWOS ? Lanes::count / 2 : 6;
constexpr int PADDED_ROWS = Lanes::count;  // in a tile, of pairs of its rows; with TWOS of firsts, then of seconds
constexpr int STEPS = TWOS ? PAIRS / 2 : PAIRS;
constexpr int SCALES = 16;  // room for ROWS numbers that keeps 64 bytes' alignment
constexpr int ACTIVATION_LIMIT = 8191;

constexpr bool plain(int row) { return Lanes::count == 16 && row % 3 == 1; }  // 11 cycles for 8 rows instead of 12

// 10 bits and a sign with 256 inner values, 12 with 64 or fewer.
float weight_limit(int inner) { return float(std::min(4095, INT32_MAX / ACTIVATION_LIMIT / inner)); }

struct Tile {
    float scales[SCALES];
    int32_t initial_sums[SCALES];  // TWOS: -(sum of x0 * x1)
    int32_t pairs[STEPS][PADDED_ROWS];
};

struct Panel {
    float scales[COLUMNS];
    int32_t initial_sums[COLUMNS];        // TWOS: -(sum of w0 * w1)
    int32_t pairs[PAIRS][COLUMNS];  // TWOS: a row of firsts, a row of seconds
};

__m256i firsts(__m256i a, __m256i b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa); }
__m256i seconds(__m256i a, __m256i b) { return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa); }

// A row's values, in place -> the firsts of each two in the row, the seconds in one that is `away`. Returns -(sum of x0 * x1).
int32_t part(int16_t *row, int inner, int away) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m128i sum = _mm_setzero_si128();
    for (int k = 0; k < inner; k += 16) {
        const __m256i v = _mm256_shuffle_epi8(load256(row + k), _mm256_broadcastsi128_si256(order));
        const __m256i parted = _mm256_permute4x64_epi64(v, 0xd8);
        const __m128i first = _mm256_castsi256_si128(parted), second = _mm256_extracti128_si256(parted, 1);
        _mm_store_si128(reinterpret_cast<__m128i *>(row + k / 2), first);
        _mm_store_si128(reinterpret_cast<__m128i *>(row + away + k / 2), second);
        sum = _mm_sub_epi32(sum, _mm_madd_epi16(first, second));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

void pack(int, const float *x, size_t stride, int rows, int inner, void *out) {
    Tile &tile = *static_cast<Tile *>(out);
    alignas(64) int16_t values[PADDED_ROWS][INNER];
    if (!TWOS) memset(values[ROWS], 0, (PADDED_ROWS - ROWS) * sizeof values[0]);
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < inner; k += 16) _mm_prefetch(x + i * stride + INNER + k, _MM_HINT_T0);  // the block after this one
        tile.scales[i] = i < rows ? quantize(x + i * stride, inner, ACTIVATION_LIMIT, values[i]) : 0;
        if (i >= rows) memset(values[i], 0, sizeof values[i]);
        if (TWOS) tile.initial_sums[i] = part(values[i], inner, ROWS * INNER);
    }
    const int steps = TWOS ? inner / 4 : inner / 2;
    for (int i = 0; i < PADDED_ROWS; i += 8)
        for (int s = 0; s < steps; s += 8)
            transpose(reinterpret_cast<const int32_t *>(values[i]) + s, PAIRS, &tile.pairs[s][i], PADDED_ROWS);
}

bool supports(int type) { return type == INT8_TRANSPOSED || type == F32 || is_supported_type(type); }

// 16 bytes of a row, of which `there` are valid
__m256i bytes16(const char *row, int there) {
    if (there >= 16) return _mm256_cvtepi8_epi16(load128(row));
    alignas(16) char padded[16] = {};
    memcpy(padded, row, std::max(there, 0));
    return _mm256_cvtepi8_epi16(load128(padded));
}

// Two rows in one register
void put_pairs(__m256i a, __m256i b, int32_t *pairs) {
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    put256(_mm256_permute2x128_si256(low, high, 0x20), pairs);
    put256(_mm256_permute2x128_si256(low, high, 0x31), pairs + 8);
}

// Rows of bytes, one per inner value. The next block's are prefetched, because they are far apart.
void unpack_across(const Product &product, int column, int columns, int k, int inner, Panel &panel) {
    constexpr int SECOND = TWOS ? 2 : 1;  // that makes a pair with the first of four
    const size_t stride = product.w_stride;
    const char *w = product.w + k * stride + column;
    for (int n = 0; n < COLUMNS; n++) panel.scales[n] = 1;
    for (int p = 0; p < inner / 2; p += 2, w += 4 * stride) {
        for (int i = 0; i < 4; i++) _mm_prefetch(w + (INNER + i) * stride, _MM_HINT_T1);
        for (int n = 0; n < COLUMNS; n += 16) {
            __m256i v[4];
            for (int i = 0; i < 4; i++) v[i] = bytes16(w + i * stride + n, columns - n);
            put_pairs(v[0], v[SECOND], &panel.pairs[p][n]);
            put_pairs(v[3 - SECOND], v[3], &panel.pairs[p + 1][n]);
        }
    }
}

void unpack_rows(const Product &product, int column, int columns, int k, int inner, Panel &panel) {
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

// Two rows of pairs -> one of firsts, one of seconds
void part(Panel &panel, int inner) {
    for (int n = 0; n < COLUMNS; n += 8)
        for (int p = 0; p < inner / 2; p += 2) {
            const __m256i a = load256(&panel.pairs[p][n]), b = load256(&panel.pairs[p + 1][n]);
            put256(firsts(a, b), &panel.pairs[p][n]);
            put256(seconds(a, b), &panel.pairs[p + 1][n]);
        }
}

void add_up(Panel &panel, int inner) {
    for (int n = 0; n < COLUMNS; n += 8) {
        __m256i start = _mm256_setzero_si256();
        for (int p = 0; p < inner / 2; p += 2)
            start = _mm256_sub_epi32(start, _mm256_madd_epi16(load256(&panel.pairs[p][n]), load256(&panel.pairs[p + 1][n])));
        put256(start, &panel.initial_sums[n]);
    }
}

void unpack(const Product &product, int column, int columns, int k, int inner, void *out) {
    Panel &panel = *static_cast<Panel *>(out);
    if (product.type == INT8_TRANSPOSED) {
        unpack_across(product, column, columns, k, inner, panel);
    } else {
        unpack_rows(product, column, columns, k, inner, panel);
        if (TWOS) part(panel, inner);
    }
    if (TWOS) add_up(panel, inner);
}

// left, right += (first of x + second of w) * (second of x + first of w), for two registers of columns
#if defined(__AVX512VNNI__)

inline __attribute__((always_inline)) void add_twos(Lanes &left, Lanes &right, const int32_t *x, const Lanes (&first)[2],
                                                    const Lanes (&second)[2]) {
    const Lanes a = Lanes::broadcast(x[0]), b = Lanes::broadcast(x[ROWS]);
    left.add_dot_int16(a.plus_int16(second[0]), b.plus_int16(first[0]));
    right.add_dot_int16(a.plus_int16(second[1]), b.plus_int16(first[1]));
}

#elif !defined(__AVXVNNI__)

// Assembly, because gcc adds register moves.
inline __attribute__((always_inline)) void add_twos(Lanes &left, Lanes &right, const int32_t *x, const Lanes (&first)[2],
                                                    const Lanes (&second)[2]) {
    __m256i a, b, c, d;
    __asm__("vpbroadcastd %[x0], %[a]\n\tvpbroadcastd %[x1], %[b]\n\t"
            "vpaddw %[second0], %[a], %[c]\n\tvpaddw %[first0], %[b], %[d]\n\t"
            "vpmaddwd %[c], %[d], %[c]\n\tvpaddd %[c], %[left], %[left]\n\t"
            "vpaddw %[second1], %[a], %[a]\n\tvpaddw %[first1], %[b], %[b]\n\t"
            "vpmaddwd %[a], %[b], %[a]\n\tvpaddd %[a], %[right], %[right]"
            : [left] "+&x"(left.v), [right] "+x"(right.v), [a] "=&x"(a), [b] "=&x"(b), [c] "=&x"(c), [d] "=&x"(d)
            : [first0] "x"(first[0].v), [first1] "x"(first[1].v), [second0] "x"(second[0].v), [second1] "x"(second[1].v),
              [x0] "m"(x[0]), [x1] "m"(x[ROWS]));
}

#endif

#if defined(__AVXVNNI__)

void add_products(const Tile &tile, const Panel &panel, int inner, Lanes *left, Lanes *right) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) left[i] = right[i] = Lanes::zero();
    for (int p = 0; p < inner / 2; p++) {
        const Lanes a = Lanes::load(panel.pairs[p]), b = Lanes::load(panel.pairs[p] + Lanes::count);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const Lanes x = Lanes::broadcast(tile.pairs[p][i]);
            left[i].add_dot_int16(a, x);
            right[i].add_dot_int16(b, x);
        }
    }
}

#else

// left, right += first of x * first of w + second of x * second of w
inline __attribute__((always_inline)) void add_plain(Lanes &left, Lanes &right, const int32_t *x, const Lanes (&first)[2],
                                                     const Lanes (&second)[2]) {
    const Lanes a = Lanes::broadcast(x[0]), b = Lanes::broadcast(x[ROWS]);
    left.add_dot_int16(a, first[0]), right.add_dot_int16(a, first[1]);
    left.add_dot_int16(b, second[0]), right.add_dot_int16(b, second[1]);
}

inline __attribute__((always_inline)) void add_products(const Tile &tile, const Panel &panel, int inner, Lanes *left,
                                                        Lanes *right) {
    const Lanes low = Lanes::load(panel.initial_sums), high = Lanes::load(panel.initial_sums + Lanes::count);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        const Lanes own = Lanes::broadcast(tile.initial_sums[i]);
        if (plain(i)) left[i] = right[i] = Lanes::zero();
        else left[i] = low.with(own), right[i] = high.with(own);
    }
    for (int s = 0; s < inner / 4; s += 4)
#pragma GCC unroll 4
        for (int j = s; j < s + 4; j++) {
            const int32_t *w = panel.pairs[2 * j];
            const Lanes first[2] = {Lanes::load(w), Lanes::load(w + Lanes::count)};
            const Lanes second[2] = {Lanes::load(w + COLUMNS), Lanes::load(w + COLUMNS + Lanes::count)};
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                if (plain(i)) add_plain(left[i], right[i], &tile.pairs[j][i], first, second);
                else add_twos(left[i], right[i], &tile.pairs[j][i], first, second);
        }
}

#endif

void multiply(int, const void *tile_memory, const void *panel_memory, int inner, bool first, float *sums) {
    const Tile &tile = *static_cast<const Tile *>(tile_memory);
    const Panel &panel = *static_cast<const Panel *>(panel_memory);
    Lanes left[ROWS], right[ROWS];
    add_products(tile, panel, inner, left, right);
    const Floats a = Floats::load(panel.scales), b = Floats::load(panel.scales + Lanes::count);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++, sums += COLUMNS) {
        add_scaled(left[i].floats(), a, tile.scales[i], first, sums);
        add_scaled(right[i].floats(), b, tile.scales[i], first, sums + Lanes::count);
    }
}

void store(const float *sums, float *y, size_t stride, int rows, int columns) {
    for (int i = 0; i < rows; i++, y += stride, sums += COLUMNS)
        if (columns == COLUMNS) memcpy(y, sums, COLUMNS * sizeof(float));  // constant size: two moves
        else memcpy(y, sums, columns * sizeof(float));
}

}  // namespace

extern const Kernel KERNEL(int16);
const Kernel KERNEL(int16) = {
    INSTRUCTIONS,
    available, supports, ROWS, COLUMNS, INNER, 64 / COLUMNS, (sizeof(Tile) + 63) / 64 * 64, sizeof(Panel),
    pack, unpack, multiply, store, nullptr, nullptr,
};

}  // namespace native
