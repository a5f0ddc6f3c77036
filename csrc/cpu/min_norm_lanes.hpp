// Small min-norm problems: the exchange of core/min_norm.hpp with its certificate, one matrix per SIMD lane (V =
// DoubleV) or one alone (V = double), in the same order of operations, so to the same bits, whatever is in the other
// lanes; no sum has two products, of which compilers could fuse one or the other. What needs more than the exchange (a
// singular support, a tie, a number that is not finite, no Gram matrix) is left to the general solver.
#pragma once

#include <utility>

#include "../core/min_norm.hpp"
#include "../core/simplex.hpp"
#include "simd.hpp"

PAMA_BEGIN

// How far a matrix may be from symmetric, of its largest diagonal entry; and, times gram_ridge(n), from positive
// semidefinite: noise has a norm of sqrt(n).
constexpr double kGramTolerance = 0.02;
inline double gram_ridge(int n) { return 1.0 + 0.25 * __builtin_sqrt(n); }

namespace min_norm {

constexpr int kSmallestInLanes = 3, kLargestInLanes = 12;  // objectives
template <class V>
using Mask = decltype(V{} < V{});

// The lower triangle of a symmetric N x N matrix per lane, by rows.
template <class V, int N>
struct LaneMatrix {
    V entry[N * (N + 1) / 2];
    V& operator()(int i, int j) { return entry[i * (i + 1) / 2 + j]; }
    const V& symmetric(int i, int j) const { return i > j ? entry[i * (i + 1) / 2 + j] : entry[j * (j + 1) / 2 + i]; }
};

// L D L' of h in place (columns hold L D below the diagonal) with y solved along; `inverse` receives 1 / D. Which
// lanes had every pivot above its floor; the others hold no meaningful numbers.
template <class V, int N>
inline Mask<V> factorise(LaneMatrix<V, N>& h, const V* floor, V* y, V* inverse) {
    Mask<V> regular = V{} == V{};
    PAMA_UNROLL
    for (int k = 0; k < N; ++k) {
        regular &= h(k, k) > floor[k];
        inverse[k] = 1.0 / h(k, k);
        PAMA_UNROLL
        for (int i = k + 1; i < N; ++i) {
            const V l = h(i, k) * inverse[k];
            PAMA_UNROLL
            for (int j = k + 1; j <= i; ++j) h(i, j) -= l * h(j, k);
            if (y) y[i] -= l * y[k];
        }
    }
    return regular;
}

// As is_gram, on what is symmetric already.
template <class V, int N>
inline Mask<V> nearly_semidefinite(LaneMatrix<V, N> h, V ridge) {
    V inverse[N], floor[N] = {};
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) h(i, i) += ridge;
    return factorise<V, N>(h, floor, nullptr, inverse);
}

// full: N x N entries, scaled so that 1 <= `largest` < 2, their largest diagonal entry. c: N weights. Whether solved.
template <class V, int N>
inline Mask<V> solve_lanes(const V* full, V largest, const double* prior, double regularization, bool checked, V* c,
                           V* optimum) {
    const V zero = V{}, one = zero + 1.0;
    const Mask<V> no = zero != zero;
    Mask<V> ok = largest > zero;
    V smallest = full[0], poison = zero;
    LaneMatrix<V, N> m;
    for (int i = 0; i < N; ++i) {
        smallest = min_of(full[i * (N + 1)], smallest);
        for (int j = 0; j <= i; ++j) {
            const V lower = full[i * N + j], upper = full[j * N + i], gap = lower - upper;
            m(i, j) = 0.5 * lower + 0.5 * upper;
            poison += 0.0 * m(i, j);
            if (checked) ok &= (gap <= largest * kGramTolerance) & (gap >= -(largest * kGramTolerance));
        }
    }
    ok &= poison == zero;
    if (checked) ok &= nearly_semidefinite<V, N>(m, largest * (kGramTolerance * gram_ridge(N)));

    const V rho = largest * regularization;
    if (regularization > 0.0)  // duplicates are averaged elsewhere
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < i; ++j) {
                const Mask<V> differs = m(i, j) != m(i, i), too = m(i, j) != m(j, j);
                ok &= differs | too;
            }
    double norm2 = 0.0;
    for (int i = 0; i < N; ++i) norm2 += prior[i] * prior[i];
    const V sigma = smallest + rho;
    ok &= sigma > kSmallestSigma;
    V shift[N], diagonal[N], inside[N], y[N], product[N];
    V mean = zero;
    for (int i = 0; i < N; ++i) {
        shift[i] = 0.5 * (sigma + rho * (norm2 - 2.0 * prior[i]));
        diagonal[i] = m(i, i) + 2.0 * shift[i] + rho;
        product[i] = zero;
        for (int j = 0; j < N; ++j) product[i] += m.symmetric(i, j);
        mean += product[i];
    }
    mean /= static_cast<double>(N);
    for (int i = 0; i < N; ++i) inside[i] = product[i] - mean <= m(i, i) + rho ? one : zero;

    Mask<V> active = ok, optimal = no;
    V fewest = zero + (N + 1.0), spare = zero + kSpareExchanges, total = one;
    while (any(active)) {
        LaneMatrix<V, N> h;
        V floor[N], inverse[N];
        for (int i = 0; i < N; ++i) {
            for (int j = 0; j < i; ++j) {
                const V both = m(i, j) + (shift[i] + shift[j]);
                h(i, j) = ((inside[i] > zero) & (inside[j] > zero)) ? both : zero;
            }
            h(i, i) = inside[i] > zero ? diagonal[i] : one;
            floor[i] = kSingularPivot * h(i, i);
            y[i] = inside[i];
        }
        Mask<V> sound = factorise<V, N>(h, floor, y, inverse);
        PAMA_UNROLL
        for (int k = N - 1; k >= 0; --k) {
            PAMA_UNROLL
            for (int i = k + 1; i < N; ++i) y[k] -= h(i, k) * y[i];
            y[k] *= inverse[k];
        }
        V linear = zero, terms = zero, wrong = zero;
        total = zero;
        for (int i = 0; i < N; ++i) {
            total += y[i];
            linear += shift[i] * y[i];
            terms += diagonal[i] * (y[i] < zero ? -y[i] : y[i]);
            wrong += y[i] < zero ? one : zero;
        }
        Mask<V> enters[N], tied = no;
        for (int j = 0; j < N; ++j) {
            product[j] = zero;
            for (int i = 0; i < N; ++i) product[j] += m.symmetric(j, i) * y[i];
            const V multiplier = product[j] + linear + shift[j] * total - 1.0;
            const V unit = diagonal[j] * total + terms;
            enters[j] = (inside[j] == zero) & (multiplier < -kViolation * unit);
            tied |= (inside[j] == zero) & (multiplier < kTie * unit);
            wrong += enters[j] ? one : zero;
        }
        sound &= (total > zero) & (total < kLargestDouble);
        active &= sound;
        const Mask<V> done = active & (wrong == zero);
        optimal |= done & ((tied == no) | (rho >= kRidge));
        active &= wrong != zero;
        spare -= wrong < fewest ? zero : one;
        fewest = min_of(wrong, fewest);
        active &= spare >= zero;
        for (int j = 0; j < N; ++j) {
            const V next = enters[j] ? one : (y[j] < zero ? zero : inside[j]);
            inside[j] = active ? next : inside[j];
        }
    }
    const V share = 1.0 / total;
    V value = zero, along = zero, least = zero + kLargestDouble;
    for (int i = 0; i < N; ++i) {
        c[i] = y[i] * share;
        const V own = product[i] * share, gradient = own + rho * (c[i] - prior[i]);
        value += c[i] * own;
        along += c[i] * gradient;
        least = min_of(gradient, least);
    }
    *optimum = value;
    return optimal & (along - least <= kCertified * (1.0 + rho));
}

inline bool lane_of(bool mask, int) { return mask; }
template <class M>
inline bool lane_of(const M& mask, int lane) {
    return mask[lane] != 0;
}

// Calls visit(integral constant N) with N = n.
template <int N, class Visit>
inline auto with_size(int n, Visit visit) {
    if constexpr (N > kSmallestInLanes)
        if (n < N) return with_size<N - 1>(n, visit);
    return visit(std::integral_constant<int, N>{});
}

}  // namespace min_norm

// Solves `used` matrices from `first` on, as far as they can be solved here: a bit for each that was.
template <class V, class T>
inline unsigned min_norm_lanes(const Gram& gram, const double* prior, double regularization, long first, int used) {
    using namespace min_norm;
    constexpr int lanes = sizeof(V) / sizeof(double);
    const int n = gram.n;
    alignas(V) double full[kLargestInLanes * kLargestInLanes * lanes], c[kLargestInLanes * lanes];
    alignas(V) double largest[lanes], optimum[lanes], scales[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        const T* from = static_cast<const T*>(gram.data) + (first + (lane < used ? lane : 0)) * gram.batch;
        double diagonal = 0.0;
        for (int i = 0; i < n; ++i) {
            const double own = static_cast<double>(from[i * (gram.row + gram.column)]);
            diagonal = own > diagonal ? own : diagonal;
        }
        const double scale = diagonal > 0.0 && diagonal <= kLargestDouble ? power_of_two_scale(diagonal) : 0.0;
        scales[lane] = scale;
        largest[lane] = diagonal * scale;
        double* to = full + lane;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j, to += lanes)
                *to = static_cast<double>(from[i * gram.row + j * gram.column]) * scale;
    }
    const V* const entries = reinterpret_cast<const V*>(full);
    const Mask<V> solved = with_size<kLargestInLanes>(n, [&](auto size) {
        return solve_lanes<V, size>(entries, *reinterpret_cast<const V*>(largest), prior, regularization, gram.checked,
                                    reinterpret_cast<V*>(c), reinterpret_cast<V*>(optimum));
    });
    unsigned bits = 0;
    for (int lane = 0; lane < used; ++lane) {
        if (!lane_of(solved, lane)) continue;
        bits |= 1u << lane;
        T* weights = static_cast<T*>(gram.weights) + (first + lane) * n;
        for (int i = 0; i < n; ++i) weights[i] = static_cast<T>(c[i * lanes + lane]);
        static_cast<T*>(gram.optimum)[first + lane] = static_cast<T>(optimum[lane] / scales[lane]);
    }
    return bits;
}

PAMA_END
