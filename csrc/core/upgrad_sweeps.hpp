// The first supports of UPGrad's projections (upgrad.hpp), on a CPU: sweeps of projected coordinate descent over all
// projections at once, in float32 vectors of projections. A sweep is a product of two n x n matrices, and takes a small
// part of the time of the systems that a better support saves. They need not converge: the search is exact from any
// support.
#pragma once

#include "upgrad_problem.hpp"

#if !defined(__CUDACC__) && defined(__GNUC__)
PAMA_BEGIN
namespace upgrad {

typedef float Floats __attribute__((vector_size(8 * ldlt::kLanes), aligned(4), may_alias));
typedef std::int32_t Flips __attribute__((vector_size(8 * ldlt::kLanes)));

constexpr int kSweeps = 10;              // without multipliers
constexpr double kSettled = 1.0 / 256;   // share of the x that may still become positive, or 0, in the last sweep
constexpr int kRounds = 20;              // of a sweep pair and an update of the multipliers, on a singular matrix
constexpr double kSweepRidge = 0.01;     // of these rounds, over M_ii
constexpr float kOverrelaxation = 1.4f;  // the same

// Vectors of projections from `first` on; the last of them may be of one vector.
struct Sweeps {
    static constexpr int kFloats = 2 * ldlt::kLanes, kWidth = 2 * kFloats, kRows = 4;
    int n, rows, columns;
    float *matrix, *x, *linear, *ridge, *inverse;  // M, by rows of `columns`; b; 1 / H_jj
    float* lower;                                  // M x of the rows above

    static int padded(int n, int to) { return (n + to - 1) / to * to; }
    static std::size_t size(int n) {
        const std::size_t rows = padded(n, kRows), columns = padded(n, kFloats);
        return (4 * rows + 2) * columns;
    }

    Sweeps(const Problem& s, float* memory) : n(s.n), rows(padded(n, kRows)), columns(padded(n, kFloats)) {
        const std::ptrdiff_t all = static_cast<std::ptrdiff_t>(rows) * columns;
        matrix = memory;
        x = matrix + all;
        linear = x + all;
        lower = linear + all;
        ridge = lower + all;
        inverse = ridge + columns;
        for (int j = 0; j < rows; ++j)
            for (int k = 0; k < columns; ++k)
                matrix[j * columns + k] = j < n && k < n ? static_cast<float>(s.row_of(j)[k]) : 0.0f;
        for (int first = 0; first < n; first += kWidth)
            for (int j = 0, width = width_of(first); j < rows; ++j)
                for (int k = 0; k < width; ++k) {
                    x[first * rows + j * width + k] = 0.0f;
                    linear[first * rows + j * width + k] = -matrix[j * columns + first + k];
                }
    }
    // x_j of projection i is at x[place(i) + j * width_of(i)].
    int width_of(int i) const { return min_of(columns - i / kWidth * kWidth, static_cast<int>(kWidth)); }
    int place(int i) const { return i / kWidth * kWidth * rows + i % kWidth; }

    static Floats& at(float* p) { return *reinterpret_cast<Floats*>(p); }
    static const Floats& at(const float* p) { return *reinterpret_cast<const Floats*>(p); }

    void weigh(const Problem& s, double factor, float relaxation) {
        for (int j = 0; j < rows; ++j) {
            ridge[j] = j < n ? static_cast<float>(factor * s.centre[j]) : 0.0f;
            inverse[j] = j < n ? relaxation / (matrix[j * columns + j] + ridge[j]) : 0.0f;
        }
    }

    // The rows j and following of M x, for the x from `from` up to `to`.
    template <int Vectors>
    void multiply(int first, int j, int from, int to, Floats (&sum)[kRows][Vectors]) const {
        const float *own = x + first * rows + from * Vectors * kFloats, *const m = matrix + j * columns;
        for (int k = from; k < to; ++k, own += Vectors * kFloats) {
            Floats other[Vectors];
            for (int v = 0; v < Vectors; ++v) other[v] = at(own + v * kFloats);
            PAMA_UNROLL
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < Vectors; ++v) sum[r][v] += m[r * columns + k] * other[v];
        }
    }

    enum class Kind { from_zero, plain, splits, updates };

    // Returns how many x became positive, or 0.
    template <Kind K>
    int sweep() {
        Flips flips = {};
        for (int first = 0; first < n; first += kWidth)
            if (width_of(first) > kFloats)
                sweep<K, 2>(first, flips);
            else
                sweep<K, 1>(first, flips);
        int count = 0;
        for (int lane = 0; lane < kFloats; ++lane) count += flips[lane];
        return count;
    }

    // Kind::updates is a step of the method of multipliers: it first adds -M (e_i + x) to b. With a ridge, the sweeps
    // then approach the minimiser nearest to 0, at a rate that does not depend on how small the eigenvalues of M are.
    // M x is what the sweep before has found from the rows above, and this one finds from the others before it changes
    // them: the sweep before has to be of Kind::splits.
    template <Kind K, int Vectors>
    void sweep(int first, Flips& flips) {
        constexpr int width = Vectors * kFloats;
        constexpr bool updates = K == Kind::updates, splits = updates || K == Kind::splits;
        for (int j = 0; j < rows; j += kRows) {
            float* const own = x + first * rows + j * width;
            float *const b = linear + (own - x), *const above = lower + (own - x);
            const float* const row = matrix + j * columns;
            Floats sum[kRows][Vectors] = {}, change[kRows][Vectors];
            if (splits) multiply<Vectors>(first, j, 0, j, sum);
            for (int r = 0; splits && r < kRows; ++r)
                for (int v = 0; v < Vectors; ++v) {
                    const int to = r * width + v * kFloats;
                    if (updates) at(b + to) -= at(above + to) + at(row + r * columns + first + v * kFloats);
                    at(above + to) = sum[r][v];
                }
            multiply<Vectors>(first, j, splits ? j : 0, K == Kind::from_zero ? j : rows, sum);
            PAMA_UNROLL
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < Vectors; ++v) {
                    const int to = r * width + v * kFloats;
                    Floats& old = at(own + to);
                    if (updates) at(b + to) -= sum[r][v] - at(above + to);
                    Floats g = sum[r][v] - at(b + to) + ridge[j + r] * old;
                    for (int q = 0; q < r; ++q) g += row[r * columns + j + q] * change[q][v];
                    const Floats next = old - g * inverse[j + r], now = next > 0.0f ? next : Floats{};
                    flips -= (old > 0.0f) ^ (now > 0.0f);
                    change[r][v] = now - old;
                    old = now;
                }
        }
    }
};

}  // namespace upgrad
PAMA_END
#endif
