// What ONNX Runtime's operators (operators.cpp) are made of.
#pragma once

#include <thread>
#include <vector>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))

namespace native {

// Threads that end with what they do. OpenMP would keep a second team for the calling thread, and libgomp lets all threads
// sleep wherever they wait as soon as it has more of them than there are processors: each token took five times as long.
struct Passing final : Team {
    explicit Passing(int threads) : Team(threads) {}
    void run(void (*task)(void *, size_t), void *data) override {
        std::vector<std::thread> others;
        int next = 1;
        try {
            for (others.reserve(size); next < size; next++) others.emplace_back(task, data, size_t(next));
        } catch (...) {  // the system gives no more: the rest is done here
        }
        task(data, 0);
        for (; next < size; next++) task(data, size_t(next));
        for (std::thread &other : others) other.join();
    }
};

// Of the calling thread: for all layers of a session, which are computed one after another.
Scratch &scratch();

// The kernel of int16.cpp for this processor; null if there is none.
const Kernel *pairs_kernel();

enum Activation { NONE, QUICK_GELU, GELU };

// y -> activation(y * scale + bias); scale: null if the weights need none.
struct Layer final : Finish {
    const float *scale, *bias;
    Activation activation;

    Layer(const float *factors, const float *added, Activation then) : scale(factors), bias(added), activation(then) {}
    void block(float *y, size_t stride, int rows, int column, int columns) const override;
};

// False, with nothing computed, if there is no memory.
bool linear(Product, const Layer &, Team &);

// Attention of all positions with all: (batch, positions, 3 * heads * width) -> (batch, positions, heads * width).
// q, k and v stand next to each other, each of them head by head.
struct Bidirectional {
    const float *qkv;
    float *out;
    int batch, positions, heads, width;
};

bool attends_bidirectional(int64_t positions, int64_t width);
bool attend_bidirectional(const Bidirectional &, Team &);  // false, with nothing computed, if there is no memory

}  // namespace native
