// A vector of eight floats: one register of AVX2, or two of NEON.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace native {
namespace {

#ifdef __x86_64__

struct Float8 {
    __m256 v;
    static Float8 zero() { return {_mm256_setzero_ps()}; }
    static Float8 broadcast(float x) { return {_mm256_set1_ps(x)}; }
    static Float8 load(const float *p) { return {_mm256_loadu_ps(p)}; }
    static Float8 load(const uint16_t *p) {  // float16
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
    }
    static Float8 load(const int8_t *p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
    }
    static Float8 broadcast_half(const void *p) {
        uint16_t bits;
        memcpy(&bits, p, sizeof bits);
        return {_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))};
    }
    void store(float *p) const { _mm256_storeu_ps(p, v); }
    void add(Float8 a, float b) { v = _mm256_fmadd_ps(a.v, _mm256_set1_ps(b), v); }
    void add(Float8 a, Float8 b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
    void scale(float b) { v = _mm256_mul_ps(v, _mm256_set1_ps(b)); }
    Float8 rounded() const { return {_mm256_round_ps(v, 8)}; }  // ties to even
    Float8 power_of_two() const {  // 2^v for integers from -126 to 127
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127)), 23))};
    }
    float reduce_max() const {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }
    float sum() const {
        __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_add_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
    }
};

inline Float8 operator+(Float8 a, Float8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Float8 operator-(Float8 a, Float8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Float8 operator*(Float8 a, Float8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Float8 elementwise_max(Float8 a, Float8 b) { return {_mm256_max_ps(a.v, b.v)}; }  // b if one is NaN

struct Mask8 {  // a bit mask per lane
    __m256 v;
    static Mask8 first(int count) {
        return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))};
    }
    bool any() const { return _mm256_movemask_ps(v); }
};

inline Mask8 operator|(Mask8 a, Mask8 b) { return {_mm256_or_ps(a.v, b.v)}; }
inline Mask8 operator==(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask8 operator<(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask8 is_nan(Float8 a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline Float8 select(Mask8 where, Float8 a, Float8 b) { return {_mm256_blendv_ps(b.v, a.v, where.v)}; }

// Horizontal sums of eight vectors
inline Float8 sums(const Float8 s[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0].v, s[1].v), _mm256_hadd_ps(s[2].v, s[3].v));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4].v, s[5].v), _mm256_hadd_ps(s[6].v, s[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

// Transpose 8x8; rows of `out` are `to` floats apart
inline void transpose(const Float8 rows[8], float *out, size_t to) {
    __m256 r[8], t[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// Exact sum of integers below 2^32
struct ExactSum {
    __m256i v = _mm256_setzero_si256();
    void add(Float8 x) {  // rounded
        const __m256i whole = _mm256_cvtps_epi32(x.v);
        v = _mm256_add_epi64(v, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(whole)));
        v = _mm256_add_epi64(v, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(whole, 1)));
    }
    int64_t sum() const {
        int64_t parts[4];
        memcpy(parts, &v, sizeof parts);
        return parts[0] + parts[1] + parts[2] + parts[3];
    }
};

#else

struct Float8 {
    float32x4_t low, high;
    static Float8 zero() { return broadcast(0); }
    static Float8 broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
    static Float8 load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static Float8 load(const uint16_t *p) {  // float16
        const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(p));
        return {vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
    }
    static Float8 load(const int8_t *p) {
        const int16x8_t v = vmovl_s8(vld1_s8(p));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), vcvtq_f32_s32(vmovl_high_s16(v))};
    }
    static Float8 broadcast_half(const void *p) {
        __fp16 value;
        memcpy(&value, p, sizeof value);
        return broadcast(value);
    }
    void store(float *p) const { vst1q_f32(p, low), vst1q_f32(p + 4, high); }
    void add(Float8 a, float b) { low = vfmaq_n_f32(low, a.low, b), high = vfmaq_n_f32(high, a.high, b); }
    void add(Float8 a, Float8 b) { low = vfmaq_f32(low, a.low, b.low), high = vfmaq_f32(high, a.high, b.high); }
    Float8 rounded() const { return {vrndnq_f32(low), vrndnq_f32(high)}; }  // ties to even
    Float8 power_of_two() const {  // 2^v for integers from -126 to 127
        const int32x4_t bias = vdupq_n_s32(127);
        return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(low), bias), 23)),
                vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(high), bias), 23))};
    }
    float reduce_max() const { return vmaxnmvq_f32(vmaxnmq_f32(low, high)); }
    float sum() const { return vaddvq_f32(vaddq_f32(low, high)); }
};

inline Float8 operator+(Float8 a, Float8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Float8 operator-(Float8 a, Float8 b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline Float8 operator*(Float8 a, Float8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
// The other one if one is NaN
inline Float8 elementwise_max(Float8 a, Float8 b) { return {vmaxnmq_f32(a.low, b.low), vmaxnmq_f32(a.high, b.high)}; }

struct Mask8 {  // a bit mask per lane
    uint32x4_t low, high;
    static Mask8 first(int count) {
        const int32x4_t lane = {0, 1, 2, 3};
        return {vcltq_s32(lane, vdupq_n_s32(count)), vcltq_s32(lane, vdupq_n_s32(count - 4))};
    }
    bool any() const { return vmaxvq_u32(vorrq_u32(low, high)); }
};

inline Mask8 operator|(Mask8 a, Mask8 b) { return {vorrq_u32(a.low, b.low), vorrq_u32(a.high, b.high)}; }
inline Mask8 operator==(Float8 a, Float8 b) { return {vceqq_f32(a.low, b.low), vceqq_f32(a.high, b.high)}; }
inline Mask8 operator<(Float8 a, Float8 b) { return {vcltq_f32(a.low, b.low), vcltq_f32(a.high, b.high)}; }
inline Mask8 is_nan(Float8 a) { return {vmvnq_u32(vceqq_f32(a.low, a.low)), vmvnq_u32(vceqq_f32(a.high, a.high))}; }
inline Float8 select(Mask8 where, Float8 a, Float8 b) {
    return {vbslq_f32(where.low, a.low, b.low), vbslq_f32(where.high, a.high, b.high)};
}

// Horizontal sums of eight vectors
inline Float8 sums(const Float8 s[8]) {
    float32x4_t halves[8];
    for (int i = 0; i < 8; i++) halves[i] = vaddq_f32(s[i].low, s[i].high);
    return {vpaddq_f32(vpaddq_f32(halves[0], halves[1]), vpaddq_f32(halves[2], halves[3])),
            vpaddq_f32(vpaddq_f32(halves[4], halves[5]), vpaddq_f32(halves[6], halves[7]))};
}

// Transpose 8x8; rows of `out` are `to` floats apart
inline void transpose(const Float8 rows[8], float *out, size_t to) {
    for (int i = 0; i < 8; i += 4)
        for (int half = 0; half < 2; half++) {
            float32x4_t r[4];
            for (int n = 0; n < 4; n++) r[n] = half ? rows[i + n].high : rows[i + n].low;
            const float32x4x2_t a = vzipq_f32(r[0], r[2]), b = vzipq_f32(r[1], r[3]);
            const float32x4x2_t c = vzipq_f32(a.val[0], b.val[0]), d = vzipq_f32(a.val[1], b.val[1]);
            float *const to_half = out + 4 * half * to + i;
            vst1q_f32(to_half, c.val[0]), vst1q_f32(to_half + to, c.val[1]);
            vst1q_f32(to_half + 2 * to, d.val[0]), vst1q_f32(to_half + 3 * to, d.val[1]);
        }
}

// Exact sum of integers below 2^32
struct ExactSum {
    uint64x2_t v = vdupq_n_u64(0);
    void add(Float8 x) {  // rounded
        for (const float32x4_t part : {x.low, x.high}) v = vpadalq_u32(v, vcvtnq_u32_f32(part));
    }
    int64_t sum() const { return int64_t(vaddvq_u64(v)); }
};

#endif

}  // namespace
}  // namespace native
