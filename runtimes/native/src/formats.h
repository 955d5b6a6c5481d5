// Block formats of a GGUF file. They are ggml's (ggml-common.h of llama.cpp):
//
//   F16    values
//   Q8_0   32 values: scale f16, 32 x int8                        value = d * q
//   Q4_0   32 values: scale f16, 16 bytes                         value = d * (q - 8)
//   Q4_1   32 values: scale f16, minimum f16, 16 bytes            value = d * q + m
//   Q4_K   256 values: d f16, dmin f16, 12 bytes, 128 bytes       value = d * scale * q - dmin * min, for each 32
//   Q5_K   256 values: d f16, dmin f16, 12 bytes, 32 bytes (fifth bits), 128 bytes       the same
//   Q6_K   256 values: 128 bytes (low 4 bits), 64 bytes (high 2 bits), 16 x int8 scales, d f16    d * scale * (q - 32)
//
// In the 32-value formats the low nibbles are the first 16 values, the high ones the others. In Q4_K and Q5_K 32 bytes
// have one group of 32 in their low nibbles and the next one in their high ones.
#pragma once

#include <cstdint>
#include <cstring>

namespace native {
namespace {

constexpr int INT8_TRANSPOSED = 100;  // int8 (inner, columns) without scales, as in vision.onnx; not a ggml_type
enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };  // ggml_type

constexpr int block_bytes(int type) {
    return type == Q4_0 ? 18 : type == Q4_1 ? 20 : type == Q8_0 ? 34 : type == Q4_K ? 144 : type == Q5_K ? 176 : 210;
}

// All eight 6-bit scales and minima of a Q4_K or Q5_K block, as bytes.
inline void group_scales(const uint8_t *s, uint64_t &scales, uint64_t &minima) {
    uint32_t low, middle, high;
    memcpy(&low, s, 4), memcpy(&middle, s + 4, 4), memcpy(&high, s + 8, 4);
    const uint32_t scale = (high & 0x0f0f0f0f) | (low >> 2 & 0x30303030);
    const uint32_t minimum = (high >> 4 & 0x0f0f0f0f) | (middle >> 2 & 0x30303030);
    scales = uint64_t(scale) << 32 | (low & 0x3f3f3f3f);
    minima = uint64_t(minimum) << 32 | (middle & 0x3f3f3f3f);
}

}  // namespace
}  // namespace native
