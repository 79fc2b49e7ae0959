// Products of gathered rows with a packed weight.
//
// Duty: the runtime's matrix product; included by runtime.cpp, gemm_f64.cpp and gemm_narrow.cpp. In:
// row addresses, a weight packed in panels of NV vectors of columns, of T or of B, which is widened
// to T as it is read; out: rows, straight to their addresses. One row's sums are taken in ascending
// order of depth, whatever other rows there are.
#pragma once
#include "runtime.h"

#include <stdlib.h>

namespace cellc {
namespace {

struct Scratch {  // kept, and grows
    char *memory = nullptr;
    size_t size = 0;
    ~Scratch() { free(memory); }
    char *get(size_t bytes) {
        if (bytes > size) {
            free(memory);
            memory = static_cast<char *>(aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
            if (!memory) abort();
            size = bytes;
        }
        return memory;
    }
};

// ---- Products

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float type __attribute__((vector_size(VBYTES), aligned(4), may_alias));
};
template <>
struct Simd<double> {
    typedef double type __attribute__((vector_size(VBYTES), aligned(8), may_alias));
};

template <class T>
inline typename Simd<T>::type widened(const T *b) {
    return *reinterpret_cast<const typename Simd<T>::type *>(b);
}

// Rows of one panel: where they begin, where partial sums are kept, where results go
template <class T, class B>
struct Block {
    const T *const *a;
    const B *b;
    const T *bias;
    T *partial;
    T *const *c;
    int64_t begin, end, column, valid;
    bool first, last;
};

// M rows by W vectors of columns: acc[m][w] = sum over k, in ascending order
template <class T, class B, int M, int W>
__attribute__((noinline)) void micro(const Block<T, B> &t) {
    typedef typename Simd<T>::type V;
    constexpr int64_t L = VBYTES / sizeof(T);
    V acc[M][W];
    const T *a[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        a[m] = t.a[m];
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) {
            const T *from = t.first ? t.bias : t.partial + m * W * L;
            acc[m][w] = from ? *reinterpret_cast<const V *>(from + w * L) : V{};
        }
    }
    const B *b = t.b;
    for (int64_t k = t.begin; k < t.end; ++k, b += W * L) {
        V x[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) {
            x[w] = widened(b + w * L);
            if (M <= 4 && w * L * sizeof(B) % 64 == 0)
                __builtin_prefetch(b + w * L + 4096 / sizeof(B));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) acc[m][w] += a[m][k] * x[w];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        T line[W * L];
        T *to = !t.last ? t.partial + m * W * L : t.valid == W * L ? t.c[m] + t.column : line;
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) *reinterpret_cast<V *>(to + w * L) = acc[m][w];
        if (to == line) memcpy(t.c[m] + t.column, line, t.valid * sizeof(T));
    }
}

template <class T, class B, int W>
void rows(const Block<T, B> &t, int64_t m) {
    static void (*const table[])(const Block<T, B> &) = {
        micro<T, B, 1, W>, micro<T, B, 2, W>, micro<T, B, 3, W>, micro<T, B, 4, W>,
#if defined(__AVX512F__) || defined(__AVX__) || defined(__aarch64__)
        micro<T, B, 5, W>, micro<T, B, 6, W>
#endif
    };
    table[m - 1](t);
}

template <class T, class B>
void columns(const Block<T, B> &t, int64_t m, int64_t vectors) {
    switch (vectors) {
        case 1:
            return rows<T, B, 1>(t, m);
        case 2:
            return rows<T, B, 2>(t, m);
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3:
            return rows<T, B, 3>(t, m);
        case 4:
            return rows<T, B, 4>(t, m);
#endif
    }
}

// m <= CHUNK rows; each panel is read from far away once, and from L2 for every block of rows
template <class T, class B>
void gemm(const T *const *a, int64_t m, const B *w, const T *bias, T *const *c, int64_t k,
          int64_t n, int64_t begin, int64_t end) {
    constexpr int64_t L = VBYTES / sizeof(T), N = NV * L;
    alignas(64) T partial[CHUNK * N];
    alignas(64) T tail_bias[N];
    const int64_t blocks = (m + MR - 1) / MR;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t valid = n - p * N < N ? n - p * N : N, vectors = (valid + L - 1) / L;
        const T *from = bias ? bias + p * N : nullptr;
        if (from && valid < N) {
            memset(tail_bias, 0, sizeof tail_bias);
            from = static_cast<const T *>(memcpy(tail_bias, from, valid * sizeof(T)));
        }
        for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
            const int64_t k1 = k0 + DEPTH < k ? k0 + DEPTH : k;
            for (int64_t i = 0; i < blocks; ++i) {
                const int64_t r0 = m * i / blocks, r1 = m * (i + 1) / blocks;
                columns<T, B>(
                    {a + r0, w + p * N * k + k0 * vectors * L, from, partial + r0 * vectors * L,
                     c + r0, k0, k1, p * N, valid, k0 == 0, k1 == k},
                    r1 - r0, vectors);
            }
        }
    }
}

// In panels for products of T
template <class T, class B>
void pack(const B *w, int64_t k, int64_t n, B *out) {
    constexpr int64_t L = VBYTES / sizeof(T), N = NV * L;
    for (int64_t j = 0; j < n; j += N) {
        const int64_t valid = n - j < N ? n - j : N, width = (valid + L - 1) / L * L;
        for (int64_t i = 0; i < k; ++i, out += width) {
            memcpy(out, w + i * n + j, valid * sizeof(B));
            memset(out + valid, 0, (width - valid) * sizeof(B));
        }
    }
}

}  // namespace
}  // namespace cellc
