// float32 -> int8 with a scale, and a float16, with NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace native {
namespace {

constexpr float LEAST = 1e-30f;  // below it the inverse scale would not be finite: taken for zero

// out = round(v / scale), ties to even; returns scale. NaN if a value is not finite, so that the result says it.
inline float quantize8(const float *v, int count, int8_t *out) {
    uint32x4_t most = vdupq_n_u32(0);  // as integers, magnitudes of floats order like the floats, infinity and NaN last
    for (int i = 0; i < count; i += 4) most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(v + i))));
    const uint32_t bits = vmaxvq_u32(most);
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    if (bits >= 0x7f800000 || magnitude < LEAST) {
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

}  // namespace
}  // namespace native
