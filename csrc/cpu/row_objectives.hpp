// Advantages per sequence: what follows for every objective from the sums of a row's tokens, in float64. An objective's
// terms are those sums times its advantage, chosen by sign; 0 times a NaN stays NaN.
#pragma once

#include "apply.hpp"
#include "rows.hpp"

PAMA_BEGIN

// block (n, n) += sum_k x_k y_k', four outer products at a time; of a symmetric sum the upper triangle alone.
struct OuterProducts {
    int64_t n;
    bool symmetric;
    double* block;
    double* room;  // (8 n)
    int used = 0;

    double* x() { return room + 2 * used * n; }
    double* y() { return x() + n; }
    void push() {
        if (++used == 4) flush();
    }
    void flush() {
        for (int64_t k = 2 * used * n; k < 8 * n; ++k) room[k] = 0;
        if (used > 0) add();
        used = 0;
    }
    void add() const {
        const double* PAMA_RESTRICT r = room;
        const double *PAMA_RESTRICT y0 = r + n, *PAMA_RESTRICT y1 = r + 3 * n, *PAMA_RESTRICT y2 = r + 5 * n,
                                    *PAMA_RESTRICT y3 = r + 7 * n;
        for (int64_t i = 0; i < n; ++i) {
            const double x0 = r[i], x1 = r[2 * n + i], x2 = r[4 * n + i], x3 = r[6 * n + i];
            double* PAMA_RESTRICT out = block + i * n;
#pragma omp simd
            for (int64_t j = symmetric ? i : 0; j < n; ++j) out[j] += x0 * y0[j] + x1 * y1[j] + (x2 * y2[j] + x3 * y3[j]);
        }
    }
};

// A row's raw advantages: 0 where absent, NaN for infinity; and which objectives are present.
inline void row_advantages(const Tokens& tokens, int64_t row, double* a, double* present) {
    const int n = tokens.n;
    const Array &given = tokens.advantages, &mask = tokens.objective_mask;
    load_values(given, row * given.row, given.objective, n, false, a);
    if (mask)
        load_values(mask, row * mask.row, mask.objective, n, true, present);
    else
        for (int i = 0; i < n; ++i) present[i] = 1;
    for (int i = 0; i < n; ++i) {
        const double value = present[i] != 0 ? a[i] : 0.0;
        a[i] = value + 0 * value;
    }
}

// The fields of one row, times `omega`, into sums. r: the row's sums.
inline void add_row_fields(int64_t n, bool noon, const double* PAMA_RESTRICT a, const double* PAMA_RESTRICT present,
                           const double* PAMA_RESTRICT r, double omega, double* PAMA_RESTRICT sums) {
    const double valid = omega * r[kValid];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double x = a[i], up = x < 0 ? 0.0 : x, down = noon ? 0.0 : x - up;
        const auto here = [&](double value) { return present[i] != 0 ? omega * value : 0.0; };
        sums[kCount * n + i] += present[i] * valid;
        sums[kBoundSum * n + i] += here(up * r[kGradPos] + down * r[kGradNeg]);
        sums[kBoundSquareSum * n + i] += here(up * up * r[kGradPosSquare] + down * down * r[kGradNegSquare]);
        sums[kLogprobSum * n + i] += here(up * r[kGradPosLogp] + down * r[kGradNegLogp]);
        sums[kSurrogateSum * n + i] += here(up * r[kPos] + down * r[kNeg]);
        sums[kAdvantageSum * n + i] += x * valid;
        sums[kAdvantageSquareSum * n + i] += x * x * valid;
        sums[kPositiveCount * n + i] += x > 0 ? valid : 0.0;
        sums[kClippedCount * n + i] +=
            x > 0 ? omega * r[kOffPos] : (x < 0 && !noon ? omega * r[kOffNeg] : 0.0);
    }
    sums[total_offset(n) + kTokenCount] += valid;
    sums[total_offset(n) + kKlSum] += omega * r[kK3];
}

inline int64_t row_scratch_size(int n) {
    const int64_t size = n;
    return 8 * (4 * size + kPairs * 8 * size + statistics_size(n, false)) + 64 * 12;
}

// sum I_i I_j of a row: up_i (G++ up_j + G+- down_j) + down_i (G+- up_j + G-- down_j).
inline void push_bound_products(int64_t n, bool noon, const double* a, const double* present, const double* r,
                                double omega, OuterProducts& products) {
    for (int side = 0; side < (noon ? 1 : 2); ++side) {
        const double with_up = omega * r[side == 0 ? kGradPosSquare : kGradBoth],
                     with_down = omega * r[side == 0 ? kGradBoth : kGradNegSquare];
        double *PAMA_RESTRICT x = products.x(), *PAMA_RESTRICT y = products.y();
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double up = a[i] < 0 ? 0.0 : a[i], down = noon ? 0.0 : a[i] - up;
            x[i] = side == 0 ? up : down;
            y[i] = present[i] != 0 ? with_up * up + with_down * down : 0.0;
        }
        products.push();
    }
}

inline void row_statistics(const Tokens& tokens, const double* omega, const double* row_sums, bool pairs, int64_t first,
                           int64_t last, double* sums, void* scratch) {
    const int64_t n = tokens.n;
    Arena arena{static_cast<char*>(scratch)};
    double *a = arena.take<double>(n), *present = arena.take<double>(n);
    OuterProducts products[kPairs];
    for (int pair = 0; pair < kPairs; ++pair)
        products[pair] = {n, pair <= kPairCount, sums + pair_offset(n, pair), arena.take<double>(8 * n), 0};
    const bool masked = static_cast<bool>(tokens.objective_mask);
    for (int64_t row = first; row < last; ++row) {
        const double *r = row_sums + row * kRowSums, weight = omega ? omega[row] : 1.0, valid = weight * r[kValid];
        if (r[kValid] == 0) continue;
        row_advantages(tokens, row, a, present);
        add_row_fields(n, tokens.noon, a, present, r, weight, sums);
        if (!pairs) continue;
        push_bound_products(n, tokens.noon, a, present, r, weight, products[kBoundProduct]);
        const auto push = [&](int pair, const double* y, bool squared) {
            double *PAMA_RESTRICT x = products[pair].x(), *PAMA_RESTRICT to = products[pair].y();
            const double* from = pair == kPairCount ? present : a;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                x[i] = valid * (squared ? a[i] * a[i] : from[i]);
                to[i] = y[i];
            }
            products[pair].push();
        };
        push(kAdvantageProduct, a, false);
        if (!masked) continue;  // the driver fills the rest from the totals
        push(kPairCount, present, false);
        push(kPairAdvantage, present, false);
        push(kPairAdvantageSquare, present, true);
    }
    if (!pairs) return;
    for (OuterProducts& p : products) {
        p.flush();
        if (!p.symmetric) continue;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < i; ++j) p.block[i * n + j] = p.block[j * n + i];
    }
}

// The weights of row `row` into c (n), for its advantages a and who is present; work: 3 n doubles, sums: the row's own.
inline void weights_of_row(const Pass& pass, int64_t row, const double* r, const double* a, const double* present,
                           double* c, double* work, double* sums, Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const int n = tokens.n;
    if (pass.by_rows()) {
        const int64_t size = statistics_size(n, false);
        for (int64_t k = 0; k < size; ++k) sums[k] = 0;
        if (r[kValid] != 0) add_row_fields(n, tokens.noon, a, present, r, 1.0, sums);
        row_weights(pass, row, sums, c, work);
        return;
    }
    // Without log-probabilities all tokens of the row have the same bound terms.
    const double tokens_weight = pass.token_weight(row) * r[kValid];
    for (int i = 0; i < n; ++i) {
        work[i] = pass.rule.kind == Kind::scores && tokens.noon && a[i] < 0 ? 0.0 : a[i];
        work[n + i] = pass.preference[i];
        c[i] = present[i];
    }
    const double optimum = pass.rule.kind == Kind::softmin
                               ? softmin_solve(n, work, pass.preference, pass.rule.number, c)
                               : simplex_row(n, work, work + n, pass.rule.number, -1.0, c);
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
    double *a = arena.take<double>(n), *present = arena.take<double>(n), *c = arena.take<double>(n),
           *work = arena.take<double>(3 * n), *sums = arena.take<double>(statistics_size(n, false));
    if (pass.known && !pass.per_row) load_values(pass.weights, 0, pass.weights.objective, n, false, c);
    for (int64_t row = first; row < last; ++row) {
        const double* r = row_sums ? row_sums + row * kRowSums : nullptr;
        row_advantages(tokens, row, a, present);
        if (!pass.known || (r && pass.per_row))
            weights_of_row(pass, row, r, a, present, c, work, sums, partial);
        else if (pass.per_row)
            load_values(pass.weights, row * pass.weights.row, pass.weights.objective, n, false, c);
        double above = 0, below = 0, mass = 0;
        for (int i = 0; i < n; ++i) {
            const double positive = a[i] < 0 ? 0.0 : a[i];
            above += c[i] * positive;
            below += tokens.noon ? 0.0 : c[i] * (a[i] - positive);
            mass += present[i] * pass.preference[i];
        }
        if (pass.divided && tokens.objective_mask) {
            above = mass > 0 ? above / mass : 0.0;
            below = mass > 0 ? below / mass : 0.0;
        }
        if (up) up[row] = above;
        if (down) down[row] = below;
        if (!r) continue;
        const double combined = r[kValid] != 0 ? above + below : 0.0, omega = pass.token_weight(row);
        if (outputs.advantages) {
            store_value(outputs.advantages, row, combined);
            partial.square += omega * r[kValid] * combined * combined;
        }
        if (outputs.loss && r[kValid] != 0)
            partial.loss -= pass.scale * omega *
                            (above * r[kPos] + (tokens.noon ? 0.0 : below * r[kNeg]) - outputs.kl_coef * r[kRefKl]);
    }
}

PAMA_END
