// Attention of many queries at once, in float32 with AVX2.
//
// A thread takes one head and a run of queries, few enough that their scores against all keys stay in the second-level
// cache: softmax then needs no second thought about maxima. Both products are tiles of 6 queries x 16 keys or values,
// twelve sums in registers. Keys are turned into panels [width][16] and values into panels [256 keys][16], float32, 8 to 16
// KB each, and used by all queries of the run. Keys behind the last visible one of a run are not looked at: half of the
// work where the mask is causal.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels.h"
#include "unpack.h"

namespace native {
namespace {

constexpr int ROWS = 6, COLUMNS = 16;
constexpr int KEYS = 256;                // of a panel of values
constexpr int SCORES = 96 << 10;         // floats: 384 KB
constexpr int MAX_QUERIES = 16 * ROWS, MAX_WIDTH = 256;

// c[6][16] (+)= a[6][count] * b[count][16]; rows of a and c are `a_row` and `c_row` floats apart
template <bool Add>
inline void tile(const float *a, size_t a_row, const float *b, int count, float *c, size_t c_row) {
    __m256 left[ROWS], right[ROWS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        left[i] = Add ? _mm256_loadu_ps(c + i * c_row) : _mm256_setzero_ps();
        right[i] = Add ? _mm256_loadu_ps(c + i * c_row + 8) : _mm256_setzero_ps();
    }
    for (int k = 0; k < count; k++, b += COLUMNS) {
        const __m256 x = _mm256_load_ps(b), y = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const __m256 v = _mm256_broadcast_ss(a + i * a_row + k);
            left[i] = _mm256_fmadd_ps(v, x, left[i]);
            right[i] = _mm256_fmadd_ps(v, y, right[i]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        _mm256_storeu_ps(c + i * c_row, left[i]);
        _mm256_storeu_ps(c + i * c_row + 8, right[i]);
    }
}

// e^x for x <= 0, relative error below 2e-7; 0 below -87. Cephes' polynomial.
inline __m256 exponential(__m256 x) {
    const __m256 none = _mm256_cmp_ps(x, _mm256_set1_ps(-87), _CMP_LT_OQ);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(none, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

inline float largest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline float sum(__m256 v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

inline const uint16_t *halves(const char *p) { return reinterpret_cast<const uint16_t *>(p); }

inline __m256 half8(const uint16_t *p, int there) {
    if (there >= 8) return _mm256_cvtph_ps(load128(p));
    uint16_t padded[8] = {};
    for (int i = 0; i < there; i++) padded[i] = p[i];
    return _mm256_cvtph_ps(load128(padded));
}

// What one thread needs for one run of queries.
struct Run {
    const Attention &a;
    float *const q;       // [queries][width], scaled
    float *const scores;  // [queries][stride]
    float *const out;     // [queries][width]
    float *const panel;   // keys [width][16], or values [256][16]
    const int stride;

    // First key behind all that queries from `first` on may see, as a multiple of 16.
    int visible(int first, int queries) const {
        for (int end = a.keys; end > 0; end--)
            for (int i = 0; i < queries; i++)
                if (halves(a.mask + (first + i) * a.mask_row)[end - 1] != 0xfc00) return (end + 15) / 16 * 16;
        return 0;
    }

    void take_queries(int head, int first, int queries, int padded) const {
        const __m256 scale = _mm256_set1_ps(a.scale);
        for (int i = 0; i < padded; i++) {
            const char *row = a.q + head * a.q_head + size_t(first + std::min(i, queries - 1)) * a.q_row;
            for (int d = 0; d < a.width; d += 8)
                _mm256_storeu_ps(q + i * a.width + d,
                                 _mm256_mul_ps(scale, _mm256_loadu_ps(reinterpret_cast<const float *>(row) + d)));
        }
    }

    void score(int shared, int keys, int padded) const {
        for (int j = 0; j < keys; j += COLUMNS) {
            for (int c = 0; c < COLUMNS; c++) {
                alignas(32) float key[MAX_WIDTH];
                const bool there = j + c < a.keys;
                const uint16_t *row = halves(a.k + shared * a.k_head + size_t(j + c) * a.k_row);
                for (int d = 0; d < a.width; d += 8)
                    _mm256_store_ps(key + d, there ? _mm256_cvtph_ps(load128(row + d)) : _mm256_setzero_ps());
                for (int d = 0; d < a.width; d++) panel[d * COLUMNS + c] = key[d];
            }
            for (int i = 0; i < padded; i += ROWS)
                tile<false>(q + i * a.width, a.width, panel, a.width, scores + size_t(i) * stride + j, stride);
        }
    }

    // Scores -> e^(score + mask - maximum); returns one over their sum.
    float soften(const char *mask_row, float *row, int keys) const {
        const uint16_t *mask = halves(mask_row);
        __m256 most = _mm256_set1_ps(-INFINITY), lost = _mm256_setzero_ps();  // lost: NaN, which maxima do not show
        for (int j = 0; j < keys; j += 8) {
            const int there = a.keys - j;
            __m256 s = _mm256_add_ps(_mm256_loadu_ps(row + j), half8(mask + j, there));
            if (there < 8) {
                const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                const __m256 in = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(there), lane));
                s = _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), s, in);
            }
            _mm256_storeu_ps(row + j, s);
            most = _mm256_max_ps(s, most);
            lost = _mm256_or_ps(lost, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
        }
        const float maximum = largest(most);
        const bool nan = _mm256_movemask_ps(lost);
        if (nan || maximum == -INFINITY) {  // the latter: no key is visible
            std::fill(row, row + keys, 0.0f);
            return nan ? NAN : 0;
        }
        __m256 total = _mm256_setzero_ps();
        for (int j = 0; j < keys; j += 8) {
            const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(row + j), _mm256_set1_ps(maximum)));
            _mm256_storeu_ps(row + j, e);
            total = _mm256_add_ps(total, e);
        }
        return 1 / sum(total);
    }

    void weigh(int shared, int keys, int padded) const {
        for (int d = 0; d < a.width; d += COLUMNS)
            for (int j = 0; j < keys; j += KEYS) {
                const int count = std::min(KEYS, keys - j);
                for (int i = 0; i < count; i++) {
                    const bool there = j + i < a.keys;
                    const uint16_t *row = halves(a.v + shared * a.v_head + size_t(j + i) * a.v_row) + d;
                    for (int c = 0; c < COLUMNS; c += 8)
                        _mm256_store_ps(panel + i * COLUMNS + c,
                                        there ? _mm256_cvtph_ps(load128(row + c)) : _mm256_setzero_ps());
                }
                for (int i = 0; i < padded; i += ROWS) {
                    const float *weights = scores + size_t(i) * stride + j;
                    float *c = out + i * a.width + d;
                    if (j) tile<true>(weights, stride, panel, count, c, a.width);
                    else tile<false>(weights, stride, panel, count, c, a.width);
                }
            }
    }

    void compute(int head, int first, int queries) const {
        const int shared = head / (a.heads / a.shared_heads), padded = (queries + ROWS - 1) / ROWS * ROWS;
        const int keys = visible(first, queries);
        float inverse[MAX_QUERIES];
        take_queries(head, first, queries, padded);
        score(shared, keys, padded);
        for (int i = 0; i < padded; i++)
            inverse[i] = soften(a.mask + (first + std::min(i, queries - 1)) * a.mask_row, scores + size_t(i) * stride, keys);
        if (keys) weigh(shared, keys, padded);
        for (int i = 0; i < queries; i++) {
            float *row = reinterpret_cast<float *>(a.out + size_t(first + i) * a.out_row + head * a.out_head);
            for (int d = 0; d < a.width; d++) row[d] = keys && inverse[i] ? out[i * a.width + d] * inverse[i] : 0;
        }
    }
};

}  // namespace

bool attends(int width) { return width % COLUMNS == 0 && width <= MAX_WIDTH; }

bool attend(const Attention &a, int threads, Scratch &scratch) {
    const int stride = (a.keys + 15) / 16 * 16;
    const int run = std::clamp(SCORES / stride / ROWS * ROWS, ROWS, MAX_QUERIES);
    const int runs = (a.queries + run - 1) / run;
    const size_t q = size_t(run) * a.width, scores = size_t(run) * stride, panel = COLUMNS * std::max(KEYS, a.width);
    const size_t own = ((2 * q + scores + panel) * sizeof(float) + 63) / 64 * 64;
    char *memory = scratch.need(threads * own);
    if (!memory) return false;
    std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
    {
        float *mine = reinterpret_cast<float *>(memory + omp_get_thread_num() * own);
        const Run work{a, mine + panel, mine + panel + 2 * q, mine + panel + q, mine, stride};
        // The last queries see the most: they come first.
        for (int i; (i = next.fetch_add(1)) < runs * a.heads;) {
            const int first = (runs - 1 - i / a.heads) * run;
            work.compute(i % a.heads, first, std::min(run, a.queries - first));
        }
    }
    return true;
}

}  // namespace native
