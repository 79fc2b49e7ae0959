// Products of floats with weights in fewer bits: bf16, or int8.
//
// Duty: compiled once a machine, when first wanted; runtime.cpp is told of it by cellc_use_narrow.
// A few rows read the weight once, and each number is widened on its way: reading is what takes the
// time, and there is half as much to read, or a quarter. For more rows a panel is widened once into
// memory that stays in L2, and multiplied as floats are. Both add the same floats in the same order.
#include "runtime.h"

#include <stdlib.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cellc {
namespace {

typedef float Floats __attribute__((vector_size(VBYTES)));
typedef int32_t Wholes __attribute__((vector_size(VBYTES)));

// Intrinsics where there are some: GCC takes conversions to wider numbers apart
#if defined(__AVX512F__)
inline Wholes extended(const bf16 *b) {
    return (Wholes)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)b));
}
inline Wholes extended(const int8_t *b) {
    return (Wholes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)b));
}
#elif defined(__AVX2__)
inline Wholes extended(const bf16 *b) {
    return (Wholes)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)b));
}
inline Wholes extended(const int8_t *b) {
    return (Wholes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)b));
}
#elif defined(__aarch64__)
inline Wholes extended(const bf16 *b) {
    return (Wholes)vmovl_u16(vld1_u16(reinterpret_cast<const uint16_t *>(b)));
}
inline Wholes extended(const int8_t *b) {
    int32_t four;
    memcpy(&four, b, sizeof four);
    return (Wholes)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
#else
inline Wholes extended(const bf16 *b) {
    typedef uint16_t Half __attribute__((vector_size(VBYTES / 2), aligned(2), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Half *>(b), Wholes);
}
inline Wholes extended(const int8_t *b) {
    typedef int8_t Quarter __attribute__((vector_size(VBYTES / 4), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Quarter *>(b), Wholes);
}
#endif

inline Floats widened(const bf16 *b) { return (Floats)(extended(b) << 16); }
inline Floats widened(const int8_t *b) { return __builtin_convertvector(extended(b), Floats); }

}  // namespace
}  // namespace cellc

#include "gemm.h"

using namespace cellc;

namespace {

thread_local Scratch panel;

template <class B>
void product(const Runtime *rt, const float *const *a, int64_t m, const B *w, const float *bias,
             float *const *c, int64_t k, int64_t n, int64_t begin, int64_t end) {
    constexpr int64_t L = VBYTES / sizeof(float), N = NV * L;
    if (m <= MR) return gemm(a, m, w, bias, c, k, n, begin, end);
    float *to[CHUNK];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t valid = n - p * N < N ? n - p * N : N, count = k * ((valid + L - 1) / L) * L;
        float *wide = reinterpret_cast<float *>(panel.get(size_t(count) * sizeof(float)));
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
