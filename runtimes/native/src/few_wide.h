// Products of a few rows, 16 columns at a time (few_wide.cpp).
#pragma once

namespace native {

struct Product;  // kernels.h
struct Activations128;  // few.h
struct Activations256;

constexpr int WIDE_COLUMNS = 16;  // columns
constexpr int MIN_WIDE_ROWS = 3;  // with fewer, memory is the bottleneck and the transposition is wasted

struct WideKernel {
    bool (*available)();
    // Compute columns from `from` on for all rows; returns the first one not computed, at most `to`. x: [block][row]
    int (*of_32)(const Product &p, const Activations128 *x, int blocks, int from, int to);
    int (*of_256)(const Product &p, const Activations256 *x, int blocks, int from, int to);
};

extern const WideKernel *const wide;  // null if the compiler lacks the instructions

inline bool wide_available() {
    static const bool available = wide && wide->available();
    return available;
}

}  // namespace native
