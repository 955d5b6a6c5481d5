// One register of 32-bit lanes, for int8.cpp, int16.cpp and, in its widest form, attention.cpp: AVX2, AVX-VNNI or
// AVX-512 VNNI, as the compiler's flags say.
//
// Products of bytes add up in int32 with VNNI, four in a lane. With AVX2 alone they add up in int16, two sums in a lane,
// which hold 16 products of 4 bits and 7, 8 of 5 bits, 4 of 6: then they have to be taken together. Its product of pairs
// does that and can multiply by an integer on the way.
#pragma once

#include "float8.h"
#include "unpack.h"

#include <cstdint>
#include <cstring>

namespace native {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif

#if defined(__AVX512VNNI__)

struct Floats {
    __m512 v;
    static Floats zero() { return {_mm512_setzero_ps()}; }
    static Floats load(const float *p) { return {_mm512_load_ps(p)}; }
    void store(float *p) const { _mm512_store_ps(p, v); }
    void add(Floats a, float b) { v = _mm512_fmadd_ps(a.v, _mm512_set1_ps(b), v); }
    void add(Floats a, Floats b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
    void scale(float b) { v = _mm512_mul_ps(v, _mm512_set1_ps(b)); }
};

struct Lanes {
    static constexpr int count = 16;
    __m512i v;
    static Lanes zero() { return {_mm512_setzero_si512()}; }
    static Lanes load(const int32_t *p) { return {_mm512_load_si512(p)}; }
    static Lanes broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
    Lanes with(Lanes b) const { return {_mm512_add_epi32(v, b.v)}; }
#ifdef NATIVE_REFUSED_COMPUTED  // tests: in plain C++
    Lanes plus_int16(Lanes b) const { return {_mm512_add_epi16(v, b.v)}; }
    void add_dot_int16(Lanes a, Lanes b) { v = _mm512_dpwssd_epi32(v, a.v, b.v); }
    void add_dot_int8(Lanes w, Lanes x) { v = _mm512_dpbusd_epi32(v, w.v, x.v); }
#else
    Lanes plus_int16(Lanes b) const {
        Lanes y;
        __asm__("vpaddw %2, %1, %0" : "=v"(y.v) : "v"(v), "v"(b.v));
        return y;
    }
    // gcc puts the intrinsics in an order in which sums no longer fit its registers.
    void add_dot_int16(Lanes a, Lanes b) { __asm__("vpdpwssd %2, %1, %0" : "+v"(v) : "v"(a.v), "v"(b.v)); }
    void add_dot_int8(Lanes w, Lanes x) { __asm__("vpdpbusd %2, %1, %0" : "+v"(v) : "v"(w.v), "v"(x.v)); }
#endif
    static Lanes bytes(Lanes w, Lanes x) {
        Lanes y = zero();
        y.add_dot_int8(w, x);
        return y;
    }
    Floats floats() const { return {_mm512_cvtepi32_ps(v)}; }
};

#else

using Floats = Float8;

struct Lanes {
    static constexpr int count = 8;
    __m256i v;
    static Lanes zero() { return {_mm256_setzero_si256()}; }
    static Lanes load(const int32_t *p) { return {_mm256_load_si256(reinterpret_cast<const __m256i *>(p))}; }
    static Lanes broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
    Lanes with(Lanes b) const { return {_mm256_add_epi32(v, b.v)}; }
    Floats floats() const { return {_mm256_cvtepi32_ps(v)}; }
    // gcc reorders the intrinsics until twelve sums no longer fit its sixteen registers: a third of the speed.
#if defined(__AVXVNNI__)
    void add_dot_int16(Lanes a, Lanes b) { __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(v) : "x"(a.v), "x"(b.v)); }
    void add_dot_int8(Lanes w, Lanes x) { __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(v) : "x"(w.v), "x"(x.v)); }
    static Lanes bytes(Lanes w, Lanes x) {
        Lanes y = zero();
        y.add_dot_int8(w, x);
        return y;
    }
#else
    void add_dot_int16(Lanes a, Lanes b) {
        __m256i t;
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(v), "=&x"(t) : "x"(a.v), "x"(b.v));
    }
    void add_dot_int8(Lanes w, Lanes x) {
        __m256i t;
        __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(v), "=&x"(t) : "x"(w.v), "x"(x.v));
    }
    static Lanes bytes(Lanes w, Lanes x) {
        Lanes y;
        __asm__("vpmaddubsw %2, %1, %0" : "=x"(y.v) : "x"(w.v), "x"(x.v));
        return y;
    }
#endif
};

#endif

// sums = (first ? 0 : sums) + v * scales * scale
inline void add_scaled(Floats v, Floats scales, float scale, bool first, float *sums) {
    scales.scale(scale);
    Floats s = first ? Floats::zero() : Floats::load(sums);
    s.add(v, scales);
    s.store(sums);
}

// Sums of groups, each times an integer (`factors`: as they are kept). With AVX2 that costs nothing, with VNNI float32 is as fast.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Totals {
    Floats v;
    static __m256i factors(__m256i x) { return _mm256_castps_si256(_mm256_cvtepi32_ps(x)); }
    static Totals zero() { return {Floats::zero()}; }
    void add(Lanes group, const int32_t *factors) { v.add(group.floats(), Floats::load(reinterpret_cast<const float *>(factors))); }
    Floats floats() const { return v; }
};
inline Floats whole(Lanes group) { return group.floats(); }
#else
struct Totals {
    Lanes v;
    static __m256i factors(__m256i x) { return twice(x); }
    static Totals zero() { return {Lanes::zero()}; }
    void add(Lanes group, const int32_t *factors) { v.add_dot_int16(group, Lanes::load(factors)); }
    Floats floats() const { return v.floats(); }
};
inline Floats whole(Lanes group) {
    Lanes sums = Lanes::zero();
    sums.v = _mm256_madd_epi16(group.v, _mm256_set1_epi16(1));
    return sums.floats();
}
#endif

}  // namespace
}  // namespace native
