// A non-negative quadratic problem (nnqp.hpp) of few unknowns in registers, one problem per SIMD lane of V or a single
// problem, and its supports for active_set.hpp. The order of operations does not depend on the other lanes, so a
// problem gets the same bits in any lane.
#pragma once

#include "active_set.hpp"

PAMA_BEGIN
namespace nnqp {

template <class V, int N>
struct SmallSystem {
    using Mask = ldlt::Mask<V>;
    ldlt::Triangle<V, N> m;
    V shift[N], diagonal[N], target[N];
    V fixed_total = V{}, fixed_terms = V{};
    V inside[N], y[N], product[N];
    V value, total = V{} + 1.0, linear, terms;
    Mask enters[N], tied = V{} != V{};  // an index outside that could enter at no cost

    PAMA_HD Mask solve() {
        ldlt::Triangle<V, N> h;
        V inverse[N];
        return solve<false>(h, inverse);
    }
    // Leaves the factor of H on the support in h and inverse. Raise: a vanishing pivot is raised.
    template <bool Raise>
    PAMA_HD Mask solve(ldlt::Triangle<V, N>& h, V* inverse) {
        const V zero = V{}, one = zero + 1.0;
        V floor[N];
        for (int i = 0; i < N; ++i) {
            for (int j = 0; j < i; ++j) {
                const V both = m(i, j) + (shift[i] + shift[j]);
                h(i, j) = choose((inside[i] > zero) & (inside[j] > zero), both, zero);
            }
            h(i, i) = choose(inside[i] > zero, diagonal[i], one);
            floor[i] = (Raise ? kSmallestPivot : kSingularPivot) * h(i, i);
            y[i] = choose(inside[i] > zero, target[i], zero);
        }
        Mask regular = ldlt::factorise<V, N, Raise>(h, floor, y, inverse);
        if (Raise) regular = zero == zero;
        ldlt::substitute_back<V, N>(h, inverse, y);
        value = total = linear = terms = zero;
        for (int i = 0; i < N; ++i) {
            value += target[i] * y[i];
            total += y[i];
            linear += shift[i] * y[i];
            terms += diagonal[i] * choose(y[i] < zero, -y[i], y[i]);
        }
        return regular & (value >= zero) & (terms < kLargestDouble);
    }

    // product: M x.
    PAMA_HD void multiply(const V* x) {
        for (int j = 0; j < N; ++j) {
            product[j] = V{};
            for (int i = 0; i < N; ++i) product[j] += m.symmetric(j, i) * x[i];
        }
    }

    PAMA_HD V mark() {
        const V zero = V{}, one = zero + 1.0;
        V wrong = zero;
        tied = zero != zero;
        for (int i = 0; i < N; ++i) wrong += choose(y[i] < zero, one, zero);
        multiply(y);
        for (int j = 0; j < N; ++j) {
            const V multiplier = product[j] + linear + shift[j] * total - target[j];
            const V size = diagonal[j] * (total + fixed_total) + (terms + fixed_terms);
            enters[j] = (inside[j] == zero) & (multiplier < -kViolation * size);
            tied |= (inside[j] == zero) & (multiplier < kTie * size);
            wrong += choose(enters[j], one, zero);
        }
        return wrong;
    }

    PAMA_HD void flip(Mask active) {
        const V zero = V{}, one = zero + 1.0;
        for (int j = 0; j < N; ++j) {
            const V next = choose(enters[j], one, choose(y[j] < zero, zero, inside[j]));
            inside[j] = choose(active, next, inside[j]);
        }
    }
};

// The same with a ridge in `shift` and `diagonal`, so that a vanishing pivot is rounding. The factor is kept.
template <class V, int N>
struct RidgeSystem {
    SmallSystem<V, N>& s;
    ldlt::Triangle<V, N> h;
    V inverse[N];
    PAMA_HD ldlt::Mask<V> solve() { return s.template solve<true>(h, inverse); }
    PAMA_HD V mark() { return s.mark(); }
    PAMA_HD void flip(ldlt::Mask<V> active) { s.flip(active); }
};

}  // namespace nnqp
PAMA_END
