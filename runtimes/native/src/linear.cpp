// Linear layers of CLIP and of the projector: y = activation((x @ W) * scale + bias), in place of ONNX Runtime's or numpy's.
//
// CLIP's W is (inner, columns) int8 as in vision.onnx, with a scale per column; the projector's is (columns, inner)
// float16 or float32 as in projector.gguf, without. Both use the kernel of int16.cpp, but with AMX CLIP uses amx_int16.cpp's.
//
// CLIP needs more than bfloat16: rounding only its activations, of 6 photos in a simulation of `smol` in float32, moved the
// features by 0.93 % in bfloat16, 0.14 % in 13 bits with a scale for 256 values, 0.07 % in 14 bits with one for 512.

#include <cstring>

#include "attention.h"
#include "formats.h"
#include "operators.h"

namespace native {

namespace {

// x * sigmoid(1.702 x)
__m256 quick_gelu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1), z = _mm256_mul_ps(x, _mm256_set1_ps(1.702f));
    const __m256 e = exponential({_mm256_or_ps(z, _mm256_set1_ps(-0.0f))}).v;  // of -|z|
    return _mm256_div_ps(_mm256_mul_ps(x, _mm256_blendv_ps(one, e, z)), _mm256_add_ps(one, e));
}

// x/2 (1 + erf(x/sqrt 2)); erf by Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most, as in projector.py.
__m256 gelu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1), away = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(away, _mm256_set1_ps(0.3275911f / 1.41421356f), one));
    __m256 tail = _mm256_set1_ps(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        tail = _mm256_fmadd_ps(tail, t, _mm256_set1_ps(c));
    const __m256 e = exponential({_mm256_mul_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(-0.5f))}).v;
    tail = _mm256_mul_ps(_mm256_mul_ps(tail, t), _mm256_mul_ps(e, _mm256_set1_ps(0.5f)));  // what lies beyond |x|
    return _mm256_mul_ps(x, _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, x));
}

template <class F>
void each(float *y, int count, F with) {
    int n = 0;
    for (; n + 8 <= count; n += 8) _mm256_storeu_ps(y + n, with(_mm256_loadu_ps(y + n)));
    if (n == count) return;
    float rest[8] = {};
    memcpy(rest, y + n, (count - n) * sizeof *y);
    _mm256_storeu_ps(rest, with(_mm256_loadu_ps(rest)));
    memcpy(y + n, rest, (count - n) * sizeof *y);
}

}  // namespace

Scratch &scratch() {
    thread_local Scratch own;
    return own;
}

const Kernel *int16_kernel() {
    for (const Kernel *const *k = kernels; *k; k++)
        if ((*k)->available() && (*k)->supports(INT8_TRANSPOSED)) return *k;
    return nullptr;
}

void Layer::block(float *y, size_t stride, int rows, int column, int columns) const {
    for (; rows > 0; rows--, y += stride) {
        const float *const a = scale ? scale + column : nullptr, *const b = bias + column;
        if (a) for (int n = 0; n < columns; n++) y[n] = y[n] * a[n] + b[n];
        else for (int n = 0; n < columns; n++) y[n] += b[n];
        if (activation == QUICK_GELU) each(y, columns, quick_gelu);
        else if (activation == GELU) each(y, columns, gelu);
    }
}

bool linear(Product p, const Layer &layer, Team &team) {
    static const bool matrix_unit = transposed_int8 && transposed_int8->available();
    const Kernel *const kernel = p.type == INT8_TRANSPOSED && matrix_unit ? transposed_int8 : int16_kernel();
    p.epilogue = &layer;
    return kernel && multiply(*kernel, p, team, scratch());
}

}  // namespace native

extern "C" {

// A layer of CLIP, for tests and the check.
EXPORT int llava_edge_native_linear(const float *x, const char *w, const float *scale, const float *bias, int quick_gelu,
                                    float *y, int rows, int columns, int inner, int threads) {
    using namespace native;
    if (inner % 16) return false;  // what `quantize` rounds at once
    const Product p{INT8_TRANSPOSED, w, size_t(columns), x, size_t(inner), y, size_t(columns), rows, columns, inner};
    TemporaryThreads team(threads);
    return linear(p, {scale, bias, quick_gelu ? QUICK_GELU : NONE}, team);
}

// A layer of the projector.
EXPORT int llava_edge_native_project(int halves, const float *x, const char *w, const float *bias, int gelu, float *y,
                                     int rows, int columns, int inner, int threads) {
    using namespace native;
    if (inner % 32) return false;  // what int16.cpp unpacks at once
    const size_t stride = size_t(inner) * (halves ? 2 : 4);
    const Product p{halves ? F16 : F32, w, stride, x, size_t(inner), y, size_t(columns), rows, columns, inner};
    TemporaryThreads team(threads);
    return linear(p, {nullptr, bias, gelu ? GELU : NONE}, team);
}
}
