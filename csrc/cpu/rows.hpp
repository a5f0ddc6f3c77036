// The passes over tokens for advantages per sequence. They do not depend on the objectives, so they cost the same for
// any number of them.
#pragma once

#include "../core/statistics.hpp"
#include "segments.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

constexpr int64_t kChunkTokens = 512;  // tokens that are summed in float32

// The inputs of one chunk of a row, converted to T and padded to whole vectors. half_logp, half_old: the
// log-probabilities in the tensors' memory, in a 16-bit format; logp and old are then null.
template <class T>
struct Chunk {
    int64_t count = 0, padded = 0;
    const unsigned char* valid = nullptr;                                        // not 0 where a token is valid
    const T *logp = nullptr, *old = nullptr, *weight = nullptr, *ref = nullptr;  // weight: null if all are 1
    const void *half_logp = nullptr, *half_old = nullptr;
};

template <class T>
struct ChunkBuffers {
    alignas(64) T logp[kChunkTokens], old[kChunkTokens], weight[kChunkTokens], ref[kChunkTokens],
        gradient[kChunkTokens];
    alignas(64) unsigned char valid[kChunkTokens];
};

// half: 16-bit log-probabilities are not converted where they are in one piece.
template <class T>
inline Chunk<T> load_chunk(const Tokens& tokens, bool with_ref, int64_t row, int64_t t, int64_t count,
                           ChunkBuffers<T>& buffers, bool half = false) {
    constexpr int64_t width = Lanes<T>::count;
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    Chunk<T> chunk;
    chunk.count = count;
    chunk.padded = (count + width - 1) / width * width;
    const auto values = [&](const Array& array, T* buffer) -> const T* {
        const int64_t offset = row * array.row + t * array.token;
        if (array.dtype == own && array.token == 1 && count == chunk.padded)
            return static_cast<const T*>(array.data) + offset;
        load_values(array, offset, array.token, count, false, buffer);
        return buffer;
    };
    const Array& mask = tokens.mask;
    const int64_t offset = row * mask.row + t * mask.token;
    chunk.valid = buffers.valid;
    if (mask && mask.dtype == Dtype::u8 && mask.token == 1 && count == chunk.padded) {
        chunk.valid = static_cast<const unsigned char*>(mask.data) + offset;
    } else {
        memset(buffers.valid, mask ? 0 : 1, sizeof buffers.valid);
        if (mask) load_values(mask, offset, mask.token, count, true, buffers.valid);
        memset(buffers.valid + count, 0, static_cast<size_t>(chunk.padded - count));
    }
    if (half && count == chunk.padded) {
        const Array &given = tokens.logprobs, &old = tokens.old_logprobs ? tokens.old_logprobs : given;
        if (given.token == 1 && old.token == 1) {
            chunk.half_logp = static_cast<const unsigned short*>(given.data) + row * given.row + t;
            chunk.half_old = static_cast<const unsigned short*>(old.data) + row * old.row + t;
            return chunk;
        }
    }
    if (tokens.logprobs) {
        chunk.logp = values(tokens.logprobs, buffers.logp);
    } else {
        memset(buffers.logp, 0, sizeof buffers.logp);
        chunk.logp = buffers.logp;
    }
    chunk.old = tokens.old_logprobs ? values(tokens.old_logprobs, buffers.old) : chunk.logp;
    if (tokens.importance_weights) chunk.weight = values(tokens.importance_weights, buffers.weight);
    if (with_ref) chunk.ref = values(tokens.ref_logprobs, buffers.ref);
    return chunk;
}

// The lanes whose tokens are valid. Reads one flag for each lane.
template <class V>
inline auto valid_lanes(const unsigned char* valid) {
    constexpr bool single = sizeof(V{}[0]) == sizeof(float);
    decltype(V{} < V{}) flags;
#if defined(__AVX512F__)
    __m512i wide;
    if constexpr (single)
        wide = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(valid)));
    else
        wide = _mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(valid)));
    memcpy(&flags, &wide, sizeof flags);
#elif defined(__AVX2__)
    __m256i wide;
    if constexpr (single) {
        wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(valid)));
    } else {
        int four;
        memcpy(&four, valid, sizeof four);
        wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    }
    memcpy(&flags, &wide, sizeof flags);
#else
    for (unsigned k = 0; k < sizeof(V) / (single ? sizeof(float) : sizeof(double)); ++k) flags[k] = valid[k];
#endif
    return flags != 0;
}

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

// The ratio u of a token and the signs of the advantages for which it has a gradient, in one float: u for both signs,
// 2^64 u for positive advantages only, -u for negative ones only, 0 for none or where the token is masked. u is between
// 2^-29 and 2^29. Under Noon u if there is a gradient, else 0.
constexpr float kPositiveOnly = 0x1p64f, kBothBelow = 0x1p32f;

// What a pass writes for each token: nothing, the gradient, or the ratio that `kept_gradient` reads.
enum class Written { nothing, gradient, ratio };

// The sums of a chunk without importance weights and KL penalty. Without weights the factors of the bound term are 0 or
// 1, so that their sums are counts of tokens. Returns false if an input is not finite: `chunk_pass` must then compute
// sums and gradient.
template <bool Noon, Written Write, class V = FloatV>
inline bool plain_chunk(const Chunk<float>& in, const ClipIn<float>& clip, const RowSlope<float>& row, float* sums,
                        float* written) {
    enum { kCounted, kPositive, kNegative, kBoth, kPositiveLogp, kNegativeLogp, kUp, kDown, kK3Sum, kPoison, kPlain };
    const float limit = static_cast<float>(kMaxLogRatio);
    const V zero{}, one = zero + 1, high = zero + clip.high, low = zero + clip.low, dual = zero + clip.dual,
                    most = zero + limit, log_high = zero + clip.log_high, log_low = zero + clip.log_low,
                    log_dual = zero + clip.log_dual, up = zero - row.by * row.up, down = zero - row.by * row.down;
    V s[kPlain] = {};
    for (int64_t t = 0; t < in.padded; t += Lanes<float>::count) {
        const auto valid = valid_lanes<V>(in.valid + t);
        const V logp = choose(valid, load<V>(in.logp + t), zero), d = choose(valid, logp - load<V>(in.old + t), zero);
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
        V factor = positive ? up : zero, kept = positive ? u : zero;
        if constexpr (!Noon) {
            const auto negative = inside & (d >= log_low) & (d <= log_dual);
            const V counted = negative ? one : zero;
            s[kNegative] += counted;
            s[kBoth] = positive ? s[kBoth] + counted : s[kBoth];
            s[kNegativeLogp] = negative ? s[kNegativeLogp] + logp : s[kNegativeLogp];
            s[kDown] = valid ? s[kDown] + max_of(min_of(u, dual), low) : s[kDown];
            if constexpr (Write == Written::gradient) factor = negative ? factor + down : factor;
            if constexpr (Write == Written::ratio) {
                const V other = positive ? u : -u;
                kept = negative ? other : kept * kPositiveOnly;
            }
        }
        if constexpr (Write == Written::gradient) store(written + t, factor * u);
        if constexpr (Write == Written::ratio) store(written + t, kept);
    }
    float plain[kPlain];
    totals<kPlain>(s, plain);
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
    sums[kRefKl] = 0;
    return plain[kPoison] == 0;
}

// Replaces what `plain_chunk` has written by the gradient.
template <bool Noon, class V = FloatV>
inline void kept_gradient(int64_t padded, const RowSlope<float>& row, float* gradient) {
    const V zero{}, up = zero - row.by * row.up, down = zero + row.by * row.down,
                    both = zero - row.by * (row.up + row.down);
    for (int64_t t = 0; t < padded; t += Lanes<float>::count) {
        V u = load<V>(gradient + t), factor = up;
        if constexpr (!Noon) {
            const auto above = u > zero + kBothBelow;
            factor = u < zero ? down : both;
            factor = above ? up : factor;
            u = above ? u * (1 / kPositiveOnly) : u;
        }
        store(gradient + t, u == zero ? zero : u * factor);
    }
}

// The sums and the gradient of one chunk, as far as `pass` asks for them. written: receives the gradient, or the ratios
// if `pass.keep`.
template <bool Noon, class T>
inline void pass_over(const Chunk<T>& chunk, const ClipIn<T>& clip, const RowPass& pass, const RowSlope<T>& slope,
                      T* sums, T* written) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (pass.sums && !chunk.weight && !chunk.ref) {
            const auto plain = pass.up     ? plain_chunk<Noon, Written::gradient>
                               : pass.keep ? plain_chunk<Noon, Written::ratio>
                                           : plain_chunk<Noon, Written::nothing>;
            if (plain(chunk, clip, slope, sums, written)) return;
        }
    }
    const auto general = !pass.up     ? chunk_pass<Noon, true, false, T>
                         : !pass.sums ? chunk_pass<Noon, false, true, T>
                                      : chunk_pass<Noon, true, true, T>;
    general(chunk, clip, slope, sums, written);
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

// Adds the sums of a chunk in double to `target` (null: no sums), and stores the gradient if `pass` asks for it.
template <bool Noon>
__attribute__((noinline)) void exact_chunk(const Tokens& tokens, const RowPass& pass, int64_t row, int64_t t,
                                           int64_t count, int64_t place, bool gradient, double* target) {
    ChunkBuffers<double> wide;
    double sums[kRowSums];
    const Chunk<double> chunk = load_chunk(tokens, pass.kl_coef != 0, row, t, count, wide);
    const auto compute = gradient ? chunk_pass<Noon, true, true, double> : chunk_pass<Noon, true, false, double>;
    compute(chunk, ClipIn<double>(tokens.clip), row_slope<double>(pass, row), sums, wide.gradient);
    if (gradient) store_values(pass.gradient, place, count, wide.gradient);
    for (int k = 0; target && k < kRowSums; ++k) target[k] += sums[k];
}

template <bool Noon, class T>
inline void row_pass(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    constexpr int64_t width = Lanes<T>::count;
    const ClipIn<T> clip(tokens.clip);
    const bool with_ref = pass.kl_coef != 0, write = pass.up || pass.keep;
    ChunkBuffers<T> buffers;
    for_each_segment(tokens, first, last - first, [&](int64_t row, int64_t t, int64_t at, int64_t piece) {
        const bool begins = t == (tokens.offsets ? tokens.offsets[row] : 0);
        double* target = pass.sums ? (begins ? pass.sums + row * kRowSums : head) : nullptr;
        const RowSlope<T> slope = row_slope<T>(pass, row);
        const bool in_range = slope_in_range(slope);
        const bool kept = pass.kept && in_range && row_is_finite(pass.kept + row * kRowSums);
        for (int64_t done = 0; done < piece; done += kChunkTokens) {
            const int64_t count = piece - done < kChunkTokens ? piece - done : kChunkTokens;
            const int64_t padded = (count + width - 1) / width * width, place = first + at + done;
            if (!in_range) {
                exact_chunk<Noon>(tokens, pass, row, t + done, count, place, true, target);
                continue;
            }
            const bool in_place = write && pass.gradient.dtype == own && count == padded;
            T* const written = in_place ? static_cast<T*>(pass.gradient.data) + place : buffers.gradient;
            T sums[kRowSums];
            if (kept) {
                if constexpr (sizeof(T) == sizeof(float)) {
                    if (!in_place) load_values(pass.gradient, place, 1, count, false, written);
                    kept_gradient<Noon>(padded, slope, written);
                }
            } else {
                const Chunk<T> chunk = load_chunk(tokens, with_ref, row, t + done, count, buffers);
                pass_over<Noon>(chunk, clip, pass, slope, sums, written);
            }
            if (write && !in_place) store_values(pass.gradient, place, count, written);
            if (!target) continue;
            if (sizeof(T) == sizeof(double) || row_in_range(sums)) {
                for (int k = 0; k < kRowSums; ++k) target[k] += static_cast<double>(sums[k]);
                continue;
            }
            exact_chunk<Noon>(tokens, pass, row, t + done, count, place, false, target);
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
