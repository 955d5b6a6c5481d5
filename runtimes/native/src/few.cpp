// Products of one row, or few, with weights in Q4_0, Q4_K and Q6_K: decoding.
//
// Each row gets the same bits alone and among others, which guessing tokens relies on (runtimes/speculation.py). Reading the
// weights once is all there is to a single one, so what matters is to read them in their order (a thread that walked through
// four rows side by side took twice as long) and with few instructions per byte. Activations are rounded to 8 bits and a scale
// for 32 (Q4_0) or 256 (the others) of them, as llama.cpp does.
//
// Q4_0: four blocks at a time, two of them in a register, one in each half: their 16 low half-bytes, then their 16 high ones,
// each times 16 activations. Half-bytes are unsigned; the -8 of the format is added as -8 times the activations' sums.
// Q4_K: products of each group of 32 times its 6-bit scale add up in int32; minima meet the sums of the groups' activations.
// Q6_K: the same for groups of 16 and their 8-bit scales; the -32 of the format as the -8 of Q4_0.

#include <omp.h>

#include "kernels.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int AHEAD = 1024;  // bytes prefetched
constexpr int BLOCK = 18;    // bytes, of 32 weights
constexpr uint8_t NO_BLOCK[BLOCK] = {};

struct Pair {  // 64 activations: halves of a register belong to the first 32 and to the others
    int8_t low[2][16], high[2][16];
    int32_t offset[8];
};

struct Part128 {  // 128 activations, for Q4_0
    static constexpr int BLOCKS = 4;  // of 32 values
    Pair pairs[2];
    float scales[4];
};

struct Part256 {  // 256 activations, for Q4_K and Q6_K
    static constexpr int BLOCKS = 8;
    int8_t values[256];
    int16_t sums[8];     // of each 32
    int16_t halves[16];  // of each 16
    float scale;
};

inline __m256i products(const __m256i low, const __m256i high, const Pair &x) {  // in 16 bits at most 15 * 127 * 4
    const __m256i a = _mm256_maddubs_epi16(low, load256(x.low)), b = _mm256_maddubs_epi16(high, load256(x.high));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
}

// What activations are multiplied with to get bytes, and back, for `count` of them; 0 and NaN if one is not finite.
void find_scale(const float *x, int count, float &inverse, float &scale) {
    const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
    __m256i m = _mm256_setzero_si256();  // as integers, magnitudes of floats order like the floats, infinity and NaN last
    for (int i = 0; i < count; i += 8)
        m = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), sign_off));
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    const float magnitude = _mm_cvtss_f32(_mm_castsi128_ps(most));
    const bool finite = _mm_cvtsi128_si32(most) < 0x7f800000, some = finite && magnitude > 1e-30f;  // 127 / it is finite
    inverse = some ? 127 / magnitude : 0;
    scale = some ? magnitude / 127 : finite ? 0 : __builtin_nanf("");
}

inline __m256i bytes(const float *x, float inverse) {  // 32 of them
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
        q[i] = inverse != 0 ? v : _mm256_setzero_si256();
    }
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void take(const float *x, int blocks, Part128 &part) {  // up to 4 blocks; the others are zero
    part = {};
    for (int b = 0; b < blocks; b++) {
        Pair &pair = part.pairs[b / 2];
        float inverse;
        find_scale(x + 32 * b, 32, inverse, part.scales[b]);
        const __m256i both = bytes(x + 32 * b, inverse);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(pair.low[b % 2]), _mm256_castsi256_si128(both));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(pair.high[b % 2]), _mm256_extracti128_si256(both, 1));
    }
    const __m256i eight = _mm256_set1_epi8(8);
    for (Pair &pair : part.pairs) {
        const __m256i sums = products(eight, eight, pair);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(pair.offset), _mm256_sub_epi32(_mm256_setzero_si256(), sums));
    }
}

void take(const float *x, int, Part256 &part) {
    float inverse;
    find_scale(x, 256, inverse, part.scale);
    for (int j = 0; j < 8; j++) {
        const __m256i q = bytes(x + 32 * j, inverse);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(part.values + 32 * j), q);
        int sums[2] = {0, 0};
        for (int i = 0; i < 32; i++) sums[i / 16] += part.values[32 * j + i];
        for (int i = 0; i < 2; i++) part.halves[2 * j + i] = int16_t(sums[i]);
        part.sums[j] = int16_t(sums[0] + sums[1]);
    }
}

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

inline int bits(const void *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

inline float total(__m256 v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

// Each of these computes `R` rows of activations, `next` parts apart, with one row of weights: what is unpacked meets all
// of them, and each gets what it would get alone, operation by operation.

template <int R>
void rows(const char *row, const Part128 *x, int next, int blocks, float *out) {
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), second = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    const __m256i mask = _mm256_set1_epi8(15);
    __m256 left[R], right[R];
    for (int r = 0; r < R; r++) left[r] = right[r] = _mm256_setzero_ps();
    const auto two = [&](const char *a, const char *b) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(a + 2)), load128(b + 2), 1);
    };
    const auto add = [](__m256i low, __m256i high, const Pair &pair, __m256 scales, __m256 sum) {
        const __m256i whole = _mm256_add_epi32(products(low, high, pair), load256(pair.offset));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scales, sum);
    };
    const auto four = [&](const char *a, const char *b, const char *c, const char *d) {
        __m128i halves = _mm_cvtsi32_si128(bits(a));
        halves = _mm_insert_epi16(halves, bits(b), 1);
        halves = _mm_insert_epi16(halves, bits(c), 2);
        halves = _mm_insert_epi16(halves, bits(d), 3);
        const __m128 weights = _mm_cvtph_ps(halves);
        const __m256i p = two(a, b), q = two(c, d);
        const __m256i p_low = _mm256_and_si256(p, mask), p_high = _mm256_and_si256(_mm256_srli_epi16(p, 4), mask);
        const __m256i q_low = _mm256_and_si256(q, mask), q_high = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Part128 &part = x[r * next];
            const __m256 scales = _mm256_castps128_ps256(_mm_mul_ps(weights, _mm_loadu_ps(part.scales)));
            left[r] = add(p_low, p_high, part.pairs[0], _mm256_permutevar8x32_ps(scales, first), left[r]);
            right[r] = add(q_low, q_high, part.pairs[1], _mm256_permutevar8x32_ps(scales, second), right[r]);
        }
    };
    for (; blocks >= 4; blocks -= 4, row += 4 * BLOCK, x++) {
        _mm_prefetch(row + AHEAD, _MM_HINT_T0);
        _mm_prefetch(row + AHEAD + 64, _MM_HINT_T0);
        four(row, row + BLOCK, row + 2 * BLOCK, row + 3 * BLOCK);
    }
    if (blocks) {
        const char *none = reinterpret_cast<const char *>(NO_BLOCK);
        four(row, blocks > 1 ? row + BLOCK : none, blocks > 2 ? row + 2 * BLOCK : none, none);
    }
    for (int r = 0; r < R; r++) out[r] = total(_mm256_add_ps(left[r], right[r]));
}

template <int R>
void rows_q4_k(const char *row, const Part256 *x, int next, int blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256 sum[R];
    __m128 minima[R];
    for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps(), minima[r] = _mm_setzero_ps();
    for (blocks /= 8; blocks > 0; blocks--, row += 144, x++) {
        for (int i = 0; i < 192; i += 64) _mm_prefetch(row + 2 * AHEAD + i, _MM_HINT_T0);
        uint32_t u[3];  // 8 scales and 8 minima of 6 bits: to 8 + 8 bytes
        memcpy(u, row + 4, 12);
        const int s0 = u[0] & 0x3f3f3f3f, s1 = (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4;
        const int m0 = u[1] & 0x3f3f3f3f, m1 = (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4;
        const __m256i both = _mm256_cvtepu8_epi16(_mm_setr_epi32(s0, s1, m0, m1));
        const __m256i scales = _mm256_broadcastsi128_si256(_mm256_castsi256_si128(both));
        const __m128i lowest = _mm256_extracti128_si256(both, 1);
        __m256i whole[R], at = _mm256_set1_epi16(0x0100);  // at: picks the scale of a group
        for (int r = 0; r < R; r++) whole[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            const __m256i q = load256(row + 16 + 16 * j);
            const __m256i a = _mm256_and_si256(q, low), b = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
            const __m256i next_at = _mm256_add_epi8(at, _mm256_set1_epi8(2));
            const __m256i a_scale = _mm256_shuffle_epi8(scales, at), b_scale = _mm256_shuffle_epi8(scales, next_at);
            at = _mm256_add_epi8(next_at, _mm256_set1_epi8(2));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const int8_t *values = x[r * next].values + 32 * j;
                add<R>(whole[r], a, values, a_scale);
                add<R>(whole[r], b, values + 32, b_scale);
            }
        }
        const float d = half(row), dmin = half(row + 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Part256 &part = x[r * next];
            const __m128i least = _mm_madd_epi16(lowest, load128(part.sums));
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[r]), _mm256_set1_ps(d * part.scale), sum[r]);
            minima[r] = _mm_fmadd_ps(_mm_cvtepi32_ps(least), _mm_set1_ps(dmin * part.scale), minima[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = total(_mm256_sub_ps(sum[r], _mm256_set_m128(_mm_setzero_ps(), minima[r])));
}

template <int R>
void rows_q6_k(const char *row, const Part256 *x, int next, int blocks, float *out) {
    const __m256i low = _mm256_set1_epi8(15), two = _mm256_set1_epi8(3);
    __m256 sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps();
    for (blocks /= 8; blocks > 0; blocks--, row += 210, x++) {
        for (int i = 0; i < 256; i += 64) _mm_prefetch(row + 2 * AHEAD + i, _MM_HINT_T0);
        const __m256i scales = _mm256_cvtepi8_epi16(load128(row + 192));  // of 16 groups of 16
        const __m256i halves[2] = {_mm256_permute4x64_epi64(scales, 0x44), _mm256_permute4x64_epi64(scales, 0xee)};
        __m256i whole[R];
        for (int r = 0; r < R; r++) {  // -32 in each value
            const __m256i sums = _mm256_slli_epi32(_mm256_madd_epi16(scales, load256(x[r * next].halves)), 5);
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
                const __m256i top = _mm256_and_si256(_mm256_srli_epi16(high, 2 * g), two);
                q = _mm256_or_si256(_mm256_and_si256(q, low), _mm256_slli_epi16(top, 4));
                const __m256i scale = _mm256_shuffle_epi8(halves[h], at);
                at = _mm256_add_epi8(at, _mm256_set1_epi8(4));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) add<R>(whole[r], q, x[r * next].values + 128 * h + 32 * g, scale);
            }
        }
        const float d = half(row + 208);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[r]), _mm256_set1_ps(d * x[r * next].scale), sum[r]);
    }
    for (int r = 0; r < R; r++) out[r] = total(sum[r]);
}

template <int R>
void rows(int, const char *row, const Part128 *x, int next, int blocks, float *out) {
    rows<R>(row, x, next, blocks, out);
}

template <int R>
void rows(int type, const char *row, const Part256 *x, int next, int blocks, float *out) {
    type == Q4_K ? rows_q4_k<R>(row, x, next, blocks, out) : rows_q6_k<R>(row, x, next, blocks, out);
}

template <class Part>
bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    constexpr int BLOCKS = Part::BLOCKS;
    const int blocks = p.inner / 32, parts = (blocks + BLOCKS - 1) / BLOCKS;
    Part *x = reinterpret_cast<Part *>(scratch.need(size_t(p.rows) * parts * sizeof(Part)));
    if (!x) return false;
    for (int m = 0; m < p.rows; m++)
        for (int b = 0; b < parts; b++) {
            const int there = blocks - BLOCKS * b < BLOCKS ? blocks - BLOCKS * b : BLOCKS;
            take(p.x + m * p.x_stride + b * BLOCKS * 32, there, x[m * parts + b]);
        }
#pragma omp parallel num_threads(threads)
    {
        const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t n = p.columns * id / all; n < p.columns * (id + 1) / all; n++)
            for (int m = 0; m < p.rows; m += 4) {  // from the fifth on the weights are in the first-level cache
                const char *row = p.w + n * p.w_stride;
                const Part *first = x + size_t(m) * parts;
                const int count = p.rows - m < 4 ? p.rows - m : 4;
                float y[4];
                if (count == 4) rows<4>(p.type, row, first, parts, blocks, y);
                else if (count == 3) rows<3>(p.type, row, first, parts, blocks, y);
                else if (count == 2) rows<2>(p.type, row, first, parts, blocks, y);
                else rows<1>(p.type, row, first, parts, blocks, y);
                for (int i = 0; i < count; i++) p.y[(m + i) * p.y_stride + n] = y[i];
            }
    }
    return true;
}

}  // namespace

bool multiplies_few(int type) { return type == Q4_0 || type == Q4_K || type == Q6_K; }

bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    return p.type == Q4_0 ? multiply_few<Part128>(p, threads, scratch) : multiply_few<Part256>(p, threads, scratch);
}

}  // namespace native
