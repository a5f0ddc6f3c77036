// The CPU kernels on every layout and instruction set, on heap buffers of exactly the size that they may read
// (AddressSanitizer sees a step beyond), against plain float64 sums.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/statistics.hpp"
#include "cpu/driver.hpp"

using namespace pama;

namespace {

int failures = 0;

void expect(double found, double wanted, double tolerance, const std::string& what) {
    if (std::fabs(found - wanted) <= tolerance) return;
    if (++failures < 20) std::printf("FAILED %s: found %.9g, wanted %.9g\n", what.c_str(), found, wanted);
}

struct Case {
    long rows, width;
    int n;
    bool packed, per_sequence, masked, presence, noon;
};

void run(const Case& given, std::mt19937& random, const char* isa) {
    std::normal_distribution<float> normal;
    std::vector<long> offsets{0};
    long tokens = given.rows * given.width;
    if (given.packed) {
        for (long row = 0; row < given.rows; ++row)
            offsets.push_back(offsets.back() + (row % 3 == 1 ? 0 : static_cast<long>(random() % (given.width + 1))));
        tokens = offsets.back();
    }
    const auto size = [](long count) { return static_cast<std::size_t>(count); };
    std::vector<float> logp(size(tokens)), old(size(tokens)),
        adv(size((given.per_sequence ? given.rows : tokens) * given.n));
    std::vector<unsigned char> mask(size(tokens)), present(size(given.rows * given.n));
    for (float& x : logp) x = normal(random);
    for (std::size_t t = 0; t < old.size(); ++t) old[t] = logp[t] + 0.3f * normal(random);
    for (float& x : adv) x = normal(random);
    for (unsigned char& m : mask) m = random() % 4 != 0;
    for (unsigned char& o : present) o = random() % 3 != 0;

    Problem p;
    p.rows = given.rows;
    p.width = given.packed ? tokens : given.width;
    p.offsets = given.packed ? offsets.data() : nullptr;
    p.n = given.n;
    p.noon = given.noon;
    p.clip = Clip::make(0.2, 0.2, INFINITY);
    const long step = given.packed ? 0 : given.width;
    p.logprobs = {logp.data(), Dtype::f32, step, 1, 0};
    p.old_logprobs = {old.data(), Dtype::f32, step, 1, 0};
    p.advantages = given.per_sequence ? Array{adv.data(), Dtype::f32, given.n, 0, 1}
                                      : Array{adv.data(), Dtype::f32, step * given.n, given.n, 1};
    if (given.masked) p.mask = {mask.data(), Dtype::u8, step, 1, 0};
    if (given.presence) p.objective_mask = {present.data(), Dtype::u8, given.n, 0, 1};

    const long n = given.n;
    std::vector<double> sums(size(statistics_size(n, true)));
    statistics(p, true, sums.data(), 2);

    std::vector<double> score(size(n)), moment(size(n)), cross(size(n * n));
    double valid = 0;
    std::vector<double> bound(size(n));
    for (long row = 0; row < given.rows; ++row)
        for (long t = p.begin(row); t < p.begin(row + 1); ++t) {
            if (given.masked && !mask[size(t)]) continue;
            valid += 1;
            const double d = static_cast<double>(logp[size(t)] - old[size(t)]);
            for (long i = 0; i < n; ++i) {
                const double raw = adv[size((given.per_sequence ? row : t) * n + i)];
                const double a = given.noon ? std::fmax(raw, 0) : raw;
                const bool stopped = (a > 0 && d > std::log(1.2)) || (a < 0 && d < std::log(0.8));
                const bool here = !given.presence || present[size(row * n + i)];
                bound[size(i)] = stopped || !here ? 0 : a;
                score[size(i)] += bound[size(i)];
                moment[size(i)] += bound[size(i)] * bound[size(i)];
            }
            for (long i = 0; i < n; ++i)
                for (long j = 0; j < n; ++j) cross[size(i * n + j)] += bound[size(i)] * bound[size(j)];
        }
    // float32 sums of 256 terms of size 1 to 20, then float64
    const double tolerance = 1e-4 + 1e-5 * static_cast<double>(tokens);
    const std::string name = std::string(isa) + " rows " + std::to_string(given.rows) + " width " +
                             std::to_string(given.width) + " n " + std::to_string(n);
    expect(sums[size(total_offset(n))], valid, 0, name + " tokens");
    for (long i = 0; i < n; ++i) {
        expect(sums[size(kBoundSum * n + i)], score[size(i)], tolerance, name + " sum I");
        expect(sums[size(kBoundSquareSum * n + i)], moment[size(i)], tolerance, name + " sum I^2");
        for (long j = 0; j < n; ++j)
            expect(sums[size(pair_offset(n, kBoundProduct) + i * n + j)], cross[size(i * n + j)], tolerance,
                   name + " sum I I");
    }

    std::vector<double> prior(size(n), 1.0 / given.n);
    std::vector<float> combined(size(tokens)), gradient(size(tokens)), weights(size(given.rows * n)),
        optimum(size(given.rows));
    for (WeightsPer per : {WeightsPer::batch, WeightsPer::sequence, WeightsPer::token}) {
        float loss = NAN;
        Apply apply_to;
        apply_to.weights_per = per;
        apply_to.prior = prior.data();
        apply_to.regularization = 0.1;
        apply_to.aggregation = Aggregation::sequence_mean_token_mean;
        apply_to.gradient = {gradient.data(), Dtype::f32, 0, 0, 0};
        apply_to.combined = {combined.data(), Dtype::f32, 0, 0, 0};
        apply_to.loss = {&loss, Dtype::f32, 0, 0, 0};
        std::vector<float> c(size(per == WeightsPer::sequence ? given.rows * n : n)),
            s(size(per == WeightsPer::sequence ? given.rows : 1));
        apply_to.weights = {c.data(), Dtype::f32, 0, 0, 1};
        apply_to.optimum = {s.data(), Dtype::f32, 0, 0, 0};
        apply_to.statistics = sums.data();
        apply(p, apply_to, 2);
        for (std::size_t first = 0; first < c.size(); first += size(n)) {
            double total = 0;
            for (std::size_t i = 0; i < size(n); ++i) total += c[first + i];
            expect(total, 1, 1e-5, name + " weights");
        }
        expect(std::isfinite(loss), 1, 0, name + " loss");
    }
}

}  // namespace

int main() {
    for (const char* isa : {"portable", "avx2", "avx512"}) {
        const std::string used = kernels(isa).name;
        if (used != isa) {
            std::printf("%s: not on this processor\n", isa);
            continue;
        }
        std::mt19937 random(11);
        for (int k = 0; k < 200; ++k) {
            const int sizes[] = {1, 2, 3, 4, 5, 8, 9, 17, 33};
            Case given;
            given.rows = static_cast<long>(random() % 6);
            given.width = static_cast<long>(random() % (k % 20 == 0 ? 3000 : 300));
            given.n = sizes[random() % 9];
            given.packed = random() % 2;
            given.per_sequence = random() % 2;
            given.masked = random() % 2;
            given.presence = random() % 2;
            given.noon = random() % 2;
            run(given, random, isa);
        }
    }
    std::printf("passes: %d failures\n", failures);
    return failures != 0;
}
