// The row kernels of protocol.py for CPUs, built at install for two levels of x86-64 (setup.py) and called through
// a plain C interface (native.py).
//
// A tile of a row is read from memory once: the sums find it in the cache where the maximum left it. Sums run in
// lanes that are added up in one order, so a row gives the same bits in any company.

#include "../vectors.h"

namespace {

template <class T> float tile_maximum(const T* z, int64_t begin, int64_t end, float scale) {
    Floats m = all(-INF);
    each_vector(begin, end, [&](int64_t k, auto get, auto) { m = larger(m, get(z + k)); });
    return largest(m) * scale; // scale > 0, and rounding keeps the order
}

// -- log-probabilities of tokens: stats m, l, u, z_y; rows m, log l, logprob, entropy -------------

template <class T> void token_stats(const T* z, int64_t begin, int64_t end, int64_t target, float scale, float* stats) {
    float m = tile_maximum(z, begin, end, scale), reference = finite(m);
    Floats l = all(0), u = all(0);
    each_vector(begin, end, [&](int64_t k, auto get, auto) {
        Floats x = get(z + k) * scale - reference, e = exp_negative(x);
        l += e;
        u += e * larger(x, all(-88.0f)); // 0 * -inf is 0 here
    });
    float z_y = -INF;
    if (target >= begin && target < end) z_y = load_some(z + target, 1)[0] * scale;
    stats[0] = m, stats[1] = sum(l), stats[2] = sum(u), stats[3] = z_y;
}

void merge_tokens(const float* stats, int64_t tiles, float* row) {
    float top = -INF, l = 0, u = 0, z_y = -INF;
    for (int64_t k = 0; k < tiles; k++) top = top < stats[4 * k] || stats[4 * k] != stats[4 * k] ? stats[4 * k] : top;
    for (int64_t k = 0; k < tiles; k++) {
        const float* tile = stats + 4 * k;
        float lead = tile[0] - top, share = std::exp(lead);
        l += share * tile[1];
        if (!(share <= 0)) u += share * (tile[2] + lead * tile[1]);
        if (tile[3] > z_y) z_y = tile[3];
    }
    float log_l = std::log(l);
    row[0] = top, row[1] = log_l, row[2] = (z_y - top) - log_l, row[3] = log_l - u / l;
}

template <class T>
void token_grad(const T* z, int64_t begin, int64_t end, int64_t target, float scale, const float* row, float g, float h,
                bool has_entropy, T* out) {
    const float m = row[0], log_l = row[1], entropy = row[3];
    float at_target = 0;
    if (target >= begin && target < end) { // read before `out` overwrites it
        float log_p = (load_some(z + target, 1)[0] * scale - m) - log_l;
        float p = exp_negative(all(log_p))[0];
        at_target = g - p * (has_entropy ? g + h * (log_p + entropy) : g);
    }
    each_vector(begin, end, [&](int64_t k, auto get, auto put) {
        Floats log_p = (get(z + k) * scale - m) - log_l, p = exp_negative(log_p);
        put(out + k, has_entropy ? -p * (g + h * (larger(log_p, all(-88.0f)) + entropy)) : p * -g);
    });
    if (target >= begin && target < end) store_some(out + target, all(at_target), 1);
}

// -- clipped KL: stats m_s, l_s, u_s, m_t, l_t, w, top; rows m_s, log l_s, m_t, log l_t, kl, bound, entropy

template <class T> void kl_stats(const T* s, const T* t, int64_t begin, int64_t end, float scale, float* stats) {
    float m_s = tile_maximum(s, begin, end, scale), m_t = tile_maximum(t, begin, end, scale);
    float ref_s = finite(m_s), ref_t = finite(m_t);
    Floats l_s = all(0), u_s = all(0), l_t = all(0), w = all(0), top = all(0);
    each_vector(begin, end, [&](int64_t k, auto get, auto) {
        Floats x = get(s + k) * scale - ref_s, y = get(t + k) * scale - ref_t;
        Floats q = exp_negative(x), p = exp_negative(y);
        l_s += q;
        u_s += q * larger(x, all(-88.0f));
        l_t += p;
        Floats f = p == 0.0f ? p : p * (y - x); // P = 0 contributes nothing, whatever its logarithm
        w += f;
        top = larger(top, f);
    });
    stats[0] = m_s, stats[1] = sum(l_s), stats[2] = sum(u_s);
    stats[3] = m_t, stats[4] = sum(l_t), stats[5] = sum(w), stats[6] = largest(top);
}

void merge_kl(const float* stats, int64_t tiles, float* row) {
    float top_s = -INF, top_t = -INF, sum_s = 0, sum_t = 0, moment_s = 0, moment_t = 0, most = 0;
    for (int64_t k = 0; k < tiles; k++) {
        float m_s = stats[7 * k], m_t = stats[7 * k + 3];
        top_s = top_s < m_s || m_s != m_s ? m_s : top_s;
        top_t = top_t < m_t || m_t != m_t ? m_t : top_t;
    }
    for (int64_t k = 0; k < tiles; k++) {
        const float* tile = stats + 7 * k;
        float lead_s = tile[0] - top_s, lead_t = tile[3] - top_t;
        float share_s = std::exp(lead_s), share_t = std::exp(lead_t);
        sum_s += share_s * tile[1];
        sum_t += share_t * tile[4];
        if (!(share_s <= 0)) moment_s += share_s * (tile[2] + lead_s * tile[1]);
        // d of the row is d of the tile plus this; where the student's tile is all -inf, d is +inf whatever is added.
        float moved = lead_t - (tile[0] == -INF ? 0.0f : lead_s);
        if (!(share_t <= 0)) {
            moment_t += share_t * (tile[5] + tile[4] * moved);
            float here = share_t * (tile[6] + (moved < 0 ? 0.0f : moved));
            most = most < here || here != here ? here : most;
        }
    }
    float log_s = std::log(sum_s), log_t = std::log(sum_t), c = log_s - log_t;
    row[0] = top_s, row[1] = log_s, row[2] = top_t, row[3] = log_t;
    row[4] = moment_t / sum_t + c;
    row[5] = (most + (c < 0 ? 0.0f : c)) / sum_t;
    row[6] = log_s - moment_s / sum_s;
}

struct Terms {
    Floats log_q, p, f;
};

inline Terms terms(Floats s, Floats t, float scale, const float* row) {
    Floats log_q = (s * scale - row[0]) - row[1], log_p = (t * scale - row[2]) - row[3], p = exp_negative(log_p);
    return {log_q, p, p == 0.0f ? p : p * (log_p - log_q)};
}

template <class T>
void kl_scan(const T* s, const T* t, int64_t begin, int64_t end, float scale, const float* row, float clip, float* sums) {
    Floats total = all(0), mass = all(0);
    each_vector(begin, end, [&](int64_t k, auto get, auto) {
        Terms x = terms(get(s + k), get(t + k), scale, row);
        total += x.f > clip ? all(clip) : x.f;
        mass += x.f > clip ? x.p : all(0);
    });
    sums[0] = sum(total), sums[1] = sum(mass);
}

template <class T>
void kl_grad(const T* s, const T* t, int64_t begin, int64_t end, float scale, const float* row, float clipped_mass,
             float clip, float weight, T* out) {
    const float kept = weight * (1.0f - clipped_mass);
    if (clipped_mass == 0.0f) {
        each_vector(begin, end, [&](int64_t k, auto get, auto put) {
            Floats q = exp_negative((get(s + k) * scale - row[0]) - row[1]);
            Floats p = exp_negative((get(t + k) * scale - row[2]) - row[3]);
            put(out + k, q * kept - p * weight);
        });
    } else {
        each_vector(begin, end, [&](int64_t k, auto get, auto put) {
            Terms x = terms(get(s + k), get(t + k), scale, row);
            Floats q = exp_negative(x.log_q);
            put(out + k, q * kept - (x.f > clip ? all(0) : x.p) * weight);
        });
    }
}

template <class T> void clear(T* out, int64_t begin, int64_t end) {
    if (end > begin) std::memset(out + begin, 0, (end - begin) * sizeof(T));
}

// One call works on `rows` rows of `columns` real and `width` all columns; strides count elements. `tiles` holds
// begin and end of `num_tiles` tiles; stats and sums leave room for `slots` tiles a row. `live` may be null.
struct Block {
    int64_t rows, columns, width, stride, out_stride, num_tiles, slots;
    const int64_t* tiles;
    const uint8_t* live;
    float scale;
    bool is_live(int64_t r) const { return !live || live[r]; }
};

template <class T>
void token_stats_rows(const Block& b, const T* logits, const int64_t* targets, int64_t start, float* stats) {
    for (int64_t r = 0; r < b.rows; r++)
        for (int64_t k = 0; b.is_live(r) && k < b.num_tiles; k++)
            token_stats(logits + r * b.stride, b.tiles[2 * k], b.tiles[2 * k + 1], targets[r] - start, b.scale,
                        stats + (r * b.slots + k) * 4);
}

template <class T>
void token_grad_rows(const Block& b, const T* logits, const int64_t* targets, int64_t start, const float* rows,
                     const float* g, const float* h, T* out) {
    for (int64_t r = 0; r < b.rows; r++) {
        T* to = out + r * b.out_stride;
        for (int64_t k = 0; b.is_live(r) && k < b.num_tiles; k++)
            token_grad(logits + r * b.stride, b.tiles[2 * k], b.tiles[2 * k + 1], targets[r] - start, b.scale,
                       rows + r * 4, g[r] * b.scale, h ? h[r] * b.scale : 0.0f, h != nullptr, to);
        clear(to, b.is_live(r) ? b.columns : 0, b.width);
    }
}

template <class T> void kl_stats_rows(const Block& b, const T* student, const T* teacher, float* stats) {
    for (int64_t r = 0; r < b.rows; r++)
        for (int64_t k = 0; b.is_live(r) && k < b.num_tiles; k++)
            kl_stats(student + r * b.stride, teacher + r * b.stride, b.tiles[2 * k], b.tiles[2 * k + 1], b.scale,
                     stats + (r * b.slots + k) * 7);
}

template <class T>
void kl_scan_rows(const Block& b, const T* student, const T* teacher, const float* rows, float clip, float* sums) {
    for (int64_t r = 0; r < b.rows; r++)
        for (int64_t k = 0; b.is_live(r) && k < b.num_tiles; k++)
            kl_scan(student + r * b.stride, teacher + r * b.stride, b.tiles[2 * k], b.tiles[2 * k + 1], b.scale,
                    rows + r * 7, clip, sums + (r * b.slots + k) * 2);
}

template <class T>
void kl_grad_rows(const Block& b, const T* student, const T* teacher, const float* rows, const float* clipped_mass,
                  float clip, const float* weight, T* out) {
    for (int64_t r = 0; r < b.rows; r++) {
        T* to = out + r * b.out_stride;
        for (int64_t k = 0; b.is_live(r) && k < b.num_tiles; k++)
            kl_grad(student + r * b.stride, teacher + r * b.stride, b.tiles[2 * k], b.tiles[2 * k + 1], b.scale,
                    rows + r * 7, clipped_mass[r], clip, weight[r] * b.scale, to);
        clear(to, b.is_live(r) ? b.columns : 0, b.width);
    }
}

// f(pointer to the type of the logits), for one of the two types.
template <class F> void for_type(int is_bfloat16, F f) {
    if (is_bfloat16)
        f((bfloat16*)nullptr);
    else
        f((float*)nullptr);
}

} // namespace

extern "C" {

const char* native_source() { return NATIVE_SOURCE; } // hash of the sources, set by setup.py

void rows_token_stats(const Block* block, int is_bfloat16, const void* logits, const int64_t* targets, int64_t start,
                      float* stats) {
    for_type(is_bfloat16, [&](auto* type) {
        token_stats_rows(*block, (decltype(type))logits, targets, start, stats);
    });
}

void rows_merge_tokens(int64_t rows, int64_t tiles, const float* stats, float* out) {
    for (int64_t r = 0; r < rows; r++) merge_tokens(stats + r * tiles * 4, tiles, out + r * 4);
}

void rows_token_grad(const Block* block, int is_bfloat16, const void* logits, const int64_t* targets, int64_t start,
                     const float* rows, const float* for_logprobs, const float* for_entropy, void* out) {
    for_type(is_bfloat16, [&](auto* type) {
        using T = decltype(type);
        token_grad_rows(*block, (T)logits, targets, start, rows, for_logprobs, for_entropy, (T)out);
    });
}

void rows_kl_stats(const Block* block, int is_bfloat16, const void* student, const void* teacher, float* stats) {
    for_type(is_bfloat16, [&](auto* type) {
        using T = decltype(type);
        kl_stats_rows(*block, (T)student, (T)teacher, stats);
    });
}

void rows_merge_kl(int64_t rows, int64_t tiles, const float* stats, float* out) {
    for (int64_t r = 0; r < rows; r++) merge_kl(stats + r * tiles * 7, tiles, out + r * 7);
}

void rows_kl_scan(const Block* block, int is_bfloat16, const void* student, const void* teacher, const float* rows,
                  float clip, float* sums) {
    for_type(is_bfloat16, [&](auto* type) {
        using T = decltype(type);
        kl_scan_rows(*block, (T)student, (T)teacher, rows, clip, sums);
    });
}

void rows_kl_grad(const Block* block, int is_bfloat16, const void* student, const void* teacher, const float* rows,
                  const float* clipped_mass, float clip, const float* for_loss, void* out) {
    for_type(is_bfloat16, [&](auto* type) {
        using T = decltype(type);
        kl_grad_rows(*block, (T)student, (T)teacher, rows, clipped_mass, clip, for_loss, (T)out);
    });
}

} // extern "C"
