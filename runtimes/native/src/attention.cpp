// Attention with many queries, in float32, with AVX2, AVX-512 or NEON. The first two give the same bits, because each lane
// accumulates its own key, and then its own element of a value.
//
// A thread computes one head and a run of queries, few enough that with up to 8,192 keys all their scores fit the L2 cache, so
// that no online softmax is needed. Both products use tiles of 6 queries x 16 keys or values, or of 12 x 32: 12 accumulators in
// registers, or 24. Keys are transposed into panels [width][16 or 32] and values packed into panels [128 keys][16 or 32],
// float32, 8 or 16 KB each for heads of width 128, and reused by all queries of the run. Panels of keys that no query of a run
// may attend to are left out, which changes no bit: half of the work with a causal mask, and all of it on other prompts in the
// KV cache (runtimes/branches.py).

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "attention.h"
#include "processor.h"
#ifdef __AVX512VNNI__
#include "lanes.h"
#endif

namespace native {
namespace {

#ifdef __AVX512VNNI__
constexpr int COLUMNS = 32, ROWS = 12;
#else
using Floats = Float8;
constexpr int COLUMNS = 16, ROWS = 6;
#endif
constexpr int KEYS = 128;  // keys in a panel of values
constexpr int MAX_QUERIES = 96, MAX_WIDTH = 256;

// c[ROWS][COLUMNS] (+)= a[ROWS][count] * b[count][COLUMNS]; rows of a and c are `a_row` and `c_row` floats apart
template <bool Add>
inline void tile(const float *a, size_t a_row, const float *b, int count, float *c, size_t c_row) {
    Floats left[ROWS], right[ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        left[i] = Add ? Floats::load(c + i * c_row) : Floats::zero();
        right[i] = Add ? Floats::load(c + i * c_row + COLUMNS / 2) : Floats::zero();
    }
    for (int k = 0; k < count; k++, b += COLUMNS) {
        const Floats x = Floats::load(b), y = Floats::load(b + COLUMNS / 2);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const float v = a[i * a_row + k];
            left[i].add(x, v), right[i].add(y, v);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        left[i].store(c + i * c_row);
        right[i].store(c + i * c_row + COLUMNS / 2);
    }
}

// Buffers of one thread for one run of queries.
struct Run {
    const Attention &a;
    float *const q;       // [queries][width], scaled
    float *const scores;  // [queries][stride]
    float *const out;     // [queries][width]
    float *const panel;   // keys [width][COLUMNS], or values [width / COLUMNS][KEYS][COLUMNS]
    int *const places;    // first key of each panel of keys that is not left out
    uint16_t *const mask; // [stride], a query's for these panels
    const int stride;

    // Find the panels for a run; returns their number.
    int place(int first, int queries, int visible) const {
        int count = 0;
        for (int j = 0; j < visible; j += COLUMNS)
            for (int i = 0; i < queries; i++)
                if (any_visible(query_mask(a, first + i) + j, std::min(COLUMNS, visible - j))) {
                    places[count++] = j;
                    break;
                }
        return count;
    }

    // Eight values of a key or value
    Float8 cached(const char *row, int d) const { return a.eight_bits ? load(Blocks{row}, d) : load(Halves{row}, d); }

    int key(int j) const { return places[j / COLUMNS] + j % COLUMNS; }

    void load_queries(int head, int first, int queries, int padded) const {
        for (int i = 0; i < padded; i++) {
            const char *row = a.q + head * a.q_head + size_t(first + std::min(i, queries - 1)) * a.q_row;
            for (int d = 0; d < a.width; d += 8)
                (Float8::load(floats(row) + d) * Float8::broadcast(a.scale)).store(q + i * a.width + d);
        }
    }

    // keys: of all panels
    void score(int kv_head, int keys, int visible, int padded) const {
        for (int j = 0; j < keys; j += COLUMNS) {
            Float8 rows[8];
            for (int c = 0; c < COLUMNS; c += 8)
                for (int d = 0; d < a.width; d += 8) {
                    for (int i = 0; i < 8; i++) {
                        const int k = key(j) + c + i;
                        rows[i] = k < visible ? cached(a.k + kv_head * a.k_head + size_t(k) * a.k_row, d) : Float8::zero();
                    }
                    transpose(rows, panel + d * COLUMNS + c, COLUMNS);
                }
            for (int i = 0; i < padded; i += ROWS)
                tile<false>(q + i * a.width, a.width, panel, a.width, scores + size_t(i) * stride + j, stride);
        }
    }

    void weighted_sum(int kv_head, int keys, int visible, int padded) const {
        for (int j = 0; j < keys; j += KEYS) {
            const int count = std::min(KEYS, keys - j);
            for (int i = 0; i < count; i++) {
                const int k = key(j + i);
                const char *row = a.v + kv_head * a.v_head + size_t(k) * a.v_row;
                for (int d = 0; d < a.width; d += 8) {
                    const Float8 part = k < visible ? cached(row, d) : Float8::zero();
                    part.store(panel + d / COLUMNS * KEYS * COLUMNS + i * COLUMNS + d % COLUMNS);
                }
            }
            for (int d = 0; d < a.width; d += COLUMNS)
                for (int i = 0; i < padded; i += ROWS) {
                    const float *weights = scores + size_t(i) * stride + j, *values = panel + d * KEYS;
                    float *c = out + i * a.width + d;
                    if (j) tile<true>(weights, stride, values, count, c, a.width);
                    else tile<false>(weights, stride, values, count, c, a.width);
                }
        }
    }

    float weigh(int query, float *row, int keys, int visible) const {
        for (int j = 0; j < keys; j += COLUMNS) {
            const int count = std::min(COLUMNS, visible - key(j));
            memcpy(mask + j, query_mask(a, query) + key(j), count * sizeof *mask);
            std::fill(mask + j + count, mask + j + COLUMNS, 0xfc00);
        }
        return softmax(mask, row, keys, keys);
    }

    void compute(int head, int first, int queries, int visible, int panels) const {
        const int kv_head = head / (a.heads / a.kv_heads), padded = (queries + ROWS - 1) / ROWS * ROWS;
        const int keys = panels * COLUMNS;
        float inverse[MAX_QUERIES];
        load_queries(head, first, queries, padded);
        score(kv_head, keys, visible, padded);
        for (int i = 0; i < padded; i++)
            inverse[i] = weigh(first + std::min(i, queries - 1), scores + size_t(i) * stride, keys, visible);
        if (keys) weighted_sum(kv_head, keys, visible, padded);
        for (int i = 0; i < queries; i++) {
            float *row = reinterpret_cast<float *>(a.out + size_t(first + i) * a.out_row + head * a.out_head);
            for (int d = 0; d < a.width; d += 8) {
                const Float8 value = Float8::load(out + i * a.width + d) * Float8::broadcast(inverse[i]);
                (inverse[i] ? value : Float8::zero()).store(row + d);
            }
        }
    }
};

bool supports(int width) { return width % COLUMNS == 0 && width <= MAX_WIDTH; }

bool attend_many(const Attention &a, int threads, Scratch &scratch) {
    const int stride = (a.keys + COLUMNS - 1) / COLUMNS * COLUMNS;
    const int run = std::clamp(SCORES / stride / ROWS * ROWS, ROWS, MAX_QUERIES);
    const int runs = (a.queries + run - 1) / run;
    const size_t q = size_t(run) * a.width, scores = size_t(run) * stride, panel = size_t(KEYS) * a.width;
    const size_t lists = stride / COLUMNS * sizeof(int) + stride * sizeof(uint16_t);
    const size_t per_thread = ((2 * q + scores + panel) * sizeof(float) + lists + 63) / 64 * 64;
    char *memory = scratch.reserve(threads * per_thread);
    if (!memory) return false;
    std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
    {
        float *buffer = reinterpret_cast<float *>(memory + omp_get_thread_num() * per_thread);
        float *const all_scores = buffer + panel + 2 * q;
        int *const places = reinterpret_cast<int *>(all_scores + scores);
        const Run work{a, buffer + panel, all_scores, buffer + panel + q, buffer, places,
                       reinterpret_cast<uint16_t *>(places + stride / COLUMNS), stride};
        // The last queries have the most visible keys, so they come first.
        int last = -1, visible = 0, panels = 0;  // the same for all heads of a run
        for (int i; (i = next.fetch_add(1)) < runs * a.heads;) {
            const int first = (runs - 1 - i / a.heads) * run, queries = std::min(run, a.queries - first);
            if (first != last) {
                visible = visible_keys(a, first, queries), last = first;
                panels = work.place(first, queries, visible);
            }
            work.compute(i % a.heads, first, queries, visible, panels);
        }
    }
    return true;
}

}  // namespace

extern const AttentionKernel KERNEL(attention);
const AttentionKernel KERNEL(attention) = {INSTRUCTIONS, available, supports, attend_many};

#ifndef __AVX512VNNI__  // choice between the two

template <class F>
static const AttentionKernel *find_kernel(F matches) {
    for (const AttentionKernel *each : {wide_attention, &KERNEL(attention)})
        if (each && each->available() && matches(*each)) return each;
    return nullptr;
}

static const AttentionKernel *kernel_for_width(int width) {
    return find_kernel([&](const AttentionKernel &each) { return each.supports(width); });
}

bool supports_width(int width) { return kernel_for_width(width); }

bool attend(const Attention &a, int threads, Scratch &scratch) {
    const AttentionKernel *kernel = kernel_for_width(a.width);
    return kernel && kernel->attend(a, threads, scratch);
}

bool attend_by(const char *name, const Attention &a, int threads, Scratch &scratch) {
    const AttentionKernel *kernel = find_kernel([&](const AttentionKernel &each) { return !strcmp(each.name, name); });
    return kernel && kernel->supports(a.width) && kernel->attend(a, threads, scratch);
}

#endif

}  // namespace native
