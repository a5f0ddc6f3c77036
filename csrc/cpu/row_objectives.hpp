// For advantages per sequence: computes the statistics of every objective, in float64, from the sums over a row's
// tokens. The terms of an objective are the sums for the sign of its advantage, multiplied by the advantage; 0 times a
// NaN stays NaN.
#pragma once

#include "apply.hpp"
#include "outer_products.hpp"
#include "rows.hpp"

PAMA_BEGIN

// Loads the raw advantages of a row (0 if the objective is absent, NaN for infinity) and, if there is a mask, the
// presence of the objectives; without one `present` contains 1.
inline void row_advantages(const Tokens& tokens, int64_t row, double* a, double* present) {
    const int n = tokens.n;
    const Array &given = tokens.advantages, &mask = tokens.objective_mask;
    if (given.dtype == Dtype::f32 && given.objective == 1) {
        const float* PAMA_RESTRICT from = static_cast<const float*>(given.data) + row * given.row;
        if (!mask) {
#pragma omp simd
            for (int i = 0; i < n; ++i) a[i] = raw_advantage(static_cast<double>(from[i]), true);
            return;
        }
#pragma omp simd
        for (int i = 0; i < n; ++i) a[i] = static_cast<double>(from[i]);
    } else {
        load_values(given, row * given.row, given.objective, n, false, a);
    }
    if (mask) load_values(mask, row * mask.row, mask.objective, n, true, present);
#pragma omp simd
    for (int i = 0; i < n; ++i) a[i] = raw_advantage(a[i], present[i] != 0);
}

constexpr int64_t kGroupRows = 32;

// A group of rows: advantages and presence (rows, stride), padded to whole vectors, and the rows' sums, multiplied by
// the token weights.
struct RowGroup {
    int64_t n, stride, rows = 0;
    bool noon, masked;
    double *advantages, *present, *sums;

    RowGroup(const Tokens& tokens, int64_t most, Arena& arena)
        : n(tokens.n),
          stride(outer_stride(tokens.n)),
          noon(tokens.noon),
          masked(static_cast<bool>(tokens.objective_mask)),
          advantages(arena.take<double>(most * stride)),
          present(arena.take<double>(most * stride)),
          sums(arena.take<double>(most * kRowSums)) {
        for (int64_t row = 0; row < most; ++row)
            for (int64_t i = 0; i < stride; ++i) {
                a(row)[i] = 0;
                here(row)[i] = i < n ? 1 : 0;
            }
    }

    double* a(int64_t row) const { return advantages + row * stride; }
    double* here(int64_t row) const { return present + row * stride; }
    double* r(int64_t row) const { return sums + row * kRowSums; }

    void read(const Tokens& tokens, int64_t row) { row_advantages(tokens, row, a(rows), here(rows)); }
    // Adds the row that has been read, unless it has no valid token.
    void push(double omega, const double* row_sums) {
        if (row_sums[kValid] == 0) return;
        for (int k = 0; k < kRowSums; ++k) r(rows)[k] = omega * row_sums[k];
        ++rows;
    }
};

// Adds the fields of the group's rows to `out`, with the sums of a vector of objectives in registers.
template <bool Noon, bool Masked, class V = DoubleV>
inline void add_row_fields(const RowGroup& group, double* out) {
    constexpr int width = Lanes<double>::count;
    const V zero{};
    for (int64_t i = 0; i < group.n; i += width) {
        V s[kFields] = {};
        for (int64_t row = 0; row < group.rows; ++row) {
            const V a = load<V>(group.a(row) + i);
            if constexpr (Masked)
                add_row(group.r(row), Noon, a, load<V>(group.here(row) + i) != zero, s);
            else
                add_row(group.r(row), Noon, a, true, s);
        }
        PAMA_UNROLL
        for (int f = 0; f < kFields; ++f) add_lanes(out + f * group.n + i, s[f], group.n - i);
    }
    for (int64_t row = 0; row < group.rows; ++row) {
        out[total_offset(group.n) + kTokenCount] += group.r(row)[kValid];
        out[total_offset(group.n) + kKlSum] += group.r(row)[kK3];
    }
}

inline void add_row_fields(const RowGroup& group, double* out) {
    const auto add = group.noon ? (group.masked ? add_row_fields<true, true> : add_row_fields<true, false>)
                                : (group.masked ? add_row_fields<false, true> : add_row_fields<false, false>);
    add(group, out);
}

inline int64_t row_scratch_size(int n) {
    const int64_t size = n, group = kGroupRows * (5 * outer_stride(n) + kRowSums);
    return 8 * (9 * size + statistics_size(n, false) + group) + 64 * 16;
}

// Adds the products of pairs over the rows of a group to the statistics.
struct RowProducts {
    const RowGroup& group;
    double *x, *y, *y_negative;  // (kGroupRows, stride)

    RowProducts(const RowGroup& group, Arena& arena)
        : group(group),
          x(arena.take<double>(kGroupRows * group.stride)),
          y(arena.take<double>(2 * kGroupRows * group.stride)),
          y_negative(y + kGroupRows * group.stride) {}

    // Whether the products depend on the sign of A_i: not on-policy without importance weights.
    bool by_sign() const {
        bool differ = false;
        for (int64_t row = 0; row < group.rows && !group.noon; ++row) {
            const double* const r = group.r(row);
            differ |= r[kGradPosSquare] != r[kGradBoth] || r[kGradBoth] != r[kGradNegSquare];
        }
        return differ;
    }

    // I_i I_j of a row is A_i (G++ up_j + G+- down_j) for A_i >= 0, else A_i (G+- up_j + G-- down_j). With a NaN in a
    // token and a mask, it is NaN for every pair with at least one present objective.
    template <class V = DoubleV>
    void bound_factors(bool signs) const {
        const V zero{};
        for (int64_t row = 0; row < group.rows; ++row) {
            const double* const r = group.r(row);
            const V above = zero + r[kGradPosSquare], both = zero + r[kGradBoth], below = zero + r[kGradNegSquare];
            const bool poisoned = group.masked && r[kGradPosSquare] != r[kGradPosSquare];
            for (int64_t i = row * group.stride; i < (row + 1) * group.stride; i += Lanes<double>::count) {
                const V a = load<V>(group.advantages + i), up = a < zero ? zero : a, down = group.noon ? zero : a - up;
                const V poison = load<V>(group.present + i) != zero ? above : zero;
                store(x + i, poisoned ? poison : up + down);
                store(y + i, poisoned ? poison : above * up + both * down);
                if (signs) store(y_negative + i, poisoned ? poison : both * up + below * down);
            }
        }
    }

    // y = valid from
    template <class V = DoubleV>
    void weigh(const double* from) const {
        for (int64_t row = 0; row < group.rows; ++row)
            for (int64_t i = row * group.stride; i < (row + 1) * group.stride; i += Lanes<double>::count)
                store(y + i, group.r(row)[kValid] * load<V>(from + i));
    }

    template <class V = DoubleV>
    void square_advantages() const {
        for (int64_t i = 0; i < group.rows * group.stride; i += Lanes<double>::count) {
            const V a = load<V>(group.advantages + i);
            store(x + i, a * a);
        }
    }

    void add_to(double* sums) const {
        const double *const a = group.advantages, *const here = group.present;
        const auto add = [&](int pair, const double* left, int64_t negative = 0) {
            const OuterProducts products{group.n, group.stride, group.rows, left, y, negative};
            const auto add_products = negative != 0 ? add_outer_products<true> : add_outer_products<false>;
            add_products(products, pair <= kPairCount, sums + pair_offset(group.n, pair));
        };
        const bool signs = by_sign();
        bound_factors(signs);
        add(kBoundProduct, x, signs ? y_negative - y : 0);
        weigh(a);
        add(kAdvantageProduct, a);
        if (!group.masked) return;  // the driver computes the other pair statistics from the fields
        weigh(here);
        add(kPairCount, here);
        add(kPairAdvantage, a);
        square_advantages();
        add(kPairAdvantageSquare, x);
    }
};

inline void row_statistics(const Tokens& tokens, const double* omega, const double* row_sums, bool pairs, int64_t first,
                           int64_t last, double* sums, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    RowGroup group(tokens, kGroupRows, arena);
    const RowProducts products(group, arena);
    for (int64_t row = first; row < last; ++row) {
        group.read(tokens, row);
        group.push(omega ? omega[row] : 1.0, row_sums + row * kRowSums);
        if (group.rows < kGroupRows && row + 1 < last) continue;
        add_row_fields(group, sums);
        if (pairs) products.add_to(sums);
        group.rows = 0;
    }
}

// Rows that row_apply reads at once: a vector that is loaded right after its numbers were stored one by one would wait
// for them.
constexpr int64_t kRowsRead = 8;

// One row in row_apply: its advantages and the presence of the objectives, in a group of rows, its weights c and the
// preference, all padded with zeros; and the workspace of weights_of_row.
struct RowWeights {
    RowGroup group;
    double *a = nullptr, *present = nullptr, *c, *preference, *work, *sums;

    RowWeights(const Pass& pass, Arena& arena)
        : group(pass.tokens, kRowsRead, arena),
          c(arena.take<double>(group.stride)),
          preference(arena.take<double>(group.stride)),
          work(arena.take<double>(3 * group.n)),
          sums(arena.take<double>(statistics_size(group.n, false))) {
        for (int64_t i = 0; i < group.stride; ++i) {
            c[i] = 0;
            preference[i] = i < group.n ? pass.preference[i] : 0.0;
        }
    }

    // Selects `row`, the k-th of kRowsRead rows.
    void select(const Tokens& tokens, int64_t row, int64_t last, int64_t k) {
        for (int64_t next = 0; k == 0 && next < kRowsRead && row + next < last; ++next)
            row_advantages(tokens, row + next, group.a(next), group.here(next));
        a = group.a(k);
        present = group.here(k);
    }

    // sum_i c_i max(A_i, 0), sum_i c_i min(A_i, 0) and, of the present objectives if `masked`, the sum of the
    // preference and 0 or NaN.
    template <class V = DoubleV>
    void combine(bool masked, double (&results)[4]) const {
        const V zero{};
        V s[4] = {};
        for (int64_t i = 0; i < group.stride; i += Lanes<double>::count) {
            const V x = load<V>(a + i), up = x < zero ? zero : x, weight = load<V>(c + i);
            s[0] += weight * up;
            if (!group.noon) s[1] += weight * (x - up);
            if (!masked) continue;
            s[2] += load<V>(present + i) * load<V>(preference + i);
            s[3] += zero * x;
        }
        totals<4>(s, results);
    }
};

// Computes the weights of one row from its sums r, its advantages and the presence of the objectives.
inline void weights_of_row(const Pass& pass, int64_t row, const double* r, RowWeights& own, Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const int n = tokens.n;
    double *const c = own.c, *const work = own.work, *const sums = own.sums;
    if (pass.by_rows()) {
        const int64_t size = statistics_size(n, false);
        for (int64_t k = 0; k < size; ++k) sums[k] = 0;
        RowGroup one = own.group;
        one.advantages = own.a;
        one.present = own.present;
        one.push(1.0, r);
        add_row_fields(one, sums);
        row_weights(pass, row, sums, c, work);
        return;
    }
    // Without log-probabilities all tokens of the row have the same bound terms.
    const double tokens_weight = pass.token_weight(row) * r[kValid];
    const double *const a = own.a, *const present = own.present;
    for (int i = 0; i < n; ++i) {
        work[i] = pass.rule.kind == Kind::scores && tokens.noon && a[i] < 0 ? 0.0 : a[i];
        work[n + i] = pass.preference[i];
        c[i] = present[i];
    }
    const double optimum = vector_weights(pass.rule, n, work, work + n, -1.0, c);
    if (r[kValid] == 0) return;
    partial.optimum += tokens_weight * optimum;
    for (int i = 0; i < n; ++i) partial.weights[i] += tokens_weight * c[i];
}

inline void row_apply(const Pass& pass, const double* row_sums, double* up, double* down, int64_t first, int64_t last,
                      Partial& partial, void* scratch) {
    const Tokens& tokens = pass.tokens;
    const Outputs& outputs = pass.outputs;
    const int n = tokens.n;
    Arena arena{static_cast<char*>(scratch)};
    RowWeights own(pass, arena);
    double* const c = own.c;
    constexpr int64_t together = 64;
    double results[together];  // stored at once
    if (pass.known && !pass.per_row) load_values(pass.weights, 0, pass.weights.objective, n, false, c);
    for (int64_t row = first; row < last; ++row) {
        const double* r = row_sums ? row_sums + row * kRowSums : nullptr;
        own.select(tokens, row, last, (row - first) % kRowsRead);
        if (!pass.known || (r && pass.per_row))
            weights_of_row(pass, row, r, own, partial);
        else if (pass.per_row)
            load_values(pass.weights, row * pass.weights.row, pass.weights.objective, n, false, c);
        double combined[4];
        const bool masked = pass.divided && tokens.objective_mask;
        own.combine(masked, combined);
        double above = combined[0], below = combined[1];
        if (masked) {
            const double mass = combined[2], poison = combined[3];
            above = mass > 0 ? above / mass : poison;
            below = mass > 0 ? below / mass : poison;
        }
        if (up) up[row] = above;
        if (down) down[row] = below;
        if (!r) continue;
        const double result = r[kValid] != 0 ? above + below : 0.0, omega = pass.token_weight(row);
        if (outputs.advantages) {
            const int64_t place = (row - first) % together;
            results[place] = result;
            if (place + 1 == together || row + 1 == last)
                store_values(outputs.advantages, row - place, place + 1, results);
            partial.square += omega * r[kValid] * result * result;
        }
        if (outputs.loss && r[kValid] != 0)
            partial.loss -= pass.scale * omega *
                            (above * r[kPos] + (tokens.noon ? 0.0 : below * r[kNeg]) - outputs.kl_coef * r[kRefKl]);
    }
}

PAMA_END
