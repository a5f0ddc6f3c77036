// Objective weights of each token of a tile, and their division by the preference of the objectives present.
#pragma once

#include "../core/softmin.hpp"
#include "lanes.hpp"
#include "workspace.hpp"

PAMA_BEGIN

// Computes the weights c(t) of each token into w.c (n, kTileTokens), and the optima into w.combined.
template <class V, int N, class T>
inline void token_scores(const Pass& pass, Workspace<T>& w) {
    const Tile<T>& tile = w.tile;
    const double regularization = pass.rule.number;
    constexpr int width = sizeof(V) / sizeof(T);
    for (int64_t t = 0; t < tile.count; t += width) {
        const int used = static_cast<int>(tile.count - t < width ? tile.count - t : width);
        const V s =
            solve_lanes<V, N>(pass.tokens.n, tile.bound + t, tile.present ? tile.present + t : nullptr, kTileTokens,
                              used, pass.preference, pass.uniform, regularization,
                              pass.tokens.noon && regularization == 0, w.c + t, reinterpret_cast<V*>(w.lanes), w.row);
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
            a[i] = load<V>(tile.advantages + i * kTileTokens + t);
            c[i] = tile.present ? load<V>(tile.present + i * kTileTokens + t) : V{} + 1;
        }
        store(w.combined + t, softmin_solve(n, a, pass.preference, pass.rule.number, c));
        for (int i = 0; i < n; ++i) store(w.c + i * kTileTokens + t, c[i]);
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
    for (int i = 0; i < n; ++i) partial.weights[i] += omega * dot(w.c + i * kTileTokens, w.tile.valid, w.tile.padded);
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

// For each token, 1 / (sum of the preferences p (n) of the objectives present there), or 0 if that sum is 0.
template <class T, class V = typename Lanes<T>::V>
inline void presence_shares(const Tile<T>& tile, int n, const T* p, T* shares) {
    const V zero{}, one = zero + 1;
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        V mass = zero;
        for (int i = 0; i < n; ++i) mass += p[i] * load<V>(tile.present + i * kTileTokens + t);
        store(shares + t, choose(mass > zero, one / mass, zero));
    }
}

PAMA_END
