// SoftMin weights (RVPO, arXiv 2605.05750): c_i proportional to p_i exp(-a_i / temperature).
#pragma once

#include <cmath>

#include "numbers.hpp"

PAMA_BEGIN

// Solves one row, or one row per SIMD lane. a (n): values; p (n): preference; c (n): on input 1 for objectives that are
// included, else 0; on output the weights. If no objective is included, c = p. If the preferences of the included
// objectives sum to 0, a uniform preference is used. A NaN or infinity in an included objective makes all weights NaN.
// Returns sum c_i a_i.
template <class V>
PAMA_HD inline V softmin_solve(int n, const V* a, const double* p, double temperature, V* c) {
    typedef typename LaneOf<V>::type T;
    constexpr bool single = sizeof(T) == sizeof(float);
    constexpr double largest = single ? 3e38 : 1.7e308;
    const V zero = V{}, inverse = zero + static_cast<T>(1 / temperature < largest ? 1 / temperature : largest);
    const V least = zero - T(single ? 87 : 708);  // below this argument the exponential is no longer exact
    V mass = zero, count = zero, poison = zero, low = zero + static_cast<T>(INFINITY);
    for (int i = 0; i < n; ++i) {
        const auto here = c[i] > zero;
        poison += choose(here, zero * a[i], zero);
        count += c[i];
        mass += c[i] * static_cast<T>(p[i]);
    }
    for (int i = 0; i < n; ++i) {
        c[i] = choose(mass > zero, c[i] * static_cast<T>(p[i]), c[i]);
        low = choose(c[i] > zero, min_of(a[i], low), low);
    }
    V total = zero, optimum = zero;
    for (int i = 0; i < n; ++i) {
        const V x = choose(c[i] > zero, (low - a[i]) * inverse, zero);
        V k3;
        const V share = c[i] * choose(x < least, zero, exponential(x, k3));
        c[i] = share;
        total += share;
        optimum += choose(share > zero, share * a[i], zero);
    }
    const auto none = count == zero;
    for (int i = 0; i < n; ++i) c[i] = choose(none, zero + static_cast<T>(p[i]), c[i] / total + poison);
    return choose(none, zero, optimum / total + poison);
}

PAMA_END
