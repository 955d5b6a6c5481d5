// One register of lanes for int8.cpp, 4 products of bytes in each: AVX2, AVX-VNNI or AVX-512 VNNI, as the compiler's flags
// say; and plain C++ in place of the last two where NATIVE_EMULATE asks for it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace native {
namespace {

#if defined(NATIVE_WIDE) && defined(__AVX512VNNI__)

struct Floats {
    __m512 v;
    static Floats zero() { return {_mm512_setzero_ps()}; }
    static Floats load(const float *p) { return {_mm512_load_ps(p)}; }
    void add(Floats a, float b) { v = _mm512_fmadd_ps(a.v, _mm512_set1_ps(b), v); }
    void add(Floats a, Floats b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
    void scale(float b) { v = _mm512_mul_ps(v, _mm512_set1_ps(b)); }
    void store(float *p) const { _mm512_store_ps(p, v); }
};

struct Bytes {
    static constexpr int count = 16;
    __m512i v;
    static Bytes zero() { return {_mm512_setzero_si512()}; }
    static Bytes load(const int32_t *p) { return {_mm512_load_si512(p)}; }
    static Bytes same(int32_t x) { return {_mm512_set1_epi32(x)}; }
    void add(Bytes w, Bytes x) { v = _mm512_dpbusd_epi32(v, w.v, x.v); }
    Floats whole() const { return {_mm512_cvtepi32_ps(v)}; }
};

#elif defined(NATIVE_WIDE)

struct Floats {
    float v[16];
    static Floats zero() { return {{0}}; }
    static Floats load(const float *p) {
        Floats x;
        memcpy(x.v, p, sizeof x.v);
        return x;
    }
    void add(Floats a, float b) {
        for (int i = 0; i < 16; i++) v[i] += a.v[i] * b;
    }
    void add(Floats a, Floats b) {
        for (int i = 0; i < 16; i++) v[i] += a.v[i] * b.v[i];
    }
    void scale(float b) {
        for (int i = 0; i < 16; i++) v[i] *= b;
    }
    void store(float *p) const { memcpy(p, v, sizeof v); }
};

struct Bytes {
    static constexpr int count = 16;
    int32_t v[16];
    static Bytes zero() { return {{0}}; }
    static Bytes load(const int32_t *p) {
        Bytes x;
        memcpy(x.v, p, sizeof x.v);
        return x;
    }
    static Bytes same(int32_t x) {
        Bytes y;
        for (int i = 0; i < 16; i++) y.v[i] = x;
        return y;
    }
    void add(Bytes w, Bytes x) {
        for (int i = 0; i < 16; i++)
            for (int b = 0; b < 32; b += 8) v[i] += uint8_t(w.v[i] >> b) * int8_t(x.v[i] >> b);
    }
    Floats whole() const {
        Floats x;
        for (int i = 0; i < 16; i++) x.v[i] = float(v[i]);
        return x;
    }
};

#else

struct Floats {
    __m256 v;
    static Floats zero() { return {_mm256_setzero_ps()}; }
    static Floats load(const float *p) { return {_mm256_load_ps(p)}; }
    void add(Floats a, float b) { v = _mm256_fmadd_ps(a.v, _mm256_set1_ps(b), v); }
    void add(Floats a, Floats b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
    void scale(float b) { v = _mm256_mul_ps(v, _mm256_set1_ps(b)); }
    void store(float *p) const { _mm256_store_ps(p, v); }
};

struct Bytes {
    static constexpr int count = 8;
    __m256i v;
    static Bytes zero() { return {_mm256_setzero_si256()}; }
    static Bytes load(const int32_t *p) { return {_mm256_load_si256(reinterpret_cast<const __m256i *>(p))}; }
    static Bytes same(int32_t x) { return {_mm256_set1_epi32(x)}; }
    // gcc reorders the intrinsics until twelve sums no longer fit its sixteen registers: a third of the speed.
#if defined(__AVXVNNI__)
    void add(Bytes w, Bytes x) { __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(v) : "x"(w.v), "x"(x.v)); }
    Floats whole() const { return {_mm256_cvtepi32_ps(v)}; }
#else
    // In int16, two sums in a lane
    void add(Bytes w, Bytes x) {
        __m256i t;
        __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(v), "=&x"(t) : "x"(w.v), "x"(x.v));
    }
    Floats whole() const { return {_mm256_cvtepi32_ps(_mm256_madd_epi16(v, _mm256_set1_epi16(1)))}; }
#endif
};

#endif

}  // namespace
}  // namespace native
