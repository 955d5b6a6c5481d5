// Which operations the backend accepts; set before llama.cpp asks.
#pragma once

#include "kernels.h"

namespace native {

constexpr int TYPES = 64;  // more than ggml has

struct Configuration {
    const Kernel *kernel[TYPES];  // by ggml_type; null: not accepted
    int min_rows[TYPES];             // that the kernel is used for
    uint64_t few;                 // bits 1 << ggml_type: types whose products of fewer rows multiply_few computes
    bool attention, few_attention;
};

void configure(const Configuration &);
void set_own_threads(int threads);  // from the next graph on, whatever llama.cpp's own operations use; 0: as many as they
void install_lazy_clear();  // for buffers that ggml allocates from now on

}  // namespace native
