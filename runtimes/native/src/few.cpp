// Products of one row, or few: decoding.
//
// Each row gets the same bits alone and among others, which guessing tokens relies on (runtimes/speculation.py). Reading the
// weights once is all there is to a single one, so what matters is to read them in their order (a thread that walked through
// four rows side by side took twice as long) and with few instructions per byte.

#include <algorithm>

#include "few_16.h"
#include "few_wide.h"
#include "kernels.h"
#include "processor.h"
#ifdef __x86_64__
#include "few_256.h"
#include "few_32.h"
#else
#include "arm_few.h"
#endif

namespace native {
namespace {

// Adapters' matrices have fewer. With larger ones, which are whole models, llama.cpp is faster.
constexpr int64_t MOST_HALVES = 1 << 20;

int in_wide(const Product &p, const Part128 *x, int blocks, int from, int to) { return wide->of_32(p, x, blocks, from, to); }
int in_wide(const Product &p, const Part256 *x, int blocks, int from, int to) { return wide->of_256(p, x, blocks, from, to); }

// with(from, to) for all columns. An adapter has hundreds of products too small for more than one thread.
template <class F>
void in_columns(const Product &p, int threads, F with) {
    if (int64_t(p.columns) * p.inner * p.rows < 1 << 15) return with(0, p.columns);
    Runs runs{(p.columns + WIDE - 1) / WIDE, threads, p.columns};
#pragma omp parallel num_threads(threads)
    for (int first, end; (first = runs.take(end)) < runs.all;) with(first * WIDE, std::min(end * WIDE, p.columns));
}

// x: [part][row]
template <class Part>
bool multiply_rounded(const Product &p, int threads, Scratch &scratch) {
    constexpr int VALUES = Part::VALUES;
    const int parts = (p.inner + VALUES - 1) / VALUES;
    Part *x = reinterpret_cast<Part *>(scratch.need(size_t(p.rows) * parts * sizeof(Part)));
    if (!x) return false;
    for (int m = 0; m < p.rows; m++)
        for (int b = 0; b < parts; b++)
            take(p.x + m * p.x_stride + b * VALUES, std::min(VALUES, p.inner - b * VALUES), x[b * p.rows + m]);
    const int blocks = p.inner / block_values(p.type);
    in_columns(p, threads, [&](int from, int to) {
        if (wide_works()) from = in_wide(p, x, blocks, from, to);
        for (int n = from; n < to; n++) {
            const char *row = p.w + size_t(n) * p.w_stride;
            column(p, n, [&](auto count, int m, float *y) { rows<count()>(p.type, row, x + m, p.rows, blocks, y); });
        }
    });
    return true;
}

}  // namespace

bool takes_few(int type, int64_t columns, int64_t inner) {
    static const bool here = works();
    if (!here) return false;
    if (type == F16) return inner % 8 == 0 && columns * inner <= MOST_HALVES;
    return unpacks(type) && inner % block_values(type) == 0;
}

bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    if (p.type == F16) {
        in_columns(p, threads, [&](int from, int to) { multiply_halves(p, from, to); });
        return true;
    }
    return block_values(p.type) == 32 ? multiply_rounded<Part128>(p, threads, scratch)
                                      : multiply_rounded<Part256>(p, threads, scratch);
}

}  // namespace native
