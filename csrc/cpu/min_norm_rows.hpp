// The min-norm problem for rows of matrices.
#pragma once

#include "../core/min_norm.hpp"
#include "problem.hpp"

PAMA_BEGIN

inline long min_norm_scratch(int n) {
    return static_cast<long>(sizeof(double)) * (static_cast<long>(min_norm_workspace(n)) + n);
}

template <class T>
inline void min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    double* c = static_cast<double*>(scratch);
    double* workspace = c + gram.n;
    for (long row = first; row < last; ++row) {
        const T* matrix = static_cast<const T*>(gram.data) + row * gram.batch;
        const MinNormResult result =
            min_norm_solve(gram.n, matrix, gram.row, gram.column, prior, present, regularization, c, workspace);
        T* weights = static_cast<T*>(gram.weights) + row * gram.n;
        for (int i = 0; i < gram.n; ++i) weights[i] = static_cast<T>(c[i]);
        static_cast<T*>(gram.optimum)[row] = static_cast<T>(result.optimum);
    }
}

inline void min_norm_rows(const Gram& gram, const double* prior, const unsigned char* present, double regularization,
                          long first, long last, void* scratch) {
    if (gram.wide)
        min_norm_rows<double>(gram, prior, present, regularization, first, last, scratch);
    else
        min_norm_rows<float>(gram, prior, present, regularization, first, last, scratch);
}

PAMA_END
