// What SGLang's float32 layers do between matrix products on a CPU, without a tensor for every step; built and called
// as megatron_ext/vocab_parallel/rows.cpp is. Every row and request is computed alone: the same bits in any batch.

#include "../../megatron_ext/vectors.h"

#include <algorithm>
#include <vector>

namespace {

inline float quick_sum(Floats x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
    return lanes[0];
}

struct Cache {
    const float *keys, *values; // [places, kv heads, size]
    int64_t kv_heads, size;
    const int32_t* slots; // [requests the pool holds, longest], places of their tokens
    int64_t slots_stride;
};

// One new token of a request: its heads that share key-value head g. query, out [group, size].
template <int SIZE>
void attend_group(const Cache& cache, const int32_t* slots, int64_t length, int64_t g, int64_t group,
                  const float* query, float scale, float* scores, float* out) {
    constexpr int VECTORS = SIZE / LANES;
    const int64_t padded = (length + LANES - 1) / LANES * LANES;
    const int64_t place = cache.kv_heads * cache.size, head = g * cache.size;
    for (int64_t t = 0; t < length; t++) {
        const float* k = cache.keys + slots[t] * place + head;
        Floats key[VECTORS];
        for (int v = 0; v < VECTORS; v++) key[v] = load(k + v * LANES);
        for (int64_t h = 0; h < group; h++) {
            Floats dot = all(0);
            for (int v = 0; v < VECTORS; v++) dot += key[v] * load(query + h * cache.size + v * LANES);
            scores[h * padded + t] = quick_sum(dot) * scale;
        }
    }
    for (int64_t h = 0; h < group; h++) {
        float* p = scores + h * padded;
        std::fill(p + length, p + padded, -INF);
        Floats top = all(-INF);
        for (int64_t t = 0; t < padded; t += LANES) top = larger(top, load(p + t));
        const float m = largest(top);
        Floats mass = all(0);
        for (int64_t t = 0; t < padded; t += LANES) {
            Floats e = exp_negative(load(p + t) - m);
            store(p + t, e);
            mass += e;
        }
        const float share = 1.0f / quick_sum(mass);
        Floats found[VECTORS] = {};
        for (int64_t t = 0; t < length; t++) {
            const float* x = cache.values + slots[t] * place + head;
            for (int v = 0; v < VECTORS; v++) found[v] += p[t] * load(x + v * LANES);
        }
        for (int v = 0; v < VECTORS; v++) store(out + h * cache.size + v * LANES, found[v] * share);
    }
}

template <int SIZE>
void decode_attention(const Cache& cache, int64_t requests, int64_t heads, const float* query, const int64_t* numbers,
                      const int64_t* lengths, float scale, float* out) {
    const int64_t group = heads / cache.kv_heads;
    std::vector<float> scores;
    for (int64_t r = 0; r < requests; r++) {
        scores.resize(std::max<size_t>(scores.size(), group * (lengths[r] + LANES)));
        for (int64_t g = 0; g < cache.kv_heads; g++) {
            const int64_t first = (r * heads + g * group) * cache.size;
            attend_group<SIZE>(cache, cache.slots + numbers[r] * cache.slots_stride, lengths[r], g, group,
                                  query + first, scale, scores.data(), out + first);
        }
    }
}

// SplitMix64's finalizer (Steele, Lea, Flood 2014).
inline uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u; // SplitMix64's increment

// The id with the largest logprob + Gumbel noise, of a hash of (row, id). The noise of most ids needs no logarithm: u
// wins if -log(u) < exp(logprob - best), and -log(u) >= 1 - u.
int64_t draw(const double* logprobs, int64_t vocab, uint64_t row) {
    double best = -__builtin_inf();
    int64_t found = 0;
    for (int64_t first = 0; first < vocab; first += LANES) {
        const int64_t count = std::min<int64_t>(LANES, vocab - first);
        float lead[LANES];
        double u[LANES];
        for (int64_t k = 0; k < LANES; k++) {
            lead[k] = k < count && best > -__builtin_inf() ? std::min(logprobs[first + k] - best, 0.0) : 0.0;
            u[k] = ((double)(mix(row + (first + k + 1) * GOLDEN) >> 11) + 0.5) * 0x1p-53;
        }
        float bound[LANES];
        store(bound, exp_negative(load(lead)) * 1.0001f);
        for (int64_t k = 0; k < count; k++) {
            if (1.0 - u[k] >= bound[k]) continue;
            const double score = logprobs[first + k] - std::log(-std::log(u[k]));
            if (score > best) best = score, found = first + k;
        }
    }
    return found;
}

} // namespace

extern "C" {

const char* native_source() { return NATIVE_SOURCE; } // hash of the sources, set by setup.py

// query, out [requests, heads, size]; numbers are the requests' rows of `slots`. size is 32, 64, 96 or 128.
void ops_decode_attention(int64_t requests, int64_t heads, int64_t kv_heads, int64_t size, const float* query,
                          const float* keys, const float* values, const int32_t* slots, int64_t slots_stride,
                          const int64_t* numbers, const int64_t* lengths, float scale, float* out) {
    const Cache cache{keys, values, kv_heads, size, slots, slots_stride};
    auto run = size == 32   ? decode_attention<32>
               : size == 64 ? decode_attention<64>
               : size == 96 ? decode_attention<96>
                            : decode_attention<128>;
    run(cache, requests, heads, query, numbers, lengths, scale, out);
}

// logprobs [rows, vocab] -> ids [rows]; cpu_kernels.py says what is drawn.
void ops_seeded_multinomial(int64_t rows, int64_t vocab, const double* logprobs, const int64_t* seeds,
                            const int64_t* positions, int64_t* out) {
    for (int64_t r = 0; r < rows; r++)
        out[r] = draw(logprobs + r * vocab, vocab, mix(seeds[r] ^ mix(positions[r] + GOLDEN)));
}

// What follows takes widths that are multiples of sixteen: of a vector, whatever the machine.

// out = norm(x + residual) * weight, sum = x + residual; without a residual sum is not written. All [rows, width].
void ops_rms_norm(int64_t rows, int64_t width, const float* x, const float* residual, const float* weight, float eps,
                  float* sum, float* out) {
    for (int64_t r = 0; r < rows; r++, out += width) {
        const float* from = x + r * width;
        if (residual) {
            for (int64_t k = 0; k < width; k += LANES)
                store(sum + r * width + k, load(from + k) + load(residual + r * width + k));
            from = sum + r * width;
        }
        Floats squares = all(0);
        for (int64_t k = 0; k < width; k += LANES) squares += load(from + k) * load(from + k);
        const float scale = 1.0f / std::sqrt(quick_sum(squares) / (float)width + eps);
        for (int64_t k = 0; k < width; k += LANES) store(out + k, load(from + k) * scale * load(weight + k));
    }
}

// out[:, k] = silu(x[:, k]) * x[:, width + k]; x [rows, 2 * width].
void ops_silu_and_mul(int64_t rows, int64_t width, const float* x, float* out) {
    for (int64_t r = 0; r < rows; r++, x += 2 * width, out += width) {
        for (int64_t k = 0; k < width; k += LANES) {
            Floats z = load(x + k);
            Floats e = exp_negative((Floats)((Ints)z | INT32_MIN)); // of -|z|
            store(out + k, z * ((z < 0.0f ? e : all(1.0f)) / (1.0f + e)) * load(x + width + k));
        }
    }
}

// Rotates the halves of each head by its position's angles: rows of half cosines, half sines. x rows are `stride`
// apart; out [tokens, heads, size].
void ops_rotate(int64_t tokens, int64_t heads, int64_t size, const int64_t* positions, const float* angles,
                const float* x, int64_t stride, float* out) {
    const int64_t half = size / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const float *cosines = angles + positions[t] * size, *sines = cosines + half;
        for (int64_t h = 0; h < heads; h++, out += size) {
            const float* from = x + t * stride + h * size;
            for (int64_t k = 0; k < half; k += LANES) {
                Floats a = load(from + k), b = load(from + half + k), c = load(cosines + k), s = load(sines + k);
                store(out + k, a * c - b * s);
                store(out + half + k, b * c + a * s);
            }
        }
    }
}

} // extern "C"
