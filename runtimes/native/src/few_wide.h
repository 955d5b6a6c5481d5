// Products of a few rows with 16 columns at a time (few_wide.cpp).
#pragma once

namespace native {

struct Product;  // kernels.h
struct Part128;  // few.h
struct Part256;

constexpr int WIDE = 16;  // columns
constexpr int LEAST_WIDE = 3;  // rows: with fewer the memory is what is waited for, and one column after the other has less to do

struct Wide {
    bool (*works)();
    // Columns from `from` on, of all rows; returns the first one that is left, `to` at most. x: [part][row]
    int (*of_32)(const Product &p, const Part128 *x, int blocks, int from, int to);
    int (*of_256)(const Product &p, const Part256 *x, int blocks, int from, int to);
};

extern const Wide *const wide;  // null where the compiler does not know the instructions

inline bool wide_works() {
    static const bool works = wide && wide->works();
    return works;
}

}  // namespace native
