// What both attentions need: which keys a query sees, and softmax of its scores.
#pragma once

#include <algorithm>
#include <cmath>

#include "eight.h"
#include "kernels.h"

namespace native {
namespace {

constexpr int SCORES = 96 << 10;  // floats at once, of a thread: 384 KB, which stay in the second-level cache

// e^x for x <= 0, relative error below 2e-7; 0 below -87. Cephes' polynomial.
inline Eight exponential(Eight x) {
    const Eight n = (x * Eight::same(1.44269504088896341f)).rounded();
    Eight r = x, p = Eight::same(1.9875691500e-4f);
    r.add(n, Eight::same(-0.693359375f));
    r.add(n, Eight::same(2.12194440e-4f));
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        Eight next = Eight::same(c);
        next.add(p, r);
        p = next;
    }
    Eight e = r;
    e.add(p, r * r);
    return choose(x < Eight::same(-87), Eight::zero(), (e + Eight::same(1)) * n.power_of_two());
}

inline const uint16_t *halves(const char *p) { return reinterpret_cast<const uint16_t *>(p); }
inline const float *floats(const char *p) { return reinterpret_cast<const float *>(p); }

inline Eight half8(const uint16_t *p, int there) {
    if (there >= 8) return Eight::load(p);
    uint16_t padded[8] = {};
    for (int i = 0; i < there; i++) padded[i] = p[i];
    return Eight::load(padded);
}

inline const uint16_t *mask_of(const Attention &a, int query) { return halves(a.mask + query * a.mask_row); }

// First key behind all that queries from `first` on may see.
inline int visible(const Attention &a, int first, int queries) {
    for (int end = a.keys; end > 0; end--)
        for (int i = 0; i < queries; i++)
            if (mask_of(a, first + i)[end - 1] != 0xfc00) return end;
    return 0;
}

// Scores -> e^(score + mask - maximum), in place; returns one over their sum. `all` of the `keys` scores are of keys.
// The sum is the same wherever the keys lie, with hidden ones between them or not, because it is one of whole numbers:
// multiples of 2^-30 of the largest.
inline float soften(const uint16_t *mask, float *row, int keys, int all) {
    const Eight none = Eight::same(-INFINITY);
    Eight most = none;
    Where lost = Where::first(0);  // NaN, which maxima do not show
    for (int j = 0; j < keys; j += 8) {
        const Eight hides = half8(mask + j, all - j);
        Eight s = choose(hides == none, none, Eight::load(row + j) + hides);  // whatever the score
        if (all - j < 8) s = choose(Where::first(all - j), s, none);
        s.store(row + j);
        most = larger(s, most);
        lost = lost | is_nan(s);
    }
    const float maximum = most.largest();
    if (lost.any() || maximum == -INFINITY) {  // the latter: no key is visible
        std::fill(row, row + keys, 0.0f);
        return lost.any() ? NAN : 0;
    }
    Whole total;
    for (int j = 0; j < keys; j += 8) {
        const Eight e = exponential(Eight::load(row + j) - Eight::same(maximum));
        e.store(row + j);
        total.add(e * Eight::same(1 << 30));
    }
    return float(double(1 << 30) / double(total.sum()));
}

}  // namespace
}  // namespace native
