// What the backend may take; set before llama.cpp asks it.
#pragma once

#include "kernels.h"

namespace native {

constexpr int TYPES = 64;  // more than ggml has

struct Use {
    const Kernel *kernel[TYPES];  // of each type, for products of some rows or of many; null: not taken
    uint64_t some, few;           // 1 << ggml_type: types whose products of so many rows are taken, too
    bool attention, few_attention;
};

void use(const Use &);

}  // namespace native
