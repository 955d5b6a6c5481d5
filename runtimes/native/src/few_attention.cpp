// Attention of one query, or few, in float32 with AVX2: decoding.
//
// Each query gets the same bits alone and among others, which guessing tokens relies on (runtimes/speculation.py): its sums
// are its own, in the order of the keys, and a hidden key, wherever it lies, adds nothing (runtimes/branches.py). A thread
// takes a head. Eight keys at a time meet a query, a sum in a register for each; then sixteen to sixty-four columns of the
// values, key after key. Several queries share what was widened to float32.

#include <omp.h>

#include <atomic>

#include "attention.h"

namespace native {
namespace {

constexpr int GROUP = 32;  // keys widened together

inline __m256 wide(const float *p) { return _mm256_load_ps(p); }
inline __m256 wide(const uint16_t *p) { return _mm256_cvtph_ps(load128(p)); }

// out[8] = query . key of eight keys
template <class T>
inline void score8(const float *query, const T *const keys[8], int width, float *out) {
    __m256 s[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) s[c] = _mm256_setzero_ps();
    for (int d = 0; d < width; d += 8) {
        const __m256 q = _mm256_load_ps(query + d);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) s[c] = _mm256_fmadd_ps(q, wide(keys[c] + d), s[c]);
    }
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}

// out[8 * N] += sum over keys of weight * value
template <int N, class T>
inline void weigh(const float *weights, const T *const values[], int count, int column, float *out) {
    __m256 s[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) s[c] = _mm256_load_ps(out + column + 8 * c);
    for (int i = 0; i < count; i++) {
        const __m256 w = _mm256_broadcast_ss(weights + i);
        const T *value = values[i] + column;
#pragma GCC unroll 8
        for (int c = 0; c < N; c++) s[c] = _mm256_fmadd_ps(w, wide(value + 8 * c), s[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) _mm256_store_ps(out + column + 8 * c, s[c]);
}

struct Head {
    const Attention &a;
    float *const q;       // [queries][width], scaled
    float *const out;     // [queries][width]
    float *const panel;   // keys or values [GROUP][width]
    float *const scores;  // [queries][stride]
    const int head, first, queries, keys, stride;

    // Calls `with` with rows of keys or values from j on: as they are for one query, widened for more.
    template <class F>
    void rows(const char *base, size_t row_bytes, int j, int count, F with) const {
        const uint16_t *rows[GROUP];
        for (int i = 0; i < count; i++) {
            rows[i] = halves(base + size_t(std::min(j + i, keys - 1)) * row_bytes);
            const char *later = base + size_t(std::min(j + count + i, keys - 1)) * row_bytes;
            for (int d = 0; d < 2 * a.width; d += 64) _mm_prefetch(later + d, _MM_HINT_T1);
        }
        if (queries == 1) return with(rows);
        const float *widened[GROUP];
        for (int i = 0; i < count; i++) {
            widened[i] = panel + i * a.width;
            for (int d = 0; d < a.width; d += 8) _mm256_store_ps(panel + i * a.width + d, wide(rows[i] + d));
        }
        with(widened);
    }

    void take_queries() const {
        const __m256 scale = _mm256_set1_ps(a.scale);
        for (int i = 0; i < queries; i++) {
            const float *row = reinterpret_cast<const float *>(a.q + head * a.q_head + size_t(first + i) * a.q_row);
            for (int d = 0; d < a.width; d += 8)
                _mm256_store_ps(q + i * a.width + d, _mm256_mul_ps(scale, _mm256_loadu_ps(row + d)));
        }
    }

    void score(int shared) const {
        for (int j = 0; j < keys; j += 8)
            rows(a.k + shared * a.k_head, a.k_row, j, 8, [&](const auto *key) {
                for (int i = 0; i < queries; i++) score8(q + i * a.width, key, a.width, scores + size_t(i) * stride + j);
            });
    }

    void weigh_all(int shared) const {
        std::fill(out, out + queries * a.width, 0.0f);
        for (int j = 0; j < keys; j += GROUP) {
            const int count = std::min(GROUP, keys - j);
            rows(a.v + shared * a.v_head, a.v_row, j, count, [&](const auto *value) {
                for (int i = 0; i < queries; i++) {
                    const float *weights = scores + size_t(i) * stride + j;
                    float *row = out + i * a.width;
                    int d = 0;
                    for (; d + 64 <= a.width; d += 64) weigh<8>(weights, value, count, d, row);
                    for (; d < a.width; d += 16) weigh<2>(weights, value, count, d, row);
                }
            });
        }
    }

    void compute() const {
        const int shared = head / (a.heads / a.shared_heads);
        float inverse[FEW];
        take_queries();
        score(shared);
        for (int i = 0; i < queries; i++)
            inverse[i] = soften(mask_of(a, first + i), scores + size_t(i) * stride, (keys + 7) / 8 * 8, keys);
        weigh_all(shared);
        for (int i = 0; i < queries; i++) {
            float *row = reinterpret_cast<float *>(a.out + size_t(first + i) * a.out_row + head * a.out_head);
            for (int d = 0; d < a.width; d++) row[d] = inverse[i] ? out[i * a.width + d] * inverse[i] : 0;
        }
    }
};

}  // namespace

bool attend_few(const Attention &a, int threads, Scratch &scratch) {
    const int stride = (a.keys + 7) / 8 * 8;
    const int run = std::min(std::max(SCORES / stride, 1), std::min(a.queries, FEW));
    const size_t q = size_t(run) * a.width, panel = size_t(GROUP) * a.width, scores = size_t(run) * stride;
    const size_t own = ((2 * q + panel + scores) * sizeof(float) + 63) / 64 * 64;
    char *memory = scratch.need(threads * own);
    if (!memory) return false;
    for (int first = 0; first < a.queries; first += run) {
        const int queries = std::min(run, a.queries - first), keys = visible(a, first, queries);
        std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
        {
            float *mine = reinterpret_cast<float *>(memory + omp_get_thread_num() * own);
            for (int head; (head = next.fetch_add(1)) < a.heads;)
                Head{a, mine, mine + q, mine + 2 * q, mine + 2 * q + panel, head, first, queries, keys, stride}.compute();
        }
    }
    return true;
}

}  // namespace native
