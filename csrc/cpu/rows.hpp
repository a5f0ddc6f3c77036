// The pass over tokens for advantages per sequence. It does not depend on the objectives, so it costs the same for any
// number of them.
#pragma once

#include "../core/statistics.hpp"
#include "segments.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

constexpr int64_t kChunkTokens = 256;  // tokens that are summed in float32

// The inputs of one chunk of a row, converted to T and padded to whole vectors.
template <class T>
struct Chunk {
    int64_t count = 0, padded = 0;
    const T *valid = nullptr, *logp = nullptr, *old = nullptr, *w = nullptr, *ref = nullptr;
};

template <class T>
struct ChunkBuffers {
    alignas(64) T valid[kChunkTokens], logp[kChunkTokens], old[kChunkTokens], w[kChunkTokens], ref[kChunkTokens],
        gradient[kChunkTokens];
};

template <class T>
inline Chunk<T> load_chunk(const Tokens& tokens, bool with_ref, int64_t row, int64_t t, int64_t count,
                           ChunkBuffers<T>& buffers) {
    constexpr int64_t width = Lanes<T>::count;
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    Chunk<T> chunk;
    chunk.count = count;
    chunk.padded = (count + width - 1) / width * width;
    const auto values = [&](const Array& array, bool truth, T* buffer) -> const T* {
        const int64_t offset = row * array.row + t * array.token;
        if (!truth && array.dtype == own && array.token == 1 && count == chunk.padded)
            return static_cast<const T*>(array.data) + offset;
        load_values(array, offset, array.token, count, truth, buffer);
        return buffer;
    };
    if (tokens.mask)
        values(tokens.mask, true, buffers.valid);
    else
        for (int64_t k = 0; k < count; ++k) buffers.valid[k] = 1;
    for (int64_t k = count; k < chunk.padded; ++k) buffers.valid[k] = 0;
    chunk.valid = chunk.w = buffers.valid;
    if (tokens.logprobs) {
        chunk.logp = values(tokens.logprobs, false, buffers.logp);
    } else {
        for (int64_t k = 0; k < chunk.padded; ++k) buffers.logp[k] = 0;
        chunk.logp = buffers.logp;
    }
    chunk.old = tokens.old_logprobs ? values(tokens.old_logprobs, false, buffers.old) : chunk.logp;
    if (tokens.importance_weights) chunk.w = values(tokens.importance_weights, false, buffers.w);
    if (with_ref) chunk.ref = values(tokens.ref_logprobs, false, buffers.ref);
    return chunk;
}

// The inputs of the gradient for the tokens of one row.
template <class T>
struct RowSlope {
    T up = 0, down = 0, by = 0, kl_coef = 0;
};

template <bool Noon, bool Sums, bool Gradient, class T, class V = typename Lanes<T>::V>
inline void chunk_pass(const Chunk<T>& in, const ClipIn<T>& clip, const RowSlope<T>& row, T* sums, T* gradient) {
    const V zero{}, one = zero + 1, up = zero + row.up, down = zero + row.down, by = zero + row.by,
                    coefficient = zero + row.kl_coef;
    V s[kRowSums] = {};
    for (int64_t t = 0; t < in.padded; t += Lanes<T>::count) {
        const auto valid = load<V>(in.valid + t) != zero;
        const TokenFactors<V> f =
            token_factors(clip, valid, load<V>(in.logp + t), load<V>(in.old + t), load<V>(in.w + t));
        V kl = zero, ref_slope = zero;
        if (in.ref) ref_terms(valid, load<V>(in.ref + t), f.logp, kl, ref_slope);
        if constexpr (Sums) {
            add_to_row(f, Noon, valid, one, s, s);
            s[kRefKl] += kl;
        }
        if constexpr (Gradient) {
            V gain, slope;
            loss_terms(Noon, up, down, f, gain, slope);
            slope -= coefficient * ref_slope;
            store(gradient + t, choose(valid, -by * slope, zero));
        }
    }
    if constexpr (Sums) totals<kRowSums>(s, sums);
}

template <bool Noon, bool Sums, bool Gradient, class T>
inline void row_pass(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    const ClipIn<T> clip(tokens.clip);
    const bool with_ref = pass.kl_coef != 0;
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    ChunkBuffers<T> buffers;
    for_each_segment(tokens, first, last - first, [&](int64_t row, int64_t t, int64_t at, int64_t piece) {
        const bool begins = t == (tokens.offsets ? tokens.offsets[row] : 0);
        double* target = Sums ? (begins ? pass.sums + row * kRowSums : head) : nullptr;
        RowSlope<T> slope;
        if constexpr (Gradient) {
            const double omega = pass.omega ? pass.omega[row] : 1.0;
            slope.up = static_cast<T>(pass.up[row]);
            slope.down = static_cast<T>(pass.down[row]);
            slope.by = static_cast<T>(pass.scale * omega);
            slope.kl_coef = static_cast<T>(pass.kl_coef);
        }
        for (int64_t done = 0; done < piece; done += kChunkTokens) {
            const int64_t count = piece - done < kChunkTokens ? piece - done : kChunkTokens;
            const Chunk<T> chunk = load_chunk(tokens, with_ref, row, t + done, count, buffers);
            T sums[kRowSums];
            T* gradient = buffers.gradient;
            const bool in_place = Gradient && pass.gradient.dtype == own && count == chunk.padded;
            if (in_place) gradient = static_cast<T*>(pass.gradient.data) + first + at + done;
            chunk_pass<Noon, Sums, Gradient>(chunk, clip, slope, sums, gradient);
            if (Gradient && !in_place) store_values(pass.gradient, first + at + done, count, gradient);
            if constexpr (Sums) {
                if (sizeof(T) == sizeof(double) || row_in_range(sums)) {
                    for (int k = 0; k < kRowSums; ++k) target[k] += static_cast<double>(sums[k]);
                    continue;
                }
                ChunkBuffers<double> wide;
                double exact[kRowSums];
                chunk_pass<Noon, true, false>(load_chunk(tokens, with_ref, row, t + done, count, wide),
                                              ClipIn<double>(tokens.clip), RowSlope<double>{}, exact,
                                              static_cast<double*>(nullptr));
                for (int k = 0; k < kRowSums; ++k) target[k] += exact[k];
            }
        }
    });
}

template <class T>
inline void row_pass(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    const auto run = [&](auto noon) {
        constexpr bool Noon = decltype(noon)::value;
        if (!pass.up)
            row_pass<Noon, true, false, T>(tokens, pass, first, last, head);
        else if (!pass.sums)
            row_pass<Noon, false, true, T>(tokens, pass, first, last, head);
        else
            row_pass<Noon, true, true, T>(tokens, pass, first, last, head);
    };
    if (tokens.noon)
        run(std::true_type{});
    else
        run(std::false_type{});
}

PAMA_END
