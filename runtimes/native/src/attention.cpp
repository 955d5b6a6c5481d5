// Attention of many queries at once, in float32, with AVX2, AVX-512 or NEON. The first two give the same bits, since each
// lane of a register has the sums of its own key, and then of its own place in a value.
//
// A thread takes one head and a run of queries, few enough that up to 8,192 keys their scores stay in the second-level
// cache: softmax then needs no second thought about maxima. Both products are tiles of 6 queries x 16 keys or values, or of
// 12 x 32: 12 sums in registers, or 24. Keys are turned into panels [width][16 or 32] and values into panels
// [128 keys][16 or 32], float32, 8 or 16 KB each where heads have a width of 128, and used by all queries of the run. Keys
// behind the last visible one of a run are not looked at: half of the work where the mask is causal.

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "attention.h"
#include "processor.h"
#ifdef NATIVE_WIDE
#include "lanes.h"
#endif

namespace native {
namespace {

#ifdef NATIVE_WIDE
constexpr int COLUMNS = 32, ROWS = 12;
#else
using Floats = Eight;
constexpr int COLUMNS = 16, ROWS = 6;
#endif
constexpr int KEYS = 128;  // of a panel of values
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

// What one thread needs for one run of queries.
struct Run {
    const Attention &a;
    float *const q;       // [queries][width], scaled
    float *const scores;  // [queries][stride]
    float *const out;     // [queries][width]
    float *const panel;   // keys [width][COLUMNS], or values [width / COLUMNS][KEYS][COLUMNS]
    const int stride;

    void take_queries(int head, int first, int queries, int padded) const {
        for (int i = 0; i < padded; i++) {
            const char *row = a.q + head * a.q_head + size_t(first + std::min(i, queries - 1)) * a.q_row;
            for (int d = 0; d < a.width; d += 8)
                (Eight::load(floats(row) + d) * Eight::same(a.scale)).store(q + i * a.width + d);
        }
    }

    // keys: `seen` of them are looked at, up to a multiple of COLUMNS
    void score(int shared, int keys, int seen, int padded) const {
        for (int j = 0; j < keys; j += COLUMNS) {
            Eight rows[8];
            for (int c = 0; c < COLUMNS; c += 8)
                for (int d = 0; d < a.width; d += 8) {
                    for (int i = 0; i < 8; i++) {
                        const uint16_t *row = halves(a.k + shared * a.k_head + size_t(j + c + i) * a.k_row) + d;
                        rows[i] = j + c + i < seen ? Eight::load(row) : Eight::zero();
                    }
                    transpose(rows, panel + d * COLUMNS + c, COLUMNS);
                }
            for (int i = 0; i < padded; i += ROWS)
                tile<false>(q + i * a.width, a.width, panel, a.width, scores + size_t(i) * stride + j, stride);
        }
    }

    void weigh(int shared, int keys, int seen, int padded) const {
        for (int j = 0; j < keys; j += KEYS) {
            const int count = std::min(KEYS, keys - j);
            for (int i = 0; i < count; i++) {
                const uint16_t *row = halves(a.v + shared * a.v_head + size_t(j + i) * a.v_row);
                for (int d = 0; d < a.width; d += 8) {
                    const Eight part = j + i < seen ? Eight::load(row + d) : Eight::zero();
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

    void compute(int head, int first, int queries, int seen) const {
        const int shared = head / (a.heads / a.shared_heads), padded = (queries + ROWS - 1) / ROWS * ROWS;
        const int keys = (seen + COLUMNS - 1) / COLUMNS * COLUMNS;
        float inverse[MAX_QUERIES];
        take_queries(head, first, queries, padded);
        score(shared, keys, seen, padded);
        for (int i = 0; i < padded; i++)
            inverse[i] = soften(mask_of(a, first + std::min(i, queries - 1)), scores + size_t(i) * stride, keys, seen);
        if (keys) weigh(shared, keys, seen, padded);
        for (int i = 0; i < queries; i++) {
            float *row = reinterpret_cast<float *>(a.out + size_t(first + i) * a.out_row + head * a.out_head);
            for (int d = 0; d < a.width; d += 8) {
                const Eight value = Eight::load(out + i * a.width + d) * Eight::same(inverse[i]);
                (inverse[i] ? value : Eight::zero()).store(row + d);
            }
        }
    }
};

bool takes(int width) { return width % COLUMNS == 0 && width <= MAX_WIDTH; }

bool attend_many(const Attention &a, int threads, Scratch &scratch) {
    const int stride = (a.keys + COLUMNS - 1) / COLUMNS * COLUMNS;
    const int run = std::clamp(SCORES / stride / ROWS * ROWS, ROWS, MAX_QUERIES);
    const int runs = (a.queries + run - 1) / run;
    const size_t q = size_t(run) * a.width, scores = size_t(run) * stride, panel = size_t(KEYS) * a.width;
    const size_t own = ((2 * q + scores + panel) * sizeof(float) + 63) / 64 * 64;
    char *memory = scratch.need(threads * own);
    if (!memory) return false;
    std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
    {
        float *mine = reinterpret_cast<float *>(memory + omp_get_thread_num() * own);
        const Run work{a, mine + panel, mine + panel + 2 * q, mine + panel + q, mine, stride};
        // The last queries see the most: they come first.
        int last = -1, seen = 0;  // all heads of a run see the same
        for (int i; (i = next.fetch_add(1)) < runs * a.heads;) {
            const int first = (runs - 1 - i / a.heads) * run, queries = std::min(run, a.queries - first);
            if (first != last) seen = visible(a, first, queries), last = first;
            work.compute(i % a.heads, first, queries, seen);
        }
    }
    return true;
}

}  // namespace

extern const ManyQueries KERNEL(attention);
const ManyQueries KERNEL(attention) = {INSTRUCTIONS, works, takes, attend_many};

#ifndef NATIVE_WIDE  // which of the two is taken

template <class F>
static const ManyQueries *first_that(F suits) {
    for (const ManyQueries *each : {wide_attention, &KERNEL(attention)})
        if (each && each->works() && suits(*each)) return each;
    return nullptr;
}

static const ManyQueries *of_width(int width) {
    return first_that([&](const ManyQueries &each) { return each.takes(width); });
}

bool attends(int width) { return of_width(width); }

bool attend(const Attention &a, int threads, Scratch &scratch) {
    const ManyQueries *taken = of_width(a.width);
    return taken && taken->attend(a, threads, scratch);
}

bool attend_by(const char *name, const Attention &a, int threads, Scratch &scratch) {
    const ManyQueries *taken = first_that([&](const ManyQueries &each) { return !strcmp(each.name, name); });
    return taken && taken->takes(a.width) && taken->attend(a, threads, scratch);
}

#endif

}  // namespace native
