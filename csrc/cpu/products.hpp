// The pair statistics of one tile: the sums over its tokens of products of two objectives.
#pragma once

#include "sums.hpp"

PAMA_BEGIN

constexpr int kPairRows = 4, kPairColumns = PAMA_VECTOR_BYTES == 64 ? 4 : 2, kGroups = PAMA_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int kBlockPairs = kPairRows * kPairColumns, kOwnPairs = kPairRows * (kPairRows - 1) / 2;

// Rows x_i and y_i, (n, stride) each, of which products are summed over `padded` tokens.
template <class T>
struct Rows {
    const T *x, *y;
    int64_t stride, padded;
};

// The products of the rows of one tile. Split: the sums over `rows`, during which the next tile is prefetched, are a
// part of two sums; the other parts are those over own[0] and own[1]. The terms are added in the order of
// unclipped_sums: the products of equal rows are then equal to their squares, so that equal objectives get equal
// weights.
template <bool Split, class T>
struct Products {
    static constexpr int results = Split ? 2 : 1;
    int64_t n;
    Rows<T> rows, own[2];
    Ahead ahead;

    // sums (results, Size): add(rows, s) adds the products over these rows to s.
    template <int Size, class Add, class V = typename Lanes<T>::V>
    PAMA_INLINE void sum(T* sums, Add add) const {
        if (rows.padded <= 0) __builtin_unreachable();
        V first[Size] = {};
        add(rows, first);
        for (int k = 0; k < results; ++k) {
            if (k > 0 && own[k].padded == 0) return (void)memcpy(sums + Size, sums, Size * sizeof(T));
            V s[Size];
            for (int l = 0; l < Size; ++l) s[l] = first[l];
            if constexpr (Split) add(own[k], s);
            totals<Size>(s, sums + k * Size);
        }
    }
};

// Of kPairRows rows x from i on and kPairColumns rows y from j on, with all sums in registers.
template <bool Split, class T, class V = typename Lanes<T>::V>
__attribute__((noinline)) void product_block(const Products<Split, T>& products, const Pieces& ahead, int64_t i,
                                             int64_t j, T* sums) {
    const int64_t n = products.n;
    products.template sum<kBlockPairs>(sums, [&](const Rows<T>& rows, V* s) PAMA_INLINE_LAMBDA {
        const T *x[kPairRows], *y[kPairColumns];
        for (int k = 0; k < kPairRows; ++k) x[k] = rows.x + (i + k < n ? i + k : n - 1) * rows.stride;
        for (int k = 0; k < kPairColumns; ++k) y[k] = rows.y + (j + k < n ? j + k : n - 1) * rows.stride;
        for (int64_t t = 0; t < rows.padded; t += Lanes<T>::count) {
            if constexpr (Split) ahead.prefetch_at(t);
            V left[kPairRows];
            for (int k = 0; k < kPairRows; ++k) left[k] = load<V>(x[k] + t);
            for (int l = 0; l < kPairColumns; ++l)
                for (int k = 0; k < kPairRows; ++k) s[k * kPairColumns + l] += left[k] * load<V>(y[l] + t);
        }
    });
}

// Of each pair of rows x within a group of kPairRows, for Groups groups of rows from i on.
template <bool Split, int Groups, class T, class V = typename Lanes<T>::V>
__attribute__((noinline)) void own_products(const Products<Split, T>& products, const Pieces& ahead, int64_t i,
                                            T* sums) {
    const int64_t n = products.n;
    products.template sum<Groups * kOwnPairs>(sums, [&](const Rows<T>& rows, V* s) PAMA_INLINE_LAMBDA {
        const T* x[Groups * kPairRows];
        for (int k = 0; k < Groups * kPairRows; ++k) x[k] = rows.x + (i + k < n ? i + k : n - 1) * rows.stride;
        for (int64_t t = 0; t < rows.padded; t += Lanes<T>::count) {
            if constexpr (Split) ahead.prefetch_at(t);
            for (int group = 0, k = 0; group < Groups; ++group) {
                V row[kPairRows];
                for (int l = 0; l < kPairRows; ++l) row[l] = load<V>(x[group * kPairRows + l] + t);
                for (int l = 0; l < kPairRows; ++l)
                    for (int m = l + 1; m < kPairRows; ++m, ++k) s[k] += row[l] * row[m];
            }
        }
    });
}

// The number of calls of the two functions above for a symmetric matrix of n rows.
inline int64_t product_calls(int64_t n) {
    int64_t calls = (n + kGroups * kPairRows - 1) / (kGroups * kPairRows);
    for (int64_t i = kPairRows; i < n; i += kPairRows) calls += (n - i + kPairColumns - 1) / kPairColumns;
    return calls;
}

// Each block (n, n) += omega sum_t x_i y_j. If x is y, only where i < j: the driver copies the other triangle.
template <bool Split, class T>
inline void add_products(const Products<Split, T>& products, double omega, double* const (&blocks)[Split ? 2 : 1]) {
    const int64_t n = products.n;
    const bool symmetric = products.rows.x == products.rows.y;
    [[maybe_unused]] const int64_t calls = Split ? product_calls(n) : 0;
    [[maybe_unused]] int64_t call = 0;
    Pieces ahead;
    const auto advance = [&] {
        if constexpr (Split) ahead = Pieces(products.ahead, call++ * n / calls, n);
    };
    for (int64_t i = 0; symmetric && i < n; i += kGroups * kPairRows) {
        T sums[2 * kGroups * kOwnPairs], *sum = sums;
        const bool all = i + kPairRows < n;
        advance();
        (all ? own_products<Split, kGroups, T> : own_products<Split, 1, T>)(products, ahead, i, sums);
        for (double* block : blocks)
            for (int64_t k = i; k < i + (all ? kGroups : 1) * kPairRows; ++k)
                for (int64_t l = k + 1; (l - i) % kPairRows != 0; ++l, ++sum)
                    if (l < n) block[k * n + l] += omega * static_cast<double>(*sum);
    }
    for (int64_t i = 0; i < n; i += kPairRows)
        for (int64_t j = symmetric ? i + kPairRows : 0; j < n; j += kPairColumns) {
            T sums[2 * kBlockPairs], *sum = sums;
            advance();
            product_block(products, ahead, i, j, sums);
            const int64_t rows = n - i < kPairRows ? n - i : kPairRows,
                          columns = n - j < kPairColumns ? n - j : kPairColumns;
            for (double* block : blocks) {
                for (int64_t k = 0; k < rows; ++k)
                    for (int64_t l = 0; l < columns; ++l)
                        block[(i + k) * n + j + l] += omega * static_cast<double>(sum[k * kPairColumns + l]);
                sum += kBlockPairs;
            }
        }
}

// Adds the products of bound terms and of advantages of a tile that is split. Returns whether it is.
inline bool add_split_pairs(const Tile<float>& tile, int64_t n, double omega, double* bound, double* advantages) {
    if (!tile.split) return false;
    const TokenSet<float>& clipped = tile.clipped;
    const auto squares = [](const float* x, int64_t stride, int64_t padded) {
        return Rows<float>{x, x, stride, padded};
    };
    const Products<true, float> products{n,
                                         squares(tile.bound, tile.stride, tile.padded),
                                         {squares(clipped.bound, clipped.stride, clipped.padded),
                                          squares(clipped.advantages, clipped.stride, clipped.padded)},
                                         tile.ahead};
    add_products(products, omega, {bound, advantages});
    return true;
}
inline bool add_split_pairs(const Tile<double>&, int64_t, double, double*, double*) { return false; }

// Adds the pair statistics of the tile to `sums`.
template <class T>
inline void add_pairs(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    const int64_t n = tokens.n;
    const auto block = [&](int pair) { return sums + pair_offset(n, pair); };
    const auto add_diagonal = [&](int pair, int field) {
        for (int64_t i = 0; i < n; ++i)
            block(pair)[i * n + i] += omega * static_cast<double>(tile.fields[i * kFields + field]);
    };
    const auto add = [&](int pair, const T* x, const T* y) {
        add_products(Products<false, T>{n, {x, y, tile.stride, tile.padded}, {}, {}}, omega, {block(pair)});
    };
    add_diagonal(kBoundProduct, kBoundSquareSum);
    add_diagonal(kAdvantageProduct, kAdvantageSquareSum);
    const bool split = add_split_pairs(tile, n, omega, block(kBoundProduct), block(kAdvantageProduct));
    if (!split) {
        add(kBoundProduct, tile.bound, tile.bound);
        add(kAdvantageProduct, tile.advantages, tile.advantages);
    }
    if (!tile.present) return;  // the driver computes the other pair statistics from the fields
    add_diagonal(kPairCount, kCount);
    add(kPairCount, tile.present, tile.present);
    add(kPairAdvantage, tile.advantages, tile.present);
    for (int64_t i = 0; i < n; ++i) {
        T *PAMA_RESTRICT square = tile.squares + i * tile.stride, *PAMA_RESTRICT a = tile.advantages + i * tile.stride;
        for (int64_t t = 0; t < tile.padded; ++t) square[t] = a[t] * a[t];
    }
    add(kPairAdvantageSquare, tile.squares, tile.present);
}

PAMA_END
