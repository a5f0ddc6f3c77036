// The min-norm problem and UPGrad for rows of matrices.
#pragma once

#include "../core/upgrad.hpp"
#include "min_norm_lanes.hpp"

PAMA_BEGIN

// For both solvers: UPGrad needs more.
inline int64_t solver_scratch(int n) {
    return static_cast<int64_t>(sizeof(double)) * (static_cast<int64_t>(upgrad_workspace(n)) + n);
}

// Checks each matrix and solves it with solve(matrix, c). Of the first 32, bits of `skip` are set for those that are
// solved already, and of `passed` for those that are checked.
template <class T, class Solve>
inline Refused solve_matrices(const Gram& gram, int64_t first, int64_t last, unsigned skip, unsigned passed, double* c,
                              double* workspace, Solve solve) {
    for (int64_t row = first; row < last; ++row) {
        if (skip && (skip >> (row - first) & 1u)) continue;
        const bool checked = gram.checked && !(passed && (passed >> (row - first) & 1u));
        const T* matrix = static_cast<const T*>(gram.data) + row * gram.batch;
        if (checked && !is_gram(gram.n, matrix, gram.row, gram.column, workspace)) return {row, 0.0};
        const SolverResult result = solve(matrix, c);
        if (unsolved(result)) return {row, result.residual};
        T* weights = static_cast<T*>(gram.weights) + row * gram.n;
        for (int i = 0; i < gram.n; ++i) weights[i] = static_cast<T>(c[i]);
        static_cast<T*>(gram.optimum)[row] = static_cast<T>(result.optimum);
    }
    return {};
}

template <class T>
inline Refused min_norm_rows(const Gram& gram, const double* preference, double regularization, int64_t first,
                             int64_t last, void* scratch) {
    double* c = static_cast<double*>(scratch);
    double* workspace = c + gram.n;
    const bool small = min_norm::is_small(gram.n, regularization);
    constexpr int lanes = Lanes<double>::count;
    for (int64_t group = first; group < last; group += lanes) {
        const int used = static_cast<int>(last - group < lanes ? last - group : lanes);
        unsigned solved = 0, passed = 0;
        if (small && used > 1)
            solved = min_norm_lanes<DoubleV, T>(gram, preference, regularization, group, used, &passed);
        if (small && used == 1) solved = min_norm_one(gram, preference, regularization, group, &passed);
        const Refused refused = solve_matrices<T>(
            gram, group, group + used, solved, passed, c, workspace, [&](const T* matrix, double* out) {
                const MatrixView<T> view = {gram.n, matrix, gram.row, gram.column};
                return gram.n == 2 ? min_norm_pair(view, preference, regularization, out)
                                   : min_norm::solve_general(view, preference, nullptr, regularization, out, workspace);
            });
        if (refused) return refused;
    }
    return {};
}

inline Refused min_norm_rows(const Gram& gram, const double* preference, double regularization, int64_t first,
                             int64_t last, void* scratch) {
    return gram.wide ? min_norm_rows<double>(gram, preference, regularization, first, last, scratch)
                     : min_norm_rows<float>(gram, preference, regularization, first, last, scratch);
}

template <class T>
inline Refused upgrad_rows(const Gram& gram, const double* preference, int64_t first, int64_t last, void* scratch) {
    double* c = static_cast<double*>(scratch);
    double* workspace = c + gram.n;
    return solve_matrices<T>(gram, first, last, 0, 0, c, workspace, [&](const T* matrix, double* out) {
        const MatrixView<T> view = {gram.n, matrix, gram.row, gram.column};
        return upgrad_solve(view, preference, nullptr, out, workspace);
    });
}

inline Refused upgrad_rows(const Gram& gram, const double* preference, int64_t first, int64_t last, void* scratch) {
    return gram.wide ? upgrad_rows<double>(gram, preference, first, last, scratch)
                     : upgrad_rows<float>(gram, preference, first, last, scratch);
}

PAMA_END
