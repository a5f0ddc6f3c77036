// Whether a matrix may be a Gram matrix: symmetric to kGramTolerance of its largest diagonal entry, and positive
// definite once gram_ridge(n) times as much is added to the diagonal, which covers the rounding of any half type. A NaN
// or infinity passes: NaN is the result.
#pragma once

#include "nnqp.hpp"

PAMA_BEGIN

constexpr double kGramTolerance = 0.02;
inline double gram_ridge(int n) {
    return 1.0 + 0.25 * std::sqrt(static_cast<double>(n));
}  // noise has a norm of sqrt(n)

template <class T>
PAMA_OUT_OF_LINE inline bool is_gram(int n, const T* m, std::ptrdiff_t row, std::ptrdiff_t column, double* workspace) {
    double largest = 0, poison = 0;
    for (int i = 0; i < n; ++i) {
        const double own = static_cast<double>(m[i * (row + column)]);
        largest = own > largest ? own : largest;
        poison += 0 * own;
    }
    const nnqp::Scale scale(largest);
    const double lift = scale.lift, power = largest > 0 ? scale.power / scale(largest) : scale.power;
    const double ridge = largest > 0 ? kGramTolerance * gram_ridge(n) : 0.0;
    nnqp::System p;
    p.bind(n, workspace);
    for (int i = 0; i < p.ld; ++i) p.scratch.rhs[i] = p.scratch.floor[i] = 0.0;
    bool symmetric = true, empty = true;
    for (int j = 0; j < ldlt::round_up_to_block(n); ++j) {
        double* PAMA_RESTRICT l = p.scratch.columns + static_cast<std::ptrdiff_t>(j) * p.ld;
        for (int i = j / ldlt::kBlock * ldlt::kBlock; i < j; ++i) l[i] = 0.0;
        for (int i = j < n ? n : j; i < p.ld; ++i) l[i] = 0.0;
        if (j >= n) l[j] = 1;
        for (int i = j; i < n; ++i) {
            const double lower = static_cast<double>(m[i * row + j * column]) * lift * power;
            const double upper = static_cast<double>(m[j * row + i * column]) * lift * power;
            symmetric &= !(std::fabs(lower - upper) > kGramTolerance);
            empty &= lower + upper == 0;
            poison += 0 * lower + 0 * upper;
            l[i] = 0.5 * (lower + upper);
        }
        if (j < n) l[j] += ridge;
    }
    if (poison != 0) return true;
    return symmetric && (largest > 0 ? ldlt::solve<false>(n, p.ld, p.scratch, true) : empty);
}

// The same for few unknowns; the matrix is symmetric already.
template <class V, int N>
inline ldlt::Mask<V> nearly_semidefinite(ldlt::Triangle<V, N> h, V ridge) {
    V inverse[N], floor[N] = {};
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) h(i, i) += ridge;
    return ldlt::factorise<V, N>(h, floor, static_cast<V*>(nullptr), inverse);
}

PAMA_END
