// The scratch memory of one thread, and the float64 summation of tiles whose squares are out of the range of float32.
#pragma once

#include "products.hpp"

PAMA_BEGIN

// A tile in the type of the computation and, for float, a second one in double for values out of the range of float.
template <class T>
struct Workspace {
    Tile<T> tile;
    Tile<double> exact;
    T *c, *combined, *gradient, *shares;  // (n, tile.stride) and (tile.stride) each
    T *weights, *divisor;                 // (n)
    double* row;                          // (4 n)
    double* sums;                         // (statistics_size(n, false))
    typename Lanes<T>::V* lanes;          // (3 n)
    Arena arena;
};

template <class T>
inline Workspace<T> allocate(const Tokens& tokens, void* scratch) {
    Workspace<T> w;
    Arena arena{static_cast<char*>(scratch)};
    w.tile = allocate_tile<T>(tokens, arena);
    w.exact = allocate_tile<double>(tokens, arena);
    w.c = arena.take<T>(tokens.n * w.tile.stride);
    w.combined = arena.take<T>(w.tile.stride);
    w.gradient = arena.take<T>(w.tile.stride);
    w.shares = arena.take<T>(w.tile.stride);
    w.weights = arena.take<T>(tokens.n);
    w.divisor = arena.take<T>(tokens.n);
    w.row = arena.take<double>(4 * tokens.n);
    w.sums = arena.take<double>(statistics_size(tokens.n, false));
    w.lanes = arena.take<typename Lanes<T>::V>(3 * tokens.n);
    w.arena = arena;
    return w;
}

inline int64_t scratch_size(int n) {
    const int64_t size = n, vectors = 3 * size * PAMA_VECTOR_BYTES;
    const int64_t doubles = tile_stride(n) * (size + 6) + 8 * size + statistics_size(n, false);
    return 2 * tile_bytes<double>(n) + 8 * doubles + vectors + 64 * 16;
}

// Calls add(tile) with the fields of w.tile or, if the range of T does not suffice, with those of the same tokens in
// double. bound, pairs: as in objective_fields. Returns whether the range of T suffices.
template <class T, class Add>
inline bool with_fields(const Tokens& tokens, Workspace<T>& w, int64_t first, bool bound, bool pairs, Add add) {
    if (objective_fields(tokens, bound, pairs, w.tile)) {
        add(w.tile);
        return true;
    }
    load_tile(tokens, first, w.tile.count, first + w.tile.count, false, w.exact, w.arena);
    objective_fields(tokens, bound, pairs, w.exact);
    add(w.exact);
    return false;
}

// Calls visit(first token, count, first token of the next tile, omega) for each tile of the tokens [first, last):
// within one row where tokens have the weight of their row. skip: as in for_each_live.
template <class Visit, class Skip>
inline void for_each_tile(const Tokens& tokens, const double* omega, int64_t first, int64_t last, Visit visit,
                          Skip skip) {
    const int64_t step = tile_tokens(tokens.n);
    const LiveTokens live(tokens);
    const auto pieces = [&](int64_t begin, int64_t end, double weight) {
        for_each_live(
            live, begin, end, step, [&](int64_t at, int64_t count, int64_t next) { visit(at, count, next, weight); },
            skip);
    };
    if (!omega) return pieces(first, last, 1.0);
    for_each_segment(tokens, first, last - first, [&](int64_t row, int64_t, int64_t at, int64_t count) {
        pieces(first + at, first + at + count, omega[row]);
    });
}

template <class T>
inline void statistics_block(const Tokens& tokens, const double* omega, bool pairs, int64_t first, int64_t last,
                             double* sums, void* scratch) {
    Workspace<T> w = allocate<T>(tokens, scratch);
    const auto add = [&](int64_t at, int64_t count, int64_t next, double weight) {
        load_tile(tokens, at, count, next, false, w.tile, w.arena);
        with_fields(tokens, w, at, false, pairs, [&](const auto& tile) {
            add_fields(tokens, tile, weight, sums);
            if (pairs) add_pairs(tokens, tile, weight, sums);
        });
    };
    for_each_tile(tokens, omega, first, last, add, [](int64_t, int64_t) {});
}

PAMA_END
