// Attention with one query or a few, in float32 with AVX2 or NEON (decoding).
//
// Each query gets the same bits alone and among others, which speculative decoding relies on (runtimes/speculation.py): it is
// accumulated separately, in the order of the keys, and a masked key, wherever it is, adds nothing (runtimes/branches.py). A
// thread computes a head. Eight keys at a time are multiplied with a query, one accumulator each; then 16 to 64 columns of the
// values, key by key. Several queries share keys and values that were converted to float32. Of 32 keys all of which are masked
// for a query, which belong to other prompts, nothing is computed.

#include <omp.h>

#include <atomic>

#include "attention.h"

namespace native {
namespace {

constexpr int GROUP = 32;  // keys converted to float32 together

size_t up(size_t a, size_t b) { return (a + b - 1) / b; }

// out[8] = query . key of eight keys
template <class Row>
inline void score8(const float *query, const Row keys[8], int width, float *out) {
    Float8 s[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) s[c] = Float8::zero();
    for (int d = 0; d < width; d += 8) {
        const Float8 q = Float8::load(query + d);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) s[c].add(q, load(keys[c], d));
    }
    sums(s).store(out);
}

// out[8 * N] += sum over keys of weight * value
template <int N, class Row>
inline void weighted_sum(const float *weights, const Row values[], int count, int column, float *out) {
    Float8 s[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) s[c] = Float8::load(out + column + 8 * c);
    for (int i = 0; i < count; i++) {
#pragma GCC unroll 8
        for (int c = 0; c < N; c++) s[c].add(load(values[i], column + 8 * c), weights[i]);
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
    const uint32_t *const sees;  // for each GROUP of keys, a bit for each query
    const int head, first, queries, keys, stride;

    // Calls `with` with rows of keys or values from j on, if any query sees them: as cached for one query, float32 for more.
    template <class F>
    void rows(const char *base, size_t row_bytes, int j, int count, F with) const {
        if (a.eight_bits) rows_as<Blocks>(base, row_bytes, j, count, with);
        else rows_as<Halves>(base, row_bytes, j, count, with);
    }

    template <class Row, class F>
    void rows_as(const char *base, size_t row_bytes, int j, int count, F with) const {
        const uint32_t seen = sees[j / GROUP];
        if (!seen) return;
        Row rows[GROUP];
        for (int i = 0; i < count; i++) {
            rows[i] = {base + size_t(std::min(j + i, keys - 1)) * row_bytes};
            const char *later = base + size_t(std::min(j + count + i, keys - 1)) * row_bytes;
            for (int d = 0; d < 2 * a.width; d += 64) __builtin_prefetch(later + d, 0, 2);
        }
        if (!(seen & (seen - 1))) return with(rows);
        const float *widened[GROUP];
        for (int i = 0; i < count; i++) {
            widened[i] = panel + i * a.width;
            for (int d = 0; d < a.width; d += 8) load(rows[i], d).store(panel + i * a.width + d);
        }
        with(widened);
    }

    void load_queries() const {
        for (int i = 0; i < queries; i++) {
            const float *row = floats(a.q + head * a.q_head + size_t(first + i) * a.q_row);
            for (int d = 0; d < a.width; d += 8) (Float8::load(row + d) * Float8::broadcast(a.scale)).store(q + i * a.width + d);
        }
    }

    void score(int kv_head) const {
        for (int j = 0; j < keys; j += 8)
            rows(a.k + kv_head * a.k_head, a.k_row, j, 8, [&](const auto *key) {
                for (int i = 0; i < queries; i++)
                    if (sees[j / GROUP] >> i & 1) score8(q + i * a.width, key, a.width, scores + size_t(i) * stride + j);
            });
    }

    void weighted_sums(int kv_head) const {
        std::fill(out, out + queries * a.width, 0.0f);
        for (int j = 0; j < keys; j += GROUP) {
            const int count = std::min(GROUP, keys - j);
            rows(a.v + kv_head * a.v_head, a.v_row, j, count, [&](const auto *value) {
                for (int i = 0; i < queries; i++) {
                    if (!(sees[j / GROUP] >> i & 1)) continue;
                    const float *weights = scores + size_t(i) * stride + j;
                    float *row = out + i * a.width;
                    int d = 0;
                    for (; d + 64 <= a.width; d += 64) weighted_sum<8>(weights, value, count, d, row);
                    for (; d < a.width; d += 16) weighted_sum<2>(weights, value, count, d, row);
                }
            });
        }
    }

    void compute() const {
        const int kv_head = head / (a.heads / a.kv_heads);
        float inverse[MAX_FEW];
        load_queries();
        score(kv_head);
        for (int i = 0; i < queries; i++)
            inverse[i] = softmax(query_mask(a, first + i), scores + size_t(i) * stride, (keys + 7) / 8 * 8, keys);
        weighted_sums(kv_head);
        for (int i = 0; i < queries; i++) {
            float *row = reinterpret_cast<float *>(a.out + size_t(first + i) * a.out_row + head * a.out_head);
            for (int d = 0; d < a.width; d++) row[d] = inverse[i] ? out[i * a.width + d] * inverse[i] : 0;
        }
    }
};

}  // namespace

bool attend_few(const Attention &a, int threads, Scratch &scratch) {
    const int stride = (a.keys + 7) / 8 * 8;
    const int run = std::min(std::max(SCORES / stride, 1), std::min(a.queries, MAX_FEW));
    const size_t q = size_t(run) * a.width, panel = size_t(GROUP) * a.width, scores = size_t(run) * stride;
    const size_t per_thread = ((2 * q + panel + scores) * sizeof(float) + 63) / 64 * 64;
    char *memory = scratch.reserve(threads * per_thread + up(stride, GROUP) * sizeof(uint32_t));
    if (!memory) return false;
    uint32_t *const sees = reinterpret_cast<uint32_t *>(memory + threads * per_thread);
    for (int first = 0; first < a.queries; first += run) {
        const int queries = std::min(run, a.queries - first), keys = visible_keys(a, first, queries);
        for (int j = 0; j < keys; j += GROUP) {
            uint32_t &seen = sees[j / GROUP] = 0;
            for (int i = 0; i < queries; i++)
                seen |= uint32_t(any_visible(query_mask(a, first + i) + j, std::min(GROUP, keys - j))) << i;
        }
        std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
        {
            float *buffer = reinterpret_cast<float *>(memory + omp_get_thread_num() * per_thread);
            for (int head; (head = next.fetch_add(1)) < a.heads;)
                Head{a, buffer, buffer + q, buffer + 2 * q, buffer + 2 * q + panel, sees, head, first, queries, keys, stride}
                    .compute();
        }
    }
    return true;
}

}  // namespace native
