// Loss and gradient under known weights of the batch, where the objectives of a token are adjacent in memory: from the
// inputs to the gradient in registers.
#pragma once

#include "apply.hpp"
#include "rows.hpp"

PAMA_BEGIN

// Whether `direct_pass` computes everything that the pass asks for.
inline bool is_direct(const Pass& pass, const Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const Outputs& outputs = pass.outputs;
    const int n = tokens.n;
    const bool plain = !tokens.objective_mask && !tokens.importance_weights && outputs.kl_coef == 0;
    return plain && pass.known && !pass.by_rows() && !partial.sums && outputs.loss && !outputs.advantages &&
           !tokens.wide && tokens.advantages.dtype != Dtype::f64 && tokens.advantages.objective == 1 &&
           tokens.advantages.token == n && (n == 1 || n == 2 || n == 4 || n == 8 || n % 16 == 0);
}

constexpr int64_t kAheadTokens = 128;

// What a chunk prefetches, in bytes from the value that is read or written: kAheadTokens further and, for the last
// kAheadTokens, as many tokens further in the next piece, which another row may hold.
struct Distances {
    int64_t advantages, logp, old, gradient;
};
struct Prefetched {
    Distances own, next;
};

// One chunk. data (padded, n): advantages in a format; c (n): weights. Values: the format of log-probabilities. Returns
// the loss without its factor `by`, or NaN if a value is not finite: the pass over a tile must then compute the chunk.
template <bool Noon, int N, class Format, class Values, class V = FloatV>
inline double direct_chunk(const Chunk<float>& in, const ClipIn<float>& clip, int64_t given, const void* data,
                           const float* c, float by, const Prefetched& prefetched, float* gradient) {
    typedef typename Format::Stored Stored;
    typedef typename std::conditional < N<16, std::integral_constant<int, N>, int64_t>::type Row;
    const Stored* const a = static_cast<const Stored*>(data);
    const auto *const logp = chunk_values<Values>(in.logp, in.half_logp), *const old =
                                                                              chunk_values<Values>(in.old, in.half_old);
    constexpr int64_t width = Lanes<float>::count;
    const int64_t n = N < 16 ? N : given;
    Row row{};
    if constexpr (N >= 16) row = n;
    const float limit = static_cast<float>(kMaxLogRatio);
    const V zero{}, high = zero + clip.high, low = zero + clip.low, dual = zero + clip.dual, most = zero + limit,
                    log_high = zero + clip.log_high, log_low = zero + clip.log_low, log_dual = zero + clip.log_dual;
    V s[2] = {};
    const int64_t last = in.padded > kAheadTokens ? in.padded - kAheadTokens : 0;
    Distances ahead = prefetched.own;
    for (int64_t t = 0; t < in.padded; t += width) {
        if (t >= last) ahead = prefetched.next;
        prefetch(reinterpret_cast<const char*>(logp + t) + ahead.logp);
        prefetch(reinterpret_cast<const char*>(old + t) + ahead.old);
        prefetch_for_writing(reinterpret_cast<const char*>(gradient + t) + ahead.gradient);
        const auto valid = valid_lanes<V>(in.valid + t);
        const V d = choose(valid, load_floats(Values{}, logp + t) - load_floats(Values{}, old + t), zero);
        const V clamped = max_of(min_of(d, most), -most);
        V k3, up{}, down{}, poison{};
        const V u = exponential<true>(clamped, k3);
        for (int64_t block = 0; block < n; block += N) {
            V v[N];
            load_columns<N, true>(Format{}, a + t * n + block, row, v, ahead.advantages);
            for (int i = 0; i < N; ++i) {
                const V weight = zero + c[block + i], positive = max_of(zero, v[i]);
                up += weight * positive;
                if constexpr (Noon)
                    poison += zero * v[i];
                else
                    down += weight * (v[i] - positive);
            }
        }
        up = valid ? up : zero;
        down = valid ? down : zero;
        const auto inside = valid & (clamped == d);
        V slope = inside & (d <= log_high) ? up : zero;
        s[0] += up * min_of(u, high);
        if constexpr (!Noon) {
            s[0] += down * max_of(min_of(u, dual), low);
            slope = inside & (d >= log_low) & (d <= log_dual) ? slope + down : slope;
        }
        s[1] += zero * d + (valid ? poison : zero);
        store(gradient + t, slope * u * -by);
    }
    float sums[2];
    totals<2>(s, sums);
    return static_cast<double>(sums[0] + 0 * sums[1]);
}

template <bool Noon, class Format, class Values>
inline auto direct_chunk_of(int n) {
    switch (n) {
        case 1:
            return direct_chunk<Noon, 1, Format, Values>;
        case 2:
            return direct_chunk<Noon, 2, Format, Values>;
        case 4:
            return direct_chunk<Noon, 4, Format, Values>;
        case 8:
            return direct_chunk<Noon, 8, Format, Values>;
        default:
            return direct_chunk<Noon, 16, Format, Values>;
    }
}
template <class Format, class Values = Native<float>>
inline auto direct_chunk_of(const Tokens& tokens) {
    return tokens.noon ? direct_chunk_of<true, Format, Values>(tokens.n)
                       : direct_chunk_of<false, Format, Values>(tokens.n);
}

// The chunk's advantages, padded by zeros: a pointer to the tensor's memory if that suffices, else `buffer`.
inline const void* direct_advantages(const Tokens& tokens, int64_t row, int64_t t, const Chunk<float>& chunk,
                                     void* buffer) {
    const Array& array = tokens.advantages;
    const int64_t token = size_of(array.dtype) * tokens.n, used = chunk.count * token;
    const char* from =
        static_cast<const char*>(array.data) + (row * array.row + t * array.token) * size_of(array.dtype);
    if (chunk.count == chunk.padded) return from;
    memcpy(buffer, from, static_cast<size_t>(used));
    memset(static_cast<char*>(buffer) + used, 0, static_cast<size_t>(chunk.padded * token - used));
    return buffer;
}

// place, next: the first tokens of the chunk and of the next piece. a, gradient: what the chunk reads and writes.
inline Prefetched prefetched_by(const Pass& pass, const Chunk<float>& chunk, int64_t place, int64_t next, const void* a,
                                const void* gradient) {
    const Tokens& tokens = pass.tokens;
    Array to = pass.outputs.gradient;
    to.token = 1;
    to.row = tokens.width;
    const int64_t last = chunk.padded > kAheadTokens ? chunk.padded - kAheadTokens : 0;
    Prefetched result{};
    const auto set = [&](int64_t Distances::* member, const Array& array, int64_t token, const void* from) {
        const Ahead here = ahead(tokens, array, place), there = ahead(tokens, array, next);
        const auto distance = [&](const char* target) {
            return static_cast<int64_t>(reinterpret_cast<intptr_t>(target) - reinterpret_cast<intptr_t>(from));
        };
        result.own.*member = distance(here.first) + kAheadTokens * token;
        result.next.*member = distance(there.first) - last * token;
    };
    const Array &logp = tokens.logprobs, &old = tokens.old_logprobs ? tokens.old_logprobs : logp;
    const bool half = chunk.half_logp != nullptr;
    set(&Distances::advantages, tokens.advantages, size_of(tokens.advantages.dtype) * tokens.n, a);
    set(&Distances::logp, logp, size_of(logp.dtype), half ? chunk.half_logp : chunk.logp);
    set(&Distances::old, old, size_of(old.dtype), half ? chunk.half_old : chunk.old);
    if (to) set(&Distances::gradient, to, size_of(to.dtype), gradient);
    return result;
}

inline void direct_pass(const Pass& pass, int64_t first, int64_t last, Workspace<float>& w, Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const Array& to = pass.outputs.gradient;
    const ClipIn<float> clip(tokens.clip);
    const Dtype dtype = tokens.advantages.dtype;
    const auto run = dtype == Dtype::bf16  ? direct_chunk_of<Bfloat16>(tokens)
                     : dtype == Dtype::f16 ? direct_chunk_of<Float16>(tokens)
                                           : direct_chunk_of<Native<float>>(tokens),
               run_half = dtype == Dtype::bf16 ? direct_chunk_of<Bfloat16, Bfloat16>(tokens)
                                               : direct_chunk_of<Float16, Float16>(tokens);
    const bool half = half_logprobs(tokens, false) && tokens.logprobs.dtype == dtype;
    const int64_t step = tile_tokens(tokens.n);
    const LiveTokens live(tokens);
    ChunkBuffers<float> buffers;
    for_each_segment(tokens, first, last - first, [&](int64_t row, int64_t t, int64_t at, int64_t piece) {
        const double omega = pass.token_weight(row), by = pass.scale * omega;
        const auto add = [&](int64_t place, int64_t count, int64_t next) {
            const int64_t token = t + place - (first + at);
            const Chunk<float> chunk = load_chunk(tokens, false, row, token, count, buffers, half);
            const bool in_place = to && to.dtype == Dtype::f32 && count == chunk.padded;
            float* const gradient = in_place ? static_cast<float*>(to.data) + place : buffers.gradient;
            const void* a = direct_advantages(tokens, row, token, chunk, w.tile.bound);
            const Prefetched prefetched = prefetched_by(pass, chunk, place, next, a, gradient);
            const double gain = (chunk.half_logp ? run_half : run)(chunk, clip, tokens.n, a, w.weights,
                                                                   static_cast<float>(by), prefetched, gradient);
            if (0 * gain != 0) {
                load_tile(tokens, place, count, next, false, w.tile, w.arena);
                apply_tile(pass, w, place, omega, w.weights, static_cast<const float*>(nullptr), partial);
                return;
            }
            partial.loss -= by * gain;
            if (to && !in_place) store_values(to, place, count, gradient);
        };
        for_each_live(live, first + at, first + at + piece, step, add,
                      [&](int64_t place, int64_t count) { store_masked(pass, place, count); });
    });
}
inline void direct_pass(const Pass&, int64_t, int64_t, Workspace<double>&, Partial&) {}

template <class T>
inline void apply_block(const Pass& pass, int64_t first, int64_t last, Partial& partial, void* scratch) {
    const Tokens& tokens = pass.tokens;
    const int n = tokens.n;
    Workspace<T> w = allocate<T>(tokens, scratch);
    if (pass.by_rows()) {
        for (int64_t row = first; row < last; ++row) apply_row(pass, row, w, partial);
        return;
    }
    if (pass.known) load_values(pass.weights, 0, pass.weights.objective, n, false, w.weights);
    if (is_direct(pass, partial)) return direct_pass(pass, first, last, w, partial);
    for (int i = 0; i < n; ++i) w.divisor[i] = static_cast<T>(pass.preference[i]);
    const auto apply = [&](int64_t at, int64_t count, int64_t next, double omega) {
        load_tile(tokens, at, count, next, pass.outputs.kl_coef != 0, w.tile, w.arena);
        bool finite = false;
        if (partial.sums)
            finite =
                with_fields(tokens, w, at, pass.rule.kind == Kind::scores, pass.outputs.pairs, [&](const auto& tile) {
                    add_fields(tokens, tile, omega, partial.sums);
                    if (pass.outputs.pairs) add_pairs(tokens, tile, omega, partial.sums);
                });
        if (!partial.sums && pass.rule.kind == Kind::scores) bound_terms(tokens, w.tile);
        const bool applied = !pass.known && finite && applied_scores(pass, w, omega, partial);
        if (!pass.known && !applied) token_weights(pass, w, omega, partial);
        apply_tile(pass, w, at, omega, pass.known ? w.weights : nullptr, pass.divided ? w.divisor : nullptr, partial,
                   applied);
    };
    for_each_tile(tokens, pass.omega, first, last, apply,
                  [&](int64_t at, int64_t count) { store_masked(pass, at, count); });
}

PAMA_END
