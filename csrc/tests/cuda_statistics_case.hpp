// The inputs of the test of the statistics kernels of CUDA, and their sums in double, one token after another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/statistics.cuh"

namespace pama {

inline std::size_t size(int64_t count) { return static_cast<std::size_t>(count); }

struct Case {
    int64_t rows = 3, width = 20;
    int n = 3;
    bool packed = false, per_sequence = false, masked = false, mask_floats = false, presence = false;
    bool presence_by_token = false, noon = false, pairs = false, row_mean = false, weighted = false, logprobs = true;
    bool bad = false;  // a NaN in one token's log-probability and in one advantage
    double scale = 1;  // of the advantages
    int multiprocessors = 3;
    int offset = 0, mask_offset = 0;  // elements before the first one: alignment

    std::string name() const {
        std::string result =
            "rows " + std::to_string(rows) + " width " + std::to_string(width) + " n " + std::to_string(n);
        const auto add = [&](bool holds, const char* what) { result += holds ? std::string(" ") + what : ""; };
        add(packed, "packed"), add(per_sequence, "per-sequence"), add(masked, "masked"),
            add(mask_floats, "mask-floats");
        add(presence, presence_by_token ? "presence-by-token" : "presence"), add(noon, "noon"), add(pairs, "pairs");
        add(row_mean, "row-mean"), add(weighted, "weighted"), add(!logprobs, "no-logprobs"), add(bad, "bad");
        result += " offsets " + std::to_string(offset) + " " + std::to_string(mask_offset);
        return result + " scale " + std::to_string(scale);
    }
};

// The tensors of a case.
struct Data {
    std::vector<int32_t> offsets{0};
    std::vector<float> logp, old, w, advantages, float_mask;
    std::vector<unsigned char> mask, present, shifted_mask;
    std::vector<float> shifted[4];
    cuda::DeviceTokens p;

    Data(const Case& given, std::mt19937& random) {
        std::normal_distribution<float> normal;
        const int64_t n = given.n;
        for (int64_t row = 0; row < given.rows; ++row) {
            const int64_t length = !given.packed  ? given.width
                                   : row % 3 == 1 ? 0
                                                  : static_cast<int64_t>(random() % (2 * given.width));
            offsets.push_back(offsets.back() + static_cast<int32_t>(length));
        }
        const int64_t tokens = offsets.back(), places = given.per_sequence ? given.rows : tokens;
        const int64_t present_places = given.presence_by_token ? tokens : given.rows;
        const auto fill = [&](std::vector<float>& x, int64_t count, double scale) {
            x.resize(size(count + 4));  // never empty
            for (float& value : x) value = static_cast<float>(scale) * normal(random);
        };
        fill(logp, tokens, 1), fill(old, tokens, 0.3), fill(w, tokens, 1), fill(advantages, places * n, given.scale);
        for (std::size_t t = 0; t < old.size(); ++t) old[t] += logp[t];
        for (float& x : w) x = std::fabs(x);
        for (float& x : advantages) x = random() % 7 ? x : 0;
        mask.resize(logp.size()), float_mask.resize(logp.size()), present.resize(size(present_places * n + 1));
        for (std::size_t t = 0; t < mask.size(); ++t) float_mask[t] = mask[t] = random() % 4 != 0;
        for (unsigned char& o : present) o = random() % 3 != 0;
        for (std::size_t t = 0; t < mask.size(); ++t)
            if (given.masked && !mask[t]) logp[t] = NAN, w[t] = INFINITY;
        if (given.bad && tokens > 0) logp[size(tokens / 2)] = NAN, advantages[size(places * n / 3)] = INFINITY;

        p.rows = given.rows;
        p.width = given.packed ? tokens : given.width;
        if (given.packed) p.starts = {offsets.data(), false, 1};
        p.n = given.n;
        p.noon = given.noon;
        p.per_sequence = given.per_sequence;
        p.mask_per_sequence = given.presence && !given.presence_by_token;
        p.aggregation = given.row_mean ? Aggregation::seq_mean_token_mean : Aggregation::token_mean;
        p.clip = Clip::make(0.2, 0.3, given.noon ? INFINITY : 3.0);
        const auto step = given.packed ? 0 : given.width;
        const auto by_token = [&](std::vector<float>& x) { return Array{x.data(), Dtype::f32, step, 1, 0}; };
        if (given.logprobs) p.logprobs = by_token(logp), p.old_logprobs = by_token(old);
        if (given.weighted) p.importance_weights = by_token(w);
        if (given.masked) p.mask = given.mask_floats ? by_token(float_mask) : Array{mask.data(), Dtype::u8, step, 1, 0};
        const auto by_objective = [&](void* x, Dtype dtype, bool rows) {
            return rows ? Array{x, dtype, n, 0, 1} : Array{x, dtype, step * n, n, 1};
        };
        p.advantages = by_objective(advantages.data(), Dtype::f32, given.per_sequence);
        if (given.presence) p.objective_mask = by_objective(present.data(), Dtype::u8, !given.presence_by_token);
        if (given.offset || given.mask_offset) shift(given, tokens, places * n);
    }

    // Copies that begin `offset` tokens after an aligned address and end with the last one.
    void shift(const Case& given, int64_t tokens, int64_t advantage_count) {
        const auto move = [](Array& array, auto& to, int64_t by, int64_t count) {
            if (!array) return;
            using T = typename std::decay<decltype(to[0])>::type;
            to.assign(size(by + count), 0);
            std::copy_n(static_cast<const T*>(array.data), size(count), to.begin() + by);
            array.data = to.data() + by;
        };
        move(p.logprobs, shifted[0], given.offset, tokens);
        move(p.old_logprobs, shifted[1], given.offset, tokens);
        move(p.importance_weights, shifted[2], given.offset, tokens);
        move(p.advantages, shifted[3], int64_t{given.offset} * p.n, advantage_count);
        if (p.mask.dtype == Dtype::u8) move(p.mask, shifted_mask, given.mask_offset, tokens);
    }

    // Every sum in its plain form; `absolute` receives those of the absolute values.
    std::vector<double> sums(bool pairs, std::vector<double>& absolute) const {
        const int64_t n = p.n;
        std::vector<double> total(size(statistics_size(n, pairs)));
        absolute.assign(total.size(), 0);
        const ClipIn<double> clip(p.clip);
        for (int64_t row = 0; row < p.rows; ++row) {
            const int64_t begin = offsets[size(row)], end = offsets[size(row) + 1];
            double count = 0;
            for (int64_t t = begin; t < end; ++t) count += p.mask ? mask[size(t)] : 1;
            for (int64_t t = begin; t < end; ++t) {
                const bool valid = !p.mask || mask[size(t)];
                if (!valid) continue;
                const double omega = p.aggregation == Aggregation::seq_mean_token_mean ? 1 / count : 1;
                const double x = p.logprobs ? logp[size(t)] : 0, y = p.logprobs ? old[size(t)] : 0;
                const TokenFactors<double> f =
                    token_factors(clip, true, x, y, p.importance_weights ? static_cast<double>(w[size(t)]) : 1.0);
                const auto add = [&](int64_t at, double value) {
                    total[size(at)] += omega * value;
                    absolute[size(at)] += std::fabs(omega * value);
                };
                std::vector<double> a(size(n)), bound(size(n)), here(size(n));
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t place = p.advantages.token == 0 ? row : t,
                                  where = p.objective_mask.token == 0 ? row : t;
                    const bool is = !p.objective_mask || present[size(where * n + i)];
                    a[size(i)] = raw_advantage(static_cast<double>(advantages[size(place * n + i)]), is);
                    bound[size(i)] = bound_term(f, p.noon, a[size(i)], is);
                    here[size(i)] = is;
                    const double up = a[size(i)] < 0 ? 0 : a[size(i)], down = p.noon ? 0 : a[size(i)] - up;
                    add(kCount * n + i, is);
                    add(kBoundSum * n + i, bound[size(i)]);
                    add(kBoundSquareSum * n + i, bound[size(i)] * bound[size(i)]);
                    add(kLogprobSum * n + i, bound[size(i)] * f.logp);
                    add(kSurrogateSum * n + i, is ? up * f.pos + down * f.neg : 0);
                    add(kAdvantageSum * n + i, a[size(i)]);
                    add(kAdvantageSquareSum * n + i, a[size(i)] * a[size(i)]);
                    add(kPositiveCount * n + i, a[size(i)] > 0);
                    add(kClippedCount * n + i, (a[size(i)] > 0 && f.off_pos) || (down < 0 && f.off_neg));
                }
                add(total_offset(n) + kTokenCount, 1);
                add(total_offset(n) + kKlSum, f.kl);
                for (int64_t i = 0; pairs && i < n; ++i)
                    for (int64_t j = 0; j < n; ++j) {
                        const double values[] = {bound[size(i)] * bound[size(j)], a[size(i)] * a[size(j)],
                                                 here[size(i)], a[size(i)], a[size(i)] * a[size(i)]};
                        for (int kind = 0; kind < kPairs; ++kind)
                            add(pair_offset(n, kind) + i * n + j, values[kind] * (kind < kPairCount || here[size(j)]));
                    }
            }
        }
        return total;
    }
};

}  // namespace pama
