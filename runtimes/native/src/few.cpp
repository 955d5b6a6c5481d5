// Products of one row or a few (decoding).
//
// Each row gets the same bits alone and among others, which speculative decoding relies on (runtimes/speculation.py). One row is
// bound by reading the weights once, so they must be read sequentially (a thread that read four rows in parallel took twice as
// long) and with few instructions per byte.

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

// Adapters' matrices are smaller. For larger ones, of float16 models, llama.cpp is faster.
constexpr int64_t MAX_F16_VALUES = 1 << 20;

// The wide kernel for this processor, or null
const WideKernel *wide_kernel() {
    static const WideKernel *const found = [] {
        const WideKernel *const *kernel = wide_kernels;
        while (*kernel && !(*kernel)->available()) kernel++;
        return *kernel;
    }();
    return found;
}

void multiply_part(const Product &p, const Activations128 *x, int blocks, int from, int to) {
    if (const WideKernel *wide = wide_kernel()) from = wide->of_32(p, x, blocks, from, to);
    if (p.type == Q4_0) multiply_columns<Q4_0>(p, x, blocks, from, to);
    else if (p.type == Q4_1) multiply_columns<Q4_1>(p, x, blocks, from, to);
    else multiply_columns<Q8_0>(p, x, blocks, from, to);
}

void multiply_part(const Product &p, const Activations256 *x, int blocks, int from, int to) {
    if (const WideKernel *wide = wide_kernel()) from = wide->of_256(p, x, blocks, from, to);
    if (p.type == Q4_K) multiply_columns<Q4_K>(p, x, blocks, from, to);
    else if (p.type == Q5_K) multiply_columns<Q5_K>(p, x, blocks, from, to);
    else multiply_columns<Q6_K>(p, x, blocks, from, to);
}

// Call with(from, to) for all columns, in parallel. Products of adapters are too small for more than one thread.
template <class F>
void for_columns(const Product &p, int threads, F with) {
    if (int64_t(p.columns) * p.inner * p.rows < 1 << 15) return with(0, p.columns);
    GuidedRange range{(p.columns + WIDE_COLUMNS - 1) / WIDE_COLUMNS, threads, p.columns};
#pragma omp parallel num_threads(threads)
    for (int first, end; (first = range.next_chunk(end)) < range.size;)
        with(first * WIDE_COLUMNS, std::min(end * WIDE_COLUMNS, p.columns));
}

// x: [part][row]
template <class Part>
bool multiply_quantized(const Product &p, int threads, Scratch &scratch) {
    constexpr int VALUES = Part::VALUES;
    const int parts = (p.inner + VALUES - 1) / VALUES;
    Part *x = reinterpret_cast<Part *>(scratch.reserve(size_t(p.rows) * parts * sizeof(Part)));
    if (!x) return false;
    for (int m = 0; m < p.rows; m++)
        for (int b = 0; b < parts; b++)
            quantize_part(p.x + m * p.x_stride + b * VALUES, std::min(VALUES, p.inner - b * VALUES), x[b * p.rows + m]);
    const int blocks = p.inner / block_values(p.type);
    for_columns(p, threads, [&](int from, int to) { multiply_part(p, x, blocks, from, to); });
    return true;
}

}  // namespace

bool supports_few(int type, int64_t columns, int64_t inner) {
    static const bool here = available();
    if (!here) return false;
    if (type == F16) return inner % 8 == 0 && columns * inner <= MAX_F16_VALUES;
    return is_supported_type(type) && inner % block_values(type) == 0;
}

bool multiply_few(const Product &p, int threads, Scratch &scratch) {
    if (p.type == F16) {
        for_columns(p, threads, [&](int from, int to) { multiply_halves(p, from, to); });
        return true;
    }
    return block_values(p.type) == 32 ? multiply_quantized<Activations128>(p, threads, scratch)
                                      : multiply_quantized<Activations256>(p, threads, scratch);
}

}  // namespace native
