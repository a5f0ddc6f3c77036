// Advantages per sequence in one launch: statistics, weights of the batch, combined advantages, factors of the loss.
#pragma once

#include "../core/statistics.hpp"
#include "problem.hpp"

namespace pama {
namespace cuda {

constexpr int kSequenceObjectives = 16;       // maximum: the solver uses shared memory
constexpr int64_t kSequenceRows = 1 << 16;    // maximum: one block writes the results of all sequences
constexpr int64_t kSequenceTokens = 1 << 18;  // maximum average per block

// The sums that a block accumulates: the totals, then fields of every objective, products for i < j, and pair fields
// for all i and j. The other statistics are computed from these: without log-probabilities bound terms equal
// advantages, and without an objective mask every objective is present at every token.
struct Terms {
    int n = 0;
    bool noon = false;
    int fields = 0, products = 0, tables = 0;
    signed char field[kFields] = {}, product[2] = {}, table[3] = {};

    // Where a field of objective i is among the sums: at + i step. at < 0: it is 0. poison: 0 times that sum.
    struct Source {
        short at = -1, step = 0;
        bool poison = false;
    };
    Source sources[kFields];
    short product_at[2] = {}, table_at[kPairs] = {};  // of pair fields; table_at < 0: not a table

    static Terms of(const Tokens& p, bool pairs) {
        Terms t;
        t.n = p.n;
        t.noon = p.noon;
        const bool presence = static_cast<bool>(p.objective_mask), factors = p.logprobs || p.importance_weights;
        for (int f = 0; f < kFields; ++f) {
            const bool bound = f == kBoundSum || f == kBoundSquareSum;
            const bool own = f == kAdvantageSum || f == kAdvantageSquareSum || f == kPositiveCount;
            if (own || factors || (bound && p.noon) || (f == kCount && presence))
                t.field[t.fields++] = static_cast<signed char>(f);
        }
        if (pairs && (factors || p.noon)) t.product[t.products++] = kBoundProduct;
        if (pairs) t.product[t.products++] = kAdvantageProduct;
        for (int kind = kPairCount; pairs && presence && kind < kPairs; ++kind)
            t.table[t.tables++] = static_cast<signed char>(kind);
        t.find_sources();
        return t;
    }

    void find_sources() {
        const auto own = [&](int from, int otherwise = -1, bool poison = false) {
            int found = -1;
            for (int at = 0; at < fields; ++at)
                if (field[at] == from || (found < 0 && field[at] == otherwise)) found = at;
            return found < 0 ? Source{} : Source{static_cast<short>(kTotals + found * n), 1, poison};
        };
        for (int f = 0; f < kFields; ++f) sources[f] = own(f);
        // Without log-probabilities bound terms are advantages, and no token is clipped.
        if (sources[kCount].at < 0) sources[kCount] = Source{kTokenCount, 0, false};
        sources[kBoundSquareSum] = own(kBoundSquareSum, kAdvantageSquareSum);
        sources[kBoundSum] = own(kBoundSum, kAdvantageSum);
        if (sources[kSurrogateSum].at < 0) sources[kSurrogateSum] = sources[kBoundSum];
        if (sources[kLogprobSum].at < 0) sources[kLogprobSum] = own(kBoundSum, kAdvantageSum, true);
        for (int kind = 0; kind < 2; ++kind) {
            const bool second = products == 2 && product[1] == kind;
            product_at[kind] = static_cast<short>(first_product() + (second ? n * (n - 1) / 2 : 0));
        }
        for (int kind = 0; kind < kPairs; ++kind) {
            table_at[kind] = -1;
            for (int k = 0; k < tables; ++k)
                if (table[k] == kind) table_at[kind] = static_cast<short>(first_table() + k * n * n);
        }
    }

    PAMA_HD int first_product() const { return kTotals + fields * n; }
    PAMA_HD int first_table() const { return first_product() + products * (n * (n - 1) / 2); }
    PAMA_HD int size() const { return first_table() + tables * n * n; }
};

struct Sequences {
    DeviceTokens p;
    Terms terms;
    bool pairs = false, factors = false;             // factors: log-probabilities or importance weights were given
    int64_t segments = 1, blocks = 1;                // segments per sequence; blocks that share the segments
    double* partials = nullptr;                      // (blocks, terms.size())
    unsigned *counts = nullptr, *counter = nullptr;  // counts: valid tokens (rows, segments)
    // results
    double* sums = nullptr;
    bool solved = false, normalize = false;
    Rule rule;
    const double* preference = nullptr;                                          // (n); null: uniform
    Array weights, optimum, combined;                                            // (n), 0-d, (rows)
    double *effective = nullptr, *square_sum = nullptr, *row_factors = nullptr;  // (n), 0-d, (rows, 3): up, down, omega

    int64_t work_doubles() const { return blocks * terms.size() + (p.rows * segments + 1) / 2; }
    void set_work(double* work) {
        partials = work;
        counts = reinterpret_cast<unsigned*>(work + blocks * terms.size());
    }
};

}  // namespace cuda
}  // namespace pama
