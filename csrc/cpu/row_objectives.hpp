// For advantages per sequence: computes the statistics of every objective, in float64, from the sums over a row's
// tokens. The terms of an objective are the sums for the sign of its advantage, multiplied by the advantage; 0 times a
// NaN stays NaN.
#pragma once

#include "apply.hpp"
#include "rows.hpp"

PAMA_BEGIN

// block (n, n) += sum_k x_k y_k', four outer products at a time. y_k may differ for negative x. Of a symmetric sum,
// only the upper triangle is computed; what is left of it in the vector of the diagonal has no meaning.
struct OuterProducts {
    static constexpr int64_t kWidth = Lanes<double>::count;
    int64_t n;
    bool symmetric;
    double* block;
    double* room;  // (12 n)
    int used = 0;

    double* x(int k) const { return room + 3 * k * n; }
    double* x() const { return x(used); }
    double* y() const { return x() + n; }           // where x >= 0
    double* y_negative() const { return y() + n; }  // elsewhere
    void push() {
        if (++used == 4) flush();
    }
    void flush() {
        for (double* rest = x(used); rest < x(4); ++rest) *rest = 0;
        if (used > 0) add();
        used = 0;
    }
    void add() const {
        for (int64_t i = 0; i < n; ++i) {
            const double x0 = x(0)[i], x1 = x(1)[i], x2 = x(2)[i], x3 = x(3)[i];
            const double *PAMA_RESTRICT y0 = x(0) + (x0 < 0 ? 2 : 1) * n,
                                        *PAMA_RESTRICT y1 = x(1) + (x1 < 0 ? 2 : 1) * n,
                                        *PAMA_RESTRICT y2 = x(2) + (x2 < 0 ? 2 : 1) * n,
                                        *PAMA_RESTRICT y3 = x(3) + (x3 < 0 ? 2 : 1) * n;
            double* PAMA_RESTRICT out = block + i * n;
#pragma omp simd
            for (int64_t j = symmetric ? i / kWidth * kWidth : 0; j < n; ++j)
                out[j] += x0 * y0[j] + x1 * y1[j] + (x2 * y2[j] + x3 * y3[j]);
        }
    }
};

// Loads the raw advantages of a row (0 if the objective is absent, NaN for infinity) and, if there is a mask, the
// presence of the objectives; without one `present` contains 1.
inline void row_advantages(const Tokens& tokens, int64_t row, double* a, double* present) {
    const int n = tokens.n;
    const Array &given = tokens.advantages, &mask = tokens.objective_mask;
    if (given.dtype == Dtype::f32 && given.objective == 1) {
        const float* PAMA_RESTRICT from = static_cast<const float*>(given.data) + row * given.row;
#pragma omp simd
        for (int i = 0; i < n; ++i) a[i] = static_cast<double>(from[i]);
    } else {
        load_values(given, row * given.row, given.objective, n, false, a);
    }
    if (mask) load_values(mask, row * mask.row, mask.objective, n, true, present);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const double value = present[i] != 0 ? a[i] : 0.0;
        a[i] = value + 0 * value;
    }
}

constexpr int64_t kGroupRows = 32;

// A group of rows: advantages and presence (rows, stride), padded to whole vectors, and the rows' sums, multiplied by
// the token weights.
struct RowGroup {
    int64_t n, stride, rows = 0;
    bool noon, masked;
    double *advantages, *present, *sums;

    RowGroup(const Tokens& tokens, Arena& arena)
        : n(tokens.n),
          stride((tokens.n + Lanes<double>::count - 1) / Lanes<double>::count * Lanes<double>::count),
          noon(tokens.noon),
          masked(static_cast<bool>(tokens.objective_mask)),
          advantages(arena.take<double>(kGroupRows * stride)),
          present(arena.take<double>(kGroupRows * stride)),
          sums(arena.take<double>(kGroupRows * kRowSums)) {
        for (int64_t row = 0; row < kGroupRows; ++row)
            for (int64_t i = 0; i < stride; ++i) {
                a(row)[i] = 0;
                here(row)[i] = i < n ? 1 : 0;
            }
    }

    double* a(int64_t row) const { return advantages + row * stride; }
    double* here(int64_t row) const { return present + row * stride; }
    double* r(int64_t row) const { return sums + row * kRowSums; }

    // Rows without a valid token are skipped.
    void push(const Tokens& tokens, int64_t row, double omega, const double* row_sums) {
        if (row_sums[kValid] == 0) return;
        row_advantages(tokens, row, a(rows), here(rows));
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
            const auto here = Masked ? load<V>(group.here(row) + i) != zero : zero == zero;
            add_row(group.r(row), Noon, load<V>(group.a(row) + i), here, s);
        }
        const int64_t used = group.n - i < width ? group.n - i : width;
        for (int f = 0; f < kFields; ++f)
            for (int64_t k = 0; k < used; ++k) out[f * group.n + i + k] += s[f][k];
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
    const int64_t size = n, group = kGroupRows * (2 * (size + 8) + kRowSums);
    return 8 * (6 * size + kPairs * 12 * size + statistics_size(n, false) + group) + 64 * 16;
}

// sum I_i I_j of a row: A_i (G++ up_j + G+- down_j) for A_i >= 0, else A_i (G+- up_j + G-- down_j).
inline void push_bound_products(const RowGroup& group, int64_t row, OuterProducts& products) {
    const int64_t n = group.n;
    const double *a = group.a(row), *here = group.here(row), *r = group.r(row);
    const double above = r[kGradPosSquare], both = r[kGradBoth], below = r[kGradNegSquare];
    if (group.masked && above != above) {  // a NaN in a token: NaN for every pair with at least one present objective
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = i; j < n; ++j) products.block[i * n + j] += here[i] + here[j] != 0 ? above : 0.0;
        return;
    }
    const bool noon = group.noon;
    double *PAMA_RESTRICT x = products.x(), *PAMA_RESTRICT y = products.y(), *PAMA_RESTRICT z = products.y_negative();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double up = a[i] < 0 ? 0.0 : a[i], down = noon ? 0.0 : a[i] - up;
        x[i] = up + down;
        y[i] = above * up + both * down;
        z[i] = both * up + below * down;
    }
    products.push();
}

// products += valid x y', with x squared if `squared`.
inline void push_product(const RowGroup& group, int64_t row, const double* from, const double* to, bool squared,
                         OuterProducts& products) {
    const double valid = group.r(row)[kValid];
    double *PAMA_RESTRICT x = products.x(), *PAMA_RESTRICT y = products.y(), *PAMA_RESTRICT z = products.y_negative();
#pragma omp simd
    for (int64_t i = 0; i < group.n; ++i) {
        x[i] = squared ? from[i] * from[i] : from[i];
        y[i] = z[i] = valid * to[i];
    }
    products.push();
}

inline void row_statistics(const Tokens& tokens, const double* omega, const double* row_sums, bool pairs, int64_t first,
                           int64_t last, double* sums, void* scratch) {
    const int64_t n = tokens.n;
    Arena arena{static_cast<char*>(scratch)};
    RowGroup group(tokens, arena);
    OuterProducts products[kPairs];
    for (int pair = 0; pair < kPairs; ++pair)
        products[pair] = {n, pair <= kPairCount, sums + pair_offset(n, pair), arena.take<double>(12 * n), 0};
    for (int64_t begin = first; begin < last; begin += kGroupRows) {
        group.rows = 0;
        for (int64_t row = begin; row < last && row < begin + kGroupRows; ++row)
            group.push(tokens, row, omega ? omega[row] : 1.0, row_sums + row * kRowSums);
        add_row_fields(group, sums);
        for (int64_t row = 0; pairs && row < group.rows; ++row) {
            const double *a = group.a(row), *here = group.here(row);
            push_bound_products(group, row, products[kBoundProduct]);
            push_product(group, row, a, a, false, products[kAdvantageProduct]);
            if (!group.masked) continue;  // the driver computes the other pair statistics from the fields
            push_product(group, row, here, here, false, products[kPairCount]);
            push_product(group, row, a, here, false, products[kPairAdvantage]);
            push_product(group, row, a, here, true, products[kPairAdvantageSquare]);
        }
    }
    if (!pairs) return;
    for (OuterProducts& p : products) p.flush();
}

// One row in row_apply: its advantages, the presence of the objectives, and its weights c; and the workspace of
// weights_of_row.
struct RowWeights {
    RowGroup group;
    double *a, *present, *c, *work, *sums;

    RowWeights(const Tokens& tokens, Arena& arena)
        : group(tokens, arena),
          a(arena.take<double>(tokens.n)),
          present(arena.take<double>(tokens.n)),
          c(arena.take<double>(tokens.n)),
          work(arena.take<double>(3 * tokens.n)),
          sums(arena.take<double>(statistics_size(tokens.n, false))) {}
};

// Computes the weights of one row from its sums r, its advantages and the presence of the objectives.
inline void weights_of_row(const Pass& pass, int64_t row, const double* r, RowWeights& own, Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const int n = tokens.n;
    double *const c = own.c, *const work = own.work, *const sums = own.sums;
    if (pass.by_rows()) {
        const int64_t size = statistics_size(n, false);
        for (int64_t k = 0; k < size; ++k) sums[k] = 0;
        own.group.rows = 0;
        own.group.push(tokens, row, 1.0, r);
        add_row_fields(own.group, sums);
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
    RowWeights own(tokens, arena);
    double *const a = own.a, *const present = own.present, *const c = own.c;
    constexpr int64_t together = 64;
    double results[together];  // stored at once
    for (int i = 0; i < n; ++i) present[i] = 1;
    if (pass.known && !pass.per_row) load_values(pass.weights, 0, pass.weights.objective, n, false, c);
    for (int64_t row = first; row < last; ++row) {
        const double* r = row_sums ? row_sums + row * kRowSums : nullptr;
        row_advantages(tokens, row, a, present);
        if (!pass.known || (r && pass.per_row))
            weights_of_row(pass, row, r, own, partial);
        else if (pass.per_row)
            load_values(pass.weights, row * pass.weights.row, pass.weights.objective, n, false, c);
        double above = 0, below = 0;
#pragma omp simd reduction(+ : above, below)
        for (int i = 0; i < n; ++i) {
            const double positive = a[i] < 0 ? 0.0 : a[i];
            above += c[i] * positive;
            below += tokens.noon ? 0.0 : c[i] * (a[i] - positive);
        }
        if (pass.divided && tokens.objective_mask) {
            double mass = 0, poison = 0;  // NaN if an advantage is
            for (int i = 0; i < n; ++i) {
                mass += present[i] * pass.preference[i];
                poison += 0 * a[i];
            }
            above = mass > 0 ? above / mass : poison;
            below = mass > 0 ? below / mass : poison;
        }
        if (up) up[row] = above;
        if (down) down[row] = below;
        if (!r) continue;
        const double combined = r[kValid] != 0 ? above + below : 0.0, omega = pass.token_weight(row);
        if (outputs.advantages) {
            const int64_t place = (row - first) % together;
            results[place] = combined;
            if (place + 1 == together || row + 1 == last)
                store_values(outputs.advantages, row - place, place + 1, results);
            partial.square += omega * r[kValid] * combined * combined;
        }
        if (outputs.loss && r[kValid] != 0)
            partial.loss -= pass.scale * omega *
                            (above * r[kPos] + (tokens.noon ? 0.0 : below * r[kNeg]) - outputs.kl_coef * r[kRefKl]);
    }
}

PAMA_END
