// The driver of the CPU backend: statistics of a batch, and the weights, advantages, loss and gradient computed from
// them.
#include <algorithm>

#include "../core/statistics.hpp"
#include "plan.hpp"
#include "values.hpp"

namespace pama {

std::vector<int64_t> count_rows(const Tokens& tokens, int threads) {
    const Kernels& k = kernels();
    const Array& mask = tokens.mask;
    std::vector<int64_t> counts(static_cast<size_t>(tokens.rows));
    const Blocks blocks(tokens.rows, tokens.tokens(), 1);
    for_each_block(blocks.count, mask ? blocks.threads(threads) : 1, [&](int64_t block) {
        for (int64_t row = blocks.first(block); row < blocks.last(block); ++row) {
            const int64_t length = tokens.begin(row + 1) - tokens.begin(row);
            const int64_t offset = row * mask.row + (tokens.offsets ? tokens.offsets[row] : 0) * mask.token;
            counts[static_cast<size_t>(row)] = mask ? k.count(mask, offset, mask.token, length) : length;
        }
    });
    return counts;
}

std::vector<double> token_weights(const Tokens& tokens, const std::vector<int64_t>& counts) {
    std::vector<double> omega;
    if (tokens.aggregation != Aggregation::seq_mean_token_mean) return omega;
    omega.reserve(counts.size());
    for (const int64_t count : counts) omega.push_back(count > 0 ? 1.0 / static_cast<double>(count) : 0.0);
    return omega;
}

void complete_pairs(const Tokens& tokens, double* sums) {
    const int64_t n = tokens.n;
    for (const int pair : {kBoundProduct, kAdvantageProduct, kPairCount})
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < i; ++j)
                sums[pair_offset(n, pair) + i * n + j] = sums[pair_offset(n, pair) + j * n + i];
    if (tokens.objective_mask) return;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
            sums[pair_offset(n, kPairCount) + i * n + j] = sums[kCount * n + i];
            sums[pair_offset(n, kPairAdvantage) + i * n + j] = sums[kAdvantageSum * n + i];
            sums[pair_offset(n, kPairAdvantageSquare) + i * n + j] = sums[kAdvantageSquareSum * n + i];
        }
}

namespace {

// Padded sequences without a gap between them are treated as one long sequence if all tokens have the same weight.
Tokens collapsed(Tokens tokens) {
    if (tokens.offsets || tokens.rows == 1) return tokens;
    for (const Array* array : {&tokens.advantages, &tokens.mask, &tokens.objective_mask, &tokens.logprobs,
                               &tokens.old_logprobs, &tokens.ref_logprobs, &tokens.importance_weights})
        if (*array && array->row != tokens.width * array->token) return tokens;
    tokens.width *= tokens.rows;
    tokens.rows = 1;
    return tokens;
}

void token_statistics(const Tokens& given, const double* omega, bool pairs, double* out, int threads) {
    const Tokens tokens = omega ? given : collapsed(given);
    const Kernels& k = kernels();
    sum_blocks(tokens.tokens(), tokens.tokens(), kTileMultiple, statistics_size(tokens.n, pairs), threads, out,
               [&](int64_t first, int64_t last, double* part) {
                   k.statistics(tokens, omega, pairs, first, last, part, scratch(k.scratch_size(tokens.n)));
               });
    if (pairs) complete_pairs(tokens, out);
}

// Memory for the ratios of a call, in the calling thread. Up to kRatioBytes are kept for the next call: new pages of
// the system can cost as much as the call.
struct KeptRatios {
    static constexpr int64_t kRatioBytes = 1 << 26;
    static Memory& memory() {
        thread_local Memory kept;
        return kept;
    }
    void* of(int64_t tokens) const { return memory().of(tokens * static_cast<int64_t>(sizeof(float))); }
    ~KeptRatios() { memory().release_above(kRatioBytes); }
};

// The state of one call of `apply`: first the weights that can be computed before the pass over tokens, then the pass.
struct Applied {
    Pass pass;
    const Preference preference;
    const int threads, n;
    const bool solved_here;  // one set of weights for the batch, solved by this call
    double* const sums;
    bool summed = false;  // the statistics are in `sums`
    bool finite = true;   // loss and means of weights per token
    std::vector<int64_t> counts;
    std::vector<double> omega, rows, c, effective;

    Applied(const Tokens& tokens, const Rule& rule, const double* p, const Array& weights, bool per_row,
            const Outputs& outputs, int threads)
        : preference(p, tokens.n),
          threads(threads),
          n(tokens.n),
          solved_here(!weights_known(rule.kind) && rule.weights_per == WeightsPer::batch),
          sums(outputs.sums) {
        pass.tokens = tokens;
        pass.rule = rule;
        pass.outputs = outputs;
        pass.preference = preference.data;
        pass.uniform = preference.uniform;
        pass.weights = weights;
        pass.known = weights_known(rule.kind);
        pass.per_row = pass.known && per_row;
        pass.divided = rule.kind == Kind::solved;
        pass.statistics = outputs.statistics || solved_here;
        if (tokens.aggregation == Aggregation::seq_mean_token_mean) counts = count_rows(tokens, threads);
        omega = token_weights(tokens, counts);
        pass.omega = omega.empty() ? nullptr : omega.data();
    }

    bool by_row_sums() const {
        const bool one =
            pass.tokens.one_result_per_row(pass.rule) || ((pass.known || solved_here) && !pass.outputs.advantages);
        return one && pama::by_row_sums(pass.tokens);
    }

    void solve_batch() {
        c.resize(static_cast<size_t>(n));
        effective.resize(static_cast<size_t>(n));
        const double optimum = solve(sums, pass.rule, preference.data, n, c.data(), effective.data());
        store_value(pass.outputs.optimum, 0, optimum);
        for (int i = 0; i < n; ++i) store_value(pass.outputs.weights, i, c[static_cast<size_t>(i)]);
        pass.known = pass.divided = summed = true;
        pass.statistics = false;
        pass.weights = Array{c.data(), Dtype::f64, 0, 0, 1};
        pass.preference = effective.data();
    }

    // The factor of every token's loss, without the token weight.
    void find_scale() {
        const Outputs& outputs = pass.outputs;
        if (!outputs.loss) return;
        const bool given = outputs.normalizer != kNoNormalizer;
        double denominator = given ? outputs.normalizer : static_cast<double>(pass.tokens.rows);
        if (!given && pass.tokens.aggregation == Aggregation::token_mean) denominator = valid_tokens();
        if (!given && denominator == 0) denominator = 1;
        pass.scale = denominator == 0 && valid_tokens() == 0 ? 0 : 1 / denominator;
        // Beyond these, products with a token's factors may be out of the range of float32.
        const auto within = [](double x) { return x == 0 || (x >= 0x1p-60 && x <= 0x1p60); };
        finite = pass.tokens.wide || (within(pass.scale) && within(outputs.kl_coef));
    }

    double valid_tokens() {
        if (summed && pass.omega == nullptr) return sums[total_offset(n) + kTokenCount];
        if (counts.empty()) counts = count_rows(collapsed(pass.tokens), threads);
        double total = 0;
        for (const int64_t count : counts) total += static_cast<double>(count);
        return total;
    }

    // The sum of the token weights.
    double weight_of_tokens() {
        const double valid = valid_tokens();  // counts the rows
        if (!pass.omega) return valid;
        return static_cast<double>(std::count_if(counts.begin(), counts.end(), [](int64_t x) { return x > 0; }));
    }

    // Runs work(first, last, partial) over blocks of `units` and writes the results computed from the partial sums.
    template <class Work>
    void run(int64_t units, int64_t tokens, int64_t multiple, Work work) {
        const int64_t own = n + 3, size = own + (pass.statistics ? statistics_size(n, pass.outputs.pairs) : 0);
        std::vector<double> merged(static_cast<size_t>(size));
        sum_blocks(units, tokens, multiple, size, threads, merged.data(),
                   [&](int64_t first, int64_t last, double* part) {
                       Partial partial{pass.statistics ? part + own : nullptr, part + 3, 0, 0, 0};
                       work(first, last, partial);
                       part[0] = partial.loss;
                       part[1] = partial.optimum;
                       part[2] = partial.square;
                   });
        for (int64_t k = 0; k < own; ++k) finite = finite && 0 * merged[static_cast<size_t>(k)] == 0;
        if (pass.outputs.loss) store_value(pass.outputs.loss, 0, merged[0]);
        if (pass.outputs.square_sum) *pass.outputs.square_sum = merged[2];
        if (pass.statistics) {
            std::memcpy(sums, merged.data() + own, sizeof(double) * static_cast<size_t>(size - own));
            if (pass.outputs.pairs) complete_pairs(pass.tokens, sums);
        } else if (!summed) {
            std::fill(sums, sums + statistics_size(n, pass.outputs.pairs), NAN);
        }
        if (!solved_here && !pass.by_rows()) report(merged.data());
    }

    // Reports given weights, or the mean of the weights per token.
    void report(const double* merged) {
        const bool without = !pass.statistics && !summed;
        const double count = without ? weight_of_tokens() : sums[total_offset(n) + kTokenCount];
        double optimum = count > 0 ? merged[1] / count : 0.0;
        if (pass.known) optimum = without ? NAN : 0;
        for (int i = 0; i < n; ++i) {
            double weight = count > 0 ? merged[3 + i] / count : pass.preference[i];
            if (pass.known) {
                weight = load_number<double>(pass.weights, i * pass.weights.objective);
                optimum += weight * score(sums, n, i);
            }
            store_value(pass.outputs.weights, i, weight);
        }
        store_value(pass.outputs.optimum, 0, optimum);
    }

    void token_passes() {
        const Kernels& k = kernels();
        if (solved_here) {
            token_statistics(pass.tokens, pass.omega, pass.outputs.pairs, sums, threads);
            solve_batch();
        }
        find_scale();
        if (!pass.by_rows() && !pass.omega) pass.tokens = collapsed(pass.tokens);
        const int64_t tokens = pass.tokens.tokens(), bytes = k.scratch_size(n);
        run(pass.by_rows() ? pass.tokens.rows : tokens, tokens, pass.by_rows() ? 1 : kTileMultiple,
            [&](int64_t first, int64_t last, Partial& partial) {
                k.apply(pass, first, last, partial, scratch(bytes));
            });
    }

    // One pass over the tokens if the weights are known before it, otherwise one pass for the sums and one for the
    // gradient.
    void row_passes() {
        const Kernels& k = kernels();
        const Tokens& tokens = pass.tokens;
        const int64_t bytes = k.scratch_size(n);
        const bool gradient = static_cast<bool>(pass.outputs.gradient), first_gradient = gradient && pass.known;
        RowPass row_pass;
        row_pass.omega = pass.omega;
        row_pass.kl_coef = pass.outputs.kl_coef;
        row_pass.gradient = pass.outputs.gradient;
        std::vector<double> up(gradient ? static_cast<size_t>(tokens.rows) : 0), down(up.size());
        const auto with_gradient = [&](RowPass with) {
            with.scale = pass.scale;
            with.up = up.data();
            with.down = down.data();
            return with;
        };
        if (first_gradient) {
            find_scale();
            Partial none{};
            k.row_apply(pass, nullptr, up.data(), down.data(), 0, tokens.rows, none, scratch(bytes));
        }
        row_pass.keep = gradient && !first_gradient && !tokens.wide && !tokens.importance_weights;
        row_pass.ratios = row_pass.gradient;
        const KeptRatios ratios;
        if (row_pass.keep && row_pass.gradient.dtype != Dtype::f32)
            row_pass.ratios = Array{ratios.of(tokens.tokens()), Dtype::f32, 0, 0, 0};
        rows = pama::row_sums(tokens, first_gradient ? with_gradient(row_pass) : row_pass, threads);
        row_statistics(tokens, pass.omega, rows, pass.outputs.pairs, sums, threads);
        pass.statistics = false;
        summed = true;
        if (solved_here) solve_batch();
        if (!first_gradient) find_scale();
        const bool up_needed = gradient && !first_gradient;
        run(tokens.rows, tokens.rows * n, 1, [&](int64_t first, int64_t last, Partial& partial) {
            k.row_apply(pass, rows.data(), up_needed ? up.data() : nullptr, up_needed ? down.data() : nullptr, first,
                        last, partial, scratch(bytes));
        });
        if (row_pass.keep) row_pass.kept = rows.data();
        if (up_needed) row_gradient(tokens, with_gradient(row_pass), threads);
    }
};

// Sequences of one token are processed as tokens, since nothing could be computed once for several tokens; in float64,
// as everything that is computed for each sequence.
Tokens sequences_or_tokens(Tokens tokens) {
    if (tokens.per_sequence && tokens.width == 1 && !tokens.offsets) {
        tokens.per_sequence = false;
        tokens.wide = true;
        tokens.advantages.token = tokens.advantages.row;
        tokens.objective_mask.token = tokens.objective_mask.row;
    }
    return tokens;
}

}  // namespace

void statistics(const Tokens& given, bool pairs, double* out, int threads) {
    const Tokens tokens = sequences_or_tokens(given);
    const bool weighted = tokens.aggregation == Aggregation::seq_mean_token_mean;
    std::vector<double> omega;
    if (weighted) omega = token_weights(tokens, count_rows(tokens, threads));
    const double* const weights = weighted ? omega.data() : nullptr;
    if (by_row_sums(tokens))
        row_statistics(tokens, weights, row_sums(tokens, RowPass{}, threads), pairs, out, threads);
    else
        token_statistics(tokens, weights, pairs, out, threads);
}

void apply(const Tokens& given, const Rule& rule, const double* preference, const Array& weights, bool per_row,
           const Outputs& outputs, int threads) {
    const bool by_rows = per_row || rule.weights_per == WeightsPer::sequence;
    const Tokens tokens = by_rows ? given : sequences_or_tokens(given);
    const auto finite = [&](const Tokens& chosen) {
        Applied applied(chosen, rule, preference, weights, per_row, outputs, threads);
        if (applied.by_row_sums())
            applied.row_passes();
        else
            applied.token_passes();
        return applied.finite;
    };
    if (finite(tokens) || tokens.wide) return;
    Tokens wide = tokens;  // for terms out of the range of float32
    wide.wide = true;
    // If that does not help, an input is not finite. The float32 results are then restored: those of other rows must
    // not depend on it, not even in their last bits.
    if (!finite(wide)) finite(tokens);
}

}  // namespace pama
