// What SGLang's float32 layers do between matrix products on a CPU, without a tensor for every step; built and called
// as megatron_ext/vocab_parallel/rows.cpp is. Every row and request is computed alone, with the same bits in any batch,
// but for products that OpenBLAS computes, which chooses by their number of rows: a head's, and a layer's without panels.

#include "../../megatron_ext/products.h"

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <thread>

namespace {

struct Cache {
    const float *keys, *values; // [places, kv heads, size]
    int64_t kv_heads, size;
    const int32_t* slots; // [requests the pool holds, longest], places of their tokens
    int64_t slots_stride;
};

inline void fetch(const float* x, int64_t count) {
    for (int64_t k = 0; k < count; k += 16) __builtin_prefetch(x + k, 0, 2); // 16 floats are a line of a core's cache
}

// One new token of a request, its last. query, out [heads, size]; scores [heads, padded length]. Reading the cache is
// most of the work: some tokens at a time with all their heads, and the next ones are fetched meanwhile.
template <int SIZE>
void attend_one(const Cache& cache, const int32_t* slots, int64_t length, int64_t heads, const float* query,
                float scale, float* scores, float* out) {
    constexpr int VECTORS = SIZE / LANES;
    const int64_t padded = (length + LANES - 1) / LANES * LANES, place = cache.kv_heads * SIZE;
    const int64_t group = heads / cache.kv_heads;
    for (int64_t first = 0; first < length; first += LANES) {
        for (int64_t t = first + LANES; t < std::min(first + 2 * LANES, length); t++)
            fetch(cache.keys + slots[t] * place, place);
        const int64_t count = std::min<int64_t>(LANES, length - first);
        for (int64_t h = 0; h < heads; h++) {
            Floats dots[LANES] = {}, q[VECTORS];
            for (int v = 0; v < VECTORS; v++) q[v] = load(query + h * SIZE + v * LANES);
            for (int64_t t = 0; t < count; t++) {
                const float* k = cache.keys + slots[first + t] * place + h / group * SIZE;
                for (int v = 0; v < VECTORS; v++) dots[t] += q[v] * load(k + v * LANES);
            }
            sums(dots);
            store(scores + h * padded + first, dots[0] * scale);
        }
    }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * padded, length, padded);
    std::fill(out, out + heads * SIZE, 0.0f);
    for (int64_t first = 0; first < length; first += LANES) {
        for (int64_t t = first + LANES; t < std::min(first + 2 * LANES, length); t++)
            fetch(cache.values + slots[t] * place, place);
        const int64_t count = std::min<int64_t>(LANES, length - first);
        for (int64_t h = 0; h < heads; h++) {
            Floats found[VECTORS];
            for (int v = 0; v < VECTORS; v++) found[v] = load(out + h * SIZE + v * LANES);
            for (int64_t t = 0; t < count; t++) {
                const float* x = cache.values + slots[first + t] * place + h / group * SIZE;
                for (int v = 0; v < VECTORS; v++) found[v] += scores[h * padded + first + t] * load(x + v * LANES);
            }
            for (int v = 0; v < VECTORS; v++) store(out + h * SIZE + v * LANES, found[v]);
        }
    }
}

constexpr int64_t BLOCK = 32; // queries of a head group, times its heads, taken together

struct Scratch {
    std::vector<float> keys, values, query, scores, found;
};

// The last `count` of a request's `length` tokens, for the heads of key-value head g. query, out: of its first new
// token, rows `heads * size` apart.
template <int SIZE>
void extend_group(const Cache& cache, const int32_t* slots, int64_t length, int64_t count, int64_t g, int64_t group,
                  int64_t heads, const float* query, float scale, Scratch& scratch, float* out) {
    const int64_t place = cache.kv_heads * SIZE, head = g * SIZE, stride = heads * SIZE;
    const int64_t padded = up(length, COLUMNS);
    float* keys = at_least(scratch.keys, padded * SIZE);
    float* values = at_least(scratch.values, padded * SIZE);
    const float nothing[SIZE] = {};
    for (int64_t t = 0; t < padded; t++) {
        put<SIZE>(t < length ? cache.keys + slots[t] * place + head : nothing, t, keys);
        std::memcpy(values + t * SIZE, t < length ? cache.values + slots[t] * place + head : nothing, sizeof nothing);
    }
    const int64_t rows_a_block = std::max<int64_t>(1, BLOCK / group);
    for (int64_t first = 0; first < count; first += rows_a_block) {
        const int64_t rows = std::min(rows_a_block, count - first), used = rows * group, all_rows = up(used, ROWS);
        const int64_t seen = length - count + first + rows, width = up(seen, COLUMNS); // by the last of them
        float* q = at_least(scratch.query, all_rows * SIZE);
        float* scores = at_least(scratch.scores, all_rows * width);
        float* found = at_least(scratch.found, all_rows * SIZE);
        std::fill(q, q + all_rows * SIZE, 0.0f);
        std::fill(found, found + all_rows * SIZE, 0.0f);
        for (int64_t i = 0; i < used; i++) {
            const float* from = query + (first + i / group) * stride + i % group * SIZE;
            for (int64_t d = 0; d < SIZE; d += LANES) store(q + i * SIZE + d, load(from + d) * scale);
        }
        multiply_tiles<SIZE>(all_rows, q, width / COLUMNS, keys, scores);
        for (int64_t i = 0; i < used; i++)
            softmax(scores + i * width, length - count + first + i / group + 1, width);
        add_products<SIZE>(all_rows, {scores, width, 1}, seen, values, found);
        for (int64_t i = 0; i < used; i++)
            std::memcpy(out + (first + i / group) * stride + i % group * SIZE, found + i * SIZE, SIZE * sizeof(float));
    }
}

template <int SIZE>
void attention(const Cache& cache, int64_t requests, int64_t heads, const float* query, const int64_t* numbers,
               const int64_t* lengths, const int64_t* counts, float scale, float* out) {
    const int64_t group = heads / cache.kv_heads;
    Scratch scratch;
    for (int64_t r = 0; r < requests; r++) {
        const int32_t* slots = cache.slots + numbers[r] * cache.slots_stride;
        const int64_t count = counts ? counts[r] : 1;
        if (count == 1)
            attend_one<SIZE>(cache, slots, lengths[r], heads, query, scale,
                             at_least(scratch.scores, heads * (lengths[r] + LANES)), out);
        else
            for (int64_t g = 0; g < cache.kv_heads; g++)
                extend_group<SIZE>(cache, slots, lengths[r], count, g, group, heads, query + g * group * SIZE, scale,
                                   scratch, out + g * group * SIZE);
        query += count * heads * SIZE;
        out += count * heads * SIZE;
    }
}

void norm_rows(int64_t rows, int64_t width, const float* x, const float* residual, const float* weight, float eps,
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

// From rows of queries, keys and values [tokens, (heads + 2 * kv_heads) * size]: queries rotated to `query`, keys
// rotated and values to their place in the cache.
void rotate_and_keep(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, const int64_t* positions,
                     const float* angles, const float* x, const int64_t* places, float* keys, float* values,
                     float* query) {
    const int64_t kept = kv_heads * size;
    for (int64_t t = 0; t < tokens; t++) {
        const float* angle = angles + positions[t] * size;
        for (int64_t h = 0; h < heads; h++, x += size, query += size) rotate_head(size / 2, angle, x, query);
        for (int64_t h = 0; h < kv_heads; h++, x += size)
            rotate_head(size / 2, angle, x, keys + places[t] * kept + h * size);
        std::memcpy(values + places[t] * kept, x, kept * sizeof(float));
        x += kept;
    }
}

// cblas_sgemm of OpenBLAS.
typedef void (*Sgemm)(int order, int a_order, int b_order, int rows, int columns, int inner, float alpha,
                      const float* a, int a_stride, const float* b, int b_stride, float beta, float* c, int c_stride);

struct Linear {
    const float *weight, *bias, *panels; // [in, out]; [out] or null; as ops_panels has the weight, or null
};

// Rows and columns of a product whose sums fit a core's registers.
constexpr int64_t TALL = LANES == 16 ? 12 : 6, WIDE = 2 * LANES;

// y[COUNT, WIDE] = bias + x[COUNT, in] panel[in, WIDE], or only its first vector.
template <int COUNT>
void multiply_rows(int64_t in, const float* x, const float* panel, const float* bias, bool is_whole, float* y,
                   int64_t y_stride) {
    Floats sums[COUNT][2];
    for (auto& sum : sums) sum[0] = load(bias), sum[1] = load(bias + LANES);
    for (int64_t k = 0; k < in; k++) {
        const Floats left = load(panel + k * WIDE), right = load(panel + k * WIDE + LANES);
        for (int i = 0; i < COUNT; i++) {
            sums[i][0] += x[i * in + k] * left;
            sums[i][1] += x[i * in + k] * right;
        }
    }
    for (int i = 0; i < COUNT; i++) {
        store(y + i * y_stride, sums[i][0]);
        if (is_whole) store(y + i * y_stride + LANES, sums[i][1]);
    }
}

template <int COUNT = TALL, class... More> void multiply_some(int64_t count, More... more) {
    if constexpr (COUNT > 0) {
        if (count == COUNT)
            multiply_rows<COUNT>(more...);
        else
            multiply_some<COUNT - 1>(count, more...);
    }
}

// y[rows, out] = x[rows, in] weight + bias, by `sgemm` where there are no panels. From panels a row has the same bits in
// any batch.
void apply(Sgemm sgemm, Linear linear, int64_t rows, int64_t in, int64_t out, const float* x, float* y) {
    if (!linear.panels) {
        if (linear.bias)
            for (int64_t r = 0; r < rows; r++) std::memcpy(y + r * out, linear.bias, out * sizeof(float));
        // Row-major (101), neither transposed (111).
        sgemm(101, 111, 111, rows, out, in, 1.0f, x, in, linear.weight, out, linear.bias ? 1.0f : 0.0f, y, out);
        return;
    }
    const int64_t blocks = (rows + TALL - 1) / TALL; // of about as many rows
    for (int64_t column = 0; column < out; column += WIDE) {
        const float* panel = linear.panels + column * in;
        float bias[WIDE] = {};
        const bool is_whole = column + LANES < out;
        if (linear.bias) std::memcpy(bias, linear.bias + column, (is_whole ? WIDE : LANES) * sizeof(float));
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * rows / blocks, count = (b + 1) * rows / blocks - first;
            multiply_some(count, in, x + first * in, panel, bias, is_whole, y + first * out + column, out);
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

// The id with the largest scale * logprob + Gumbel noise, of a hash of (row, id). The noise of most ids needs no
// logarithm: u wins if -log(u) < exp(scale * logprob - best), and -log(u) >= 1 - u.
template <class T> int64_t draw(const T* logprobs, double scale, int64_t vocab, uint64_t row) {
    double best = -__builtin_inf();
    int64_t found = 0;
    for (int64_t first = 0; first < vocab; first += LANES) {
        const int64_t count = std::min<int64_t>(LANES, vocab - first);
        float lead[LANES];
        double u[LANES];
        for (int64_t k = 0; k < LANES; k++) {
            lead[k] = k < count && best > -__builtin_inf() ? std::min(scale * logprobs[first + k] - best, 0.0) : 0.0;
            u[k] = ((double)(mix(row + (first + k + 1) * GOLDEN) >> 11) + 0.5) * 0x1p-53;
        }
        float bound[LANES];
        store(bound, exp_negative(load(lead)) * 1.0001f);
        for (int64_t k = 0; k < count; k++) {
            if (1.0 - u[k] >= bound[k]) continue;
            const double score = scale * logprobs[first + k] - std::log(-std::log(u[k]));
            if (score > best) best = score, found = first + k;
        }
    }
    return found;
}

constexpr int64_t SUMMED = 4096; // exponentials in a row of sums of floats

// log softmax(x)[id]
float logprob(const float* x, int64_t count, int64_t id) {
    Floats top = all(-INF);
    const int64_t whole = count / LANES * LANES;
    const Floats rest = load_some(x + whole, count - whole);
    for (int64_t k = 0; k < whole; k += LANES) top = larger(top, load(x + k));
    const float m = largest(larger(top, rest));
    double mass = quick_sum(exp_negative(rest - m));
    for (int64_t first = 0; first < whole; first += SUMMED) {
        Floats sums = all(0);
        for (int64_t k = first; k < std::min(first + SUMMED, whole); k += LANES) sums += exp_negative(load(x + k) - m);
        mass += quick_sum(sums);
    }
    return (float)((double)x[id] - m - std::log(mass)); // m + log(mass) would lose digits of the logarithm
}

} // namespace

extern "C" {

const char* native_source() { return NATIVE_SOURCE; } // hash of the sources, set by setup.py

// Each request's last counts[r] tokens (1 without counts) see it up to themselves. query, out [tokens, heads, size];
// numbers are the requests' rows of `slots`. size is 32, 64, 96 or 128.
void ops_attention(int64_t requests, int64_t heads, int64_t kv_heads, int64_t size, const float* query,
                   const float* keys, const float* values, const int32_t* slots, int64_t slots_stride,
                   const int64_t* numbers, const int64_t* lengths, const int64_t* counts, float scale, float* out) {
    const Cache cache{keys, values, kv_heads, size, slots, slots_stride};
    auto run = size == 32   ? attention<32>
               : size == 64 ? attention<64>
               : size == 96 ? attention<96>
                            : attention<128>;
    run(cache, requests, heads, query, numbers, lengths, counts, scale, out);
}

// logprobs [rows, vocab] -> ids [rows]; cpu_kernels.py says what is drawn.
void ops_seeded_multinomial(int64_t rows, int64_t vocab, const double* logprobs, const int64_t* seeds,
                            const int64_t* positions, int64_t* out) {
    for (int64_t r = 0; r < rows; r++)
        out[r] = draw(logprobs + r * vocab, 1.0, vocab, mix(seeds[r] ^ mix(positions[r] + GOLDEN)));
}

// logits [rows, vocab], temperatures [rows] -> ids [rows], drawn as by ops_seeded_multinomial at their temperatures,
// and their logprobs at temperature 1.
void ops_sample(int64_t rows, int64_t vocab, const float* logits, const float* temperatures, const int64_t* seeds,
                const int64_t* positions, int32_t* ids, float* logprobs) {
    for (int64_t r = 0; r < rows; r++, logits += vocab) {
        const double scale = 1.0 / temperatures[r];
        ids[r] = (int32_t)draw(logits, scale, vocab, mix(seeds[r] ^ mix(positions[r] + GOLDEN)));
        logprobs[r] = logprob(logits, vocab, ids[r]);
    }
}

// logits [rows, vocab] -> the likeliest ids [rows], the first of equals, and their logprobs.
void ops_likeliest(int64_t rows, int64_t vocab, const float* logits, int32_t* ids, float* logprobs) {
    for (int64_t r = 0; r < rows; r++, logits += vocab) {
        ids[r] = (int32_t)(std::max_element(logits, logits + vocab) - logits);
        logprobs[r] = logprob(logits, vocab, ids[r]);
    }
}

// What follows takes widths that are multiples of sixteen: of a vector, whatever the machine.

// out = norm(x + residual) * weight, sum = x + residual; without a residual sum is not written. All [rows, width].
void ops_rms_norm(int64_t rows, int64_t width, const float* x, const float* residual, const float* weight, float eps,
                  float* sum, float* out) {
    norm_rows(rows, width, x, residual, weight, eps, sum, out);
}

// out[:, k] = silu(x[:, k]) * x[:, width + k]; x [rows, 2 * width].
void ops_silu_and_mul(int64_t rows, int64_t width, const float* x, float* out) {
    for (int64_t r = 0; r < rows; r++) gate_row(width, x + r * 2 * width, out + r * width);
}

// x rows are `stride` apart; out [tokens, heads, size].
void ops_rotate(int64_t tokens, int64_t heads, int64_t size, const int64_t* positions, const float* angles,
                const float* x, int64_t stride, float* out) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++, out += size)
            rotate_head(size / 2, angles + positions[t] * size, x + t * stride + h * size, out);
}

// weight [in, out] -> panels [out / WIDE, in, WIDE], of columns that a product takes together; 0 behind the last.
void ops_panels(int64_t in, int64_t out, const float* weight, float* panels) {
    for (int64_t column = 0; column < out; column += WIDE)
        for (int64_t k = 0; k < in; k++, panels += WIDE) {
            const float* from = weight + k * out + column;
            store(panels, load(from));
            store(panels + LANES, column + LANES < out ? load(from + LANES) : Floats{});
        }
}

// y [rows, out] = x [rows, in] panels + bias [out] or null.
void ops_product(int64_t rows, int64_t in, int64_t out, const float* x, const float* panels, const float* bias,
                 float* y) {
    apply(nullptr, {nullptr, bias, panels}, rows, in, out, x, y);
}

// What a decoder layer is: sizes, weights as Linear has them, and its cache [places, kv heads, size].
struct Layer {
    Sgemm sgemm;
    int64_t hidden, heads, kv_heads, size, width; // width of the feed-forward layer
    float eps, scale;
    const float *angles, *before_attention, *before_mlp; // weights of the norms
    Linear qkv, out, gate_up, down;
    float *keys, *values;
};

// What its new tokens are, packed, and where those of their requests lie; as ops_attention and rotate_and_keep have it.
struct Tokens {
    int64_t count, requests, slots_stride;
    const int64_t *positions, *places, *numbers, *lengths, *counts;
    const int32_t* slots;
};

} // extern "C"

namespace {

// x, and residual or null [tokens, hidden] -> sum of both, and query [tokens, heads, size]; keys and values are kept.
// scratch [tokens, hidden + (heads + 2 * kv_heads) * size].
void project_qkv(const Layer& is, const Tokens& tokens, const float* x, const float* residual, float* scratch, float* sum,
         float* query) {
    const int64_t rows = tokens.count, packed = (is.heads + 2 * is.kv_heads) * is.size;
    float *normed = scratch, *wide = scratch + rows * is.hidden;
    norm_rows(rows, is.hidden, x, residual, is.before_attention, is.eps, sum, normed);
    if (!residual) std::memcpy(sum, x, rows * is.hidden * sizeof(float));
    apply(is.sgemm, is.qkv, rows, is.hidden, packed, normed, wide);
    rotate_and_keep(rows, is.heads, is.kv_heads, is.size, tokens.positions, is.angles, wide, tokens.places, is.keys,
                    is.values, query);
}

// The rest of the layer: sum, to which attention is added, and out [tokens, hidden]. scratch
// [tokens, heads * size + hidden + 2 * width].
void attend_and_feed(const Layer& is, const Tokens& tokens, const float* query, float* scratch, float* sum, float* out) {
    const int64_t rows = tokens.count, inner = is.heads * is.size;
    float *attended = scratch, *normed = attended + rows * inner, *wide = normed + rows * is.hidden;
    ops_attention(tokens.requests, is.heads, is.kv_heads, is.size, query, is.keys, is.values, tokens.slots,
                  tokens.slots_stride, tokens.numbers, tokens.lengths, tokens.counts, is.scale, attended);
    apply(is.sgemm, is.out, rows, inner, is.hidden, attended, out);
    norm_rows(rows, is.hidden, out, sum, is.before_mlp, is.eps, sum, normed);
    apply(is.sgemm, is.gate_up, rows, is.hidden, 2 * is.width, normed, wide);
    for (int64_t r = 0; r < rows; r++) gate_row(is.width, wide + r * 2 * is.width, wide + r * is.width);
    apply(is.sgemm, is.down, rows, is.width, is.hidden, wide, out);
}

} // namespace

extern "C" {

// x, and residual or null [tokens, hidden] -> out, and sum: what the next layer takes as its residual. out may be x
// and sum may be residual. scratch [tokens, hidden + 2 * heads * size + the larger of (heads + 2 * kv_heads) * size
// and 2 * width].
void ops_layer(const Layer* layer, const Tokens* tokens, const float* x, const float* residual, float* scratch,
               float* sum, float* out) {
    float* query = scratch;
    scratch += tokens->count * layer->heads * layer->size;
    project_qkv(*layer, *tokens, x, residual, scratch, sum, query);
    attend_and_feed(*layer, *tokens, query, scratch, sum, out);
}

// Layers of the same sizes between embedding and head [vocab, hidden]; norm is the last one's weight. scratch: floats
// that a layer needs for a token.
struct Model {
    const Layer* layers;
    Sgemm sgemm; // of the head
    int64_t count, vocab, scratch;
    const float *embedding, *norm, *head;
};

// The new tokens of some requests, whose positions are their last, and what is drawn after them.
struct Batch {
    Tokens tokens;             // without positions
    const int64_t* ids;        // of the tokens, or null: each request's newest one
    int64_t* newest;           // [requests the pool holds], the token of each that was drawn last
    const float* temperatures; // [requests], or null: the likeliest tokens are taken
    const int64_t* seeds;      // [requests]
    int32_t* drawn;            // [requests]
    float* logprobs;           // [requests], at temperature 1
};

} // extern "C"

namespace {

// What the scheduler changes while a batch waits: the places of its requests' tokens [requests, longest].
std::vector<int32_t> copy_slots(const Tokens& tokens, int64_t longest) {
    std::vector<int32_t> slots(tokens.requests * longest);
    for (int64_t r = 0; r < tokens.requests; r++)
        std::memcpy(&slots[r * longest], tokens.slots + tokens.numbers[r] * tokens.slots_stride,
                    tokens.lengths[r] * sizeof(int32_t));
    return slots;
}

void forward(const Model& model, const Batch& batch, const std::vector<int32_t>& slots) {
    const Layer& layer = model.layers[0];
    Tokens tokens = batch.tokens;
    const int64_t rows = tokens.count, requests = tokens.requests, hidden = layer.hidden;
    std::vector<int64_t> positions(rows), last(requests), numbers(requests);
    for (int64_t r = 0, row = 0; r < requests; r++) {
        const int64_t count = tokens.counts ? tokens.counts[r] : 1;
        for (int64_t k = 0; k < count; k++) positions[row++] = tokens.lengths[r] - count + k;
        last[r] = row - 1;
        numbers[r] = r;
    }
    tokens.positions = positions.data();
    tokens.numbers = numbers.data();
    tokens.slots = slots.data();
    tokens.slots_stride = (int64_t)slots.size() / requests;

    auto floats = [](int64_t count) { return std::unique_ptr<float[]>(new float[count]); };
    const auto x = floats(rows * hidden), sum = floats(rows * hidden);
    const auto scratch = floats(rows * model.scratch);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t id = batch.ids ? batch.ids[row] : batch.newest[batch.tokens.numbers[row]];
        std::memcpy(&x[row * hidden], model.embedding + id * hidden, hidden * sizeof(float));
    }
    const int64_t inner = layer.heads * layer.size;
    for (int64_t l = 0; l < model.count; l++) {
        float *query = scratch.get(), *rest = query + rows * inner;
        project_qkv(model.layers[l], tokens, x.get(), l ? sum.get() : nullptr, rest, sum.get(), query);
        if (l == model.count - 1 && rows > requests) { // of the last layer only the last tokens are asked for
            for (int64_t r = 0; r < requests; r++) {
                std::memmove(query + r * inner, query + last[r] * inner, inner * sizeof(float));
                std::memmove(&sum[r * hidden], &sum[last[r] * hidden], hidden * sizeof(float));
            }
            tokens.count = requests;
            tokens.counts = nullptr;
        }
        attend_and_feed(model.layers[l], tokens, query, rest, sum.get(), x.get());
    }

    const auto logits = floats(requests * model.vocab), normed = floats(requests * hidden);
    norm_rows(requests, hidden, x.get(), sum.get(), model.norm, layer.eps, sum.get(), normed.get());
    // Row-major (101), the second transposed (112).
    model.sgemm(101, 111, 112, requests, model.vocab, hidden, 1.0f, normed.get(), hidden, model.head, hidden, 0.0f,
                logits.get(), model.vocab);
    for (int64_t r = 0; r < requests; r++) last[r] = positions[last[r]];
    if (batch.temperatures)
        ops_sample(requests, model.vocab, logits.get(), batch.temperatures, batch.seeds, last.data(), batch.drawn,
                   batch.logprobs);
    else
        ops_likeliest(requests, model.vocab, logits.get(), batch.drawn, batch.logprobs);
    for (int64_t r = 0; r < requests; r++) batch.newest[batch.tokens.numbers[r]] = batch.drawn[r];
}

// Batches that go through their models one after the other, in a thread that ends with the process.
class Stream {
  public:
    void add(const Model& model, const Batch& batch) {
        const int64_t* lengths = batch.tokens.lengths;
        auto slots = copy_slots(batch.tokens, *std::max_element(lengths, lengths + batch.tokens.requests));
        {
            std::lock_guard lock(mutex);
            if (!added++) {
                std::thread thread([this] { work(); });
                pthread_setname_np(thread.native_handle(), "searche1-stream"); // for `top -H` and the benches
                thread.detach();
            }
            waiting.push_back({model, batch, std::move(slots)});
        }
        changed.notify_all();
    }

    void wait(int64_t number) {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return done >= number; });
    }

  private:
    struct Job {
        Model model;
        Batch batch;
        std::vector<int32_t> slots;
    };

    [[noreturn]] void work() {
        for (std::unique_lock lock(mutex);;) {
            changed.wait(lock, [&] { return !waiting.empty(); });
            const Job job = std::move(waiting.front());
            waiting.pop_front();
            lock.unlock();
            forward(job.model, job.batch, job.slots);
            lock.lock();
            done++;
            changed.notify_all();
        }
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Job> waiting;
    int64_t added = 0, done = 0;
};

Stream& stream() {
    static Stream* const only = new Stream; // its thread may outlive what is destroyed at the end
    return *only;
}

} // namespace

extern "C" {

// Has a thread compute the batch after those before it. What it points at must stay until then, but for slots.
void ops_start(const Model* model, const Batch* batch) { stream().add(*model, *batch); }

// Until so many batches of this process are done.
void ops_wait(int64_t number) { stream().wait(number); }

} // extern "C"
