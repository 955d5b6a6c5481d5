// Products of one row, or few, with Q4_0 weights: decoding. (llama.cpp is as fast on plain Q4_K as on re-ordered.)
//
// Each row gets the same bits alone and among others, which guessing tokens relies on (runtimes/speculation.py). Reading the
// weights once is all there is to a single one, so what matters is few instructions per byte. Two rows of weights share a
// register, one in each half: 16 low half-bytes of both, 16 high ones of both, each times the same 16 activations. Those
// are rounded to 8 bits and a scale for each 32, as llama.cpp does. Half-bytes are unsigned, and the -8 of the format is
// added as -8 times the activations' sums.

#include <omp.h>

#include <initializer_list>

#include "kernels.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int AHEAD = 1024;  // bytes prefetched
constexpr int BLOCK = 18;    // bytes

struct Part {  // 32 activations, everything twice
    int8_t low[32], high[32];
    int32_t offset[8];
    float scale[8];
};

inline __m256i products(const __m256i low, const __m256i high, const Part &x) {  // in 16 bits at most 15 * 127 * 4
    const __m256i a = _mm256_maddubs_epi16(low, load256(x.low)), b = _mm256_maddubs_epi16(high, load256(x.high));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
}

void take(const float *x, Part &part) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + 8 * i);
    // As integers, magnitudes of floats order like the floats, infinity and NaN last.
    __m256i m = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) m = _mm256_max_epi32(m, _mm256_castps_si256(_mm256_andnot_ps(sign, v[i])));
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    const float magnitude = _mm_cvtss_f32(_mm_castsi128_ps(most));
    const bool finite = _mm_cvtsi128_si32(most) < 0x7f800000, some = finite && magnitude > 1e-30f;  // 127 / it is finite
    const __m256 inverse = _mm256_set1_ps(some ? 127 / magnitude : 0);
    __m256i q[4];
    for (int i = 0; i < 4; i++)
        q[i] = some ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse)) : _mm256_setzero_si256();
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(part.low), _mm256_permute2x128_si256(bytes, bytes, 0x00));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(part.high), _mm256_permute2x128_si256(bytes, bytes, 0x11));
    const __m256i eight = _mm256_set1_epi8(8), sums = products(eight, eight, part);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(part.offset), _mm256_sub_epi32(_mm256_setzero_si256(), sums));
    _mm256_storeu_ps(part.scale, _mm256_set1_ps(some ? magnitude / 127 : finite ? 0 : __builtin_nanf("")));
}

inline __m256 add(const char *a, const char *b, const Part &x, __m256 scales, __m256 sum) {
    const __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(a + 2)), load128(b + 2), 1);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i p = products(_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16(q, 4), mask), x);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(p, load256(x.offset))), scales, sum);
}

inline int bits(const char *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

inline float total(__m128 m) {
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

void four_rows(const char *w, size_t stride, const Part *x, int parts, float *y) {
    const char *a = w, *b = w + stride, *c = w + 2 * stride, *d = w + 3 * stride;
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), second = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    __m256 ab = _mm256_setzero_ps(), cd = ab;
    for (int i = 0; i < parts; i++, a += BLOCK, b += BLOCK, c += BLOCK, d += BLOCK) {
        for (const char *p : {a, b, c, d}) _mm_prefetch(p + AHEAD, _MM_HINT_T0);
        __m128i halves = _mm_cvtsi32_si128(bits(a));
        halves = _mm_insert_epi16(halves, bits(b), 1);
        halves = _mm_insert_epi16(halves, bits(c), 2);
        halves = _mm_insert_epi16(halves, bits(d), 3);
        const __m256 scales = _mm256_mul_ps(_mm256_castps128_ps256(_mm_cvtph_ps(halves)), _mm256_loadu_ps(x[i].scale));
        ab = add(a, b, x[i], _mm256_permutevar8x32_ps(scales, first), ab);
        cd = add(c, d, x[i], _mm256_permutevar8x32_ps(scales, second), cd);
    }
    y[0] = total(_mm256_castps256_ps128(ab)), y[1] = total(_mm256_extractf128_ps(ab, 1));
    y[2] = total(_mm256_castps256_ps128(cd)), y[3] = total(_mm256_extractf128_ps(cd, 1));
}

}  // namespace

bool multiplies_few(int type) { return type == Q4_0; }

bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    const int parts = p.inner / 32;
    Part *x = reinterpret_cast<Part *>(scratch.need(size_t(p.rows) * parts * sizeof(Part)));
    if (!x) return false;
    for (int m = 0; m < p.rows; m++)
        for (int b = 0; b < parts; b++) take(p.x + m * p.x_stride + b * 32, x[m * parts + b]);
#pragma omp parallel num_threads(threads)
    {
        const int64_t fours = p.columns / 4, id = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t n = fours * id / all * 4; n < fours * (id + 1) / all * 4; n += 4)
            for (int m = 0; m < p.rows; m++)  // from the second on the weights are in the first-level cache
                four_rows(p.w + n * p.w_stride, p.w_stride, x + m * parts, parts, p.y + m * p.y_stride + n);
        if (id == all - 1)  // up to three last ones, each as if it were four
            for (int64_t n = fours * 4; n < p.columns; n++)
                for (int m = 0; m < p.rows; m++) {
                    float same[4];
                    four_rows(p.w + n * p.w_stride, 0, x + m * parts, parts, same);
                    p.y[m * p.y_stride + n] = same[0];
                }
    }
    return true;
}

}  // namespace native
