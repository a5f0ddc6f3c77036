// The tokens of a tile whose bound terms differ from their advantages, apart from the others.
#pragma once

#include "tile.hpp"

PAMA_BEGIN

// Appends those of the vector of tokens from t on where the condition holds to `list` (count), which has room for a
// vector more. Returns the new count.
template <class Mask>
inline int64_t append_where(Mask here, int64_t t, int* list, int64_t count) {
#if defined(__AVX512F__)
    const auto bits = reinterpret_cast<__m512i>(here);
    const __mmask16 which = _mm512_test_epi32_mask(bits, bits);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i tokens = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(t)), lanes);
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(which, tokens));
    return count + __builtin_popcount(which);
#else
    if (!any(here)) return count;
    for (int k = 0; k < Lanes<float>::count; ++k) {
        list[count] = static_cast<int>(t) + k;
        count += here[k] != 0;
    }
    return count;
#endif
}

// The largest number of tokens to copy: with more, or with fewer objectives, the copies cost as much as they save.
inline int64_t most_clipped(int n, int64_t padded) { return n < 6 ? 0 : padded / (n < 12 ? 32 : 8); }

// If the tokens without a gradient for both signs are few, copies them to tile.clipped. wanted: the caller has a use
// for this.
template <class T>
inline void split_tile(int n, [[maybe_unused]] bool wanted, Tile<T>& tile) {
    tile.split = false;
    if constexpr (sizeof(T) == sizeof(float)) {
        constexpr int64_t width = Lanes<float>::count;
        const int64_t most = most_clipped(n, tile.padded);
        if (!wanted || most == 0) return;
        int list[kMostClipped + width];
        int64_t count = 0;
        for (int64_t t = 0; t < tile.padded; t += width) {
            count = append_where(load<FloatV>(tile.side + t) != 0.0f, t, list, count);
            if (count > most) return;
        }
        TokenSet<float>& clipped = tile.clipped;
        clipped.padded = (count + width - 1) / width * width;
        const auto copy = [&](const float* from, float* to) {
            for (int64_t k = 0; k < count; ++k) to[k] = from[list[k]];
            for (int64_t k = count; k < clipped.padded; ++k) to[k] = 0;
        };
        copy(tile.logp, clipped.logp);
        copy(tile.pos, clipped.pos);
        copy(tile.neg, clipped.neg);
        copy(tile.side, clipped.side);
        for (int i = 0; i < n; ++i) copy(tile.advantages + i * tile.stride, clipped.advantages + i * clipped.stride);
        tile.split = true;
    }
}

PAMA_END
