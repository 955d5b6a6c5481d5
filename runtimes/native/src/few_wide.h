// Products of a few rows with 16 columns at a time (few_wide.cpp).
#pragma once

#include <cstddef>

namespace native {

struct Part256;  // few.h

constexpr int WIDE = 16;  // columns
constexpr int LEAST_WIDE = 3;  // rows: with fewer the memory is what is waited for, and few_256.h has less to do

struct Wide {
    bool (*works)();
    // x: [block][row]; y: 16 results of each row, `y_stride` floats apart
    void (*q4_k)(const char *w, size_t w_stride, const Part256 *x, int rows, int blocks, float *y, size_t y_stride);
    void (*q6_k)(const char *w, size_t w_stride, const Part256 *x, int rows, int blocks, float *y, size_t y_stride);
};

extern const Wide *const wide;  // null where the compiler does not know the instructions

}  // namespace native
