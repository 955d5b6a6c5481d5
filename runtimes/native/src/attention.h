// Shared by both attention kernels: visible keys of a query, and softmax of its scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "float8.h"
#include "kernels.h"

namespace native {
namespace {

constexpr int SCORES = 96 << 10;  // scores per thread at once, in floats: 384 KB, which fit the L2 cache

// e^x for x <= 0, relative error below 2e-7; 0 below -87. Cephes' polynomial.
inline Float8 exponential(Float8 x) {
    const Float8 n = (x * Float8::broadcast(1.44269504088896341f)).rounded();
    Float8 r = x, p = Float8::broadcast(1.9875691500e-4f);
    r.add(n, Float8::broadcast(-0.693359375f));
    r.add(n, Float8::broadcast(2.12194440e-4f));
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        Float8 next = Float8::broadcast(c);
        next.add(p, r);
        p = next;
    }
    Float8 e = r;
    e.add(p, r * r);
    return select(x < Float8::broadcast(-87), Float8::zero(), (e + Float8::broadcast(1)) * n.power_of_two());
}

inline const uint16_t *halves(const char *p) { return reinterpret_cast<const uint16_t *>(p); }
inline const float *floats(const char *p) { return reinterpret_cast<const float *>(p); }

// Rows of the KV cache, eight values of which `load` returns as float32.
struct Halves { const char *p; };
struct Blocks { const char *p; };  // Q8_0: a float16 scale and 32 int8 each

inline Float8 load(const float *row, int d) { return Float8::load(row + d); }
inline Float8 load(Halves row, int d) { return Float8::load(halves(row.p) + d); }
inline Float8 load(Blocks row, int d) {
    const char *block = row.p + d / 32 * 34;
    return Float8::load(reinterpret_cast<const int8_t *>(block + 2) + d % 32) * Float8::broadcast_half(block);
}

inline Float8 load_half8(const uint16_t *p, int there) {
    if (there >= 8) return Float8::load(p);
    uint16_t padded[8] = {};
    for (int i = 0; i < there; i++) padded[i] = p[i];
    return Float8::load(padded);
}

inline const uint16_t *query_mask(const Attention &a, int query) { return halves(a.mask + query * a.mask_row); }

// Whether a query may attend to any of `count` keys.
inline bool any_visible(const uint16_t *mask, int count) {
    constexpr uint64_t HIDDEN = 0xfc00fc00fc00fc00;  // four times -infinity
    int j = 0;
    for (; j + 4 <= count; j += 4) {
        uint64_t four;
        memcpy(&four, mask + j, sizeof four);
        if (four != HIDDEN) return true;
    }
    for (; j < count; j++)
        if (mask[j] != 0xfc00) return true;
    return false;
}

// One past the last key that any of the queries from `first` on may attend to.
inline int visible_keys(const Attention &a, int first, int queries) {
    for (int end = a.keys; end > 0; end--)
        for (int i = 0; i < queries; i++)
            if (query_mask(a, first + i)[end - 1] != 0xfc00) return end;
    return 0;
}

// Scores -> e^(score + mask - maximum), in place; returns one over their sum. Only `all` of the `keys` scores are of keys, the
// rest is padding. The sum does not depend on the keys' places or on masked ones between them, because it is computed in
// integers, as multiples of 2^-30 of the largest.
inline float softmax(const uint16_t *mask, float *row, int keys, int all) {
    const Float8 hidden = Float8::broadcast(-INFINITY);
    Float8 largest = hidden;
    Mask8 nan = Mask8::first(0);  // NaN, which the maximum ignores
    for (int j = 0; j < keys; j += 8) {
        const Float8 mask_values = load_half8(mask + j, all - j);
        Float8 s = select(mask_values == hidden, hidden, Float8::load(row + j) + mask_values);  // even if the score is NaN
        if (all - j < 8) s = select(Mask8::first(all - j), s, hidden);
        s.store(row + j);
        largest = elementwise_max(s, largest);
        nan = nan | is_nan(s);
    }
    const float maximum = largest.reduce_max();
    if (nan.any() || maximum == -INFINITY) {  // the latter: all keys are masked
        std::fill(row, row + keys, 0.0f);
        return nan.any() ? NAN : 0;
    }
    ExactSum total;
    for (int j = 0; j < keys; j += 8) {
        const Float8 e = exponential(Float8::load(row + j) - Float8::broadcast(maximum));
        e.store(row + j);
        total.add(e * Float8::broadcast(1 << 30));
    }
    return float(double(1 << 30) / double(total.sum()));
}

}  // namespace
}  // namespace native
