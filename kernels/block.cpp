// A transformer block on a CPU: what `engine.model.blocks.Block` computes, in three passes over its tokens.
//
//     x  = Linear([x, skip])                                                             with a long skip only
//     x' = x + m_gate1·Linear(attention(LN(x)·(1 + m_scale1) + m_shift1))
//     x" = x' + m_gate2·Linear(GELU(Linear(LN(x')·(1 + m_scale2) + m_shift2)))           m = table[index] + vector
//
// The norms of a "pre" block are of this kind too, with a vector alone. In a "post" block they follow the sums.
//
// A pass takes some tokens from one product to the next within a core's own cache; a product's sums are in registers
// until what follows it is done. Threads share out the tokens, and between the passes the heads of the attention. No
// result depends on the number of threads, nor on what other rows there are.
//
// T is float or bfloat16; sums, norms, softmax and GELU are float. A product's weight [N, K] lies in panels of PANEL
// outputs, the last one as narrow as N asks; in a panel, S inputs of every output follow each other, then the next S
// inputs; S values of T are a word of 32 bits. All of D, D/heads, N and the MLP's width are multiples of LANES.
//
// Needs AVX-512, for bfloat16 also AVX512-BF16.
//
// Sources: as of the modules it stands for; erf: Abramowitz and Stegun 1964, 7.1.26 (error 1.5e-7).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include <immintrin.h>

namespace {

constexpr long LANES = 16;
typedef __m512 V;
typedef int32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
struct bfloat16 { uint16_t bits; };

constexpr long PANEL = 4 * LANES;
constexpr long HEIGHT = 6;  // tokens of a tile of sums that is held in registers
constexpr long TOKENS = 32;  // that a thread takes through a pass at a time

template <class T> constexpr long S = 4 / sizeof(T);

inline V all(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }

inline Words words(const bfloat16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Words);
}
inline V load(const bfloat16* p) { return reinterpret_cast<V>(words(p) << 16); }

#if defined(__AVX512BF16__)
inline void store(bfloat16* p, V x) {
    auto rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &rounded, sizeof rounded);
}
#endif

// V with its lanes i and i XOR `step` exchanged.
template <int step> inline V exchanged(V x) {
    Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(x, lanes ^ step);
}

inline float sum(V x) {
    x += exchanged<8>(x);
    x += exchanged<4>(x);
    x += exchanged<2>(x);
    return x[0] + x[1];
}

inline V larger(V x, V y) { return _mm512_max_ps(x, y); }

inline float largest(V x) {
    x = larger(x, exchanged<8>(x));
    x = larger(x, exchanged<4>(x));
    x = larger(x, exchanged<2>(x));
    return std::max(x[0], x[1]);
}

// 2^x: 2^n by its exponent for the nearest integer n, and a polynomial for the rest, at most 1/2 (error 1e-7, fitted by
// least squares with weights that even out the error). Of −∞ the rest is NaN, which scalef makes 0.
inline V exp2(V x) {
    V n = _mm512_roundscale_ps(x, 0);
    V r = x - n, p = all(0.00132647274f);
    for (float c : {0.00967151297f, 0.0555073375f, 0.240222421f, 0.693146978f, 1.f}) p = p * r + c;
    return _mm512_scalef_ps(p, n);
}

constexpr float LOG2_E = 1.4426950409f;

inline V gelu_tanh(V x) { return x / (1 + exp2(x * (1 + 0.044715f * x * x) * (-2 * 0.7978845608f * LOG2_E))); }

inline V gelu_erf(V x) {
    V z = x * 0.7071067812f, a = z < 0 ? -z : z, t = 1 / (1 + 0.3275911f * a);
    V p = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    V erf = 1 - p * t * exp2(a * a * -LOG2_E);
    return 0.5f * x * (1 + (z < 0 ? -erf : erf));
}

// sums[m][j] = a[m]·w[j] over K inputs, for M tokens and J·LANES outputs.
template <long M, long J> void tile(const float* a, long stride, const float* w, long k, float* sums) {
    V c[M][J];
    for (long m = 0; m < M; m++)
        for (long j = 0; j < J; j++) c[m][j] = V{};
    for (long i = 0; i < k; i++) {
        V b[J];
        for (long j = 0; j < J; j++) b[j] = load(w + (i * J + j) * LANES);
        for (long m = 0; m < M; m++)
            for (long j = 0; j < J; j++) c[m][j] += a[m * stride + i] * b[j];
    }
    for (long m = 0; m < M; m++)
        for (long j = 0; j < J; j++) store(sums + m * PANEL + j * LANES, c[m][j]);
}

#if defined(__AVX512BF16__)
template <long M, long J> void tile(const bfloat16* a, long stride, const bfloat16* w, long k, float* sums) {
    V c[M][J];
    for (long m = 0; m < M; m++)
        for (long j = 0; j < J; j++) c[m][j] = V{};
    for (long i = 0; i < k; i += 2) {
        __m512bh b[J];
        for (long j = 0; j < J; j++) std::memcpy(&b[j], w + i * J * LANES + j * 2 * LANES, sizeof b[j]);
        for (long m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * stride + i, sizeof pair);
            auto pairs = (__m512bh)_mm512_set1_epi32(pair);
            for (long j = 0; j < J; j++) c[m][j] = _mm512_dpbf16_ps(c[m][j], pairs, b[j]);
        }
    }
    for (long m = 0; m < M; m++)
        for (long j = 0; j < J; j++) store(sums + m * PANEL + j * LANES, c[m][j]);
}
#endif

template <long J, class T> void tile(long m, const T* a, long stride, const T* w, long k, float* sums) {
    switch (m) {
        case 1: return tile<1, J>(a, stride, w, k, sums);
        case 2: return tile<2, J>(a, stride, w, k, sums);
        case 3: return tile<3, J>(a, stride, w, k, sums);
        case 4: return tile<4, J>(a, stride, w, k, sums);
        case 5: return tile<5, J>(a, stride, w, k, sums);
        default: return tile<6, J>(a, stride, w, k, sums);
    }
}

// write(token, output, sums) for each token and LANES outputs of a [tokens, K] times w [N, K] in panels.
template <class T, class Write>
void product(const T* a, long stride, long tokens, const T* w, long n, long k, Write write) {
    long tiles = (tokens + HEIGHT - 1) / HEIGHT;
    for (long first = 0; first < n; first += PANEL) {
        long width = std::min(PANEL, n - first);
        for (long t = 0; t < tiles; t++) {
            long token = tokens * t / tiles, m = tokens * (t + 1) / tiles - token;
            alignas(64) float sums[HEIGHT * PANEL];
            const T *from = a + token * stride, *panel = w + first * k;
            if (width == LANES) tile<1>(m, from, stride, panel, k, sums);
            else if (width == 2 * LANES) tile<2>(m, from, stride, panel, k, sums);
            else if (width == 3 * LANES) tile<3>(m, from, stride, panel, k, sums);
            else tile<4>(m, from, stride, panel, k, sums);
            for (long i = 0; i < m; i++)
                for (long j = 0; j < width; j += LANES) write(token + i, first + j, load(sums + i * PANEL + j));
        }
    }
}

// Memory of a thread, which it keeps for its next calls.
class Scratch {
    std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, std::free};
    size_t size_ = 0, used_ = 0;

  public:
    // Gives up what was taken before; false where memory does not suffice.
    bool reserve(size_t bytes) {
        if (bytes > size_) {
            size_t size = (bytes + 4095) / 4096 * 4096;
            memory_.reset();
            memory_.reset(std::aligned_alloc(4096, size));
            size_ = memory_ ? size : 0;
        }
        used_ = 0;
        return bytes <= size_;
    }
    template <class T> T* take(long count) {
        T* p = reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

}  // namespace

// The weights of a block: those of products in panels, the rest float32. `kernels/block.py` has the same fields.
struct Weights {
    const void *skip, *qkv, *proj, *fc1, *fc2;  // skip: null without
    const float *skip_bias, *proj_bias, *fc1_bias, *fc2_bias;  // qkv has none
    const float* vector;  // [6·D]: shift, scale, gate of attention, then of the MLP
    const float* skip_norm;  // [2·D]: shift, scale of a "post" block's norm after the skip; null without
    int64_t dim, heads, hidden, exact_gelu, post;
    double eps;
};

namespace {

// Shift, scale or gate of a token: row `table` (null: zeros) plus `vector`.
template <class T> struct Modulation {
    const T* table;
    const float* vector;
    V operator()(long chunk, long dim, long channel) const {
        long i = chunk * dim + channel;
        return table ? load(table + i) + load(vector + i) : load(vector + i);
    }
};

template <class T> void norm_modulate(const T* x, T* h, Modulation<T> m, long shift, long dim, float eps) {
    V total{}, squares{};
    for (long i = 0; i < dim; i += LANES) total += load(x + i);
    V mean = all(sum(total) / dim);
    for (long i = 0; i < dim; i += LANES) {
        V centred = load(x + i) - mean;
        squares += centred * centred;
    }
    V r = all(1 / std::sqrt(sum(squares) / dim + eps));
    for (long i = 0; i < dim; i += LANES)
        store(h + i, (load(x + i) - mean) * r * (1 + m(shift + 1, dim, i)) + m(shift, dim, i));
}

// Words [rows, n] → panels of [n, rows]; rows that a panel lacks are zero.
void transpose(const int32_t* from, long stride, long rows, long n, int32_t* to) {
    for (long first = 0; first < rows; first += PANEL) {
        long width = std::min(PANEL, (rows - first + LANES - 1) / LANES * LANES);
        for (long r = 0; r < width; r++)
            for (long i = 0; i < n; i++)
                to[first * n + i * width + r] = first + r < rows ? from[(first + r) * stride + i] : 0;
    }
}

// A head's values [tokens, d] as a product's weight [d, tokens].
void panels(const float* v, long stride, long tokens, long d, float* to) {
    for (long first = 0; first < d; first += PANEL)
        for (long t = 0, width = std::min(PANEL, d - first); t < tokens; t++)
            for (long i = 0; i < width; i += LANES)
                store(to + first * tokens + t * width + i, load(v + t * stride + first + i));
}

void panels(const bfloat16* v, long stride, long tokens, long d, bfloat16* to) {
    long even = (tokens + 1) / 2 * 2;
    for (long first = 0; first < d; first += PANEL)
        for (long t = 0, width = std::min(PANEL, d - first); t < tokens; t += 2)
            for (long i = 0; i < width; i += LANES) {
                const bfloat16* p = v + t * stride + first + i;
                Words pairs = words(p) | (t + 1 < tokens ? words(p + stride) << 16 : Words{});
                std::memcpy(to + first * even + t * width + 2 * i, &pairs, sizeof pairs);
            }
}

// Bytes of scratch that the attention of a head takes.
template <class T> size_t attention_bytes(long tokens, long d) {
    long wide = (tokens + LANES - 1) / LANES * LANES;
    return wide * d * sizeof(T) * 2 + HEIGHT * wide * (sizeof(T) + 4) + 1024;
}

// softmax(Q·Kᵀ/√d)·V of one head of one row; q, k, v [tokens, d] with `stride` between tokens.
template <class T>
void attention(const T* q, const T* k, const T* v, long stride, long tokens, long d, T* out, long out_stride,
               Scratch& scratch) {
    long wide = (tokens + LANES - 1) / LANES * LANES, keys = (tokens + S<T> - 1) / S<T> * S<T>;
    scratch.reserve(attention_bytes<T>(tokens, d));
    T *keyed = scratch.take<T>(wide * d), *valued = scratch.take<T>(wide * d);
    T* weights = scratch.take<T>(HEIGHT * wide);
    float* scores = scratch.take<float>(HEIGHT * wide);
    transpose(reinterpret_cast<const int32_t*>(k), stride / S<T>, tokens, d / S<T>, reinterpret_cast<int32_t*>(keyed));
    panels(v, stride, tokens, d, valued);
    float scale = LOG2_E / std::sqrt(float(d));
    for (long first = 0; first < tokens; first += HEIGHT) {
        long m = std::min(HEIGHT, tokens - first);
        float inverse[HEIGHT];
        product(q + first * stride, stride, m, keyed, wide, d, [&](long t, long key, V c) {
            store(scores + t * wide + key, c * scale);
        });
        for (long t = 0; t < m; t++) {
            float* s = scores + t * wide;
            std::fill(s + tokens, s + wide, -1e30f);
            V high = load(s), total{};
            for (long i = LANES; i < wide; i += LANES) high = larger(load(s + i), high);
            float highest = largest(high);
            for (long i = 0; i < wide; i += LANES) {
                V e = exp2(load(s + i) - highest);
                total += e;
                store(weights + t * wide + i, e);
            }
            inverse[t] = 1 / sum(total);
        }
        product(weights, wide, m, valued, d, keys, [&](long t, long i, V c) {
            store(out + (first + t) * out_stride + i, c * inverse[t]);
        });
    }
}

// False where memory does not suffice.
template <class T>
bool block(const Weights& w, const T* x, const T* skip, const T* table, const int32_t* index, T* out, long rows,
           long length, int threads) {
    const long D = w.dim, d = D / w.heads, F = w.hidden, all_tokens = rows * length;
    if (all_tokens == 0) return true;
    const long share = std::min(TOKENS, (all_tokens + threads - 1) / threads);
    const long tiles = (all_tokens + share - 1) / share;
    static thread_local Scratch shared;
    if (!shared.reserve(all_tokens * D * 5 * sizeof(T) + 4096)) return false;
    T *qkv = shared.take<T>(all_tokens * 3 * D), *attended = shared.take<T>(all_tokens * D);
    T* joined = skip ? shared.take<T>(all_tokens * D) : nullptr;
    const T* stream = skip ? joined : x;
    auto modulation = [&](long token) {
        return Modulation<T>{table ? table + index[token] * 6 * D : nullptr, w.vector};
    };

    const size_t most = std::max(share * (2 * D + F) * sizeof(T) + 1024, attention_bytes<T>(length, d));
    bool enough = true;  // memory for every thread, known after the first pass

#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch own;
        const bool reserved = own.reserve(most);
        if (!reserved) {
#pragma omp atomic write
            enough = false;
        }
#pragma omp for
        for (long tile = 0; tile < tiles; tile++) {
            if (!reserved) continue;
            long first = all_tokens * tile / tiles, tokens = all_tokens * (tile + 1) / tiles - first;
            own.reserve(tokens * D * 2 * sizeof(T) + 1024);
            T* h = own.take<T>(tokens * D * 2);
            if (skip) {
                for (long t = 0; t < tokens; t++) {
                    std::memcpy(h + t * 2 * D, x + (first + t) * D, D * sizeof(T));
                    std::memcpy(h + t * 2 * D + D, skip + (first + t) * D, D * sizeof(T));
                }
                product(h, 2 * D, tokens, static_cast<const T*>(w.skip), D, 2 * D, [&](long t, long i, V c) {
                    store(joined + (first + t) * D + i, c + load(w.skip_bias + i));
                });
            }
            if (w.skip_norm)
                for (T* y = joined + first * D; y < joined + (first + tokens) * D; y += D)
                    norm_modulate(y, y, Modulation<T>{nullptr, w.skip_norm}, 0, D, w.eps);
            for (long t = 0; t < tokens && !w.post; t++)
                norm_modulate(stream + (first + t) * D, h + t * D, modulation(first + t), 0, D, w.eps);
            const T* from = w.post ? stream + first * D : h;
            product(from, D, tokens, static_cast<const T*>(w.qkv), 3 * D, D, [&](long t, long i, V c) {
                store(qkv + (first + t) * 3 * D + i, c);
            });
        }
#pragma omp for
        for (long head = 0; head < (enough ? rows * w.heads : 0); head++) {
            long first = head / w.heads * length, channel = head % w.heads * d;
            const T* q = qkv + first * 3 * D + channel;
            attention(q, q + D, q + 2 * D, 3 * D, length, d, attended + first * D + channel, D, own);
        }
#pragma omp for
        for (long tile = 0; tile < (enough ? tiles : 0); tile++) {
            long first = all_tokens * tile / tiles, tokens = all_tokens * (tile + 1) / tiles - first;
            own.reserve(tokens * (D + F) * sizeof(T) + 1024);
            T *h = own.take<T>(tokens * D), *hidden = own.take<T>(tokens * F), *y = out + first * D;
            product(attended + first * D, D, tokens, static_cast<const T*>(w.proj), D, D, [&](long t, long i, V c) {
                V gate = modulation(first + t)(2, D, i);
                store(y + t * D + i, load(stream + (first + t) * D + i) + gate * (c + load(w.proj_bias + i)));
            });
            auto norm = [&](T* to, long shift) {
                for (long t = 0; t < tokens; t++)
                    norm_modulate(y + t * D, to + t * D, modulation(first + t), shift, D, w.eps);
            };
            w.post ? norm(y, 0) : norm(h, 3);
            product(w.post ? y : h, D, tokens, static_cast<const T*>(w.fc1), F, D, [&](long t, long i, V c) {
                c += load(w.fc1_bias + i);
                store(hidden + t * F + i, w.exact_gelu ? gelu_erf(c) : gelu_tanh(c));
            });
            product(hidden, F, tokens, static_cast<const T*>(w.fc2), D, F, [&](long t, long i, V c) {
                V gate = modulation(first + t)(5, D, i);
                store(y + t * D + i, load(y + t * D + i) + gate * (c + load(w.fc2_bias + i)));
            });
            if (w.post) norm(y, 3);
        }
    }
    return enough;
}

}  // namespace

extern "C" {

// x, skip (null without), out [rows, length, D]; table [times, 6·D] or null; index [rows, length], within the table.
// False where memory does not suffice.
bool block_float32(const Weights* w, const float* x, const float* skip, const float* table, const int32_t* index,
                   float* out, int64_t rows, int64_t length, int threads) {
    return block(*w, x, skip, table, index, out, rows, length, threads);
}

#if defined(__AVX512BF16__)
bool block_bfloat16(const Weights* w, const bfloat16* x, const bfloat16* skip, const bfloat16* table,
                    const int32_t* index, bfloat16* out, int64_t rows, int64_t length, int threads) {
    return block(*w, x, skip, table, index, out, rows, length, threads);
}
#endif
}
