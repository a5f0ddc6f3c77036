// A tile: up to kTileTokens consecutive tokens in the first-level cache, each input a contiguous array of T,
// the advantages objective by objective. Masked places hold 0. A NaN or infinity makes the factors of its token, or
// its own advantage, NaN; so the arithmetic that follows needs no test.
#pragma once

#include "../core/statistics.hpp"
#include "../core/token.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

constexpr long kTileTokens = 256;

// Fewer tokens for many objectives, so that a tile stays in the cache.
inline long tile_tokens(int n) {
    long tokens = kTileTokens;
    while (tokens > 16 && tokens * n > 16384) tokens /= 2;
    return tokens;
}

// Where the values from one token on lie in memory, and those of each objective.
struct Ahead {
    const char* first;
    long token, objective;  // bytes
    const char* at(long t, long i = 0) const { return first + i * objective + t * token; }
};

inline Ahead ahead(const Problem& problem, const Array& array, long token) {
    const long row = problem.offsets ? 0 : token / problem.width, t = problem.offsets ? token : token % problem.width;
    const long size = size_of(array.dtype);
    return {static_cast<const char*>(array.data) + (row * array.row + t * array.token) * size, array.token * size,
            array.objective * size};
}

// Of `count` tokens whose objectives lie side by side each objective gets a piece as long as its own values.
inline Ahead in_pieces(Ahead values, int n, long count) {
    if (values.token == n * values.objective) {
        values.token = values.objective;
        values.objective *= count;
    }
    return values;
}

template <class T>
struct Tile {
    long count, padded;  // tokens; and with the zeros that fill the last vector
    T *valid, *logp;
    T *advantages, *present;             // (n, kTileTokens); present is null where all are
    T *pos, *neg, *grad_pos, *grad_neg;  // factors of the surrogate and of the bound, times w and mask
    T *off_pos, *off_neg;                // 1 where there is no gradient
    T *ratio, *kl;
    T *ref_kl, *ref_slope;        // the KL penalty to the reference, and its derivative
    Ahead ahead;                  // the next tile's advantages
    T *bound, *squares, *fields;  // work space of the sums: I and A'^2 (n, kTileTokens), (n, kFields)
};

// Hands out 64-byte aligned pieces of the scratch memory of one thread.
struct Arena {
    char* next;
    template <class T>
    T* take(long count) {
        T* piece = reinterpret_cast<T*>(next);
        next += (count * static_cast<long>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

template <class T, class S, class F>
inline void convert(const S* PAMA_RESTRICT source, long stride, long count, T* PAMA_RESTRICT target, F read) {
    if (stride == 1) {
#pragma omp simd
        for (long t = 0; t < count; ++t) target[t] = read(source[t]);
    } else if (stride == 0) {
        const T value = count > 0 ? static_cast<T>(read(source[0])) : T(0);
        for (long t = 0; t < count; ++t) target[t] = value;
    } else {
#pragma omp simd
        for (long t = 0; t < count; ++t) target[t] = read(source[t * stride]);
    }
}

// count values from element `offset` on, as T; for masks (`truth`) 1 where not zero.
template <class T>
inline void load_values(const Array& array, long offset, long stride, long count, bool truth, T* target) {
    const auto same = [](auto x) { return static_cast<T>(x); };
    const auto nonzero = [](auto x) { return static_cast<T>(x != 0); };
    switch (array.dtype) {
#define PAMA_LOAD(TAG, S)                                             \
    case Dtype::TAG: {                                                \
        const S* source = static_cast<const S*>(array.data) + offset; \
        if (truth)                                                    \
            convert(source, stride, count, target, nonzero);          \
        else                                                          \
            convert(source, stride, count, target, same);             \
        break;                                                        \
    }
        PAMA_LOAD(f32, float)
        PAMA_LOAD(f64, double)
        PAMA_LOAD(u8, unsigned char)
        PAMA_LOAD(i8, signed char)
        PAMA_LOAD(i16, short)
        PAMA_LOAD(i32, int)
        PAMA_LOAD(i64, long)
#undef PAMA_LOAD
        case Dtype::bf16:
        case Dtype::f16: {
            const auto* source = static_cast<const unsigned short*>(array.data) + offset;
            if (truth)
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>((x & 0x7fff) != 0); });
            else if (array.dtype == Dtype::bf16)
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>(bf16_to_float(x)); });
            else
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>(f16_to_float(x)); });
            break;
        }
    }
}

// Calls visit(row, first token within the array's row, tile position, count) for each piece of a row.
template <class Visit>
inline void for_each_segment(const Problem& problem, long first, long count, Visit visit) {
    if (!problem.offsets) {
        for (long done = 0; done < count;) {
            const long row = (first + done) / problem.width, t = (first + done) % problem.width;
            const long piece = problem.width - t < count - done ? problem.width - t : count - done;
            visit(row, t, done, piece);
            done += piece;
        }
        return;
    }
    long low = 0, high = problem.rows;  // the last row that begins at or before `first`
    while (high - low > 1) {
        const long middle = (low + high) / 2;
        (problem.offsets[middle] <= first ? low : high) = middle;
    }
    for (long done = 0; done < count; ++low) {
        const long t = first + done, end = problem.offsets[low + 1];
        const long piece = end - t < count - done ? end - t : count - done;
        if (piece > 0) {
            visit(low, t, done, piece);
            done += piece;
        }
    }
}

template <class T>
inline void load_tokens(const Problem& problem, const Array& array, long first, long count, bool truth, T* target) {
    for_each_segment(problem, first, count, [&](long row, long t, long at, long piece) {
        load_values(array, row * array.row + t * array.token, array.token, piece, truth, target + at);
    });
}

// (tokens, objectives) to objective-major. With `valid`, masked places become 0 and infinities NaN on the way. buffer:
// (n, kTileTokens).
template <class T>
inline void load_objectives(const Problem& problem, const Array& array, long first, long count, bool truth,
                            const T* valid, T* target, T* buffer) {
    for_each_segment(problem, first, count, [&](long row, long t, long at, long piece) {
        const long offset = row * array.row + t * array.token;
        bool loaded = false;
        if constexpr (sizeof(T) == sizeof(float)) {
            const float* from = nullptr;
            if (array.dtype == Dtype::f32 && array.token != 0 && !truth) {
                from = static_cast<const float*>(array.data) + offset;
            } else if (array.token == problem.n && array.objective == 1) {
                load_values(array, offset, 1, piece * problem.n, truth, buffer);
                from = buffer;
            }
            const auto masked = [&](FloatV x, long token) {
                x = load<FloatV>(valid + at + token) != 0.0f ? x : FloatV{};
                return x + 0.0f * x;
            };
            if (from && valid &&
                contiguous_rows_to_columns(problem.n, from, array.token, array.objective, piece, target + at,
                                           kTileTokens, masked))
                return;
            loaded = from != nullptr;
            if (loaded) rows_to_columns(problem.n, from, array.token, array.objective, piece, target + at, kTileTokens);
        }
        for (int i = 0; !loaded && i < problem.n; ++i)
            load_values(array, offset + i * array.objective, array.token, piece, truth, target + i * kTileTokens + at);
        for (int i = 0; valid && i < problem.n; ++i) {
            T* PAMA_RESTRICT a = target + i * kTileTokens + at;
            const T* PAMA_RESTRICT here = valid + at;
#pragma omp simd
            for (long k = 0; k < piece; ++k) {
                const T value = here[k] != 0 ? a[k] : T(0);
                a[k] = value + T(0) * value;
            }
        }
    });
}

template <class T>
inline Tile<T> allocate_tile(const Problem& problem, Arena& arena) {
    Tile<T> tile;
    tile.count = 0;
    tile.valid = arena.take<T>(kTileTokens);
    tile.logp = arena.take<T>(kTileTokens);
    tile.advantages = arena.take<T>(problem.n * kTileTokens);
    tile.present = problem.objective_mask ? arena.take<T>(problem.n * kTileTokens) : nullptr;
    T** pieces[] = {&tile.pos,     &tile.neg,   &tile.grad_pos, &tile.grad_neg, &tile.off_pos,
                    &tile.off_neg, &tile.ratio, &tile.kl,       &tile.ref_kl,   &tile.ref_slope};
    for (T** piece : pieces) *piece = arena.take<T>(kTileTokens);
    tile.bound = arena.take<T>(problem.n * kTileTokens);
    tile.squares = tile.present ? arena.take<T>(problem.n * kTileTokens) : nullptr;
    tile.fields = arena.take<T>(problem.n * kFields);
    return tile;
}

template <class T>
inline long tile_bytes(int n) {
    return static_cast<long>(sizeof(T)) * (kTileTokens * (4 * n + 16) + kFields * n) + 64 * 24;
}

// The values of a tile's tokens as T, where they lie if they lie there as such, else copied to `buffer`.
template <class T>
inline const T* token_values(const Problem& problem, const Array& array, long first, long count, T* buffer) {
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    const bool one_piece = problem.offsets || first % problem.width + count <= problem.width;
    if (array.dtype == own && array.token == 1 && one_piece && count % Lanes<T>::count == 0)
        return reinterpret_cast<const T*>(ahead(problem, array, first).first);
    load_tokens(problem, array, first, count, false, buffer);
    return buffer;
}

template <bool Noon, class T, class V = typename Lanes<T>::V>
inline void store_factors(const Problem& problem, const T* logp, const T* old, const T* w, long next,
                          const Tile<T> tile) {
    const Array &given = problem.logprobs ? problem.logprobs : problem.advantages,
                &given_old = problem.old_logprobs ? problem.old_logprobs : given;
    const Ahead next_logp = ahead(problem, given, next), next_old = ahead(problem, given_old, next);
    const ClipIn<T> clip(problem.clip);
    const V zero{}, one = zero + 1;
    for (long t = 0; t < tile.padded; t += Lanes<T>::count) {
        ask(next_logp.at(t));
        ask(next_old.at(t));
        const TokenFactors<V> f =
            token_factors(clip, load<V>(tile.valid + t) != zero, load<V>(logp + t), load<V>(old + t), load<V>(w + t));
        store(tile.logp + t, f.logp);
        store(tile.ratio + t, f.ratio);
        store(tile.kl + t, f.kl);
        store(tile.pos + t, f.pos);
        store(tile.grad_pos + t, f.grad_pos);
        store(tile.off_pos + t, choose(f.off_pos, one, zero));
        if constexpr (!Noon) {
            store(tile.neg + t, f.neg);
            store(tile.grad_neg + t, f.grad_neg);
            store(tile.off_neg + t, choose(f.off_neg, one, zero));
        }
    }
}

// e^r - 1 - r with r = ref - logp, in place of ref.
template <class T, class V = typename Lanes<T>::V>
inline void ref_terms(const Tile<T> tile) {
    const V zero{};
    for (long t = 0; t < tile.padded; t += Lanes<T>::count) {
        const V r = choose(load<V>(tile.valid + t) != zero, load<V>(tile.ref_kl + t) - load<V>(tile.logp + t), zero);
        const V poison = zero * r;
        V k3;
        exponential(r, k3);
        store(tile.ref_kl + t, k3 + poison);
        store(tile.ref_slope + t, poison - (r + k3));
    }
}

template <class T>
inline void load_tile(const Problem& problem, long first, long count, bool with_ref, Tile<T>& tile, Arena arena) {
    constexpr long width = Lanes<T>::count;
    const long padded = (count + width - 1) / width * width;
    tile.count = count;
    tile.padded = padded;
    T* valid = tile.valid;
    if (problem.mask)
        load_tokens(problem, problem.mask, first, count, true, valid);
    else
        for (long t = 0; t < count; ++t) valid[t] = 1;
    for (long t = count; t < padded; ++t) valid[t] = 0;

    T *buffer = arena.take<T>(3 * kTileTokens), *old_buffer = buffer + kTileTokens,
      *w_buffer = old_buffer + kTileTokens;
    const T *logp = buffer, *old = buffer, *w = valid;  // on-policy the ratio is 1
    if (problem.logprobs)
        old = logp = token_values(problem, problem.logprobs, first, count, buffer);
    else
        for (long t = 0; t < padded; ++t) buffer[t] = 0;
    if (problem.old_logprobs) old = token_values(problem, problem.old_logprobs, first, count, old_buffer);
    if (problem.importance_weights) w = token_values(problem, problem.importance_weights, first, count, w_buffer);
    if (problem.noon)
        store_factors<true>(problem, logp, old, w, first + count, tile);
    else
        store_factors<false>(problem, logp, old, w, first + count, tile);
    if (with_ref) {
        load_tokens(problem, problem.ref_logprobs, first, count, false, tile.ref_kl);
        ref_terms(tile);
    }

    load_objectives<T>(problem, problem.advantages, first, count, false, tile.present ? nullptr : valid,
                       tile.advantages, tile.bound);
    tile.ahead = in_pieces(ahead(problem, problem.advantages, first + count), problem.n, count);
    for (int i = 0; i < problem.n; ++i)
        for (long t = count; t < padded; ++t) tile.advantages[i * kTileTokens + t] = 0;
    if (!tile.present) return;
    load_objectives<T>(problem, problem.objective_mask, first, count, true, nullptr, tile.present, tile.bound);
    for (int i = 0; i < problem.n; ++i) {
        T *PAMA_RESTRICT a = tile.advantages + i * kTileTokens, *PAMA_RESTRICT here = tile.present + i * kTileTokens;
#pragma omp simd
        for (long t = 0; t < padded; ++t) {
            here[t] = valid[t] != 0 ? here[t] : T(0);
            const T value = here[t] != 0 ? a[t] : T(0);
            a[t] = value + T(0) * value;
        }
    }
}

PAMA_END
