// Linear layers of CLIP and of the projector: y = (x @ W) * scale + bias, in place of what ONNX Runtime or numpy would compute.
//
// CLIP's W is (inner, columns) int8 as vision.onnx stores it, with a scale for each column; the projector's is (columns, inner)
// float16 or float32 as projector.gguf stores it, without. The kernel is that of int16.cpp: activations keep 13 bits, which
// CLIP needs.

#include "formats.h"
#include "operators.h"

namespace native {

Scratch &scratch() {
    thread_local Scratch own;
    return own;
}

const Kernel *pairs_kernel() {
    for (const Kernel *const *k = kernels; *k; k++)
        if ((*k)->works() && (*k)->takes(BYTES_ACROSS)) return *k;
    return nullptr;
}

bool linear(const Product &p, const float *scale, const float *bias, Team &team) {
    const Kernel *const kernel = pairs_kernel();
    if (!kernel || !multiply(*kernel, p, team, scratch())) return false;
    team.each([&](int member) {
        for (int m = member * p.rows / team.size; m < (member + 1) * p.rows / team.size; m++) {
            float *y = p.y + m * p.y_stride;
            if (scale) for (int n = 0; n < p.columns; n++) y[n] = y[n] * scale[n] + bias[n];
            else for (int n = 0; n < p.columns; n++) y[n] += bias[n];
        }
    });
    return true;
}

}  // namespace native

extern "C" {

// Of a layer of CLIP, for tests and for the check.
EXPORT int llava_edge_native_linear(const float *x, const char *w, const float *scale, const float *bias, float *y, int rows,
                                    int columns, int inner, int threads) {
    using namespace native;
    if (inner % 16) return false;  // int16.cpp rounds so many at once
    const Product p{BYTES_ACROSS, w, size_t(columns), x, size_t(inner), y, size_t(columns), rows, columns, inner};
    Passing team(threads);
    return linear(p, scale, bias, team);
}

// Of a layer of the projector.
EXPORT int llava_edge_native_project(int halves, const float *x, const char *w, const float *bias, float *y, int rows,
                                     int columns, int inner, int threads) {
    using namespace native;
    if (inner % 32) return false;  // int16.cpp unpacks so many at once
    const size_t stride = size_t(inner) * (halves ? 2 : 4);
    const Product p{halves ? F16 : F32, w, stride, x, size_t(inner), y, size_t(columns), rows, columns, inner};
    Passing team(threads);
    return linear(p, nullptr, bias, team);
}
}
