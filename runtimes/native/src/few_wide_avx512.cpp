// Products of a few rows with quantized weights (few_wide.h), for processors with AVX-512 VNNI: eight dot products accumulate a
// group of 32 values of a column.

#include "few_wide.h"
#include "few.h"
#include "few_wide_256.h"
#include "few_wide_32.h"
#include "processor.h"

namespace native {
namespace {

// 16 columns at a time, if there are enough rows; returns the first column not computed.
template <int TYPE, class Part>
int multiply_wide_blocks(const Product &p, const Part *x, int blocks, int from, int to) {
    if (p.rows < MIN_WIDE_ROWS) return from;
    for (; from + WIDE_COLUMNS <= to; from += WIDE_COLUMNS)
        multiply_wide<TYPE>(p.w + size_t(from) * p.w_stride, p.w_stride, x, p.rows, blocks, p.y + from, p.y_stride);
    return from;
}

template <int TYPE>
int multiply_all_columns(const Product &p, const Activations128 *x, int blocks, int from, int to) {
    multiply_columns<TYPE>(p, x, blocks, multiply_wide_blocks<TYPE>(p, x, blocks, from, to), to);
    return to;
}

int of_32(const Product &p, const Activations128 *x, int blocks, int from, int to) {
    if (p.type == Q4_0) return multiply_all_columns<Q4_0>(p, x, blocks, from, to);
    if (p.type == Q4_1) return multiply_all_columns<Q4_1>(p, x, blocks, from, to);
    return multiply_all_columns<Q8_0>(p, x, blocks, from, to);
}

int of_256(const Product &p, const Activations256 *x, int blocks, int from, int to) {
    if (p.type == Q4_K) return multiply_wide_blocks<Q4_K>(p, x, blocks, from, to);
    if (p.type == Q5_K) return multiply_wide_blocks<Q5_K>(p, x, blocks, from, to);
    return multiply_wide_blocks<Q6_K>(p, x, blocks, from, to);
}

}  // namespace

extern const WideKernel few_wide_avx512vnni;
const WideKernel few_wide_avx512vnni = {available, of_32, of_256};

}  // namespace native
