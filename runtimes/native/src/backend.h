// What the backend may take; set before llama.cpp asks it.
#pragma once

#include "kernels.h"

namespace native {

struct Use {
    const Kernel *kernel;  // for products of many rows
    uint64_t many, one;    // 1 << ggml_type: types whose products of many rows, and of one row, are taken
    bool attention;
};

void use(Use);

}  // namespace native
