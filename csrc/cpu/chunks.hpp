// Chunks of a row: the inputs of the passes over tokens for advantages per sequence.
#pragma once

#include "segments.hpp"

PAMA_BEGIN

constexpr int64_t kChunkTokens = 512;  // tokens that are summed in float32

// The inputs of one chunk of a row, converted to T and padded to whole vectors. half_logp, half_old, half_ref: the
// log-probabilities in the tensors' memory, in a 16-bit format; logp, old and ref are then null.
template <class T>
struct Chunk {
    int64_t count = 0, padded = 0;
    const unsigned char* valid = nullptr;                                        // not 0 where a token is valid
    const T *logp = nullptr, *old = nullptr, *weight = nullptr, *ref = nullptr;  // weight: null if all are 1
    const void *half_logp = nullptr, *half_old = nullptr, *half_ref = nullptr;
};

template <class T>
struct ChunkBuffers {
    alignas(64) T logp[kChunkTokens], old[kChunkTokens], weight[kChunkTokens], ref[kChunkTokens],
        gradient[kChunkTokens];
    alignas(64) unsigned char valid[kChunkTokens];
};

// Whether the log-probabilities are in one 16-bit format.
inline bool half_logprobs(const Tokens& tokens, bool with_ref) {
    const Dtype dtype = tokens.logprobs.dtype;
    const auto same = [&](const Array& other) { return !other || other.dtype == dtype; };
    return tokens.logprobs && size_of(dtype) == 2 && same(tokens.old_logprobs) &&
           (!with_ref || same(tokens.ref_logprobs));
}

// Log-probabilities of a chunk in a format.
template <class Values>
inline const typename Values::Stored* chunk_values(const float* values, const void* half) {
    if constexpr (std::is_same<Values, Native<float>>::value)
        return values;
    else
        return static_cast<const typename Values::Stored*>(half);
}

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
        const Array &given = tokens.logprobs, &old = tokens.old_logprobs ? tokens.old_logprobs : given,
                    &ref = with_ref ? tokens.ref_logprobs : given;
        if (given.token == 1 && old.token == 1 && ref.token == 1) {
            const auto memory = [&](const Array& array) {
                return static_cast<const unsigned short*>(array.data) + row * array.row + t;
            };
            chunk.half_logp = memory(given);
            chunk.half_old = memory(old);
            chunk.half_ref = memory(ref);
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

PAMA_END
