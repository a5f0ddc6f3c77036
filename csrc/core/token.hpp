// The factors of one token, computed from loaded values. The statistics (core/statistics.hpp) and the loss are built
// from them.
//
// Masked values are ignored and count as 0, including NaN. A NaN or infinity at a valid token makes the factors of that
// token, or that advantage, NaN, so later arithmetic needs no test for it.
#pragma once

#include "numbers.hpp"
#include "surrogate.hpp"

PAMA_BEGIN

// Factors of the surrogate and of the bound term, multiplied by w, for positive and for negative advantages; for one
// token or one token per SIMD lane.
template <class V>
struct TokenFactors {
    V logp, pos, neg, grad_pos, grad_neg;
    V ratio, kl;
    decltype(V{} < V{}) off_pos, off_neg;  // no gradient
};

// The clip limits in the type of the computation.
template <class T>
struct ClipIn {
    T low, high, dual, log_low, log_high, log_dual;
    PAMA_HD explicit ClipIn(const Clip& clip)
        : low(static_cast<T>(clip.low)),
          high(static_cast<T>(clip.high)),
          dual(static_cast<T>(clip.dual)),
          log_low(static_cast<T>(clip.log_low)),
          log_high(static_cast<T>(clip.log_high)),
          log_dual(static_cast<T>(clip.log_dual)) {}
};

// On-policy `old` is `logp`; without log-probabilities both are 0.
template <class V, class Mask, class T>
PAMA_HD inline TokenFactors<V> token_factors(const ClipIn<T>& clip, Mask valid, V logp, V old, V w) {
    const V zero = V{}, limit = zero + static_cast<T>(kMaxLogRatio), low = zero + clip.low, high = zero + clip.high;
    logp = choose(valid, logp, zero);
    old = choose(valid, old, zero);
    w = choose(valid, w, zero);
    const V bad = zero * logp + zero * old + zero * w;  // 0, or NaN
    const auto finite = bad == zero;
    logp = choose(finite, logp, zero);
    const V d = choose(finite, logp - old, zero), factor = choose(finite, w, zero);
    const auto outside = (d > limit) | (d < -limit);
    TokenFactors<V> f;
    V k3;
    f.ratio = exponential<true>(max_of(min_of(d, limit), -limit), k3);
    f.logp = logp;
    f.off_pos = (d > zero + clip.log_high) | outside;
    f.off_neg = (d > zero + clip.log_dual) | (d < zero + clip.log_low) | outside;
    f.pos = factor * min_of(f.ratio, high) + bad;
    f.neg = factor * max_of(min_of(f.ratio, zero + clip.dual), low) + bad;
    f.grad_pos = choose(f.off_pos, zero, factor) + bad;
    f.grad_neg = choose(f.off_neg, zero, factor) + bad;
    f.kl = k3 + bad;  // k3 is 0 at d = 0, hence at masked tokens
    return f;
}

// The raw advantage as used in the sums: 0 if the objective is absent, NaN if it is infinite.
template <class T>
PAMA_HD inline T raw_advantage(T value, bool present) {
    value = present ? value : T(0);
    return value + T(0) * value;
}

// The surrogate g and the bound term I of one objective, from its raw advantage and the token's factors.
template <class V>
PAMA_HD inline void surrogate_terms(bool noon, V a, V pos, V neg, V grad_pos, V grad_neg, V& surrogate, V& bound) {
    const V up = a < V{} ? V{} : a;  // not choose(): the comparison stays a mask
    surrogate = up * pos;
    bound = up * grad_pos;
    if (noon) return;
    const V down = a - up;
    surrogate += down * neg;
    bound += down * grad_neg;
}

// The gain of a token, and `by` times its derivative in logp, from up = sum_i c_i max(A_i, 0) and
// down = sum_i c_i min(A_i, 0). `by` and the ratio are multiplied first, since up * ratio alone may overflow.
template <class V>
PAMA_HD inline void loss_terms(bool noon, V up, V down, const TokenFactors<V>& f, V by, V& gain, V& slope) {
    gain = up * f.pos;
    slope = up * f.grad_pos;
    if (!noon) {
        gain += down * f.neg;
        slope += down * f.grad_neg;
    }
    slope *= by * f.ratio;
}

// The KL penalty to the reference, e^r - 1 - r with r = clamp(ref - logp, -20, 20), and its derivative in logp: 0 where
// the clamp binds.
template <class V, class Mask>
PAMA_HD inline void ref_terms(Mask valid, V ref, V logp, V& kl, V& slope) {
    const V zero = V{}, limit = zero + static_cast<typename LaneOf<V>::type>(kMaxLogRatio);
    ref = choose(valid, ref, zero);
    const V poison = zero * ref;
    const V r = choose(valid, ref - logp, zero), clamped = max_of(min_of(r, limit), -limit);
    V k3;
    exponential<true>(clamped, k3);
    kl = k3 + poison;
    slope = poison - choose((r > limit) | (r < -limit), zero, clamped + k3);
}

template <class T>
PAMA_HD inline T bound_term(const TokenFactors<T>& f, bool noon, T advantage, bool present) {
    T surrogate, bound;
    surrogate_terms(noon, advantage, f.pos, f.neg, f.grad_pos, f.grad_neg, surrogate, bound);
    return present ? bound : T(0);
}

PAMA_END
