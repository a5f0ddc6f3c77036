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

// x_j of projection i at x[place(i) + j * kWidth].
struct Sweeps {
    static constexpr int kFloats = 2 * ldlt::kLanes, kVectors = 2, kWidth = kVectors * kFloats, kRows = 4;
    int n, rows, columns;
    float *matrix, *x, *linear, *ridge, *inverse;  // M, by rows of `columns`; b; 1 / H_jj

    static int padded(int n, int to) { return (n + to - 1) / to * to; }
    static std::size_t size(int n) {
        const std::size_t rows = padded(n, kRows), columns = padded(n, kWidth);
        return (3 * rows + 2) * columns;
    }

    Sweeps(const Problem& s, float* memory) : n(s.n), rows(padded(n, kRows)), columns(padded(n, kWidth)) {
        const std::ptrdiff_t all = static_cast<std::ptrdiff_t>(rows) * columns;
        matrix = memory;
        x = matrix + all;
        linear = x + all;
        ridge = linear + all;
        inverse = ridge + columns;
        for (int j = 0; j < rows; ++j)
            for (int k = 0; k < columns; ++k)
                matrix[j * columns + k] = j < n && k < n ? static_cast<float>(s.row_of(j)[k]) : 0.0f;
        for (int first = 0; first < n; first += kWidth)
            for (int j = 0; j < rows; ++j)
                for (int k = 0; k < kWidth; ++k) {
                    x[first * rows + j * kWidth + k] = 0.0f;
                    linear[first * rows + j * kWidth + k] = -matrix[j * columns + first + k];
                }
    }
    int place(int i) const { return i / kWidth * kWidth * rows + i % kWidth; }

    static Floats& at(float* p) { return *reinterpret_cast<Floats*>(p); }

    void weigh(const Problem& s, double factor, float relaxation) {
        for (int j = 0; j < rows; ++j) {
            ridge[j] = j < n ? static_cast<float>(factor * s.centre[j]) : 0.0f;
            inverse[j] = j < n ? relaxation / (matrix[j * columns + j] + ridge[j]) : 0.0f;
        }
    }

    // The rows j and following of M x - b, for the projections from `first` on, given the first `known` of x.
    void gradient(int first, int j, int known, Floats (&g)[kRows][kVectors]) const {
        const float *from = x + first * rows, *const m = matrix + j * columns;
        float* const b = linear + first * rows + j * kWidth;
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) g[r][v] = -at(b + r * kWidth + v * kFloats);
        for (int k = 0; k < known; ++k, from += kWidth) {
            Floats other[kVectors];
            for (int v = 0; v < kVectors; ++v) other[v] = *reinterpret_cast<const Floats*>(from + v * kFloats);
            PAMA_UNROLL
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kVectors; ++v) g[r][v] += m[r * columns + k] * other[v];
        }
    }

    // Returns how many x became positive, or 0.
    int sweep(bool from_zero) {
        Flips flips = {};
        for (int first = 0; first < n; first += kWidth)
            for (int j = 0; j < rows; j += kRows) {
                Floats g[kRows][kVectors];
                gradient(first, j, from_zero ? j : rows, g);
                float* const own = x + first * rows + j * kWidth;
                Floats change[kRows][kVectors];
                PAMA_UNROLL
                for (int r = 0; r < kRows; ++r)
                    for (int v = 0; v < kVectors; ++v) {
                        Floats& old = at(own + r * kWidth + v * kFloats);
                        Floats sum = g[r][v] + ridge[j + r] * old;
                        for (int q = 0; q < r; ++q) sum += matrix[(j + r) * columns + j + q] * change[q][v];
                        const Floats next = old - sum * inverse[j + r], now = next > 0.0f ? next : Floats{};
                        flips -= (old > 0.0f) ^ (now > 0.0f);
                        change[r][v] = now - old;
                        old = now;
                    }
            }
        int count = 0;
        for (int lane = 0; lane < kFloats; ++lane) count += flips[lane];
        return count;
    }

    // The method of multipliers: adds -M (e_i + x) to b. With a ridge, the sweeps then approach the minimiser nearest
    // to 0, at a rate that does not depend on how small the eigenvalues of M are.
    void update() {
        for (int first = 0; first < n; first += kWidth)
            for (int j = 0; j < rows; j += kRows) {
                Floats g[kRows][kVectors];
                gradient(first, j, rows, g);
                for (int r = 0; r < kRows; ++r)
                    for (int v = 0; v < kVectors; ++v) {
                        float* const b = linear + first * rows + (j + r) * kWidth + v * kFloats;
                        at(b) = -g[r][v] - at(matrix + (j + r) * columns + first + v * kFloats);
                    }
            }
    }
};

}  // namespace upgrad
PAMA_END
#endif
