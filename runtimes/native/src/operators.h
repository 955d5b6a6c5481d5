// Building blocks of ONNX Runtime's operators (operators.cpp).
#pragma once

#include <thread>
#include <vector>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))

namespace native {

// Threads that end after the task. OpenMP would keep a second team for the calling thread, and libgomp makes all threads sleep
// instead of spin once it has more of them than there are processors: each token took five times as long.
struct TemporaryThreads final : Team {
    explicit TemporaryThreads(int threads) : Team(threads) {}
    void run(void (*task)(void *, size_t), void *data) override {
        std::vector<std::thread> others;
        int next = 1;
        try {
            for (others.reserve(size); next < size; next++) others.emplace_back(task, data, size_t(next));
        } catch (...) {  // no more threads: the rest runs here
        }
        task(data, 0);
        for (; next < size; next++) task(data, size_t(next));
        for (std::thread &other : others) other.join();
    }
};

// The calling thread's, for all layers of a session, which are computed one after another.
Scratch &scratch();

// The kernel of int16.cpp for this processor, null without one.
const Kernel *int16_kernel();

enum Activation { NONE, QUICK_GELU, GELU };

// y -> activation(y * scale + bias); scale: null if the weights need none.
struct Layer final : Epilogue {
    const float *scale, *bias;
    Activation activation;

    Layer(const float *factors, const float *added, Activation then) : scale(factors), bias(added), activation(then) {}
    void block(float *y, size_t stride, int rows, int column, int columns) const override;
};

// Returns false, with nothing computed, if out of memory.
bool linear(Product, const Layer &, Team &);

// Attention of all positions to all: (batch, positions, 3 * heads * width) -> (batch, positions, heads * width).
// q, k and v of a position are concatenated, each of them head by head.
struct Bidirectional {
    const float *qkv;
    float *out;
    int batch, positions, heads, width;
};

bool supports_bidirectional(int64_t positions, int64_t width);
bool attend_bidirectional(const Bidirectional &, Team &);  // false, with nothing computed, if out of memory

}  // namespace native
