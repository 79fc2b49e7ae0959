// Products of floats with weights in fewer bits: bf16, or int8.
//
// Duty: compiled once a machine, when first wanted; runtime.cpp is told of it by cellc_use_narrow.
// A few rows read the weight once, and each number is widened on its way: reading is what takes the
// time, and there is half as much to read, or a quarter. For more rows a panel is widened once into
// memory that stays in L2, and multiplied as floats are. Both add the same floats in the same order.
#include "gemm.h"

#include <stdlib.h>

using namespace cellc;

namespace {

struct Panel {  // of floats, one a thread, kept
    float *memory = nullptr;
    int64_t size = 0;
    ~Panel() { free(memory); }
    float *get(int64_t count) {
        if (count > size) {
            free(memory);
            const size_t bytes = (size_t(count) * sizeof(float) + 63) / 64 * 64;
            memory = static_cast<float *>(aligned_alloc(64, bytes));
            if (!memory) abort();
            size = count;
        }
        return memory;
    }
};
thread_local Panel panel;

template <class B>
void product(const Runtime *rt, const float *const *a, int64_t m, const B *w, const float *bias,
             float *const *c, int64_t k, int64_t n, int64_t begin, int64_t end) {
    constexpr int64_t L = VBYTES / sizeof(float), N = NV * L;
    if (m <= MR) return gemm(a, m, w, bias, c, k, n, begin, end);
    float *to[CHUNK];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t valid = n - p * N < N ? n - p * N : N, count = k * ((valid + L - 1) / L) * L;
        float *wide = panel.get(count);
        for (int64_t i = 0; i < count; i += L)
            *reinterpret_cast<Simd<float>::type *>(wide + i) = widened(w + p * N * k + i);
        for (int64_t r = 0; r < m; ++r) to[r] = c[r] + p * N;
        rt->gemm_f32(a, m, wide, bias ? bias + p * N : nullptr, to, k, valid, 0, 1);
    }
}

}  // namespace

extern "C" {

void cellc_gemm_bf16(const Runtime *rt, const float *const *a, int64_t m, const bf16 *w,
                     const float *bias, float *const *c, int64_t k, int64_t n, int64_t begin,
                     int64_t end) {
    product(rt, a, m, w, bias, c, k, n, begin, end);
}
void cellc_gemm_i8(const Runtime *rt, const float *const *a, int64_t m, const int8_t *w,
                   const float *bias, float *const *c, int64_t k, int64_t n, int64_t begin,
                   int64_t end) {
    product(rt, a, m, w, bias, c, k, n, begin, end);
}
void cellc_pack_bf16(const bf16 *w, int64_t k, int64_t n, bf16 *out) {
    pack<float>(w, k, n, out);
}
void cellc_pack_i8(const int8_t *w, int64_t k, int64_t n, int8_t *out) {
    pack<float>(w, k, n, out);
}
}
