// Vectors of floats for the CPU kernels, as many as a register holds, in GCC's and Clang's own notation.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8; // wider vectors than the machine has are cut up badly
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

constexpr float INF = __builtin_inff();

struct bfloat16 {
    uint16_t bits;
};

inline Floats all(float x) { return Floats{} + x; }

inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Floats load(const bfloat16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline void store(bfloat16* p, Floats x) { // round to nearest even; NaN stays NaN
    Words bits = (Words)x;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves h = __builtin_convertvector((Words)(x == x ? (Ints)rounded : (Ints)(rounded | 0x7fc0)), Halves);
    std::memcpy(p, &h, sizeof h);
}

// The last, incomplete vector of a tile: columns behind its end read as -inf and are not written.
template <class T> inline Floats load_some(const T* p, int64_t count) {
    T some[LANES] = {};
    std::memcpy(some, p, count * sizeof(T));
    Floats x = load(some);
    for (int64_t k = count; k < LANES; k++) x[k] = -INF;
    return x;
}

template <class T> inline void store_some(T* p, Floats x, int64_t count) {
    T some[LANES];
    store(some, x);
    std::memcpy(p, some, count * sizeof(T));
}

inline Floats larger(Floats a, Floats b) { return a < b ? b : a; } // NaN in a stays

// e^x for x <= 0: 0 below -87.3 (denormals would be slow), NaN for NaN. Cephes' polynomial, error about one ulp.
inline Floats exp_negative(Floats x) {
    Floats shifted = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
    Floats n = shifted - 12582912.0f;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + (r + 1.0f);
    Floats power = (Floats)(((Ints)shifted << 23) + (127 << 23));
    return x < -87.3f ? all(0.0f) : p * power;
}

inline Floats sigmoid(Floats z) {
    const Floats e = exp_negative((Floats)((Ints)z | INT32_MIN)); // of -|z|
    return (z < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

inline float sum(Floats x) {
    float total = 0.0f;
    for (int k = 0; k < LANES; k++) total += x[k];
    return total;
}

inline float largest(Floats x) {
    float found = x[0];
    for (int k = 1; k < LANES; k++) found = found < x[k] || x[k] != x[k] ? x[k] : found;
    return found;
}

inline float finite(float m) { return m == -INF ? 0.0f : m; } // a maximum that may be subtracted

// Calls body(column, load, store) for every vector of a tile; the loaders know where the tile ends.
template <class Body> inline void each_vector(int64_t begin, int64_t end, Body body) {
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) {
        body(
            k, [](auto* p) { return load(p); }, [](auto* p, Floats x) { store(p, x); });
    }
    if (int64_t rest = end - k) {
        body(
            k, [rest](auto* p) { return load_some(p, rest); }, [rest](auto* p, Floats x) { store_some(p, x, rest); });
    }
}

} // namespace
