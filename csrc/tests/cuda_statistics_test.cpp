// The statistics kernels of CUDA, run on the host thread by thread (csrc/cuda/emulation.hpp), against sums in double
// over one token after another.
#define PAMA_CUDA_EMULATION 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/sequences.cu"
#include "cuda/statistics.cu"

using namespace pama;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    if (++failures < 20) std::printf("FAILED %s\n", what.c_str());
}

std::size_t size(int64_t count) { return static_cast<std::size_t>(count); }

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

// The statistics by the general kernels, and by that of advantages per sequence where it serves.
bool launch_statistics(const Data& data, const Case& given, bool by_sequence, std::vector<double>& sums) {
    unsigned counter = 0;
    if (by_sequence) {
        cuda::Sequences s;
        if (!cuda::plan_sequences(data.p, given.pairs, given.multiprocessors, s)) return false;
        std::vector<double> work(size(s.work_doubles()), NAN);
        s.set_work(work.data());
        s.counter = &counter;
        s.sums = sums.data();
        cuda::sequences(s, nullptr);
    } else {
        const cuda::Plan plan = cuda::statistics_plan(data.p, given.pairs, given.multiprocessors);
        std::vector<double> work(size(plan.doubles()), NAN);
        cuda::statistics(data.p, given.pairs, plan, work.data(), &counter, sums.data(), nullptr, nullptr);
    }
    expect(counter == 0, given.name() + ": the counter is reset");
    return true;
}

void run(const Case& given, std::mt19937& random) {
    Data data(given, random);
    std::vector<double> absolute;
    const std::vector<double> wanted = data.sums(given.pairs, absolute);
    std::vector<double> first[2];
    for (int k = 0; k < 6; ++k) {
        const bool wide = k % 3 == 1, by_sequence = k >= 3;
        data.p.wide = wide;
        std::vector<double> sums(wanted.size(), NAN);
        if (!launch_statistics(data, given, by_sequence, sums)) continue;
        for (std::size_t k = 0; k < wanted.size(); ++k) {
            // A dozen roundings of each term and of up to 32 in one sum; log-ratios lose as much again.
            const double tolerance =
                (wide ? 1e-12 : 5e-6) * absolute[k] +
                (wide ? 1e-14
                      : 1e-7 * static_cast<double>(data.p.tokens()) * (k >= size(total_offset(given.n)) ? 1 : 0));
            const bool same = std::isnan(wanted[k]) ? std::isnan(sums[k]) : std::fabs(sums[k] - wanted[k]) <= tolerance;
            expect(same, given.name() + (wide ? " wide" : "") + (by_sequence ? " by sequence" : "") + " sum " +
                             std::to_string(k) + " is " + std::to_string(sums[k]) + ", wanted " +
                             std::to_string(wanted[k]));
        }
        if (wide) continue;
        std::vector<double>& before = first[by_sequence];
        if (!before.empty())  // scheduled in another order: the same bits
            expect(std::memcmp(before.data(), sums.data(), sizeof(double) * sums.size()) == 0, given.name() + ": bits");
        before = sums;
    }
}

// Every layer once, for any number of objectives, in a grid that CUDA can launch.
void layers() {
    for (const int n : {1, 4, 5, 64, 721, 1500}) {
        const auto groups = cuda::groups_of(n);
        std::vector<char> seen(size(groups * groups * kPairs));
        const int64_t count = cuda::layers_of(n, true, true);
        for (int64_t k = 0; k < count; ++k) {
            const cuda::Layer layer = cuda::layer_at(k, n);
            const int64_t kind = layer.kind < 0 ? 0 : layer.kind, g = layer.first / cuda::kGroup,
                          h = layer.second / cuda::kGroup;
            expect(g < groups && h < groups && (layer.kind >= 0 || g <= h), "layer " + std::to_string(k));
            expect(!seen[size((kind * groups + g) * groups + h)]++, "a layer twice");
        }
        expect(count == groups * (groups + 1) / 2 + 3 * groups * groups, "every layer");
        Case given;
        given.n = n;
        given.presence = given.pairs = true;
        std::mt19937 random(1);
        const Data data(given, random);
        const cuda::Plan plan = cuda::statistics_plan(data.p, true, 132);
        expect(plan.blocks * plan.layers < (int64_t{1} << 31), "the grid");
    }
}

// One run of tokens of every length up to several groups of four, at every alignment; longer ones for every third n.
void runs(std::mt19937& random) {
    for (int n = 1; n <= 9; ++n) {
        for (int64_t tokens = 1; tokens <= 70; ++tokens) {
            if (tokens > 24 && (tokens + n) % 3 != 0) continue;
            Case given;
            given.rows = 1;
            given.width = tokens;
            given.n = n;
            const auto chance = [&](unsigned of) { return random() % of == 0; };
            given.offset = static_cast<int>(random() % 4);
            given.mask_offset = chance(4) ? static_cast<int>(random() % 4) : given.offset;
            given.masked = !chance(4);
            given.mask_floats = chance(8);
            given.pairs = chance(2);
            given.noon = chance(3);
            given.weighted = chance(4);
            given.logprobs = !chance(5);
            given.bad = chance(10);
            given.multiprocessors = 1 + static_cast<int>(random() % 3);
            run(given, random);
        }
    }
}

// The weights that the last block solves for, from the sums that it wrote.
void weights(std::mt19937& random) {
    for (const int n : {1, 2, 3, 4, 5, 9}) {
        for (int k = 0; k < 12; ++k) {
            Case given;
            given.n = n;
            given.width = 30;
            given.per_sequence = k % 2;
            Data data(given, random);
            if (k % 3 == 0)  // one objective without a signal
                for (std::size_t t = 0; t < data.advantages.size(); t += size(n)) data.advantages[t] = 0;
            std::vector<double> preference(size(n));
            for (double& p : preference) p = 0.1 + static_cast<double>(random() % 5);
            const cuda::Plan plan = cuda::statistics_plan(data.p, false, 3);
            const int64_t total = statistics_size(n, false);
            std::vector<double> work(size(plan.doubles() + 3 * n), NAN), sums(size(total), NAN);
            std::vector<double> got(size(2 * n + 1), NAN), wanted(size(2 * n)), space(size(2 * n));
            cuda::Solve solve;
            solve.rule = {k % 4 == 3 ? Kind::fixed : Kind::scores, WeightsPer::batch, k % 4 ? 0.1 : 0.0};
            solve.n = n;
            solve.sums = sums.data();
            solve.preference = k % 4 == 1 ? nullptr : preference.data();
            solve.weights = got.data(), solve.effective = got.data() + n, solve.optimum = got.data() + 2 * n;
            solve.work = work.data() + plan.doubles();
            unsigned counter = 0;
            cuda::statistics(data.p, false, plan, work.data(), &counter, sums.data(), &solve, nullptr);
            if (!solve.preference) preference.assign(size(n), 1.0 / n);
            const SolverResult result = batch_weights(sums.data(), n, solve.rule, preference.data(), wanted.data(),
                                                      wanted.data() + n, space.data());
            const std::string name = "weights of " + std::to_string(n) + ", case " + std::to_string(k);
            for (int i = 0; i < n && solve.rule.kind == Kind::scores; ++i)
                expect(std::fabs(got[size(i)] - wanted[size(i)]) < 1e-9, name);
            for (int i = n; i < 2 * n; ++i)
                expect(std::fabs(got[size(i)] - wanted[size(i)]) < 1e-14 * 6, name + " effective");
            expect(std::fabs(got[size(2 * n)] - result.optimum) <= 1e-9, name + " optimum");
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(7);
    layers();
    runs(random);
    weights(random);
    for (const int n : {1, 2, 3, 4, 5, 8, 9}) {
        for (int k = 0; k < 40; ++k) {
            Case given;
            given.rows = 1 + static_cast<int64_t>(random() % 7);
            given.width = 1 + static_cast<int64_t>(random() % 90);
            given.n = n;
            const auto chance = [&](unsigned of) { return random() % of == 0; };
            given.packed = k & 1;
            given.per_sequence = k & 2;
            given.presence = k & 4;
            given.noon = k & 8;
            given.masked = chance(2);
            given.mask_floats = chance(3);
            given.presence_by_token = chance(2);
            given.pairs = chance(2);
            given.row_mean = chance(2);
            given.weighted = chance(3);
            given.logprobs = !chance(3);
            given.bad = chance(6);
            given.multiprocessors = 1 + static_cast<int>(random() % 6);
            run(given, random);
        }
        for (const bool per_sequence : {false, true}) {
            Case given;
            given.n = n;
            given.width = 40;
            given.masked = given.pairs = true;
            given.per_sequence = per_sequence;
            for (const double scale : {1e30, 1e-30}) {  // squares overflow float32, or vanish
                given.scale = scale;
                run(given, random);
            }
            given.scale = 1;
            given.rows = 0;
            run(given, random);
            given.rows = 2;
            given.width = 2500;  // several chunks to a thread
            given.multiprocessors = 1;
            run(given, random);
        }
    }
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
