// Products of a few rows with rounded weights, for processors with AVX-512 VNNI.
//
// few_256.h and few_32.h go along a row of weights and end each group of 32 with several more instructions for every row of
// activations. Here 16 columns are taken together, one in each lane of 32 bits: eight products add up a group of a column
// before its scale is looked at. What that costs first, turning 16 rows of blocks around, meets all rows of activations. One
// or two rows do not pay for it.
//
// Each column has the same operations in the same order as there, whole numbers aside, whose order is all one: the same bits.

#include "few_wide.h"
#include "few.h"
#include "processor.h"

#if defined(__AVX512VNNI__)

#include "few_wide_256.h"
#include "few_wide_32.h"

namespace native {
namespace {

// 16 columns at a time, as long as there are so many and enough rows; the first one that is left.
template <int TYPE, class Part>
int in_steps(const Product &p, const Part *x, int blocks, int from, int to) {
    if (p.rows < LEAST_WIDE) return from;
    for (; from + WIDE <= to; from += WIDE)
        multiply_wide<TYPE>(p.w + size_t(from) * p.w_stride, p.w_stride, x, p.rows, blocks, p.y + from, p.y_stride);
    return from;
}

template <int TYPE>
int in_steps_and_rows(const Product &p, const Part128 *x, int blocks, int from, int to) {
    for (from = in_steps<TYPE>(p, x, blocks, from, to); from < to; from++) {
        const char *row = p.w + size_t(from) * p.w_stride;
        column(p, from, [&](auto count, int m, float *y) { multiply_row<TYPE, count()>(row, x + m, p.rows, blocks, y); });
    }
    return to;
}

int of_32(const Product &p, const Part128 *x, int blocks, int from, int to) {
    if (p.type == Q4_0) return in_steps_and_rows<Q4_0>(p, x, blocks, from, to);
    if (p.type == Q4_1) return in_steps_and_rows<Q4_1>(p, x, blocks, from, to);
    return in_steps_and_rows<Q8_0>(p, x, blocks, from, to);
}

int of_256(const Product &p, const Part256 *x, int blocks, int from, int to) {
    if (p.type == Q4_K) return in_steps<Q4_K>(p, x, blocks, from, to);
    if (p.type == Q5_K) return in_steps<Q5_K>(p, x, blocks, from, to);
    return in_steps<Q6_K>(p, x, blocks, from, to);
}

}  // namespace

extern const Wide wide_few;
const Wide wide_few = {works, of_32, of_256};

}  // namespace native

#else  // tests, where there is no such processor

namespace native {

extern const Wide wide_few;
const Wide wide_few = {[] { return false; }, nullptr, nullptr};

}  // namespace native

#endif
