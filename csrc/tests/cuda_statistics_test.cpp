// The CUDA kernels, run on the host thread by thread (csrc/cuda/emulation.hpp), against the CPU kernels.
#define PAMA_CUDA_EMULATION 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/driver.hpp"
#include "cuda/solvers.cu"
#include "cuda/statistics.cu"

using namespace pama;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    if (++failures < 20) std::printf("FAILED %s\n", what.c_str());
}

bool near(double found, double wanted, double tolerance) {
    if (std::isnan(wanted)) return std::isnan(found);
    return std::fabs(found - wanted) <= tolerance;
}

std::size_t size(long count) { return static_cast<std::size_t>(count); }

struct Case {
    long rows, width;
    int n;
    bool packed, per_sequence, masked, presence, noon, pairs;
    double scale;  // of the advantages
    int blocks;
};

void run(const Case& given, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<long> offsets{0};
    long tokens = given.rows * given.width;
    if (given.packed) {
        for (long row = 0; row < given.rows; ++row)
            offsets.push_back(offsets.back() + (row % 3 == 1 ? 0 : static_cast<long>(random() % (given.width + 1))));
        tokens = offsets.back();
    }
    const long n = given.n;
    std::vector<float> logp(size(tokens)), old(size(tokens)), adv(size((given.per_sequence ? given.rows : tokens) * n));
    std::vector<unsigned char> mask(size(tokens)), present(size(given.rows * n));
    for (float& x : logp) x = normal(random);
    for (std::size_t t = 0; t < old.size(); ++t) old[t] = logp[t] + 0.3f * normal(random);
    for (float& x : adv) x = static_cast<float>(given.scale) * normal(random);
    for (unsigned char& m : mask) m = random() % 4 != 0;
    for (unsigned char& o : present) o = random() % 3 != 0;
    for (std::size_t t = 0; t < mask.size(); ++t)
        if (given.masked && !mask[t]) logp[t] = NAN;  // never seen
    std::vector<std::int32_t> offsets32(offsets.begin(), offsets.end());

    Problem p;
    p.rows = given.rows;
    p.width = given.packed ? tokens : given.width;
    p.offsets = given.packed ? offsets.data() : nullptr;
    p.n = given.n;
    p.noon = given.noon;
    p.clip = Clip::make(0.2, 0.2, given.noon ? INFINITY : 3.0);
    const long step = given.packed ? 0 : given.width;
    p.logprobs = {logp.data(), Dtype::f32, step, 1, 0};
    p.old_logprobs = {old.data(), Dtype::f32, step, 1, 0};
    p.advantages =
        given.per_sequence ? Array{adv.data(), Dtype::f32, n, 0, 1} : Array{adv.data(), Dtype::f32, step * n, n, 1};
    if (given.masked) p.mask = {mask.data(), Dtype::u8, step, 1, 0};
    if (given.presence) p.objective_mask = {present.data(), Dtype::u8, n, 0, 1};
    std::vector<double> wanted(size(statistics_size(n, given.pairs))), prior(size(n), 1.0 / static_cast<double>(n));
    statistics(p, given.pairs, wanted.data(), 1);
    std::vector<double> c(size(n));
    const double optimum = batch_weights(wanted.data(), given.n, given.pairs, prior.data(), 0.1, c.data());

    cuda::Tokens t;
    t.rows = p.rows;
    t.width = p.width;
    if (given.packed) t.offsets = {offsets32.data(), false, 1};
    t.n = p.n;
    t.noon = p.noon;
    t.clip = p.clip;
    t.advantages = p.advantages;
    t.mask = p.mask;
    t.objective_mask = p.objective_mask;
    t.logprobs = p.logprobs;
    t.old_logprobs = p.old_logprobs;
    const std::string what = "rows " + std::to_string(given.rows) + " width " + std::to_string(given.width) + " n " +
                             std::to_string(n) + (given.packed ? " packed" : "") +
                             (given.per_sequence ? " per-sequence" : "") + (given.masked ? " masked" : "") +
                             (given.presence ? " presence" : "") + (given.noon ? " noon" : "") +
                             (given.pairs ? " pairs" : "") + " scale " + std::to_string(given.scale);
    std::vector<double> first;
    for (const bool wide : {false, true, false}) {
        t.wide = wide;
        const cuda::Plan plan = cuda::statistics_plan(t, given.pairs, given.blocks);
        std::vector<double> partials(size(plan.partials), NAN), sums(wanted.size(), NAN), weights(size(n), NAN);
        std::vector<double> work(size(cuda::solve_doubles(given.n, given.pairs)), NAN);
        double found = NAN;
        unsigned counter = 0;
        cuda::Solve solve;
        solve.bound = given.pairs ? cuda::Bound::gram : cuda::Bound::scores;
        solve.prior = prior.data();
        solve.regularization = 0.1;
        solve.wide = true;
        solve.weights = weights.data();
        solve.optimum = &found;
        solve.work = work.data();
        cuda::statistics(t, given.pairs, plan, partials.data(), &counter, sums.data(), solve, nullptr);
        expect(counter == 0, what + ": the counter is reset");
        // Sums of about `tokens` terms: float32 over a few of them, and another order.
        for (std::size_t k = 0; k < wanted.size(); ++k) {
            const double unit = k < size(kFields * n) && k / size(n) >= 1 && k / size(n) < 7
                                    ? std::pow(given.scale, k / size(n) == 2 || k / size(n) == 6 ? 2 : 1)
                                    : (k >= size(pair_offset(n, 0)) ? std::max(1.0, given.scale * given.scale) : 1.0);
            expect(near(sums[k], wanted[k], 2e-5 * unit * static_cast<double>(tokens + 1)),
                   what + " sum " + std::to_string(k) + " is " + std::to_string(sums[k]) + ", wanted " +
                       std::to_string(wanted[k]));
        }
        for (std::size_t i = 0; i < c.size(); ++i)
            expect(near(weights[i], c[i], 1e-3), what + " weight " + std::to_string(i));
        expect(near(found / given.scale, optimum / given.scale, 1e-3 * (given.pairs ? given.scale : 1)),
               what + " optimum");
        if (!wide) {  // scheduled in another order: the same bits
            if (first.empty())
                first = sums;
            else
                expect(std::memcmp(first.data(), sums.data(), sizeof(double) * sums.size()) == 0, what + ": bits");
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(7);
    for (int n : {1, 2, 3, 4, 5, 8}) {
        for (int k = 0; k < 16; ++k) {
            Case given{};
            given.rows = 1 + static_cast<long>(random() % 7);
            given.width = 1 + static_cast<long>(random() % 90);
            given.n = n;
            given.packed = k & 1;
            given.per_sequence = k & 2;
            given.masked = random() % 2;
            given.presence = k & 4;
            given.noon = k & 8;
            given.pairs = random() % 3 == 0;
            given.scale = 1;
            given.blocks = 1 + static_cast<int>(random() % 6);
            run(given, random);
        }
        run({3, 40, n, false, false, true, false, true, false, 1e30, 3}, random);   // squares overflow float32
        run({3, 40, n, false, false, true, false, true, false, 1e-30, 3}, random);  // and vanish
        run({0, 5, n, false, false, false, false, true, true, 1, 3}, random);
        run({2, 700, n, false, false, false, false, true, false, 1, 2}, random);  // several chunks to a thread
    }
    std::printf(failures ? "%d failures\n" : "ok\n", failures);
    return failures != 0;
}
