// What the backend may take; set before llama.cpp asks it.
#pragma once

#include "kernels.h"

namespace native {

constexpr int TYPES = 64;  // more than ggml has

struct Use {
    const Kernel *kernel[TYPES];  // of each type; null: not taken
    int least[TYPES];             // rows from which on it is
    uint64_t few;                 // 1 << ggml_type: types whose products of fewer rows are taken by multiply_few
    bool attention, few_attention;
};

void use(const Use &);
void clear_by_giving_back();  // what ggml allocates from now on

}  // namespace native
