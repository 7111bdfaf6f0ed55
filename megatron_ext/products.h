// Products of small matrices and the softmax between them, for attention on a CPU, and what else trainer and engine
// compute alike. `__builtin_shuffle` is GCC's.

#pragma once

#include "vectors.h"

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

// The sums of as many vectors as a vector has lanes, that of x[k] in lane k. Each level adds halves of two vectors.
template <int DISTANCE = 1> inline void sums(Floats* x) {
    if constexpr (DISTANCE < LANES) {
        Ints near, far;
        for (int k = 0; k < LANES; k++) {
            near[k] = k & DISTANCE ? k - DISTANCE + LANES : k;
            far[k] = k & DISTANCE ? k + LANES : k + DISTANCE;
        }
        for (int k = 0; k < LANES / DISTANCE; k += 2)
            x[k / 2] = __builtin_shuffle(x[k], x[k + 1], near) + __builtin_shuffle(x[k], x[k + 1], far);
        sums<2 * DISTANCE>(x);
    }
}

inline float* at_least(std::vector<float>& x, int64_t count) {
    if ((int64_t)x.size() < count) x.resize(count);
    return x.data();
}

// p[width] = softmax(p[:length]), 0 behind; width is a multiple of a vector. Returns log sum exp(p[:length]).
inline float softmax(float* p, int64_t length, int64_t width) {
    std::fill(p + length, p + width, -INF);
    Floats top = all(-INF);
    for (int64_t t = 0; t < width; t += LANES) top = larger(top, load(p + t));
    const float m = largest(top);
    Floats mass = all(0);
    for (int64_t t = 0; t < width; t += LANES) {
        Floats e = exp_negative(load(p + t) - m);
        store(p + t, e);
        mass += e;
    }
    const float total = quick_sum(mass), share = 1.0f / total;
    for (int64_t t = 0; t < width; t += LANES) store(p + t, load(p + t) * share);
    return m + std::log(total);
}

constexpr int64_t ROWS = 4, COLUMNS = 2 * LANES; // of a tile of products that fits a core's registers

struct Matrix {
    const float* x;
    int64_t row, column; // strides
};

// c[ROWS, COLUMNS] = a[ROWS, inner] b[inner, COLUMNS], added to what is there if `adds`.
inline void multiply(int64_t inner, Matrix a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                     bool adds) {
    Floats sums[ROWS][2] = {};
    for (int64_t k = 0; k < inner; k++) {
        const Floats left = load(b + k * b_stride), right = load(b + k * b_stride + LANES);
        for (int i = 0; i < ROWS; i++) {
            sums[i][0] += a.x[i * a.row + k * a.column] * left;
            sums[i][1] += a.x[i * a.row + k * a.column] * right;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        for (int v = 0; v < 2; v++) {
            float* to = c + i * c_stride + v * LANES;
            store(to, adds ? load(to) + sums[i][v] : sums[i][v]);
        }
    }
}

// x[t] -> tiles[t / COLUMNS, :, t % COLUMNS], so that a vector holds as many tokens.
template <int SIZE> inline void put(const float* x, int64_t t, float* tiles) {
    float* column = tiles + t / COLUMNS * SIZE * COLUMNS + t % COLUMNS;
    for (int64_t d = 0; d < SIZE; d++) column[d * COLUMNS] = x[d];
}

// out[rows, tiles * COLUMNS] = x[rows, SIZE] of all tokens of some tiles; rows is a multiple of ROWS.
template <int SIZE> inline void multiply_tiles(int64_t rows, const float* x, int64_t tiles, const float* tokens, float* out) {
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t i = 0; i < rows; i += ROWS)
            multiply(SIZE, {x + i * SIZE, SIZE, 1}, tokens + t * SIZE * COLUMNS, COLUMNS,
                     out + i * tiles * COLUMNS + t * COLUMNS, tiles * COLUMNS, false);
}

constexpr int64_t NEAR = 64; // rows of a head that stay in a core's nearest cache

// out[rows, SIZE] += p[rows, count] x[count, SIZE]
template <int SIZE> inline void add_products(int64_t rows, Matrix p, int64_t count, const float* x, float* out) {
    for (int64_t t = 0; t < count; t += NEAR)
        for (int64_t i = 0; i < rows; i += ROWS)
            for (int64_t d = 0; d < SIZE; d += COLUMNS)
                multiply(std::min(NEAR, count - t), {p.x + i * p.row + t * p.column, p.row, p.column}, x + t * SIZE + d,
                         SIZE, out + i * SIZE + d, SIZE, true);
}

inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rotates the halves of a head by the angles of a position, half cosines, half sines; back with direction -1.
inline void rotate_head(int64_t half, const float* angles, const float* from, float* out, float direction = 1.0f) {
    for (int64_t k = 0; k < half; k += LANES) {
        const Floats a = load(from + k), b = load(from + half + k), c = load(angles + k);
        const Floats s = load(angles + half + k) * direction;
        store(out + k, a * c - b * s);
        store(out + half + k, b * c + a * s);
    }
}

// out[k] = silu(x[k]) * x[width + k]
inline void gate_row(int64_t width, const float* x, float* out) {
    for (int64_t k = 0; k < width; k += LANES) {
        const Floats z = load(x + k);
        store(out + k, z * sigmoid(z) * load(x + width + k));
    }
}

} // namespace
