// Random matrices of every family against the KKT conditions: min_norm_fuzz [count] [seed] [largest n]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/min_norm.hpp"
#include "min_norm_families.hpp"

namespace {

struct Worst {
    int factorisations = 0;
    double kkt = 0.0;
    long long total = 0, matrices = 0;
};

// No proof bounds the factorisations by a polynomial; this is several times what was ever seen.
int cap(int n) { return 100 + 10 * n; }

}  // namespace

int main(int argc, char** argv) {
    const long long count = argc > 1 ? std::atoll(argv[1]) : 10000;
    const unsigned long long seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const int largest_n = argc > 3 ? std::atoi(argv[3]) : 64;
    families::Generator random(seed);
    std::vector<double> weights(largest_n), workspace(pama::min_norm_workspace(largest_n));
    std::vector<unsigned char> present(largest_n);
    Worst all, worst[families::kFamilies];
    int failures = 0;
    for (long long i = 0; i < count; ++i) {
        const int family = static_cast<int>(i % families::kFamilies);
        const int n =
            random.integer(0, 3) ? random.integer(1, largest_n < 16 ? largest_n : 16) : random.integer(1, largest_n);
        const std::vector<double> gram = random.gram(family, n);
        const std::vector<double> preference = random.preference(n, random.integer(0, 1));
        const double regularization = random.integer(0, 3) ? 0.0 : std::pow(10.0, random.uniform(-14.0, 1.0));
        const bool masked = random.integer(0, 7) == 0;
        present.assign(n, 1);
        if (masked)
            for (int k = 1; k < n; ++k) present[k] = static_cast<unsigned char>(random.integer(0, 1));
        weights.assign(n, -1.0);
        const pama::MinNormResult result =
            pama::min_norm_solve(pama::MatrixView<double>{n, gram.data(), n, 1}, preference.data(),
                                 masked ? present.data() : nullptr, regularization, weights.data(), workspace.data());
        const double kkt = families::kkt_residual(n, gram, preference, regularization, weights, present.data());
        for (Worst* w : {&all, &worst[family]}) {
            w->factorisations = std::max(w->factorisations, result.factorisations);
            w->kkt = std::max(w->kkt, kkt);
            w->total += result.factorisations;
            ++w->matrices;
        }
        if (!(kkt <= 1e-10) || !(result.residual <= 1e-10) || result.factorisations > cap(n)) {
            std::printf("FAILED %s n=%d matrix=%lld regularization=%g masked=%d kkt=%g residual=%g factorisations=%d\n",
                        families::name(family), n, i, regularization, masked, kkt, result.residual,
                        result.factorisations);
            ++failures;
        }
    }
    for (int f = 0; f < families::kFamilies; ++f)
        std::printf("%-20s mean_factorisations=%.2f max_factorisations=%d max_kkt=%.1e\n", families::name(f),
                    worst[f].matrices ? static_cast<double>(worst[f].total) / worst[f].matrices : 0.0,
                    worst[f].factorisations, worst[f].kkt);
    std::printf("matrices=%lld max_factorisations=%d max_kkt=%.1e\n", count, all.factorisations, all.kkt);
    return failures != 0;
}
