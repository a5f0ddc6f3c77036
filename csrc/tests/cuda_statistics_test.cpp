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
#include "tests/cuda_statistics_case.hpp"

using namespace pama;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    if (++failures < 20) std::printf("FAILED %s\n", what.c_str());
}

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
    for (const int n : {1, 2, 3, 4, 5, 8, 9, 18}) {
        for (int k = 0; k < (n > 9 ? 16 : 40); ++k) {
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
