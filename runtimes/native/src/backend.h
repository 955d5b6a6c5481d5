// What the backend may take; set before llama.cpp asks it.
#pragma once

#include "kernels.h"

namespace native {

struct Use {
    const Kernel *kernel;  // for products of some and of many rows
    uint64_t many, some, few;  // 1 << ggml_type: types whose products of so many rows are taken
    bool attention, few_attention;
};

void use(Use);

}  // namespace native
