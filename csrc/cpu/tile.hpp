// A tile: up to tile_tokens(n) consecutive tokens in the first-level cache, each input a contiguous array of T;
// advantages are stored objective by objective. Masked entries are set to 0. A NaN or infinity makes the factors of its
// token, or its own advantage, NaN, so later arithmetic needs no test for it.
#pragma once

#include "../core/statistics.hpp"
#include "../core/token.hpp"
#include "live.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

// Tokens per tile: fewer for many objectives, so that a tile fits the cache; many enough that the sums over the lanes
// at its end cost little.
inline int64_t tile_tokens(int n) {
    int64_t tokens = n <= 16 ? 512 : 256;
    while (tokens > 16 && tokens * n > 16384) tokens /= 2;
    return tokens;
}
// From one objective of a tile to the next: not a multiple of 4096 bytes, which would map all of them to the same sets
// of the cache.
inline int64_t tile_stride(int n) { return tile_tokens(n) + 16; }

// Some tokens of a plain tile, in whole vectors: advantages and bound terms (n, stride), all else (stride).
template <class T>
struct TokenSet {
    int64_t padded, stride;
    T *logp, *pos, *neg, *side, *advantages, *bound;
};

template <class T>
struct Tile {
    int64_t count, padded;  // tokens; tokens rounded up to whole vectors, with zeros at the end
    int64_t stride;         // tile_stride(n)
    T *valid, *logp;
    T *advantages, *present;             // (n, stride); present is null if all objectives are present
    T *pos, *neg, *grad_pos, *grad_neg;  // factors of the surrogate and of the bound, times w and mask
    T *off_pos, *off_neg;                // 1 where there is no gradient
    T* ratio;
    T *ref_kl, *ref_slope;        // the KL penalty to the reference, and its derivative
    Ahead ahead;                  // addresses of the next tile's advantages, to prefetch
    T *bound, *squares, *fields;  // workspace of the sums: I and A'^2 (n, stride), (n, kFields) and the totals
    // Without importance weights the factors of the bound are 0 or 1. `side` then replaces them and the two flags: 0
    // where there is a gradient for both signs of the advantage, 1 for positive advantages only, -1 for others only.
    bool plain;
    T* side;
    // Where a token has a gradient for both signs, its bound terms are its advantages. If the tile is split
    // (split_tile), `clipped` contains copies of the other tokens, and one sum over the former serves for both.
    bool split;
    TokenSet<T> clipped;  // memory for kMostClipped tokens
};

constexpr int64_t kMostClipped = 64, kClippedStride = kMostClipped + 16;

// The factors of the vector of tokens from t on.
template <class T, class V = typename Lanes<T>::V>
inline TokenFactors<V> tile_factors(bool noon, const Tile<T>& tile, int64_t t) {
    const V zero{}, one = zero + 1;
    TokenFactors<V> f;
    f.pos = load<V>(tile.pos + t);
    f.ratio = load<V>(tile.ratio + t);
    f.neg = noon ? zero : load<V>(tile.neg + t);
    if (tile.plain) {
        const V side = load<V>(tile.side + t);
        f.grad_pos = choose(side >= zero, one, zero);
        f.grad_neg = choose(side <= zero, one, zero);
    } else {
        f.grad_pos = load<V>(tile.grad_pos + t);
        f.grad_neg = noon ? zero : load<V>(tile.grad_neg + t);
    }
    return f;
}

// x where the condition holds, NaN for infinity, else 0.
template <class Mask>
inline FloatV finite_where(Mask here, FloatV x) {
#if defined(__AVX512F__)
    const auto bits = reinterpret_cast<__m512i>(here);
    const __m512 value = reinterpret_cast<__m512>(x);
    return reinterpret_cast<FloatV>(
        _mm512_maskz_fmadd_ps(_mm512_test_epi32_mask(bits, bits), value, _mm512_setzero_ps(), value));
#else
    x = here ? x : FloatV{};
    return x + 0.0f * x;
#endif
}

// Transposes (tokens, objectives) to objective-major order. If `valid` is given, masked entries become 0 and infinities
// become NaN. target, buffer: (n, stride).
template <class T>
inline void load_objectives(const Tokens& tokens, const Array& array, int64_t first, int64_t count, bool truth,
                            const T* valid, T* target, T* buffer) {
    const int64_t stride = tile_stride(tokens.n);
    for_each_segment(tokens, first, count, [&](int64_t row, int64_t t, int64_t at, int64_t piece) {
        const int64_t offset = row * array.row + t * array.token;
        bool loaded = false;
        if constexpr (sizeof(T) == sizeof(float)) {
            const auto masked = [&](int64_t token) {
                const auto here = load<FloatV>(valid + at + token) != 0.0f;
                return [here](FloatV x) { return finite_where(here, x); };
            };
            const bool done = valid && !truth && array.token != 0 && array.objective == 1 &&
                              with_format(array.dtype, [&](auto format) {
                                  typedef typename decltype(format)::Stored Stored;
                                  if constexpr (sizeof(Stored) <= sizeof(float))
                                      return contiguous_rows_to_columns(
                                          format, tokens.n, static_cast<const Stored*>(array.data) + offset,
                                          array.token, piece, target + at, stride, masked);
                                  return false;
                              });
            if (done) return;
            const float* from = nullptr;
            if (array.dtype == Dtype::f32 && array.token != 0 && !truth) {
                from = static_cast<const float*>(array.data) + offset;
            } else if (array.token == tokens.n && array.objective == 1) {
                load_values(array, offset, 1, piece * tokens.n, truth, buffer);
                from = buffer;
            }
            loaded = from != nullptr;
            if (loaded) rows_to_columns(tokens.n, from, array.token, array.objective, piece, target + at, stride);
        }
        for (int i = 0; !loaded && i < tokens.n; ++i)
            load_values(array, offset + i * array.objective, array.token, piece, truth, target + i * stride + at);
        for (int i = 0; valid && i < tokens.n; ++i) {
            T* PAMA_RESTRICT a = target + i * stride + at;
            const T* PAMA_RESTRICT here = valid + at;
#pragma omp simd
            for (int64_t k = 0; k < piece; ++k) {
                const T value = here[k] != 0 ? a[k] : T(0);
                a[k] = value + T(0) * value;
            }
        }
    });
}

template <class T>
inline Tile<T> allocate_tile(const Tokens& tokens, Arena& arena) {
    Tile<T> tile;
    tile.count = 0;
    const int64_t stride = tile.stride = tile_stride(tokens.n);
    tile.valid = arena.take<T>(stride);
    tile.logp = arena.take<T>(stride);
    tile.advantages = arena.take<T>(tokens.n * stride);
    tile.present = tokens.objective_mask ? arena.take<T>(tokens.n * stride) : nullptr;
    T** pieces[] = {&tile.pos,     &tile.neg,   &tile.grad_pos, &tile.grad_neg, &tile.off_pos,
                    &tile.off_neg, &tile.ratio, &tile.side,     &tile.ref_kl,   &tile.ref_slope};
    for (T** piece : pieces) *piece = arena.take<T>(stride);
    tile.bound = arena.take<T>(tokens.n * stride);
    tile.squares = tile.present ? arena.take<T>(tokens.n * stride) : nullptr;
    tile.fields = arena.take<T>(statistics_size(tokens.n, false));
    if constexpr (sizeof(T) == sizeof(float)) {
        TokenSet<T>& clipped = tile.clipped;
        clipped.stride = kClippedStride;
        T** of_tokens[] = {&clipped.logp, &clipped.pos, &clipped.neg, &clipped.side};
        for (T** piece : of_tokens) *piece = arena.take<T>(kClippedStride);
        clipped.advantages = arena.take<T>(tokens.n * kClippedStride);
        clipped.bound = arena.take<T>(tokens.n * kClippedStride);
    }
    return tile;
}

template <class T>
inline int64_t tile_bytes(int n) {
    return static_cast<int64_t>(sizeof(T)) *
               (tile_stride(n) * (4 * n + 16) + statistics_size(n, false) + kClippedStride * (2 * n + 4)) +
           64 * 30;
}

// Computes the factors of the tile's tokens and the two totals.
template <bool Noon, class T, class V = typename Lanes<T>::V>
inline void store_factors(const Tokens& tokens, const T* logp, const T* old, const T* w, int64_t next,
                          const Tile<T> tile) {
    const Array &given = tokens.logprobs ? tokens.logprobs : tokens.advantages,
                &given_old = tokens.old_logprobs ? tokens.old_logprobs : given;
    const Ahead next_logp = ahead(tokens, given, next), next_old = ahead(tokens, given_old, next);
    const ClipIn<T> clip(tokens.clip);
    const V zero{}, one = zero + 1;
    V s[kTotals] = {};
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        prefetch(next_logp.at(t));
        prefetch(next_old.at(t));
        const V valid = load<V>(tile.valid + t);
        const TokenFactors<V> f =
            token_factors(clip, valid != zero, load<V>(logp + t), load<V>(old + t), load<V>(w + t));
        s[kTokenCount] += valid;
        s[kKlSum] += f.kl;
        store(tile.logp + t, f.logp);
        store(tile.ratio + t, f.ratio);
        store(tile.pos + t, f.pos);
        store(tile.grad_pos + t, f.grad_pos);
        store(tile.off_pos + t, choose(f.off_pos, one, zero));
        if constexpr (!Noon) {
            store(tile.neg + t, f.neg);
            store(tile.grad_neg + t, f.grad_neg);
            store(tile.off_neg + t, choose(f.off_neg, one, zero));
        }
    }
    totals<kTotals>(s, tile.fields + total_offset(tokens.n));
}

// The same in the form of a plain tile, from log-probabilities in a format. Returns false if an input is not finite or,
// without Noon, a token has no gradient for either sign: the tile is then not plain.
template <bool Noon, class Format, class V = FloatV>
inline bool store_plain_factors(Format format, const Tokens& tokens, const typename Format::Stored* logprobs,
                                const typename Format::Stored* old, int64_t next, const Tile<float> tile) {
    const Ahead next_logp = ahead(tokens, tokens.logprobs, next),
                next_old = ahead(tokens, tokens.old_logprobs ? tokens.old_logprobs : tokens.logprobs, next);
    const ClipIn<float> clip(tokens.clip);
    const float limit = static_cast<float>(kMaxLogRatio);
    const V zero{}, one = zero + 1, high = zero + clip.high, low = zero + clip.low, dual = zero + clip.dual,
                    most = zero + limit, log_high = zero + clip.log_high, log_low = zero + clip.log_low,
                    log_dual = zero + clip.log_dual;
    V s[kTotals] = {}, unfit{};
    for (int64_t t = 0; t < tile.padded; t += Lanes<float>::count) {
        prefetch(next_logp.at(t));
        prefetch(next_old.at(t));
        const V flag = load<V>(tile.valid + t);
        const auto valid = flag != zero;
        const V logp = choose(valid, load_floats(format, logprobs + t), zero),
                d = choose(valid, logp - load_floats(format, old + t), zero);
        const V clamped = max_of(min_of(d, most), -most);
        V k3;
        const V u = exponential<true>(clamped, k3);
        const auto inside = clamped == d, positive = inside & (d <= log_high);
        s[kTokenCount] += flag;
        s[kKlSum] += k3;
        unfit += zero * d;
        V side = positive ? zero : -one;
        if constexpr (!Noon) {
            const auto negative = inside & (d >= log_low) & (d <= log_dual);
            unfit = positive | negative ? unfit : unfit + one;
            side = negative ? side : one;
            store(tile.neg + t, max_of(min_of(u, dual), low));
        }
        store(tile.logp + t, logp);
        store(tile.ratio + t, u);
        store(tile.pos + t, min_of(u, high));
        store(tile.side + t, side);
    }
    float sums[kTotals], bad;
    totals<kTotals>(s, sums);
    totals<1>(&unfit, &bad);
    memcpy(tile.fields + total_offset(tokens.n), sums, sizeof sums);
    return bad == 0;
}

// Stores the factors of a plain tile, if it is one, from 16-bit log-probabilities in the memory of the tensors. Returns
// whether they are there.
inline bool plain_from_memory(const Tokens& tokens, int64_t first, int64_t count, int64_t next, Tile<float>& tile) {
    const Array &given = tokens.logprobs, &given_old = tokens.old_logprobs ? tokens.old_logprobs : given;
    if (!given || tokens.importance_weights || size_of(given.dtype) != 2 || given_old.dtype != given.dtype)
        return false;
    const void *const logp = token_memory<float>(tokens, given, first, count), *const old = token_memory<float>(
                                                                                   tokens, given_old, first, count);
    if (!logp || !old) return false;
    const auto store = [&](auto format) {
        typedef decltype(format) Format;
        typedef const typename Format::Stored* Values;
        const auto plain = tokens.noon ? store_plain_factors<true, Format> : store_plain_factors<false, Format>;
        return plain(format, tokens, static_cast<Values>(logp), static_cast<Values>(old), next, tile);
    };
    tile.plain = given.dtype == Dtype::bf16 ? store(Bfloat16{}) : store(Float16{});
    return true;
}

// Replaces tile.ref_kl, which contains the reference log-probabilities, by the KL penalty, and computes its derivative.
template <class T, class V = typename Lanes<T>::V>
inline void store_ref_terms(const Tile<T> tile) {
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        V kl, slope;
        ref_terms(load<V>(tile.valid + t) != V{}, load<V>(tile.ref_kl + t), load<V>(tile.logp + t), kl, slope);
        store(tile.ref_kl + t, kl);
        store(tile.ref_slope + t, slope);
    }
}

// Stores the factors of the tile's tokens. tried: it is not plain.
template <class T>
inline void load_factors(const Tokens& tokens, int64_t first, int64_t count, int64_t next, bool tried, Tile<T>& tile,
                         Arena arena) {
    T *buffer = arena.take<T>(3 * tile.stride), *old_buffer = buffer + tile.stride,
      *w_buffer = old_buffer + tile.stride;
    const T *logp = buffer, *old = buffer, *w = tile.valid;  // without old_logprobs the ratio is 1
    if (tokens.logprobs)
        old = logp = token_values(tokens, tokens.logprobs, first, count, buffer);
    else
        for (int64_t t = 0; t < tile.padded; ++t) buffer[t] = 0;
    if (tokens.old_logprobs) old = token_values(tokens, tokens.old_logprobs, first, count, old_buffer);
    if (tokens.importance_weights) w = token_values(tokens, tokens.importance_weights, first, count, w_buffer);
    if constexpr (sizeof(T) == sizeof(float)) {
        typedef Native<float> Format;
        const auto plain = tokens.noon ? store_plain_factors<true, Format> : store_plain_factors<false, Format>;
        const bool possible = !tried && tokens.logprobs && !tokens.importance_weights;
        tile.plain = possible && plain(Format{}, tokens, logp, old, next, tile);
    }
    const auto general = tokens.noon ? store_factors<true, T> : store_factors<false, T>;
    if (!tile.plain) general(tokens, logp, old, w, next, tile);
}

// next: the first token of the next tile, which is prefetched.
template <class T>
inline void load_tile(const Tokens& tokens, int64_t first, int64_t count, int64_t next, bool with_ref, Tile<T>& tile,
                      Arena arena) {
    constexpr int64_t width = Lanes<T>::count;
    const int64_t padded = (count + width - 1) / width * width;
    tile.count = count;
    tile.padded = padded;
    T* valid = tile.valid;
    if (tokens.mask)
        load_tokens(tokens, tokens.mask, first, count, true, valid);
    else
        for (int64_t t = 0; t < count; ++t) valid[t] = 1;
    for (int64_t t = count; t < padded; ++t) valid[t] = 0;

    tile.plain = false;
    bool tried = false;
    if constexpr (sizeof(T) == sizeof(float)) tried = plain_from_memory(tokens, first, count, next, tile);
    if (!tile.plain) load_factors(tokens, first, count, next, tried, tile, arena);
    if (with_ref) {
        load_tokens(tokens, tokens.ref_logprobs, first, count, false, tile.ref_kl);
        store_ref_terms(tile);
    }

    load_objectives<T>(tokens, tokens.advantages, first, count, false, tile.present ? nullptr : valid, tile.advantages,
                       tile.bound);
    tile.ahead = in_pieces(ahead(tokens, tokens.advantages, next), tokens.n, count);
    for (int i = 0; i < tokens.n; ++i)
        for (int64_t t = count; t < padded; ++t) tile.advantages[i * tile.stride + t] = 0;
    if (!tile.present) return;
    load_objectives<T>(tokens, tokens.objective_mask, first, count, true, nullptr, tile.present, tile.bound);
    for (int i = 0; i < tokens.n; ++i) {
        T *PAMA_RESTRICT a = tile.advantages + i * tile.stride, *PAMA_RESTRICT here = tile.present + i * tile.stride;
#pragma omp simd
        for (int64_t t = 0; t < padded; ++t) {
            here[t] = valid[t] != 0 ? here[t] : T(0);
            const T value = here[t] != 0 ? a[t] : T(0);
            a[t] = value + T(0) * value;
        }
    }
}

PAMA_END
