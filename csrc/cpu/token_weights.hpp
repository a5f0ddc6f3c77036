// Objective weights of each token of a tile, and their division by the preference of the objectives present.
#pragma once

#include "../core/softmin.hpp"
#include "lanes.hpp"
#include "workspace.hpp"

PAMA_BEGIN

// Computes the weights c(t) of each token into w.c (n, tile.stride), and the optima into w.combined.
template <class V, int N, class T>
inline void token_scores(const Pass& pass, Workspace<T>& w) {
    const Tile<T>& tile = w.tile;
    const ScalarRule rule = pass.scalar_rule();
    constexpr int width = sizeof(V) / sizeof(T);
    for (int64_t t = 0; t < tile.count; t += width) {
        const int used = static_cast<int>(tile.count - t < width ? tile.count - t : width);
        const LaneRows<T> rows{
            pass.tokens.n, tile.bound + t, tile.present ? tile.present + t : nullptr,   tile.stride, w.c + t,
            used,          nullptr,        pass.tokens.noon && rule.regularization == 0};
        const V s = solve_rows<V, N>(rows, rule, {reinterpret_cast<V*>(w.lanes), w.row});
        store(w.combined + t, s);
    }
}

template <class T, class V = typename Lanes<T>::V>
inline void token_softmin(const Pass& pass, Workspace<T>& w) {
    const Tile<T>& tile = w.tile;
    const int n = pass.tokens.n;
    V *const a = w.lanes, *const c = a + n;
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        for (int i = 0; i < n; ++i) {
            a[i] = load<V>(tile.advantages + i * tile.stride + t);
            c[i] = tile.present ? load<V>(tile.present + i * tile.stride + t) : V{} + 1;
        }
        store(w.combined + t, softmin_solve(n, a, pass.preference, pass.rule.number, c));
        for (int i = 0; i < n; ++i) store(w.c + i * tile.stride + t, c[i]);
    }
}

// weights (n) += omega times the sums of sum(constant number of objectives, first of them, sums).
template <class T, class Sum>
inline void add_means(int n, double omega, double* weights, Sum sum) {
    constexpr std::integral_constant<int, 8> together{};
    constexpr std::integral_constant<int, 1> one{};
    T sums[together];
    for (int i = 0; i < n;) {
        const bool all = i + together <= n;
        all ? sum(together, i, sums) : sum(one, i, sums);
        for (int k = 0; k < (all ? together : one); ++k) weights[i++] += omega * static_cast<double>(sums[k]);
    }
}

// Computes the weights c(t) into w.c, from the bound terms I in tile.bound or from the raw advantages, and adds weights
// and optima to the reported means.
template <class T>
inline void token_weights(const Pass& pass, Workspace<T>& w, double omega, Partial& partial) {
    const int n = pass.tokens.n;
    if (pass.rule.kind == Kind::softmin)
        token_softmin(pass, w);
    else if (sizeof(T) == sizeof(float) && !w.tile.present)
        with_lanes_size(n, [&](auto size) { token_scores<typename Lanes<T>::V, size>(pass, w); });
    else
        token_scores<typename Lanes<T>::V, 0>(pass, w);
    partial.optimum += omega * dot(w.combined, w.tile.valid, w.tile.padded);
    add_means<T>(n, omega, partial.weights, [&](auto count, int i, T* sums) {
        dots<count>(w.c + i * w.tile.stride, w.tile.stride, w.tile.valid, w.tile.padded, sums);
    });
}

// The weights of each token are equal where its bound term is the smallest: stores that term, which is its optimum, and
// the weight, 0 where the token is masked, and sum_i c_i max(A_i, 0). For `Count` vectors of tokens from t on.
template <int Count, class T, class V = typename Lanes<T>::V>
inline void smallest_scores(const Tile<T>& tile, int n, int64_t t, T* smallest, T* share, T* combined) {
    constexpr int width = Lanes<T>::count;
    const V zero{}, one = zero + 1, equal = one / (zero + static_cast<T>(n));
    V low[Count], ties[Count] = {}, total[Count] = {};
    for (int k = 0; k < Count; ++k) low[k] = load<V>(tile.bound + t + k * width);
    for (int i = 1; i < n; ++i)
        for (int k = 0; k < Count; ++k) low[k] = min_of(load<V>(tile.bound + i * tile.stride + t + k * width), low[k]);
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < Count; ++k) {
            const int64_t at = i * tile.stride + t + k * width;
            ties[k] = load<V>(tile.bound + at) == low[k] ? ties[k] + one : ties[k];
            total[k] += max_of(zero, load<V>(tile.advantages + at));
        }
    for (int k = 0; k < Count; ++k) {
        const int64_t at = t + k * width;
        store(smallest + at, low[k]);
        store(share + at, load<V>(tile.valid + at) != zero ? reciprocal(ties[k]) : zero);
        // Without a gradient all bound terms are 0 and all weights equal.
        store(combined + at, load<V>(tile.side + at) < zero ? total[k] * equal : low[k]);
    }
}

// sums[i]: the weights of objective i, summed over the tile's tokens.
template <int Count, class T, class V = typename Lanes<T>::V>
inline void sum_shares(const T* bound, int64_t stride, const T* smallest, const T* share, int64_t padded, T* sums) {
    V s[Count] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) {
        const V low = load<V>(smallest + t), own = load<V>(share + t);
        for (int i = 0; i < Count; ++i) s[i] = load<V>(bound + i * stride + t) == low ? s[i] + own : s[i];
    }
    totals<Count>(s, sums);
}

// Without regularization: see `applied_scores`.
template <class T>
inline void tied_scores(const Pass& pass, Workspace<T>& w, double omega, Partial& partial) {
    const int n = pass.tokens.n;
    T *const smallest = w.shares, *const share = w.gradient;
    constexpr int64_t width = Lanes<T>::count;
    int64_t t = 0;
    for (; t + 4 * width <= w.tile.padded; t += 4 * width)
        smallest_scores<4>(w.tile, n, t, smallest, share, w.combined);
    for (; t < w.tile.padded; t += width) smallest_scores<1>(w.tile, n, t, smallest, share, w.combined);
    partial.optimum += omega * dot(smallest, w.tile.valid, w.tile.padded);
    add_means<T>(n, omega, partial.weights, [&](auto count, int i, T* sums) {
        sum_shares<count>(w.tile.bound + i * w.tile.stride, w.tile.stride, smallest, share, w.tile.padded, sums);
    });
}

// Solves a vector of tokens of any scale, through memory: the weights in w.c. Returns the optima. N as in
// `solve_lanes`.
template <int N>
__attribute__((noinline)) FloatV scores_in_memory(const Pass& pass, const Workspace<float>& w, int64_t t) {
    const LaneRows<float> rows{pass.tokens.n, w.tile.bound + t,    nullptr, w.tile.stride,
                               w.c + t,       Lanes<float>::count, nullptr};
    return solve_lanes<FloatV, N>(rows, pass.scalar_rule(), LaneMemory<FloatV>{w.lanes, w.row});
}

// The same as `tied_scores` with regularization, from bound terms of at least 0. Not inlined, like `sorted_weights`.
template <int N, class V = FloatV>
__attribute__((noinline)) void regularized_scores(const Pass& pass, Workspace<float>& w, double omega,
                                                  Partial& partial) {
    const Tile<float>& tile = w.tile;
    const V zero{}, equal = zero + 1.0f / N;
    V sums[N + 1] = {};
    for (int64_t t = 0; t < tile.padded; t += Lanes<float>::count) {
        const auto valid = load<V>(tile.valid + t) != zero;
        const auto bound = [&](int i) { return load<V>(tile.bound + i * tile.stride + t); };
        const auto add = [&](int i, V weight) { sums[i] = valid ? sums[i] + weight : sums[i]; };
        V sorted[sorted_size<N>()], optimum, total{};
        for (int i = 0; i < N; ++i) sorted[i] = bound(i);
        sort_some<N>(sorted);
        const V low = sorted[0], high = sorted[N - 1];
        if (any(extreme_scores<float>(high))) {
            optimum = scores_in_memory<N>(pass, w, t);
            for (int i = 0; i < N; ++i) add(i, load<V>(w.c + i * tile.stride + t));
        } else {
            const V rho = high * high * static_cast<float>(pass.rule.number);
            for (int i = 0; i < N; ++i) sorted[i] -= low;
            const Threshold<V> at = sorted_threshold<N>(sorted, low, rho);
            for (int i = 0; i < N; ++i) add(i, max_of(at.tau - at.lambda * (bound(i) - low), zero));
            optimum = max_of(low, min_of(high, rho * at.lambda));
        }
        for (int i = 0; i < N; ++i) total += max_of(zero, load<V>(tile.advantages + i * tile.stride + t));
        sums[N] += optimum;
        // Without a gradient all bound terms are 0 and all weights equal.
        store(w.combined + t, load<V>(tile.side + t) < zero ? total * equal : optimum);
    }
    float means[N + 1];
    totals<N + 1>(sums, means);
    for (int i = 0; i < N; ++i) partial.weights[i] += omega * static_cast<double>(means[i]);
    partial.optimum += omega * static_cast<double>(means[N]);
}

// The same for any number of objectives, with the weights in w.c.
__attribute__((noinline)) inline void newton_scores(const Pass& pass, Workspace<float>& w, double omega,
                                                    Partial& partial) {
    const Tile<float>& tile = w.tile;
    const int n = pass.tokens.n;
    const FloatV zero{}, equal = zero + 1.0f / static_cast<float>(n);
    float* const optima = w.shares;
    for (int64_t t = 0; t < tile.padded; t += Lanes<float>::count) {
        const auto bound = [&](int i) { return load<FloatV>(tile.bound + i * tile.stride + t); };
        FloatV low = bound(0), high = low, sum{}, total{}, optimum;
        for (int i = 0; i < n; ++i) {
            const FloatV own = bound(i);
            low = min_of(own, low);
            high = max_of(own, high);
            sum += own;
            total += max_of(zero, load<FloatV>(tile.advantages + i * tile.stride + t));
        }
        if (any(extreme_scores<float>(high))) {
            optimum = scores_in_memory<0>(pass, w, t);
        } else {
            const FloatV rho = high * high * static_cast<float>(pass.rule.number);
            const Multipliers<FloatV> at = newton_multipliers(n, bound, sum * equal, rho);
            for (int i = 0; i < n; ++i)
                store(w.c + i * tile.stride + t, max_of(at.tau - at.lambda * (bound(i) - at.pivot), zero));
            optimum = max_of(low, min_of(high, rho * at.lambda));
        }
        store(optima + t, optimum);
        // Without a gradient all bound terms are 0 and all weights equal.
        store(w.combined + t, load<FloatV>(tile.side + t) < zero ? total * equal : optimum);
    }
    partial.optimum += omega * dot(optima, tile.valid, tile.padded);
    add_means<float>(n, omega, partial.weights, [&](auto count, int i, float* sums) {
        dots<count>(w.c + i * tile.stride, tile.stride, tile.valid, tile.padded, sums);
    });
}

// What `token_weights` computes, for the paper's rule and finite bound terms, with sum_i c_i max(A_i, 0) in w.combined
// in place of the weights. Returns false where it does not.
template <class T>
inline bool applied_scores(const Pass& pass, Workspace<T>& w, double omega, Partial& partial) {
    if constexpr (sizeof(T) == sizeof(float)) {
        const double regularization = pass.rule.number;
        if (!w.tile.plain || w.tile.present || !pass.tokens.noon || pass.rule.kind != Kind::scores || !pass.uniform)
            return false;
        if (regularization == 0) {
            tied_scores(pass, w, omega, partial);
            return true;
        }
        if (!ordinary_regularization<T>(regularization)) return false;
        with_lanes_size(pass.tokens.n, [&](auto size) {
            if constexpr (size > 0)
                regularized_scores<size>(pass, w, omega, partial);
            else
                newton_scores(pass, w, omega, partial);
        });
        return true;
    }
    return false;
}

// The preference normalised over the objectives that are present in a row (`counts` > 0); uniform over these if their
// preferences sum to 0.
inline void row_preference(int n, const double* preference, const double* counts, double* p) {
    double mass = 0, some = 0;
    for (int i = 0; i < n; ++i) {
        mass += counts[i] > 0 ? preference[i] : 0.0;
        some += counts[i] > 0 ? 1.0 : 0.0;
    }
    for (int i = 0; i < n; ++i) p[i] = counts[i] > 0 ? (mass > 0 ? preference[i] / mass : 1 / some) : 0.0;
}

// For each token, the sum of the preferences p (n) of the objectives present there; NaN if it is 0 and an advantage is
// NaN.
template <class T, class V = typename Lanes<T>::V>
inline void presence_masses(const Tile<T>& tile, int n, const T* p, T* masses) {
    const V zero{};
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        V mass = zero, poison = zero;
        for (int i = 0; i < n; ++i) {
            mass += p[i] * load<V>(tile.present + i * tile.stride + t);
            poison += zero * load<V>(tile.advantages + i * tile.stride + t);
        }
        store(masses + t, choose(mass > zero, mass, poison));
    }
}

PAMA_END
