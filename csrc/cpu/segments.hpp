// Tokens [first, first + count) of any layout, row by row.
#pragma once

#include "values.hpp"

PAMA_BEGIN

// Addresses of the values to prefetch: at(t, i) is the value of token t and objective i, counted from a first token.
struct Ahead {
    const char* first;
    int64_t token, objective;  // bytes
    const char* at(int64_t t, int64_t i = 0) const { return first + i * objective + t * token; }
};

inline Ahead ahead(const Tokens& tokens, const Array& array, int64_t token) {
    const int64_t row = tokens.offsets ? 0 : token / tokens.width, t = tokens.offsets ? token : token % tokens.width;
    const int64_t size = size_of(array.dtype);
    return {static_cast<const char*>(array.data) + (row * array.row + t * array.token) * size, array.token * size,
            array.objective * size};
}

// If the objectives of a token are adjacent in memory, the range of `count` tokens is divided into one contiguous piece
// per objective, so that the passes over single objectives prefetch all of it.
inline Ahead in_pieces(Ahead values, int n, int64_t count) {
    if (values.token == n * values.objective) {
        values.token = values.objective;
        values.objective *= count;
    }
    return values;
}

// For a loop that prefetches nothing: a value that is in the cache.
inline Ahead nothing_ahead(const void* cached) { return {static_cast<const char*>(cached), 0, 0}; }

// The values of up to `count` objectives, from `first` on, for a loop over vectors of tokens. A vector of float32 is
// one cache line with AVX-512, at most half of one otherwise: two pieces then take turns.
struct Pieces {
    static constexpr bool turns = PAMA_VECTOR_BYTES < 64;
    static constexpr int count = turns ? 2 : 4;
    const char* at[count] = {};
    int64_t token = 0;
    Pieces() = default;
    Pieces(const Ahead& ahead, int64_t first, int64_t n) : token(ahead.token) {
        for (int k = 0; k < count; ++k) at[k] = ahead.at(0, first + k < n ? first + k : n - 1);
    }
    PAMA_INLINE void prefetch_at(int64_t t) const {
        if constexpr (turns) return prefetch(at[t / Lanes<float>::count % count] + t * token);
        for (const char* piece : at) prefetch(piece + t * token);
    }
};

// Hands out 64-byte aligned pieces of the scratch memory of one thread.
struct Arena {
    char* next;
    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(next);
        next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

// Calls visit(row, first token within the array's row, tile position, count) for each piece of a row.
template <class Visit>
inline void for_each_segment(const Tokens& tokens, int64_t first, int64_t count, Visit visit) {
    if (!tokens.offsets) {
        for (int64_t done = 0; done < count;) {
            const int64_t row = (first + done) / tokens.width, t = (first + done) % tokens.width;
            const int64_t piece = tokens.width - t < count - done ? tokens.width - t : count - done;
            visit(row, t, done, piece);
            done += piece;
        }
        return;
    }
    int64_t low = 0, high = tokens.rows;  // binary search for the last row that begins at or before `first`
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (tokens.offsets[middle] <= first ? low : high) = middle;
    }
    for (int64_t done = 0; done < count; ++low) {
        const int64_t t = first + done, end = tokens.offsets[low + 1];
        const int64_t piece = end - t < count - done ? end - t : count - done;
        if (piece > 0) {
            visit(low, t, done, piece);
            done += piece;
        }
    }
}

template <class T>
inline void load_tokens(const Tokens& tokens, const Array& array, int64_t first, int64_t count, bool truth, T* target) {
    for_each_segment(tokens, first, count, [&](int64_t row, int64_t t, int64_t at, int64_t piece) {
        load_values(array, row * array.row + t * array.token, array.token, piece, truth, target + at);
    });
}

// The memory of a tile's tokens if it consists of whole vectors of T in one piece, else null.
template <class T>
inline const void* token_memory(const Tokens& tokens, const Array& array, int64_t first, int64_t count) {
    const bool one_piece = tokens.offsets || first % tokens.width + count <= tokens.width;
    if (array.token != 1 || !one_piece || count % Lanes<T>::count != 0) return nullptr;
    return ahead(tokens, array, first).first;
}

// The values of a tile's tokens as T: a pointer to the tensor's memory if it is contiguous and of type T, else a copy
// in `buffer`.
template <class T>
inline const T* token_values(const Tokens& tokens, const Array& array, int64_t first, int64_t count, T* buffer) {
    constexpr Dtype own = sizeof(T) == sizeof(float) ? Dtype::f32 : Dtype::f64;
    const void* const memory = array.dtype == own ? token_memory<T>(tokens, array, first, count) : nullptr;
    if (memory) return static_cast<const T*>(memory);
    load_tokens(tokens, array, first, count, false, buffer);
    return buffer;
}

PAMA_END
