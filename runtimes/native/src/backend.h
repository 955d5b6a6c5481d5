// What the backend may take; set before llama.cpp asks it.
#pragma once

#include "kernels.h"

namespace native {

struct Use {
    const Kernel *kernel;  // for products of many rows
    uint64_t many, few;    // 1 << ggml_type: types whose products of many rows, and of few, are taken
    bool attention;
};

void use(Use);

}  // namespace native
