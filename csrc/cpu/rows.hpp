// The passes over tokens for advantages per sequence. They do not depend on the objectives, so they cost the same for
// any number of them.
#pragma once

#include "../core/statistics.hpp"
#include "chunks.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

// The inputs of the gradient for the tokens of one row.
template <class T>
struct RowSlope {
    T up = 0, down = 0, by = 0, kl_coef = 0;
};

template <bool Noon, bool Sums, bool Gradient, class T, class V = typename Lanes<T>::V>
inline void chunk_pass(const Chunk<T>& in, const ClipIn<T>& clip, const RowSlope<T>& row, T* sums, T* gradient) {
    const V zero{}, one = zero + 1, up = zero + row.up, down = zero + row.down, by = zero + row.by,
                    coefficient = zero + row.kl_coef * row.by;
    V s[kRowSums] = {};
    for (int64_t t = 0; t < in.padded; t += Lanes<T>::count) {
        const auto valid = valid_lanes<V>(in.valid + t);
        const TokenFactors<V> f = token_factors(clip, valid, load<V>(in.logp + t), load<V>(in.old + t),
                                                in.weight ? load<V>(in.weight + t) : one);
        V kl = zero, ref_slope = zero;
        if (in.ref) ref_terms(valid, load<V>(in.ref + t), f.logp, kl, ref_slope);
        if constexpr (Sums) {
            add_to_row(f, Noon, valid, one, s, s);
            s[kRefKl] += kl;
        }
        if constexpr (Gradient) {
            V gain, slope;
            loss_terms(Noon, up, down, f, by, gain, slope);
            slope -= coefficient * ref_slope;
            store(gradient + t, choose(valid, -slope, zero));
        }
    }
    if constexpr (Sums) totals<kRowSums>(s, sums);
}

// The ratio u of a token and the signs of the advantages for which it has a gradient, in one float: the sign bit is set
// if positive advantages have one, the exponent is 64 larger if negative ones have. u is between 2^-29 and 2^29.
constexpr unsigned kUpBit = 0x80000000, kDownBit = 0x20000000;  // added to the bits of u
constexpr float kDownFactor = 0x1p64f, kDownAbove = 0x1p32f;

// What a pass writes for each token: nothing, the gradient, or the ratio that `kept_gradient` reads.
enum class Written { nothing, gradient, ratio };

// The sums of a chunk without importance weights. The factors of the bound term are then 0 or 1, so that their sums are
// counts of tokens. Values: the format of log-probabilities. Ref: with the KL penalty to the reference. Returns false
// if an input is not finite: `chunk_pass` must then compute sums and gradient.
template <bool Noon, Written Write, class Values, bool Ref, class V = FloatV>
inline bool plain_chunk(const Chunk<float>& in, const ClipIn<float>& clip, const RowSlope<float>& row, float* sums,
                        float* written) {
    enum { kCounted, kPositive, kNegative, kBoth, kPositiveLogp, kNegativeLogp, kUp, kDown, kK3Sum, kPoison, kRefSum };
    constexpr int count = Ref ? kRefSum + 1 : kRefSum;
    const float limit = static_cast<float>(kMaxLogRatio);
    const V zero{}, one = zero + 1, high = zero + clip.high, low = zero + clip.low, dual = zero + clip.dual,
                    most = zero + limit, log_high = zero + clip.log_high, log_low = zero + clip.log_low,
                    log_dual = zero + clip.log_dual, up = zero - row.by * row.up, down = zero - row.by * row.down;
    const auto *const logprobs = chunk_values<Values>(in.logp, in.half_logp), *const old = chunk_values<Values>(
                                                                                  in.old, in.half_old);
    [[maybe_unused]] const auto* const ref = chunk_values<Values>(in.ref, in.half_ref);
    [[maybe_unused]] const V coefficient = zero + row.kl_coef * row.by;
    V s[count] = {};
    for (int64_t t = 0; t < in.padded; t += Lanes<float>::count) {
        const auto valid = valid_lanes<V>(in.valid + t);
        const V logp = choose(valid, load_floats(Values{}, logprobs + t), zero),
                d = choose(valid, logp - load_floats(Values{}, old + t), zero);
        const V clamped = max_of(min_of(d, most), -most);
        V k3;
        const V u = exponential<true>(clamped, k3);
        const auto inside = valid & (clamped == d), positive = inside & (d <= log_high);
        s[kPoison] += zero * d;
        s[kCounted] = valid ? s[kCounted] + one : s[kCounted];
        s[kPositive] = positive ? s[kPositive] + one : s[kPositive];
        s[kPositiveLogp] = positive ? s[kPositiveLogp] + logp : s[kPositiveLogp];
        s[kUp] = valid ? s[kUp] + min_of(u, high) : s[kUp];
        s[kK3Sum] += k3;
        V factor = positive ? up : zero;
        FloatBits kept = reinterpret_cast<FloatBits>(u);
        kept = positive ? kept + kUpBit : kept;
        if constexpr (!Noon) {
            const auto negative = inside & (d >= log_low) & (d <= log_dual);
            const V counted = negative ? one : zero;
            s[kNegative] += counted;
            s[kBoth] = positive ? s[kBoth] + counted : s[kBoth];
            s[kNegativeLogp] = negative ? s[kNegativeLogp] + logp : s[kNegativeLogp];
            s[kDown] = valid ? s[kDown] + max_of(min_of(u, dual), low) : s[kDown];
            factor = negative ? factor + down : factor;
            kept = negative ? kept + kDownBit : kept;
        }
        V gradient = factor * u;
        if constexpr (Ref) {
            V kl, ref_slope;
            ref_terms(valid, load_floats(Values{}, ref + t), logp, kl, ref_slope);
            s[kRefSum] += kl;
            gradient += coefficient * ref_slope;
        }
        if constexpr (Write == Written::gradient) store(written + t, gradient);
        if constexpr (Write == Written::ratio) store(written + t, reinterpret_cast<V>(kept));
    }
    float plain[count];
    totals<count>(s, plain);
    sums[kValid] = plain[kCounted];
    sums[kOffPos] = plain[kCounted] - plain[kPositive];
    sums[kOffNeg] = Noon ? 0 : plain[kCounted] - plain[kNegative];
    sums[kGradPos] = sums[kGradPosSquare] = plain[kPositive];
    sums[kGradNeg] = sums[kGradNegSquare] = plain[kNegative];
    sums[kGradBoth] = plain[kBoth];
    sums[kGradPosLogp] = plain[kPositiveLogp];
    sums[kGradNegLogp] = plain[kNegativeLogp];
    sums[kPos] = plain[kUp];
    sums[kNeg] = plain[kDown];
    sums[kK3] = plain[kK3Sum];
    sums[kRefKl] = Ref ? plain[count - 1] : 0;
    return plain[kPoison] + 0 * sums[kRefKl] == 0;
}

// The gradient from the ratios that `plain_chunk` has written, which may be in the same memory. `in` is needed for the
// KL penalty (Ref).
template <bool Noon, class Values, bool Ref, class V = FloatV>
__attribute__((noinline)) void kept_gradient(const Chunk<float>& in, const RowSlope<float>& row, const float* ratios,
                                             float* gradient) {
    const V zero{}, up = zero - row.by * row.up, down = zero - row.by * row.down;
    [[maybe_unused]] const V coefficient = zero + row.kl_coef * row.by;
    [[maybe_unused]] const auto* const logprobs = chunk_values<Values>(in.logp, in.half_logp);
    [[maybe_unused]] const auto* const ref = chunk_values<Values>(in.ref, in.half_ref);
    for (int64_t t = 0; t < in.padded; t += Lanes<float>::count) {
        const V kept = load<V>(ratios + t);
        V u = reinterpret_cast<V>(reinterpret_cast<FloatBits>(kept) & ~kUpBit), factor = kept < zero ? up : zero;
        if constexpr (!Noon) {
            const auto negative = u > zero + kDownAbove;
            factor = negative ? factor + down : factor;
            u = negative ? u * (1 / kDownFactor) : u;
        }
        V result = u * factor;
        if constexpr (Ref) {
            const auto valid = valid_lanes<V>(in.valid + t);
            V kl, slope;
            ref_terms(valid, load_floats(Values{}, ref + t), choose(valid, load_floats(Values{}, logprobs + t), zero),
                      kl, slope);
            result += coefficient * slope;
        }
        store(gradient + t, result);
    }
}

template <class T>
inline RowSlope<T> row_slope(const RowPass& pass, int64_t row) {
    RowSlope<T> slope;
    if (!pass.up) return slope;
    slope.up = static_cast<T>(pass.up[row]);
    slope.down = static_cast<T>(pass.down[row]);
    slope.by = static_cast<T>(pass.scale * (pass.omega ? pass.omega[row] : 1.0));
    slope.kl_coef = static_cast<T>(pass.kl_coef);
    return slope;
}

// Whether the gradient of a row can be computed in T: no product of its inputs and a ratio overflows or underflows.
template <class T>
inline bool slope_in_range(const RowSlope<T>& row) {
    const auto within = [](T x, T reach) {
        const T size = x < 0 ? -x : x;
        return size == 0 || (size <= reach && size * reach >= 1);
    };
    const T wide = static_cast<T>(0x1p60), narrow = static_cast<T>(0x1p40);
    return sizeof(T) == sizeof(double) ||
           (within(row.up, wide) && within(row.down, wide) && within(row.by, narrow) && within(row.kl_coef, narrow));
}

// Tokens [t, t + count) of a row, at most a chunk; place: the position of the first one in contiguous results.
struct Piece {
    int64_t row, t, count, place;

    // Where results of type T can be written in whole vectors: in their memory, or in `buffer`.
    template <class T>
    T* target(const Array& results, T* buffer) const {
        constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
        const bool direct = results && results.dtype == own && count % Lanes<T>::count == 0;
        return direct ? static_cast<T*>(results.data) + place : buffer;
    }
    template <class T>
    void store(const Array& results, const T* written, const T* buffer) const {
        if (written == buffer) store_values(results, place, count, written);
    }
};

// Adds the sums of a chunk in double to `target` (null: no sums), and stores the gradient if `pass` asks for it.
template <bool Noon>
__attribute__((noinline)) void exact_chunk(const Tokens& tokens, const RowPass& pass, const Piece& piece, bool gradient,
                                           double* target) {
    ChunkBuffers<double> wide;
    double sums[kRowSums];
    const Chunk<double> chunk = load_chunk(tokens, pass.kl_coef != 0, piece.row, piece.t, piece.count, wide);
    const auto compute = gradient ? chunk_pass<Noon, true, true, double> : chunk_pass<Noon, true, false, double>;
    compute(chunk, ClipIn<double>(tokens.clip), row_slope<double>(pass, piece.row), sums, wide.gradient);
    if (gradient) store_values(pass.gradient, piece.place, piece.count, wide.gradient);
    for (int k = 0; target && k < kRowSums; ++k) target[k] += sums[k];
}

// The sums and the gradient of one chunk, as far as `pass` asks for them.
template <bool Noon, class T>
inline void general_chunk(const Tokens& tokens, const RowPass& pass, const ClipIn<T>& clip, const RowSlope<T>& slope,
                          const Piece& piece, ChunkBuffers<T>& buffers, T* sums) {
    const Chunk<T> chunk = load_chunk(tokens, pass.kl_coef != 0, piece.row, piece.t, piece.count, buffers);
    T* const written = piece.target(pass.gradient, buffers.gradient);
    const auto compute = !pass.up     ? chunk_pass<Noon, true, false, T>
                         : !pass.sums ? chunk_pass<Noon, false, true, T>
                                      : chunk_pass<Noon, true, true, T>;
    compute(chunk, clip, slope, sums, written);
    if (pass.up) piece.store(pass.gradient, written, buffers.gradient);
}

template <bool Noon, class Values, bool Ref>
inline auto plain_chunk_of(const RowPass& pass) {
    return pass.up     ? plain_chunk<Noon, Written::gradient, Values, Ref>
           : pass.keep ? plain_chunk<Noon, Written::ratio, Values, Ref>
                       : plain_chunk<Noon, Written::nothing, Values, Ref>;
}

// Calls visit(format, constant) with the format of the chunk's log-probabilities and whether there is a KL penalty.
template <class Visit>
inline auto with_values(const Tokens& tokens, const Chunk<float>& chunk, bool with_ref, Visit visit) {
    const auto with = [&](auto format) {
        return with_ref ? visit(format, std::true_type{}) : visit(format, std::false_type{});
    };
    if (!chunk.half_logp) return with(Native<float>{});
    return tokens.logprobs.dtype == Dtype::bf16 ? with(Bfloat16{}) : with(Float16{});
}

// The same without importance weights, and the ratios if `pass.keep`. Returns false as `plain_chunk` does.
template <bool Noon>
inline bool plain_piece(const Tokens& tokens, const RowPass& pass, const ClipIn<float>& clip,
                        const RowSlope<float>& slope, const Piece& piece, ChunkBuffers<float>& buffers, float* sums) {
    const bool with_ref = pass.kl_coef != 0;
    const Chunk<float> chunk =
        load_chunk(tokens, with_ref, piece.row, piece.t, piece.count, buffers, half_logprobs(tokens, with_ref));
    const Array& to = pass.keep ? pass.ratios : pass.gradient;
    float* const written = piece.target(to, buffers.gradient);
    const auto plain = with_values(tokens, chunk, with_ref, [&](auto format, auto ref) {
        return plain_chunk_of<Noon, decltype(format), decltype(ref)::value>(pass);
    });
    const bool finite = plain(chunk, clip, slope, sums, written);
    if (pass.keep || pass.up) piece.store(to, written, buffers.gradient);
    return finite;
}

// The gradient of a chunk from its ratios.
template <bool Noon>
inline void kept_piece(const Tokens& tokens, const RowPass& pass, const RowSlope<float>& slope, const Piece& piece,
                       ChunkBuffers<float>& buffers) {
    constexpr int64_t width = Lanes<float>::count;
    const bool with_ref = pass.kl_coef != 0;
    Chunk<float> chunk;
    chunk.padded = (piece.count + width - 1) / width * width;
    if (with_ref)
        chunk = load_chunk(tokens, true, piece.row, piece.t, piece.count, buffers, half_logprobs(tokens, true));
    float* const buffer = buffers.gradient;
    const float* const ratios = piece.target(pass.ratios, buffer);
    if (ratios == buffer) load_values(pass.ratios, piece.place, 1, piece.count, false, buffer);
    float* const written = piece.target(pass.gradient, buffer);
    with_values(tokens, chunk, with_ref, [&](auto format, auto ref) {
        kept_gradient<Noon, decltype(format), decltype(ref)::value>(chunk, slope, ratios, written);
    });
    piece.store(pass.gradient, written, buffer);
}

template <bool Noon, class T>
inline void row_pass(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    const ClipIn<T> clip(tokens.clip);
    const bool plain = sizeof(T) == sizeof(float) && pass.sums && tokens.logprobs && !tokens.importance_weights;
    ChunkBuffers<T> buffers;
    for_each_segment(tokens, first, last - first, [&](int64_t row, int64_t t, int64_t at, int64_t count) {
        const bool begins = t == (tokens.offsets ? tokens.offsets[row] : 0);
        double* target = pass.sums ? (begins ? pass.sums + row * kRowSums : head) : nullptr;
        const RowSlope<T> slope = row_slope<T>(pass, row);
        const bool in_range = slope_in_range(slope);
        const bool kept = pass.kept && in_range && row_is_finite(pass.kept + row * kRowSums);
        for (int64_t done = 0; done < count; done += kChunkTokens) {
            const Piece piece{row, t + done, count - done < kChunkTokens ? count - done : kChunkTokens,
                              first + at + done};
            if (!in_range) {
                exact_chunk<Noon>(tokens, pass, piece, true, target);
                continue;
            }
            T sums[kRowSums];
            bool computed = false;
            if constexpr (sizeof(T) == sizeof(float)) {
                if (kept) {
                    kept_piece<Noon>(tokens, pass, slope, piece, buffers);
                    continue;
                }
                computed = plain && plain_piece<Noon>(tokens, pass, clip, slope, piece, buffers, sums);
            }
            if (!computed) general_chunk<Noon>(tokens, pass, clip, slope, piece, buffers, sums);
            if (!target) continue;
            if (sizeof(T) == sizeof(double) || row_in_range(sums)) {
                for (int k = 0; k < kRowSums; ++k) target[k] += static_cast<double>(sums[k]);
                continue;
            }
            exact_chunk<Noon>(tokens, pass, piece, false, target);
        }
    });
}

template <class T>
inline void row_pass(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    if (tokens.noon)
        row_pass<true, T>(tokens, pass, first, last, head);
    else
        row_pass<false, T>(tokens, pass, first, last, head);
}

PAMA_END
