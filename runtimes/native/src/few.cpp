// Products of one row, or few, with weights in Q4_0 and Q4_K: decoding.
//
// Each row gets the same bits alone and among others, which guessing tokens relies on (runtimes/speculation.py). Reading the
// weights once is all there is to a single one, so what matters is to read them in their order (a thread that walked through
// four rows side by side took twice as long) and with few instructions per byte. Activations are rounded to 8 bits and a scale
// for 32 (Q4_0) or 256 (Q4_K) of them, as llama.cpp does.
//
// Q4_0: four blocks at a time, two of them in a register, one in each half: their 16 low half-bytes, then their 16 high ones,
// each times 16 activations. Half-bytes are unsigned; the -8 of the format is added as -8 times the activations' sums.
// Q4_K: products of each group of 32 times its 6-bit scale add up in int32; minima meet the sums of the groups' activations.

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

struct Part256 {  // 256 activations, for Q4_K
    static constexpr int BLOCKS = 8;
    int8_t values[256];
    int16_t sums[8];  // of each 32
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
        int sum = 0;
        for (int i = 0; i < 32; i++) sum += part.values[32 * j + i];
        part.sums[j] = int16_t(sum);
    }
}

inline __m256 add(const void *a, const void *b, const Pair &x, __m256 scales, __m256 sum) {
    const __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(a)), load128(b), 1);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i p = products(_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16(q, 4), mask), x);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(p, load256(x.offset))), scales, sum);
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

float one(const char *row, const Part128 *x, int blocks) {
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), second = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    __m256 left = _mm256_setzero_ps(), right = left;
    const auto four = [&](const char *a, const char *b, const char *c, const char *d) {
        __m128i halves = _mm_cvtsi32_si128(bits(a));
        halves = _mm_insert_epi16(halves, bits(b), 1);
        halves = _mm_insert_epi16(halves, bits(c), 2);
        halves = _mm_insert_epi16(halves, bits(d), 3);
        const __m256 scales = _mm256_castps128_ps256(_mm_mul_ps(_mm_cvtph_ps(halves), _mm_loadu_ps(x->scales)));
        left = add(a + 2, b + 2, x->pairs[0], _mm256_permutevar8x32_ps(scales, first), left);
        right = add(c + 2, d + 2, x->pairs[1], _mm256_permutevar8x32_ps(scales, second), right);
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
    return total(_mm256_add_ps(left, right));
}

float one(const char *row, const Part256 *x, int blocks) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256 sum = _mm256_setzero_ps();
    __m128 minima = _mm_setzero_ps();
    for (blocks /= 8; blocks > 0; blocks--, row += 144, x++) {
        for (int i = 0; i < 192; i += 64) _mm_prefetch(row + 2 * AHEAD + i, _MM_HINT_T0);
        uint32_t u[3];  // 8 scales and 8 minima of 6 bits: to 8 + 8 bytes
        memcpy(u, row + 4, 12);
        const int s0 = u[0] & 0x3f3f3f3f, s1 = (u[2] & 0x0f0f0f0f) | (u[0] >> 6 & 0x03030303) << 4;
        const int m0 = u[1] & 0x3f3f3f3f, m1 = (u[2] >> 4 & 0x0f0f0f0f) | (u[1] >> 6 & 0x03030303) << 4;
        const __m256i both = _mm256_cvtepu8_epi16(_mm_setr_epi32(s0, s1, m0, m1));
        const __m256i scales = _mm256_broadcastsi128_si256(_mm256_castsi256_si128(both));
        const __m128i low_parts = _mm_madd_epi16(_mm256_extracti128_si256(both, 1), load128(x->sums));
        __m256i whole = _mm256_setzero_si256(), at = _mm256_set1_epi16(0x0100);  // at: picks the scale of a group
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) {
            const __m256i q = load256(row + 16 + 16 * j);
            const __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(q, low), load256(x->values + 32 * j));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
            const __m256i b = _mm256_maddubs_epi16(high, load256(x->values + 32 * j + 32));
            const __m256i next = _mm256_add_epi8(at, _mm256_set1_epi8(2));
            whole = _mm256_add_epi32(whole, _mm256_madd_epi16(a, _mm256_shuffle_epi8(scales, at)));
            whole = _mm256_add_epi32(whole, _mm256_madd_epi16(b, _mm256_shuffle_epi8(scales, next)));
            at = _mm256_add_epi8(next, _mm256_set1_epi8(2));
        }
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(half(row) * x->scale), sum);
        minima = _mm_fmadd_ps(_mm_cvtepi32_ps(low_parts), _mm_set1_ps(half(row + 2) * x->scale), minima);
    }
    return total(_mm256_sub_ps(sum, _mm256_set_m128(_mm_setzero_ps(), minima)));
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
            for (int m = 0; m < p.rows; m++)  // from the second on the weights are in the first-level cache
                p.y[m * p.y_stride + n] = one(p.w + n * p.w_stride, x + m * parts, blocks);
    }
    return true;
}

}  // namespace

bool multiplies_few(int type) { return type == Q4_0 || type == Q4_K; }

bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    return p.type == Q4_0 ? multiply_few<Part128>(p, threads, scratch) : multiply_few<Part256>(p, threads, scratch);
}

}  // namespace native
