// Long stretches of masked tokens, such as the padding of a batch, are left out of the passes: they cost a scan of the
// mask.
#pragma once

#include "segments.hpp"

PAMA_BEGIN

// The same stretches in every layout of the mask, so that results do not depend on it.
class LiveTokens {
    static constexpr int64_t kGroup = 16, kStretch = 64;  // tokens
    const Tokens& tokens;
    const Array& mask;
    const bool linear;  // one stride for all tokens

    template <class S>
    static bool any_valid(const S* mask, int64_t stride, int64_t count, S bits) {
        S found = 0;
        for (int64_t k = 0; k < count; ++k) found |= mask[k * stride];
        return (found & bits) != 0;
    }

    // find(valid), where valid(first, count) tells whether one of these tokens is valid.
    template <class Find>
    int64_t with_groups(Find find) const {
        return with_bits(mask, [&](auto* data, auto bits) {
            const int64_t stride = mask.token;
            if (linear && stride == 1)
                return find([&](int64_t at, int64_t count) { return any_valid(data + at, 1, count, bits); });
            if (linear)
                return find(
                    [&](int64_t at, int64_t count) { return any_valid(data + at * stride, stride, count, bits); });
            return find([&](int64_t first, int64_t all) {
                bool found = false;
                for_each_segment(tokens, first, all, [&](int64_t row, int64_t t, int64_t, int64_t count) {
                    found = found || any_valid(data + row * mask.row + t * stride, stride, count, bits);
                });
                return found;
            });
        });
    }

  public:
    explicit LiveTokens(const Tokens& tokens)
        : tokens(tokens),
          mask(tokens.mask),
          linear(tokens.offsets || tokens.rows == 1 || tokens.mask.row == tokens.width * tokens.mask.token) {}

    // The first token in [first, last) from which on a group has a valid token; `last` if there is none.
    int64_t begin(int64_t first, int64_t last) const {
        if (!mask) return first;
        return with_groups([&](auto valid) {
            int64_t at = first;
            for (; at + kGroup <= last; at += kGroup)
                if (valid(at, kGroup)) return at;
            return at < last && valid(at, last - at) ? at : last;
        });
    }

    // The end of the tokens from `first` on, where there is a valid one, before the next long masked stretch, or
    // `last`.
    int64_t end(int64_t first, int64_t last) const {
        if (!mask) return last;
        return with_groups([&](auto valid) {
            const auto found = [&](int64_t at) {
                return at + kGroup <= last ? valid(at, kGroup) : at < last && valid(at, last - at);
            };
            for (int64_t end = first;;) {
                int64_t at = end + kStretch - kGroup;  // if this group has a valid token, those before need no scan
                while (at >= end && !found(at)) at -= kGroup;
                if (at < end) return end < last ? end : last;
                end = at + kGroup;
            }
        });
    }
};

// Calls visit(first token, count, first token of the next piece) for the tokens [first, last) in pieces of at most
// `step`, and skip(first, count) for the masked stretches between them. The last two pieces before a stretch have about
// the same size, because the work on one hides the time to load the next.
template <class Visit, class Skip>
inline void for_each_live(const LiveTokens& live, int64_t first, int64_t last, int64_t step, Visit visit, Skip skip) {
    int64_t end = first;
    for (int64_t at = live.begin(first, last);;) {
        if (at > end) skip(end, at - end);
        if (at >= last) return;
        end = live.end(at, last - at < 2 * step ? last : at + 2 * step);
        if (end - at > step) end = at + ((end - at) / 2 + 15) / 16 * 16;
        const int64_t next = live.begin(end, last);
        visit(at, end - at, next);
        at = next;
    }
}

inline void store_zeros(const Array& array, int64_t first, int64_t count) {
    if (!array) return;
    const int64_t size = size_of(array.dtype);
    memset(static_cast<char*>(array.data) + first * size, 0, static_cast<size_t>(count * size));
}

PAMA_END
