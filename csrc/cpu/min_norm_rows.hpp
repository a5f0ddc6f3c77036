// The min-norm problem for rows of matrices.
#pragma once

#include "min_norm_lanes.hpp"

PAMA_BEGIN

inline long min_norm_scratch(int n) {
    return static_cast<long>(sizeof(double)) * (static_cast<long>(min_norm_workspace(n)) + n);
}

// Whether m may be a Gram matrix: symmetric to kGramTolerance of its largest diagonal entry, and positive definite once
// gram_ridge(n) times as much is added to the diagonal, which covers the rounding of any half type. A NaN or infinity
// passes: NaN is the result.
template <class T>
inline bool is_gram(int n, const T* m, long row, long column, double* workspace) {
    double largest = 0, poison = 0;
    for (long i = 0; i < n; ++i) {
        const double own = static_cast<double>(m[i * (row + column)]);
        largest = own > largest ? own : largest;
        poison += 0 * own;
    }
    const double unit = largest > 0 ? 1 / largest : 1, ridge = largest > 0 ? kGramTolerance * gram_ridge(n) : 0.0;
    min_norm::Problem p;
    p.bind(n, workspace);
    memset(p.scratch.rhs, 0, sizeof(double) * p.ld);
    memset(p.scratch.floor, 0, sizeof(double) * p.ld);
    bool symmetric = true, empty = true;
    for (long j = 0; j < ldlt::round_up_to_block(n); ++j) {
        double* PAMA_RESTRICT l = p.scratch.columns + j * p.ld;
        memset(l, 0, sizeof(double) * p.ld);
        if (j >= n) l[j] = 1;
        for (long i = j; i < n; ++i) {
            const double lower = static_cast<double>(m[i * row + j * column]) * unit;
            const double upper = static_cast<double>(m[j * row + i * column]) * unit;
            symmetric &= !(__builtin_fabs(lower - upper) > kGramTolerance);
            empty &= lower + upper == 0;
            poison += 0 * lower + 0 * upper;
            l[i] = 0.5 * (lower + upper);
        }
        if (j < n) l[j] += ridge;
    }
    if (poison != 0) return true;
    return symmetric && (largest > 0 ? ldlt::solve(n, p.ld, p.scratch, true) : empty);
}

template <class T>
inline long min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    double* c = static_cast<double*>(scratch);
    double* workspace = c + gram.n;
    const bool small = !present && gram.n >= min_norm::kSmallestInLanes && gram.n <= min_norm::kLargestInLanes &&
                       regularization <= 1.0;
    constexpr int lanes = Lanes<double>::count;
    for (long group = first; group < last; group += lanes) {
        const int used = static_cast<int>(last - group < lanes ? last - group : lanes);
        unsigned solved = 0;
        if (small && used > 1) solved = min_norm_lanes<DoubleV, T>(gram, prior, regularization, group, used);
        if (small && used == 1) solved = min_norm_lanes<double, T>(gram, prior, regularization, group, 1);
        for (int lane = 0; lane < used; ++lane) {
            if (solved >> lane & 1u) continue;
            const long row = group + lane;
            const T* matrix = static_cast<const T*>(gram.data) + row * gram.batch;
            if (gram.checked && !is_gram(gram.n, matrix, gram.row, gram.column, workspace)) return row;
            const MinNormResult result =
                min_norm_solve(gram.n, matrix, gram.row, gram.column, prior, present, regularization, c, workspace);
            T* weights = static_cast<T*>(gram.weights) + row * gram.n;
            for (int i = 0; i < gram.n; ++i) weights[i] = static_cast<T>(c[i]);
            static_cast<T*>(gram.optimum)[row] = static_cast<T>(result.optimum);
        }
    }
    return -1;
}

inline long min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    return gram.wide ? min_norm_rows<double>(gram, prior, present, regularization, first, last, scratch)
                     : min_norm_rows<float>(gram, prior, present, regularization, first, last, scratch);
}

PAMA_END
