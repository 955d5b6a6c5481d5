// Quantize float32 to int8 with a scale, and convert float16, with NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace native {
namespace {

constexpr float MIN_MAGNITUDE = 1e-30f;  // below it the inverse scale would not be finite: taken for zero

// out = round(v / scale), ties to even; returns scale, NaN if a value is not finite, so that the result is NaN, too.
inline float quantize8(const float *v, int count, int8_t *out) {
    // As integers, the bits of floats without sign compare like the floats, with infinity and NaN last.
    uint32x4_t largest_magnitude = vdupq_n_u32(0);
    for (int i = 0; i < count; i += 4)
        largest_magnitude = vmaxq_u32(largest_magnitude, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + i))));
    const uint32_t bits = vmaxvq_u32(largest_magnitude);
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    if (bits >= 0x7f800000 || magnitude < MIN_MAGNITUDE) {
        memset(out, 0, count);
        return bits >= 0x7f800000 ? __builtin_nanf("") : 0;
    }
    const float inverse = 127 / magnitude;
    for (int i = 0; i < count; i += 8) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i), inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(v + i + 4), inverse));
        vst1_s8(out + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
    }
    return magnitude / 127;
}

inline float half(const void *p) {
    __fp16 value;
    memcpy(&value, p, 2);
    return value;
}

inline int sum16(const int8_t *v) { return vaddlvq_s8(vld1q_s8(v)); }

}  // namespace
}  // namespace native
