// The batched solvers: many rows of the scalar problem, many matrices of the min-norm problem and UPGrad.
#include "../core/simplex.hpp"
#include "blocks.hpp"
#include "driver.hpp"

namespace pama {

namespace {

template <class Solve>
int64_t each_matrix(const Gram& gram, int64_t work, int threads, Solve solve) {
    const Kernels& k = kernels();
    const int64_t bytes = k.matrices->scratch_size(gram.n);
    const Blocks blocks(gram.rows, gram.rows * work, 1);
    std::vector<Refused> refused(static_cast<size_t>(blocks.count));
    for_each_block(blocks.count, blocks.threads(threads), [&](int64_t block) {
        refused[static_cast<size_t>(block)] = solve(k, blocks.first(block), blocks.last(block), scratch(bytes));
    });
    for (const Refused& r : refused)
        if (r) {
            if (r.residual != 0) throw_unsolved(r.row, r.residual);
            return r.row;
        }
    return -1;
}

}  // namespace

int64_t min_norm(const Gram& gram, const double* preference, double regularization, int threads) {
    const int64_t work = static_cast<int64_t>(gram.n) * gram.n;
    return each_matrix(gram, work, threads, [&](const Kernels& k, int64_t first, int64_t last, void* scratch) {
        return k.matrices->min_norm(gram, preference, regularization, first, last, scratch);
    });
}

int64_t upgrad(const Gram& gram, const double* preference, int threads) {
    const int64_t work = static_cast<int64_t>(gram.n) * gram.n * gram.n;  // UPGrad solves n problems per matrix
    return each_matrix(gram, work, threads, [&](const Kernels& k, int64_t first, int64_t last, void* scratch) {
        return k.matrices->upgrad(gram, preference, first, last, scratch);
    });
}

void weights(const ScoreRows& rows, const ScalarRule& rule, int threads) {
    const Kernels& k = kernels();
    const int n = rows.n;
    const Blocks blocks(rows.rows, rows.rows * n, 64);
    if (rows.scores.dtype == Dtype::f32 && n <= kLaneObjectives) {
        for_each_block(blocks.count, blocks.threads(threads), [&](int64_t block) {
            k.weights(rows, rule, blocks.first(block), blocks.last(block), scratch(k.scratch_size(n)));
        });
        return;
    }
    const auto solve = [&](auto zero) {
        using T = decltype(zero);
        for_each_block(blocks.count, blocks.threads(threads), [&](int64_t block) {
            double* a = static_cast<double*>(scratch(static_cast<int64_t>(sizeof(double)) * 3 * n));
            double *p = a + n, *c = p + n;
            for (int64_t row = blocks.first(block); row < blocks.last(block); ++row) {
                const T* source = static_cast<const T*>(rows.scores.data) + row * rows.scores.row;
                for (int i = 0; i < n; ++i) {
                    a[i] = static_cast<double>(source[i * rows.scores.objective]);
                    p[i] = rule.preference[i];
                    c[i] = 1;
                }
                const double size = rows.scale ? static_cast<const double*>(rows.scale.data)[row * rows.scale.row] : -1;
                static_cast<T*>(rows.optimum)[row] = static_cast<T>(simplex_row(n, a, p, rule.regularization, size, c));
                for (int i = 0; i < n; ++i) static_cast<T*>(rows.weights)[row * n + i] = static_cast<T>(c[i]);
            }
        });
    };
    if (rows.scores.dtype == Dtype::f64)
        solve(0.0);
    else
        solve(0.0f);
}

}  // namespace pama
