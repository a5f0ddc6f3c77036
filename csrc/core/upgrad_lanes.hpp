// UPGrad's projections (upgrad.hpp) of many objectives on a CPU: the searches of several projections advance together,
// and the systems that they wait for are solved in SIMD lanes. From its first support on, a projection gets the same
// bits whatever the others are. One system at a time leaves most of a CPU core idle: supports are small, and each pivot
// waits for the one before.
#pragma once

#include "ldlt_lanes.hpp"
#include "upgrad_sweeps.hpp"

PAMA_BEGIN
namespace upgrad {

#if defined(__CUDACC__) || !defined(__GNUC__)
constexpr int kLargestInLanes = 0;  // objectives up to which the projections are solved in lanes
PAMA_HD inline std::size_t lanes_workspace(int) { return 0; }
SolverResult solve_in_lanes(Problem& s, double* workspace);  // never called
#else
constexpr int kLargestInLanes = 128;  // beyond, the vectors of one system are long enough

template <int Lanes>
struct Doubles;
template <>
struct Doubles<2> {
    typedef double V __attribute__((vector_size(16), aligned(8), may_alias));
};
template <>
struct Doubles<4> {
    typedef double V __attribute__((vector_size(32), aligned(8), may_alias));
};
template <>
struct Doubles<8> {
    typedef double V __attribute__((vector_size(64), aligned(8), may_alias));
};
constexpr int kSlots = 32;
constexpr int kLaneVectors = 4 + ldlt::kLaneBlock, kAlignment = 64;

// Size of the workspace beyond that of the problem, in doubles.
inline std::size_t lanes_workspace(int n) {
    if (n > kLargestInLanes) return 0;
    const std::size_t ld = ldlt::leading_dimension(n);
    const int k = ldlt::round_up_to_lane_block(n);
    const std::size_t systems = ldlt::kLanes * (ldlt::lane_row(k) + static_cast<std::size_t>(kLaneVectors) * k);
    return n * ld + Sweeps::size(n) / 2 + kSlots * Problem::kOwnVectors * ld + systems + kAlignment / sizeof(double);
}

// Solves on the supports of `count` problems, at most as many as the vectors have lanes, and calls resume(problem,
// sound), sound: the result of System::solve. Where it returns true, the problem is solved again with the same factor.
template <int Lanes, class Resume>
inline void solve_systems(Problem* const* given, int count, double* scratch, Resume resume) {
    if constexpr (Lanes > 2)
        if (count <= Lanes / 2) return solve_systems<Lanes / 2>(given, count, scratch, resume);
    Problem* problems[Lanes];  // `given` may change
    for (int lane = 0; lane < Lanes; ++lane) problems[lane] = given[lane < count ? lane : 0];
    typedef typename Doubles<Lanes>::V V;
    int largest = 0;
    for (int lane = 0; lane < count; ++lane) largest = max_of(problems[lane]->size, largest);
    const int k = ldlt::round_up_to_lane_block(largest);
    const auto take = [&](std::ptrdiff_t vectors) {
        return reinterpret_cast<V*>((scratch += vectors * Lanes)) - vectors;
    };
    V* const rows = take(ldlt::lane_row(k));
    V* const panel = take(static_cast<std::ptrdiff_t>(ldlt::kLaneBlock) * k);
    V *const rhs = take(k), *const diagonal = take(k), *const inverse = take(k);
    std::ptrdiff_t* const support = reinterpret_cast<std::ptrdiff_t*>(take(k));
    // A lane without a problem, or past the end of its support, has the rows of the identity.
    V relative = V{};
    for (int lane = 0; lane < Lanes; ++lane) {
        const Problem& p = *problems[lane];
        const int size = lane < count ? p.size : 0;
        relative[lane] = p.strict ? p.vanishing : nnqp::kSmallestPivot;
        for (int a = 0; a < size; ++a) {
            const int i = p.support[a];
            support[a * Lanes + lane] = i;
            diagonal[a][lane] = p.diagonal[i];
            rhs[a][lane] = p.target[i];
        }
        for (int a = size; a < k; ++a) {
            support[a * Lanes + lane] = 0;
            diagonal[a][lane] = 1.0;
            rhs[a][lane] = 0.0;
        }
    }
    const double* const zeros = problems[0]->shift;
    for (int a = 0; a < k; ++a) {
        V* const PAMA_RESTRICT to = rows + ldlt::lane_row(a);
        const double* from[Lanes];
        for (int lane = 0; lane < Lanes; ++lane) {
            const bool used = lane < count && a < problems[lane]->size;
            from[lane] = used ? problems[0]->row_of(static_cast<int>(support[a * Lanes + lane])) : zeros;
        }
        for (int b = 0; b < a; ++b) {
            V x = {};
            PAMA_UNROLL
            for (int lane = 0; lane < Lanes; ++lane) x[lane] = from[lane][support[b * Lanes + lane]];
            to[b] = x;
        }
        to[a] = diagonal[a];
        for (int b = a + 1; b % ldlt::kLaneBlock != 0; ++b) to[b] = V{};
    }
    const ldlt::LaneScratch systems = {rows, panel, rhs, diagonal, inverse, relative};
    bool regular[Lanes], pending[Lanes];
    ldlt::solve_lanes<V>(k, systems, regular);
    const auto read = [&](int lane) {
        Problem& p = *problems[lane];
        double value = 0.0, total = 0.0, terms = 0.0;
        for (int a = 0; a < p.size; ++a) {
            const double y = rhs[a][lane];
            p.scratch.solution[a] = y;
            value += p.target[p.support[a]] * y;
            total += y;
            terms += diagonal[a][lane] * (y < 0.0 ? -y : y);
        }
        p.value = value;
        p.total = total;
        p.terms = terms;
        return resume(&p, (regular[lane] || !p.strict) && value >= 0.0 && terms < nnqp::kLargestDouble);
    };
    for (int lane = 0; lane < count; ++lane) pending[lane] = true;
    for (bool any = true; any;) {
        any = false;
        for (int lane = 0; lane < count; ++lane) any |= pending[lane] = pending[lane] && read(lane);
        if (!any) break;
        for (int lane = 0; lane < count; ++lane)
            for (int a = 0; pending[lane] && a < problems[lane]->size; ++a)
                rhs[a][lane] = problems[lane]->target[problems[lane]->support[a]];
        ldlt::solve_lanes_again<V>(k, systems);
    }
}

// Sorts by the size of the support, so that systems that are solved together have about the same size.
inline void sort_by_size(Problem** problems, int count) {
    for (int i = 1; i < count; ++i) {
        Problem* const p = problems[i];
        int k = i;
        for (; k > 0 && problems[k - 1]->size < p->size; --k) problems[k] = problems[k - 1];
        problems[k] = p;
    }
}

// Finds where the x of all projections are probably positive. Returns whether M is singular, where that matters.
inline bool find_supports(Problem& s, Sweeps& all) {
    using Kind = Sweeps::Kind;
    all.weigh(s, 0.0, 1.0f);
    const int settled = static_cast<int>(kSettled * s.n * s.n);
    for (int count = 0; count < kSweeps; ++count)
        if ((count == 0 ? all.sweep<Kind::from_zero>() : all.sweep<Kind::plain>()) <= settled) return false;
    if (!s.singular()) return false;
    all.weigh(s, kSweepRidge, kOverrelaxation);
    for (int round = 0; round < kRounds; ++round) {
        if (round == 0)
            all.sweep<Kind::plain>();
        else
            all.sweep<Kind::updates>();
        all.sweep<Kind::splits>();
    }
    return true;
}

// solve_all in lanes: adds the sums of the c^(i) to s.answer.
inline SolverResult solve_in_lanes(Problem& s, double* workspace) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace);
    workspace += (kAlignment - address % kAlignment) % kAlignment / sizeof(double);
    const std::size_t ld = s.ld;
    const auto take = [&](std::size_t doubles) { return (workspace += doubles) - doubles; };
    double* const points = take(s.n * ld);
    Sweeps sweeps(s, reinterpret_cast<float*>(take(Sweeps::size(s.n) / 2)));
    const bool singular = find_supports(s, sweeps);
    Problem slots[kSlots];
    SolverResult result = {0.0, 0.0, SolveStatus::solved, 0};
    Problem* active[kSlots];
    int count = 0, next = 0;
    const auto starts = [&](Problem* slot) {
        while (next < s.n && s.preference[next] == 0.0) ++next;
        if (next == s.n) return false;
        slot->guess = sweeps.x + sweeps.place(next);
        slot->guess_stride = sweeps.width_of(next);
        slot->objective = next++;
        slot->factorisations = 0;
        return slot->begin(singular);
    };
    for (Problem& slot : slots) {
        if (next < s.n) slot.share(s, take(Problem::kOwnVectors * ld));
        if (starts(&slot)) active[count++] = &slot;
    }
    double* const scratch = workspace;
    while (count > 0) {
        for (int i = 0; i < count; ++i) active[i]->gather_support();
        sort_by_size(active, count);
        int kept = 0;
        for (int first = 0; first < count; first += ldlt::kLanes) {
            const int lanes = min_of(count - first, static_cast<int>(ldlt::kLanes));
            solve_systems<ldlt::kLanes>(active + first, lanes, scratch, [&](Problem* p, bool sound) {
                const bool counts = p->repeats || p->factorisations < p->most;
                p->factorisations += counts && !p->repeats;
                bool more = p->resume(counts && sound);
                if (more && p->repeats) return true;
                if (!more) {
                    result.factorisations += p->factorisations;
                    for (int j = 0; j < s.n; ++j) points[p->objective * ld + j] = p->point[j];
                    if (is_worse(p->residual, result.residual)) {
                        result.residual = p->residual;
                        result.status = p->status();
                    }
                    more = !unsolved(result) && starts(p);
                }
                if (more) active[kept++] = p;
                return false;
            });
            if (unsolved(result)) return result;
        }
        count = kept;
    }
    for (int i = 0; i < s.n; ++i)
        if (s.preference[i] != 0.0) s.add(i, points + i * ld);
    return result;
}
#endif

}  // namespace upgrad
PAMA_END
