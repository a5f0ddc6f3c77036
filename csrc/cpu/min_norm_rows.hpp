// The min-norm problem for rows of matrices.
#pragma once

#include "../core/min_norm.hpp"
#include "problem.hpp"

PAMA_BEGIN

inline long min_norm_scratch(int n) {
    return static_cast<long>(sizeof(double)) * (static_cast<long>(min_norm_workspace(n)) + n);
}

// Whether m may be a Gram matrix: symmetric to 2% of its largest diagonal entry, and positive definite once that much
// (more for large matrices: noise has a norm of sqrt(n)) is added to the diagonal, which covers the rounding of any
// half type. By LDL', column by column. A NaN or infinity passes: NaN is the result.
template <class T>
inline bool is_gram(int n, const T* m, long row, long column, double* PAMA_RESTRICT l) {
    double largest = 0, poison = 0;
    for (long i = 0; i < n; ++i) {
        const double own = static_cast<double>(m[i * (row + column)]);
        largest = own > largest ? own : largest;
        poison += 0 * own;
    }
    const double unit = largest > 0 ? 1 / largest : 1, tolerance = 0.02,
                 ridge = tolerance * (1 + 0.25 * __builtin_sqrt(n));
    bool symmetric = true;
    for (long j = 0; j < n; ++j)
        for (long i = j; i < n; ++i) {
            const double lower = static_cast<double>(m[i * row + j * column]) * unit;
            const double upper = static_cast<double>(m[j * row + i * column]) * unit;
            symmetric &= !(__builtin_fabs(lower - upper) > tolerance);
            poison += 0 * lower + 0 * upper;
            l[j * n + i] = 0.5 * (lower + upper) + (i == j && largest > 0 ? ridge : 0.0);
        }
    if (poison != 0) return true;
    if (!symmetric) return false;
    if (largest == 0) {  // then nothing else may be there
        for (long j = 0; j < n; ++j)
            for (long i = j; i < n; ++i)
                if (l[j * n + i] != 0) return false;
        return true;
    }
    for (long j = 0; j < n; ++j) {
        const double* PAMA_RESTRICT from = l + j * n;
        if (from[j] <= 0) return false;
        for (long k = j + 1; k < n; ++k) {
            const double factor = from[k] / from[j];
            double* PAMA_RESTRICT to = l + k * n;
#pragma omp simd
            for (long i = k; i < n; ++i) to[i] -= factor * from[i];
        }
    }
    return true;
}

template <class T>
inline long min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    double* c = static_cast<double*>(scratch);
    double* workspace = c + gram.n;
    for (long row = first; row < last; ++row) {
        const T* matrix = static_cast<const T*>(gram.data) + row * gram.batch;
        if (gram.checked && !is_gram(gram.n, matrix, gram.row, gram.column, workspace)) return row;
        const MinNormResult result =
            min_norm_solve(gram.n, matrix, gram.row, gram.column, prior, present, regularization, c, workspace);
        T* weights = static_cast<T*>(gram.weights) + row * gram.n;
        for (int i = 0; i < gram.n; ++i) weights[i] = static_cast<T>(c[i]);
        static_cast<T*>(gram.optimum)[row] = static_cast<T>(result.optimum);
    }
    return -1;
}

inline long min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    return gram.wide ? min_norm_rows<double>(gram, prior, present, regularization, first, last, scratch)
                     : min_norm_rows<float>(gram, prior, present, regularization, first, last, scratch);
}

PAMA_END
