// Rows of the scalar problem and of the min-norm problem.
#include "../core/simplex.hpp"
#include "../core/upgrad.hpp"
#include "blocks.hpp"
#include "driver.hpp"

namespace pama {

long min_norm(const Gram& gram, const double* prior, double regularization, int threads) {
    const Kernels& k = kernels();
    const long bytes = k.min_norm_scratch(gram.n);
    const Blocks blocks(gram.rows, gram.rows * gram.n * gram.n, 1);
    std::vector<long> refused(static_cast<size_t>(blocks.count));
    for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
        refused[static_cast<size_t>(block)] =
            k.min_norm(gram, prior, nullptr, regularization, blocks.first(block), blocks.last(block), scratch(bytes));
    });
    for (long row : refused)
        if (row >= 0) return row;
    return -1;
}

int64_t upgrad(const Gram& gram, const double* preference, int threads) {
    const int n = gram.n;
    const Blocks blocks(gram.rows, gram.rows * n * n, 1);
    for_each_block(blocks.count, blocks.threads(threads), [&](int64_t block) {
        std::vector<double> c(static_cast<size_t>(n)), work(upgrad_workspace(n));
        for (int64_t row = blocks.first(block); row < blocks.last(block); ++row) {
            const auto solve = [&](auto zero) {
                using T = decltype(zero);
                const T* matrix = static_cast<const T*>(gram.data) + row * gram.batch;
                const auto solved =
                    upgrad_solve(n, matrix, gram.row, gram.column, preference, nullptr, c.data(), work.data());
                for (int i = 0; i < n; ++i)
                    static_cast<T*>(gram.weights)[row * n + i] = static_cast<T>(c[static_cast<size_t>(i)]);
                static_cast<T*>(gram.optimum)[row] = static_cast<T>(solved.optimum);
            };
            gram.wide ? solve(0.0) : solve(0.0f);
        }
    });
    return -1;
}

void weights(long rows, int n, const Array& scores, const double* prior, bool uniform, double regularization,
             const Array& scale, void* weights, void* optimum, int threads) {
    const Kernels& k = kernels();
    const Blocks blocks(rows, rows * n, 64);
    if (scores.dtype == Dtype::f32 && n <= kLaneObjectives) {
        for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
            const long first = blocks.first(block);
            k.weights(blocks.last(block) - first, n, static_cast<const float*>(scores.data) + first * scores.row,
                      scores.row, scores.objective, prior, uniform, regularization,
                      scale ? static_cast<const double*>(scale.data) + first * scale.row : nullptr, scale.row,
                      static_cast<float*>(weights) + first * n, static_cast<float*>(optimum) + first,
                      scratch(k.scratch_size(n)));
        });
        return;
    }
    const auto solve = [&](auto zero) {
        using T = decltype(zero);
        for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
            double* a = static_cast<double*>(scratch(static_cast<long>(sizeof(double)) * 3 * n));
            double *p = a + n, *c = p + n;
            for (long row = blocks.first(block); row < blocks.last(block); ++row) {
                const T* source = static_cast<const T*>(scores.data) + row * scores.row;
                for (int i = 0; i < n; ++i) {
                    a[i] = static_cast<double>(source[i * scores.objective]);
                    p[i] = prior[i];
                    c[i] = 1;
                }
                const double size = scale ? static_cast<const double*>(scale.data)[row * scale.row] : -1.0;
                static_cast<T*>(optimum)[row] = static_cast<T>(simplex_row(n, a, p, regularization, size, c));
                for (int i = 0; i < n; ++i) static_cast<T*>(weights)[row * n + i] = static_cast<T>(c[i]);
            }
        });
    };
    if (scores.dtype == Dtype::f64)
        solve(0.0);
    else
        solve(0.0f);
}

}  // namespace pama
