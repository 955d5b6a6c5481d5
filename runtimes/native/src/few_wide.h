// Products of a few rows, 16 columns at a time.
//
// few_256.h and few_32.h process one row of weights at a time and need several more instructions per group of 32 for every row
// of activations. Here 16 columns are processed together, each in a 32-bit lane: the products of a group of a column add up
// before they are scaled. That requires transposing 16 rows of blocks, once for all rows of activations.
//
// Each column has the same floating-point operations in the same order as there (the order of integer additions does not
// matter), so the bits are the same.
#pragma once

namespace native {

struct Product;  // kernels.h
struct Activations128;  // few.h
struct Activations256;

constexpr int WIDE_COLUMNS = 16;
constexpr int MIN_WIDE_ROWS = 3;  // with fewer, memory is the bottleneck and the transposition is wasted

struct WideKernel {
    bool (*available)();
    // Compute columns from `from` on for all rows; returns the first one not computed, at most `to`. x: [block][row]
    int (*of_32)(const Product &p, const Activations128 *x, int blocks, int from, int to);
    int (*of_256)(const Product &p, const Activations256 *x, int blocks, int from, int to);
};

extern const WideKernel *const wide_kernels[];  // preferred ones first, null-terminated; none for ARM

namespace {

// Call add(count, first row) for all rows, at most MOST at a time and about as many each time.
template <int MOST, class F>
inline void for_row_chunks(int rows, F add) {
    for (int times = (rows + MOST - 1) / MOST, r = 0; times > 0; times--) {
        const int some = (rows - r + times - 1) / times;
        add(some, r);
        r += some;
    }
}

}  // namespace
}  // namespace native
