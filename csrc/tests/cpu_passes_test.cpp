// The CPU kernels on every layout and instruction set, on heap buffers of exactly the size that they may read
// (AddressSanitizer sees a step beyond): against plain float64 sums, advantages per sequence against the same repeated
// at every token, 16-bit log-probabilities against float32, and one thread against two. Half the cases have rows with
// long masked stretches.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/statistics.hpp"
#include "cpu/driver.hpp"

using namespace pama;

namespace {

int failures = 0;

void expect(double found, double wanted, double tolerance, const std::string& what) {
    if (std::fabs(found - wanted) <= tolerance || (std::isnan(found) && std::isnan(wanted))) return;
    if (++failures < 20) std::printf("FAILED %s: found %.9g, wanted %.9g\n", what.c_str(), found, wanted);
}

size_t size(int64_t count) { return static_cast<size_t>(count); }

struct Case {
    int64_t rows, width;
    int n;
    bool packed, per_sequence, masked, padded, presence, noon, weighted, reference;
    Aggregation aggregation;
};

// Random tensors of a case, and the same advantages at every token of their sequence.
struct Data {
    Case given;
    std::vector<int64_t> offsets{0};
    int64_t tokens;
    std::vector<float> logp, old, ref, w, advantages, repeated;
    std::vector<unsigned char> mask, present;
    std::string name;

    Data(const Case& c, std::mt19937& random, const char* isa) : given(c), tokens(c.rows * c.width) {
        std::normal_distribution<float> normal;
        for (int64_t row = 0; c.packed && row < c.rows; ++row)
            offsets.push_back(offsets.back() + (row % 3 == 1 ? 0 : static_cast<int64_t>(random() % (c.width + 1))));
        if (c.packed) tokens = offsets.back();
        const auto draw = [&](std::vector<float>& x, int64_t count) {
            x.resize(size(count));
            for (float& value : x) value = normal(random);
        };
        draw(logp, tokens);
        draw(ref, tokens);
        draw(w, tokens);
        for (float& x : w) x = std::fabs(x);
        for (const float x : logp) old.push_back(x + 0.3f * normal(random));
        draw(advantages, (c.per_sequence ? c.rows : tokens) * c.n);
        mask.resize(size(tokens));
        for (unsigned char& m : mask) m = random() % 4 != 0;
        for (int64_t row = 0; c.padded && row < c.rows; ++row) {  // before a position of the row, or from there on
            const int64_t first = begin(row), last = begin(row + 1), length = last - first;
            const int64_t place = first + (length > 0 ? static_cast<int64_t>(random()) % length : 0);
            for (int64_t t = row % 2 ? first : place; t < (row % 2 ? place : last); ++t) mask[size(t)] = 0;
        }
        present.resize(size(c.rows * c.n));
        for (unsigned char& o : present) o = random() % 3 != 0;
        for (int64_t row = 0; c.per_sequence && row < c.rows; ++row)
            for (int64_t t = begin(row); t < begin(row + 1); ++t)
                for (int64_t i = 0; i < c.n; ++i) repeated.push_back(advantages[size(row * c.n + i)]);
        name = std::string(isa) + " rows " + std::to_string(c.rows) + " width " + std::to_string(c.width) + " n " +
               std::to_string(c.n) + (c.packed ? " packed" : "") + (c.per_sequence ? " per sequence" : "");
    }

    int64_t begin(int64_t row) const { return given.packed ? offsets[size(row)] : row * given.width; }

    Tokens problem(bool repeat) {
        Tokens p;
        p.rows = given.rows;
        p.width = given.packed ? tokens : given.width;
        p.offsets = given.packed ? offsets.data() : nullptr;
        p.n = given.n;
        p.noon = given.noon;
        p.clip = Clip::make(0.2, 0.2, INFINITY);
        p.aggregation = given.aggregation;
        p.per_sequence = given.per_sequence && !repeat;
        const int64_t step = given.packed ? 0 : given.width;
        const auto floats = [&](std::vector<float>& x) { return Array{x.data(), Dtype::f32, step, 1, 0}; };
        p.logprobs = floats(logp);
        p.old_logprobs = floats(old);
        if (given.weighted) p.importance_weights = floats(w);
        if (given.reference) p.ref_logprobs = floats(ref);
        p.advantages = p.per_sequence ? Array{advantages.data(), Dtype::f32, given.n, 0, 1}
                                      : Array{(repeat && given.per_sequence ? repeated : advantages).data(), Dtype::f32,
                                              step * given.n, given.n, 1};
        if (given.masked) p.mask = {mask.data(), Dtype::u8, step, 1, 0};
        if (given.presence) {
            p.objective_mask = {present.data(), Dtype::u8, given.n, 0, 1};
            p.mask_per_sequence = true;
        }
        return p;
    }
};

// float32 sums of 256 terms of size 1 to 20, then float64
double tolerance_of(const Data& d) { return 1e-3 + 3e-5 * static_cast<double>(d.tokens); }

void check_statistics(Data& d) {
    const Case& c = d.given;
    const int64_t n = c.n;
    const Tokens p = d.problem(false);
    std::vector<double> sums(size(statistics_size(n, true))), again(sums.size()), wanted(sums.size());
    statistics(p, true, sums.data(), 2);
    statistics(p, true, again.data(), 1);
    expect(std::memcmp(sums.data(), again.data(), sizeof(double) * sums.size()), 0, 0, d.name + " threads");
    std::vector<double> bound(size(n));
    for (int64_t row = 0; row < c.rows; ++row) {
        double valid = 0;
        for (int64_t t = d.begin(row); t < d.begin(row + 1); ++t) valid += !c.masked || d.mask[size(t)];
        const double omega = c.aggregation == Aggregation::seq_mean_token_mean && valid > 0 ? 1 / valid : 1.0;
        for (int64_t t = d.begin(row); t < d.begin(row + 1); ++t) {
            if (c.masked && !d.mask[size(t)]) continue;
            wanted[size(total_offset(n))] += omega;
            const double gap = static_cast<double>(d.logp[size(t)] - d.old[size(t)]);
            for (int64_t i = 0; i < n; ++i) {
                const double raw = d.advantages[size((c.per_sequence ? row : t) * n + i)];
                const double a = c.noon ? std::fmax(raw, 0) : raw, w = c.weighted ? d.w[size(t)] : 1.0f;
                const bool stopped = (a > 0 && gap > std::log(1.2)) || (a < 0 && gap < std::log(0.8));
                const bool here = !c.presence || d.present[size(row * n + i)];
                bound[size(i)] = stopped || !here ? 0 : w * a;
                wanted[size(kCount * n + i)] += here ? omega : 0;
                wanted[size(kBoundSum * n + i)] += omega * bound[size(i)];
                wanted[size(kBoundSquareSum * n + i)] += omega * bound[size(i)] * bound[size(i)];
            }
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < n; ++j)
                    wanted[size(pair_offset(n, kBoundProduct) + i * n + j)] += omega * bound[size(i)] * bound[size(j)];
        }
    }
    const double tolerance = tolerance_of(d);
    expect(sums[size(total_offset(n))], wanted[size(total_offset(n))], 1e-6, d.name + " tokens");
    for (int64_t k = 0; k < 3 * n; ++k) expect(sums[size(k)], wanted[size(k)], tolerance, d.name + " field");
    for (int64_t k = pair_offset(n, 0); k < pair_offset(n, 1); ++k)
        expect(sums[size(k)], wanted[size(k)], tolerance, d.name + " sum I I");
    if (!c.per_sequence) return;
    statistics(d.problem(true), true, again.data(), 2);
    for (size_t k = 0; k < sums.size(); ++k)
        expect(sums[k], again[k], tolerance, d.name + " statistic " + std::to_string(k) + " of repeated advantages");
}

struct Applied {
    std::vector<float> gradient, weights, optimum;
    std::vector<double> sums;
    float loss = NAN;
    double square = NAN;
};

// half: receives the gradient in bfloat16.
Applied run_apply(const Tokens& p, const Rule& rule, bool reference, std::vector<unsigned short>* half = nullptr) {
    const int64_t rows = rule.weights_per == WeightsPer::sequence ? p.rows : 1;
    Applied r;
    r.gradient.assign(size(p.tokens()), NAN);
    r.weights.resize(size(rows * p.n));
    r.optimum.resize(size(rows));
    r.sums.resize(size(statistics_size(p.n, true)));
    Outputs outputs;
    outputs.pairs = true;
    outputs.kl_coef = reference ? 0.1 : 0.0;
    outputs.loss = {&r.loss, Dtype::f32, 0, 0, 0};
    outputs.gradient = {r.gradient.data(), Dtype::f32, 0, 0, 0};
    if (half) {
        half->assign(size(p.tokens()), 0x7fff);
        outputs.gradient = {half->data(), Dtype::bf16, 0, 0, 0};
    }
    outputs.weights = {r.weights.data(), Dtype::f32, 0, 0, 1};
    outputs.optimum = {r.optimum.data(), Dtype::f32, 0, 0, 0};
    outputs.sums = r.sums.data();
    outputs.square_sum = &r.square;
    apply(p, rule, nullptr, Array{}, false, outputs, 2);
    return r;
}

void check_apply(Data& d) {
    const Rule rules[] = {{Kind::fixed, WeightsPer::batch, 0},       {Kind::scores, WeightsPer::batch, 0.1},
                          {Kind::gram, WeightsPer::batch, 0.1},      {Kind::upgrad, WeightsPer::batch, 0},
                          {Kind::scores, WeightsPer::sequence, 0.1}, {Kind::softmin, WeightsPer::sequence, 0.5},
                          {Kind::scores, WeightsPer::token, 0.1},    {Kind::softmin, WeightsPer::token, 0.5}};
    for (const Rule& rule : rules) {
        const std::string name = d.name + " rule " + std::to_string(static_cast<int>(rule.kind)) + " per " +
                                 std::to_string(static_cast<int>(rule.weights_per));
        const Applied one = run_apply(d.problem(false), rule, d.given.reference);
        for (size_t first = 0; first < one.weights.size(); first += size(d.given.n)) {
            double total = 0;
            for (size_t i = 0; i < size(d.given.n); ++i) total += one.weights[first + i];
            expect(total, 1, 1e-5, name + " weights");
        }
        expect(std::isfinite(one.loss), 1, 0, name + " loss");
        for (size_t t = 0; t < one.gradient.size(); ++t) {
            expect(std::isfinite(one.gradient[t]), 1, 0, name + " gradient");
            if (d.given.masked && !d.mask[t]) expect(one.gradient[t], 0, 0, name + " gradient of a masked token");
        }
        // UPGrad's weights of a singular matrix follow its rounding.
        if (!d.given.per_sequence || rule.kind == Kind::upgrad) continue;
        const Applied other = run_apply(d.problem(true), rule, d.given.reference);
        expect(one.loss, other.loss, 3e-4 * (1 + std::fabs(other.loss)), name + " loss of repeated advantages");
        for (size_t t = 0; t < one.gradient.size(); ++t)
            expect(one.gradient[t], other.gradient[t], 3e-3, name + " gradient of repeated advantages");
        for (size_t k = 0; k < one.weights.size(); ++k)
            expect(one.weights[k], other.weights[k], 3e-3, name + " weights of repeated advantages");
    }
}

// 16-bit log-probabilities give the results of the same values in float32, rounded once.
void check_half(Data& d, bool bfloat16) {
    const auto narrowed = [&](std::vector<float>& values) {
        std::vector<unsigned short> half;
        for (float& x : values) {
            half.push_back(bfloat16 ? float_to_bf16(x) : float_to_f16(x));
            x = bfloat16 ? bf16_to_float(half.back()) : f16_to_float(half.back());
        }
        return half;
    };
    std::vector<unsigned short> logp = narrowed(d.logp), old = narrowed(d.old), gradient;
    for (const Rule& rule : {Rule{Kind::fixed, WeightsPer::batch, 0}, Rule{Kind::scores, WeightsPer::sequence, 0.1}}) {
        Tokens p = d.problem(false);
        const Applied wanted = run_apply(p, rule, d.given.reference);
        p.logprobs.data = logp.data();
        p.old_logprobs.data = old.data();
        p.logprobs.dtype = p.old_logprobs.dtype = bfloat16 ? Dtype::bf16 : Dtype::f16;
        const Applied found = run_apply(p, rule, d.given.reference, bfloat16 ? &gradient : nullptr);
        const std::string name = d.name + (bfloat16 ? " bfloat16" : " float16");
        expect(found.loss, wanted.loss, 0, name + " loss");
        for (size_t t = 0; t < wanted.gradient.size(); ++t) {
            const float exact = wanted.gradient[t];
            expect(bfloat16 ? bf16_to_float(gradient[t]) : found.gradient[t],
                   bfloat16 ? bf16_to_float(float_to_bf16(exact)) : exact, 0, name + " gradient");
        }
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
        for (int k = 0; k < 120; ++k) {
            const int sizes[] = {1, 2, 3, 4, 5, 8, 9, 17, 33};
            Case given;
            given.rows = static_cast<int64_t>(random() % 6);
            given.width = static_cast<int64_t>(random() % (k % 20 == 0 ? 9000 : 300));
            given.n = sizes[random() % 9];
            if (k % 8 == 3) {  // more rows than are summed at once, more objectives than fit a part of their products
                given.rows = 30 + static_cast<int64_t>(random() % 50);
                given.width = static_cast<int64_t>(random() % 9);
                given.n = k % 16 == 3 ? 6 : 39;
            }
            given.packed = random() % 2;
            given.per_sequence = random() % 2;
            given.masked = random() % 2;
            given.padded = random() % 2;
            given.presence = random() % 2;
            given.noon = random() % 2;
            given.weighted = random() % 4 == 0;
            given.reference = random() % 4 == 0;
            given.aggregation = static_cast<Aggregation>(random() % 3);
            Data data(given, random, isa);
            check_statistics(data);
            check_apply(data);
            check_half(data, k % 2 == 0);
        }
    }
    std::printf("passes: %d failures\n", failures);
    return failures != 0;
}
