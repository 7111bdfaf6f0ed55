// What Megatron's layers do between matrix products on a CPU, in float32, forward and backward; built and called as
// vocab_parallel/rows.cpp is. Every sequence is computed alone, for one key-value head after the other.

#include "products.h"

#include <cstring>
#include <immintrin.h>

namespace {

struct Heads {
    const float* x; // [tokens, heads, size]
    int64_t row, head; // strides
    const float* at(int64_t token, int64_t number) const { return x + token * row + number * head; }
};

// Queries of `count` tokens from `query` on. They see the keys [known, known_end), and of [own, own + count) those up
// to their own.
struct Span {
    int64_t known, known_end, own, count, query;
    int64_t num_known() const { return known_end - known; }
    int64_t length() const { return num_known() + count; }
    int64_t token(int64_t t) const { return t < num_known() ? known + t : own + t - num_known(); }
};

constexpr int64_t BLOCK = 64; // queries of a head group, times its heads, taken together

struct Scratch {
    std::vector<float> keys, key_tiles, values, value_tiles, of_keys, of_values; // of a span's tokens
    std::vector<float> query, found, gradient, scores, of_scores;                // of a block of queries
};

// Some queries of a span and the heads that share a key-value head: row i is of token first + i / group.
struct Block {
    int64_t first, group, head, rows, all_rows, seen, width;
    Block(const Span& span, int64_t first, int64_t group, int64_t head) : first(first), group(group), head(head) {
        const int64_t count = std::min(std::max<int64_t>(1, BLOCK / group), span.count - first);
        rows = count * group, all_rows = up(rows, ROWS);
        seen = span.num_known() + first + count, width = up(seen, COLUMNS); // by the last of them
    }
    int64_t token(const Span& span, int64_t i) const { return span.query + first + i / group; }
    int64_t number(int64_t i) const { return head + i % group; }
    int64_t visible(const Span& span, int64_t i) const { return span.num_known() + first + i / group + 1; }
    static int64_t step(int64_t group) { return std::max<int64_t>(1, BLOCK / group); }
};

// rows of `x` for a block, times scale; rows behind its own are 0.
template <int SIZE>
float* take(const Span& span, const Block& block, Heads x, float scale, std::vector<float>& memory) {
    float* out = at_least(memory, block.all_rows * SIZE);
    for (int64_t i = 0; i < block.rows; i++) {
        const float* from = x.at(block.token(span, i), block.number(i));
        for (int64_t d = 0; d < SIZE; d += LANES) store(out + i * SIZE + d, load(from + d) * scale);
    }
    std::fill(out + block.rows * SIZE, out + block.all_rows * SIZE, 0.0f);
    return out;
}

// A key-value head of a span's tokens, as rows and as tiles where those are asked for; what is behind them is 0.
template <int SIZE> void take(const Span& span, Heads x, int64_t g, float* rows, float* tiles) {
    const int64_t length = span.length(), width = up(length, COLUMNS);
    const float nothing[SIZE] = {};
    for (int64_t t = 0; t < width; t++) {
        const float* from = t < length ? x.at(span.token(t), g) : nothing;
        if (rows) std::memcpy(rows + t * SIZE, from, sizeof nothing);
        if (tiles) put<SIZE>(from, t, tiles);
    }
}

template <int SIZE>
void attend(const Span* spans, int64_t num_spans, int64_t group, int64_t first_head, int64_t last_head, Heads query,
            Heads key, Heads value, float scale, int64_t heads, float* out, float* lse) {
    Scratch scratch;
    for (const Span* span = spans; span < spans + num_spans; span++) {
        const int64_t width = up(span->length(), COLUMNS);
        float* keys = at_least(scratch.key_tiles, width * SIZE);
        float* values = at_least(scratch.values, width * SIZE);
        for (int64_t g = first_head; g < last_head; g++) {
            take<SIZE>(*span, key, g, nullptr, keys);
            take<SIZE>(*span, value, g, values, nullptr);
            for (int64_t first = 0; first < span->count; first += Block::step(group)) {
                const Block block(*span, first, group, g * group);
                const float* q = take<SIZE>(*span, block, query, scale, scratch.query);
                float* scores = at_least(scratch.scores, block.all_rows * block.width);
                float* found = at_least(scratch.found, block.all_rows * SIZE);
                multiply_tiles<SIZE>(block.all_rows, q, block.width / COLUMNS, keys, scores);
                for (int64_t i = 0; i < block.rows; i++)
                    lse[block.token(*span, i) * heads + block.number(i)] =
                        softmax(scores + i * block.width, block.visible(*span, i), block.width);
                std::fill(found, found + block.all_rows * SIZE, 0.0f);
                add_products<SIZE>(block.all_rows, {scores, block.width, 1}, block.seen, values, found);
                for (int64_t i = 0; i < block.rows; i++)
                    std::memcpy(out + (block.token(*span, i) * heads + block.number(i)) * SIZE, found + i * SIZE,
                                SIZE * sizeof(float));
            }
        }
    }
}

// Dao et al. 2022, FlashAttention, appendix B: P = exp(q k - lse), dS = P * (dO V - sum(dO * O)).
template <int SIZE>
void attend_backward(const Span* spans, int64_t num_spans, int64_t group, int64_t first_head, int64_t last_head,
                     Heads query, Heads key, Heads value, float scale, int64_t heads, const float* out,
                     const float* lse, Heads gradient, float* of_query, float* of_key, float* of_value) {
    const int64_t kv_heads = heads / group;
    Scratch scratch;
    for (const Span* span = spans; span < spans + num_spans; span++) {
        const int64_t length = span->length(), width = up(length, COLUMNS);
        float* keys = at_least(scratch.keys, width * SIZE);
        float* key_tiles = at_least(scratch.key_tiles, width * SIZE);
        float* value_tiles = at_least(scratch.value_tiles, width * SIZE);
        float* of_keys = at_least(scratch.of_keys, width * SIZE);
        float* of_values = at_least(scratch.of_values, width * SIZE);
        for (int64_t g = first_head; g < last_head; g++) {
            take<SIZE>(*span, key, g, keys, key_tiles);
            take<SIZE>(*span, value, g, nullptr, value_tiles);
            std::fill(of_keys, of_keys + width * SIZE, 0.0f);
            std::fill(of_values, of_values + width * SIZE, 0.0f);
            for (int64_t first = 0; first < span->count; first += Block::step(group)) {
                const Block block(*span, first, group, g * group);
                const float* q = take<SIZE>(*span, block, query, scale, scratch.query);
                const float* grad = take<SIZE>(*span, block, gradient, 1.0f, scratch.gradient);
                float* p = at_least(scratch.scores, block.all_rows * block.width);
                float* of_scores = at_least(scratch.of_scores, block.all_rows * block.width);
                float* found = at_least(scratch.found, block.all_rows * SIZE);
                multiply_tiles<SIZE>(block.all_rows, q, block.width / COLUMNS, key_tiles, p);
                multiply_tiles<SIZE>(block.all_rows, grad, block.width / COLUMNS, value_tiles, of_scores);
                for (int64_t i = 0; i < block.rows; i++) {
                    const int64_t row = block.token(*span, i) * heads + block.number(i);
                    float *own = p + i * block.width, *of_own = of_scores + i * block.width;
                    std::fill(own + block.visible(*span, i), own + block.width, -INF);
                    Floats products = all(0);
                    for (int64_t d = 0; d < SIZE; d += LANES)
                        products += load(out + row * SIZE + d) * load(grad + i * SIZE + d);
                    const float mean = quick_sum(products), m = lse[row];
                    for (int64_t t = 0; t < block.width; t += LANES) {
                        const Floats share = exp_negative(load(own + t) - m);
                        store(own + t, share);
                        store(of_own + t, share * (load(of_own + t) - mean));
                    }
                }
                std::fill(found, found + block.all_rows * SIZE, 0.0f);
                add_products<SIZE>(block.all_rows, {of_scores, block.width, 1}, block.seen, keys, found);
                for (int64_t i = 0; i < block.rows; i++) {
                    float* to = of_query + (block.token(*span, i) * heads + block.number(i)) * SIZE;
                    for (int64_t d = 0; d < SIZE; d += LANES) store(to + d, load(found + i * SIZE + d) * scale);
                }
                add_products<SIZE>(block.width, {p, 1, block.width}, block.all_rows, grad, of_values);
                add_products<SIZE>(block.width, {of_scores, 1, block.width}, block.all_rows, q, of_keys);
            }
            for (int64_t t = 0; t < length; t++) {
                const int64_t to = (span->token(t) * kv_heads + g) * SIZE;
                for (int64_t d = 0; d < SIZE; d += LANES) {
                    store(of_key + to + d, load(of_key + to + d) + load(of_keys + t * SIZE + d));
                    store(of_value + to + d, load(of_value + to + d) + load(of_values + t * SIZE + d));
                }
            }
        }
    }
}

constexpr int64_t TILE = 8;
typedef float Eight __attribute__((vector_size(4 * TILE)));
typedef Eight Unaligned __attribute__((aligned(4), may_alias)); // arrays that memcpy fills leave the registers
typedef int Picks __attribute__((vector_size(4 * TILE)));

// out[j, i] = x[i, j] of a tile: pairs of rows exchange single columns, then pairs of columns, then halves.
inline void transpose_tile(const float* x, int64_t row, float* out, int64_t out_row) {
    Eight a[TILE], b[TILE];
    for (int i = 0; i < TILE; i++) a[i] = *(const Unaligned*)(x + i * row);
    for (int i = 0; i < TILE; i += 2) {
        b[i] = __builtin_shuffle(a[i], a[i + 1], (Picks){0, 8, 2, 10, 4, 12, 6, 14});
        b[i + 1] = __builtin_shuffle(a[i], a[i + 1], (Picks){1, 9, 3, 11, 5, 13, 7, 15});
    }
    for (int i = 0; i < TILE; i += 4)
        for (int j = i; j < i + 2; j++) {
            a[j] = __builtin_shuffle(b[j], b[j + 2], (Picks){0, 1, 8, 9, 4, 5, 12, 13});
            a[j + 2] = __builtin_shuffle(b[j], b[j + 2], (Picks){2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int j = 0; j < TILE / 2; j++) {
        b[j] = __builtin_shuffle(a[j], a[j + 4], (Picks){0, 1, 2, 3, 8, 9, 10, 11});
        b[j + 4] = __builtin_shuffle(a[j], a[j + 4], (Picks){4, 5, 6, 7, 12, 13, 14, 15});
    }
    // Past the caches, which would read every line before they write it.
    for (int j = 0; j < TILE; j++) _mm256_stream_ps(out + j * out_row, (__m256)b[j]);
}

} // namespace

extern "C" {

const char* native_source() { return NATIVE_SOURCE; } // hash of the sources, set by setup.py

// spans [num_spans, 5], see Span. Heads that share the key-value heads first_head to last_head. query, key, value:
// rows and heads `*_row` and `*_head` apart; out [tokens, heads, size], lse [tokens, heads]. size is 32, 64, 96, 128.
void layers_attend(int64_t num_spans, const int64_t* spans, int64_t heads, int64_t kv_heads, int64_t size,
                   int64_t first_head, int64_t last_head, const float* query, int64_t query_row, int64_t query_head,
                   const float* key, int64_t key_row, int64_t key_head, const float* value, int64_t value_row,
                   int64_t value_head, float scale, float* out, float* lse) {
    auto run = size == 32 ? attend<32> : size == 64 ? attend<64> : size == 96 ? attend<96> : attend<128>;
    run((const Span*)spans, num_spans, heads / kv_heads, first_head, last_head, {query, query_row, query_head},
        {key, key_row, key_head}, {value, value_row, value_head}, scale, heads, out, lse);
}

// The same, and what `layers_attend` found; gradient [tokens, heads, size]. Fills of_query [tokens, heads, size], adds
// to of_key and of_value [tokens, key-value heads, size].
void layers_attend_backward(int64_t num_spans, const int64_t* spans, int64_t heads, int64_t kv_heads, int64_t size,
                            int64_t first_head, int64_t last_head, const float* query, int64_t query_row,
                            int64_t query_head, const float* key, int64_t key_row, int64_t key_head,
                            const float* value, int64_t value_row, int64_t value_head, float scale, const float* out,
                            const float* lse, const float* gradient, float* of_query, float* of_key,
                            float* of_value) {
    auto run = size == 32   ? attend_backward<32>
               : size == 64 ? attend_backward<64>
               : size == 96 ? attend_backward<96>
                            : attend_backward<128>;
    run((const Span*)spans, num_spans, heads / kv_heads, first_head, last_head, {query, query_row, query_head},
        {key, key_row, key_head}, {value, value_row, value_head}, scale, heads, out, lse,
        {gradient, heads * size, size}, of_query, of_key, of_value);
}

// out[:, k] = silu(x[:, k]) * x[:, width + k]; x [rows, 2 * width], width a multiple of 16.
void layers_gate(int64_t rows, int64_t width, const float* x, float* out) {
    for (int64_t r = 0; r < rows; r++) gate_row(width, x + r * 2 * width, out + r * width);
}

// d silu(z) / dz = s (1 + z (1 - s)) with s = sigmoid(z). gradient [rows, width], of_x [rows, 2 * width].
void layers_gate_backward(int64_t rows, int64_t width, const float* x, const float* gradient, float* of_x) {
    for (int64_t r = 0; r < rows; r++, x += 2 * width, of_x += 2 * width, gradient += width)
        for (int64_t k = 0; k < width; k += LANES) {
            const Floats z = load(x + k), s = sigmoid(z), from = load(gradient + k);
            store(of_x + k, from * load(x + width + k) * s * (1.0f + z * (1.0f - s)));
            store(of_x + width + k, from * z * s);
        }
}

// out = x / sqrt(mean(x^2) + eps) * weight, scales[r] what its row of x is multiplied by. x [rows, width], width a
// multiple of 16.
void layers_norm(int64_t rows, int64_t width, const float* x, const float* weight, float eps, float* out,
                 float* scales) {
    for (int64_t r = 0; r < rows; r++, x += width, out += width) {
        Floats squares = all(0);
        for (int64_t k = 0; k < width; k += LANES) squares += load(x + k) * load(x + k);
        const float scale = scales[r] = 1.0f / std::sqrt(quick_sum(squares) / (float)width + eps);
        for (int64_t k = 0; k < width; k += LANES) store(out + k, load(x + k) * scale * load(weight + k));
    }
}

// With n = x * scale and g = gradient * weight: of_x = scale * (g - n * mean(g * n)). Adds to of_weight, if it is there.
void layers_norm_backward(int64_t rows, int64_t width, const float* x, const float* weight, const float* scales,
                          const float* gradient, float* of_x, float* of_weight) {
    for (int64_t r = 0; r < rows; r++, x += width, gradient += width, of_x += width) {
        const float scale = scales[r];
        Floats products = all(0);
        for (int64_t k = 0; k < width; k += LANES) products += load(gradient + k) * load(weight + k) * load(x + k);
        const float mean = quick_sum(products) * scale * scale / (float)width;
        for (int64_t k = 0; k < width; k += LANES) {
            const Floats from = load(gradient + k), own = load(x + k);
            store(of_x + k, scale * (from * load(weight + k) - own * mean));
            if (of_weight) store(of_weight + k, load(of_weight + k) + from * own * scale);
        }
    }
}

// Turns the halves of each head by its token's angles, their cosines and sines in angles [tokens, size], or back.
// x: rows and heads `row` and `head` apart; out [tokens, heads, size].
void layers_rotate(int64_t tokens, int64_t heads, int64_t size, const float* angles, const float* x, int64_t row,
                   int64_t head, int64_t is_back, float* out) {
    for (int64_t t = 0; t < tokens; t++, angles += size)
        for (int64_t h = 0; h < heads; h++, out += size)
            rotate_head(size / 2, angles, x + t * row + h * head, out, is_back ? -1.0f : 1.0f);
}

// out[k, r] = x[r, k]; x: rows `row` apart, out: rows `out_row` apart. rows is a multiple of 16, which fill a line of
// out, width and out_row of 8, and out is aligned to 32 bytes.
void layers_transpose(int64_t rows, int64_t width, const float* x, int64_t row, float* out, int64_t out_row) {
    for (int64_t k = 0; k < width; k += TILE)
        for (int64_t r = 0; r < rows; r += 2 * TILE)
            for (int64_t next = r; next < r + 2 * TILE; next += TILE)
                transpose_tile(x + next * row + k, row, out + k * out_row + next, out_row);
    _mm_sfence();
}

} // extern "C"
