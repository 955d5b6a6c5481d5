// Attention of one query, or few, in float32 with AVX2 or NEON: decoding.
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

// out[8] = query . key of eight keys
template <class T>
inline void score8(const float *query, const T *const keys[8], int width, float *out) {
    Eight s[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) s[c] = Eight::zero();
    for (int d = 0; d < width; d += 8) {
        const Eight q = Eight::load(query + d);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) s[c].add(q, Eight::load(keys[c] + d));
    }
    sums(s).store(out);
}

// out[8 * N] += sum over keys of weight * value
template <int N, class T>
inline void weigh(const float *weights, const T *const values[], int count, int column, float *out) {
    Eight s[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) s[c] = Eight::load(out + column + 8 * c);
    for (int i = 0; i < count; i++) {
        const T *value = values[i] + column;
#pragma GCC unroll 8
        for (int c = 0; c < N; c++) s[c].add(Eight::load(value + 8 * c), weights[i]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) s[c].store(out + column + 8 * c);
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
            for (int d = 0; d < 2 * a.width; d += 64) __builtin_prefetch(later + d, 0, 2);
        }
        if (queries == 1) return with(rows);
        const float *widened[GROUP];
        for (int i = 0; i < count; i++) {
            widened[i] = panel + i * a.width;
            for (int d = 0; d < a.width; d += 8) Eight::load(rows[i] + d).store(panel + i * a.width + d);
        }
        with(widened);
    }

    void take_queries() const {
        for (int i = 0; i < queries; i++) {
            const float *row = floats(a.q + head * a.q_head + size_t(first + i) * a.q_row);
            for (int d = 0; d < a.width; d += 8) (Eight::load(row + d) * Eight::same(a.scale)).store(q + i * a.width + d);
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
