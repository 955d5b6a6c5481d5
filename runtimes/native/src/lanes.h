// One register of int32 lanes, for int16.cpp: AVX2, AVX-VNNI or AVX-512 VNNI, as the compiler's flags say; and plain C++
// in place of the last two where NATIVE_EMULATE asks for it, so that their order of work is tested on every machine.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace native {
namespace {

#if defined(NATIVE_WIDE) && defined(__AVX512VNNI__)

struct Lanes {
    static constexpr int count = 16;
    __m512i v;
    static Lanes zero() { return {_mm512_setzero_si512()}; }
    static Lanes load(const int32_t *p) { return {_mm512_load_si512(p)}; }
    static Lanes same(int32_t x) { return {_mm512_set1_epi32(x)}; }
    // + the sum of the two products of int16 in each lane
    void add(Lanes a, Lanes b) { v = _mm512_dpwssd_epi32(v, a.v, b.v); }
    // sums[i] = (first ? 0 : sums[i]) + v[i] * scales[i] * scale
    void scale(const float *scales, float scale, bool first, float *sums) const {
        const __m512 s = _mm512_mul_ps(_mm512_load_ps(scales), _mm512_set1_ps(scale));
        _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), s, first ? _mm512_setzero_ps() : _mm512_load_ps(sums)));
    }
};

#elif defined(NATIVE_WIDE)

struct Lanes {
    static constexpr int count = 16;
    int32_t v[16];
    static Lanes zero() { return {{0}}; }
    static Lanes load(const int32_t *p) {
        Lanes x;
        for (int i = 0; i < 16; i++) x.v[i] = p[i];
        return x;
    }
    static Lanes same(int32_t x) {
        Lanes y;
        for (int i = 0; i < 16; i++) y.v[i] = x;
        return y;
    }
    void add(Lanes a, Lanes b) {
        for (int i = 0; i < 16; i++)
            v[i] += int16_t(a.v[i]) * int16_t(b.v[i]) + (a.v[i] >> 16) * (b.v[i] >> 16);
    }
    void scale(const float *scales, float scale, bool first, float *sums) const {
        for (int i = 0; i < 16; i++) sums[i] = (first ? 0 : sums[i]) + float(v[i]) * (scales[i] * scale);
    }
};

#else

struct Lanes {
    static constexpr int count = 8;
    __m256i v;
    static Lanes zero() { return {_mm256_setzero_si256()}; }
    static Lanes load(const int32_t *p) { return {_mm256_load_si256(reinterpret_cast<const __m256i *>(p))}; }
    static Lanes same(int32_t x) { return {_mm256_set1_epi32(x)}; }
    void add(Lanes a, Lanes b) {
        // gcc reorders the intrinsics until twelve sums no longer fit its sixteen registers: a third of the speed.
#if defined(__AVXVNNI__)
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(v) : "x"(a.v), "x"(b.v));
#else
        __m256i t;
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(v), "=&x"(t) : "x"(a.v), "x"(b.v));
#endif
    }
    void scale(const float *scales, float scale, bool first, float *sums) const {
        const __m256 s = _mm256_mul_ps(_mm256_load_ps(scales), _mm256_set1_ps(scale));
        _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), s, first ? _mm256_setzero_ps() : _mm256_load_ps(sums)));
    }
};

#endif

}  // namespace
}  // namespace native
