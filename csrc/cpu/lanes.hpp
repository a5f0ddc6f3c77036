// The scalar problem for one row (or token) per SIMD lane.
#pragma once

#include "../core/simplex.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

// Scores a (n, stride) of `lanes` rows side by side; prior (n). c (n, stride) receives the weights. Returns the optima.
// `present` (1 or 0, like a) may be null; `scale` (per lane) may be null, then it is max a^2.
// `non_negative`: no score is negative and there is no regularization. work: 3 n vectors; row: 3 n doubles.
template <class T>
inline typename Lanes<T>::V solve_lanes(int n, const T* a, const T* present, long stride, int lanes,
                                        const double* prior, bool uniform, double regularization, bool non_negative,
                                        T* c, typename Lanes<T>::V* work, double* row, const double* scale = nullptr) {
    using V = typename Lanes<T>::V;
    const V zero = V{}, one = zero + 1;
    const auto load = [](const T* from) {
        V v;
        memcpy(&v, from, sizeof v);
        return v;
    };
    const auto put = [](T* to, V v) { memcpy(to, &v, sizeof v); };
    if (non_negative && !present) {
        V low = load(a), poison = zero;
        for (int i = 0; i < n; ++i) {
            const V x = load(a + i * stride);
            low = min_of(low, x);
            poison += zero * x;
        }
        V ties = zero, mass = zero;
        for (int i = 0; i < n; ++i) {
            const auto tied = load(a + i * stride) == low;
            ties += tied ? one : zero;
            mass += tied ? zero + static_cast<T>(prior[i]) : zero;
        }
        const V shift = (one - mass) / ties + poison;
        for (int i = 0; i < n; ++i) {
            const V kept = shift + static_cast<T>(prior[i]);
            put(c + i * stride, load(a + i * stride) == low ? kept : poison);
        }
        return low + poison;
    }
    V *x = work, *p = work + n, *keep = work + 2 * n;
    V largest = zero, mass = zero, count = zero, poison = zero;
    V low = zero + static_cast<T>(INFINITY), high = -low;
    for (int i = 0; i < n; ++i) {
        keep[i] = present ? load(present + i * stride) : one;
        x[i] = keep[i] > zero ? load(a + i * stride) : zero;
        largest = max_of(x[i] < zero ? -x[i] : x[i], largest);
        low = keep[i] > zero ? min_of(x[i], low) : low;
        high = keep[i] > zero ? max_of(x[i], high) : high;
        poison += zero * x[i];
        mass += keep[i] * static_cast<T>(prior[i]);
        count += keep[i];
    }
    // Every row is scaled, exactly, by the power of two of its largest score; subnormal ones are lifted first.
    const V lift = largest < static_cast<T>(1e-30) ? zero + static_cast<T>(0x1p100) : one;
    const V unit = largest > zero ? power_below(largest * lift) : one;
    const V inverse = one / unit, peak = (largest * lift) * inverse;
    V size = peak * peak;
    if (scale && regularization > 0) {
        for (int k = 0; k < lanes; ++k) {  // in double: a scale is a square
            const double factor = static_cast<double>(lift[k]) * static_cast<double>(inverse[k]);
            poison[k] += static_cast<T>(0 * scale[k]);
            size[k] = static_cast<T>(scale[k] * factor * factor);
        }
    }
    V rho = size * static_cast<T>(regularization);
    rho = rho < static_cast<T>(1e-30) ? zero : rho;  // what T can't tell from none
    const auto exact = rho == zero, one_sided = (low >= zero) | (high <= zero);
    const V nearest = low > zero ? low : (high < zero ? high : zero);
    for (int i = 0; i < n; ++i) {
        keep[i] = exact & one_sided & (x[i] != nearest) ? zero : keep[i];
        x[i] = exact & one_sided ? zero : (x[i] * lift) * inverse;
        p[i] = present ? (mass > zero ? keep[i] * static_cast<T>(prior[i]) / mass : keep[i] / count)
                       : zero + static_cast<T>(prior[i]);
    }
    V optimum;
    if (n == 2)
        optimum = simplex_solve<V, 2>(n, x, p, rho, !uniform, keep);
    else if (n == 3)
        optimum = simplex_solve<V, 3>(n, x, p, rho, !uniform, keep);
    else if (n == 4)
        optimum = simplex_solve<V, 4>(n, x, p, rho, !uniform, keep);
    else
        optimum = simplex_solve<V>(n, x, p, rho, !uniform, keep);
    optimum = exact ? (one_sided ? nearest : zero) : optimum * unit / lift;
    const auto none = present ? count == zero : count != count;
    for (int i = 0; i < n; ++i) put(c + i * stride, none ? zero + static_cast<T>(prior[i]) : keep[i] + poison);
    optimum = (none ? zero : optimum) + poison;
    // Two signs of very different size and no regularization: the large score gets a weight near T's rounding, on
    // which the rest depends. These lanes are solved in double.
    const V smaller = min_of(-low, high);
    const auto unsure =
        exact & (low < zero) & (high > zero) & (smaller < largest * static_cast<T>(sizeof(T) == 4 ? 1e-3 : 1e-9));
    if (any(unsure)) {
        for (int k = 0; k < lanes; ++k) {
            if (!unsure[k]) continue;
            for (int i = 0; i < n; ++i) {
                row[i] = static_cast<double>(a[i * stride + k]);
                row[n + i] = prior[i];
                row[2 * n + i] = present ? static_cast<double>(present[i * stride + k]) : 1.0;
            }
            optimum[k] = static_cast<T>(simplex_row(n, row, row + n, 0.0, -1.0, row + 2 * n));
            for (int i = 0; i < n; ++i) c[i * stride + k] = static_cast<T>(row[2 * n + i]);
        }
    }
    return optimum;
}

// float32 rows in memory order, transposed in pieces to one array per objective, solved, transposed back.
inline void weights_rows(long rows, int n, const float* scores, long row, long objective, const double* prior,
                         bool uniform, double regularization, const double* scale, long scale_row, float* weights,
                         float* optimum, void* scratch) {
    constexpr int width = Lanes<float>::count;
    constexpr long piece = 16 * width;
    auto* work = static_cast<FloatV*>(scratch);
    auto* a = reinterpret_cast<float*>(work + 3 * n);
    float* c = a + n * piece;
    auto* size = reinterpret_cast<double*>(c + n * piece);
    double* buffer = size + piece;
    for (long first = 0; first < rows; first += piece) {
        const long count = rows - first < piece ? rows - first : piece;
        for (long t = count; t < count + width && t < piece; ++t)
            for (int i = 0; i < n; ++i) a[i * piece + t] = 0;
        rows_to_columns(n, scores + first * row, row, objective, count, a, piece);
        for (long t = 0; t < count; ++t) size[t] = scale ? scale[(first + t) * scale_row] : 0;
        for (long t = 0; t < count; t += width) {
            const int used = static_cast<int>(count - t < width ? count - t : width);
            bool non_negative = regularization == 0;
            for (int i = 0; non_negative && i < n; ++i) {
                FloatV x;
                memcpy(&x, a + i * piece + t, sizeof x);
                non_negative = !any(x < 0.0f);
            }
            const FloatV s = solve_lanes<float>(n, a + t, nullptr, piece, used, prior, uniform, regularization,
                                                non_negative, c + t, work, buffer, scale ? size + t : nullptr);
            if (used == width)
                memcpy(optimum + first + t, &s, sizeof s);
            else
                for (int k = 0; k < used; ++k) optimum[first + t + k] = s[k];
        }
        columns_to_rows(n, c, piece, count, weights + first * n);
    }
}

PAMA_END
