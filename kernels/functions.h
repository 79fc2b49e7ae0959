// The mathematics of generated kernels: pointwise functions, reductions, products of data with
// data.
//
// Duty: what one stage of a kernel computes, as torch has it. Included by runtime.h. Sums are taken
// in an order that does not depend on the batch: a row's result never does.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace cellc {

// ---- Mathematics, as torch has it; float versions are branch-free, so that loops over them become
// vector code

template <class To, class From>
static inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

struct Reduced {  // x = n ln2 + r; m1 = exp(r) - 1
    int32_t n;
    float m1;
};
static inline Reduced reduce_exp(float x) {
    float t = x * 1.44269504f + 12582912.f, n = t - 12582912.f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {bits<int32_t>(t) - 0x4b400000, p * (r * r) + r};
}
static inline float exp2i(int32_t n) { return bits<float>((n + 127) << 23); }  // -126 <= n <= 127

static inline float exp_(float x) {
    x = x > 89.f ? 89.f : x < -104.f ? -104.f : x;
    Reduced e = reduce_exp(x);
    int32_t half = e.n >> 1;
    return (e.m1 + 1.f) * exp2i(half) * exp2i(e.n - half);
}
static inline float sigmoid(float x) {
    float y = x < -87.f ? 87.f : x > 87.f ? -87.f : -x;
    Reduced e = reduce_exp(y);
    float s = exp2i(e.n), z = 1.f / (1.f + (e.m1 * s + s));
    return x < -88.f ? 0.f : z;
}
static inline float tanh_(float x) {
    float y = x > 20.f ? 40.f : x < -20.f ? -40.f : x + x;
    Reduced e = reduce_exp(y);
    float s = exp2i(e.n), d = e.m1 * s + (s - 1.f);
    return d / (d + 2.f);
}
static inline double exp_(double x) { return exp(x); }
static inline double tanh_(double x) { return tanh(x); }
static inline double sigmoid(double x) { return 1. / (1. + exp(-x)); }

#define CELLC_LIBM(name, f32, f64)                       \
    static inline float name(float x) { return f32(x); } \
    static inline double name(double x) { return f64(x); }
CELLC_LIBM(log_, logf, log)
CELLC_LIBM(log1p_, log1pf, log1p)
CELLC_LIBM(expm1_, expm1f, expm1)
CELLC_LIBM(sqrt_, __builtin_sqrtf, __builtin_sqrt)
CELLC_LIBM(sin_, sinf, sin)
CELLC_LIBM(cos_, cosf, cos)
CELLC_LIBM(tan_, tanf, tan)
CELLC_LIBM(atan_, atanf, atan)
CELLC_LIBM(erf_, erff, erf)
CELLC_LIBM(floor_, __builtin_floorf, __builtin_floor)
CELLC_LIBM(ceil_, __builtin_ceilf, __builtin_ceil)
CELLC_LIBM(round_, __builtin_rintf, __builtin_rint)
CELLC_LIBM(trunc_, __builtin_truncf, __builtin_trunc)
static inline float fmod_(float a, float b) { return fmodf(a, b); }
static inline double fmod_(double a, double b) { return fmod(a, b); }
static inline float pow_(float a, float b) { return powf(a, b); }
static inline double pow_(double a, double b) { return pow(a, b); }
static inline float atan2_(float a, float b) { return atan2f(a, b); }
static inline double atan2_(double a, double b) { return atan2(a, b); }

template <class T>
static inline T floor_(T x) {
    return x;
}
template <class T>
static inline T ceil_(T x) {
    return x;
}
template <class T>
static inline T round_(T x) {
    return x;
}
template <class T>
static inline T trunc_(T x) {
    return x;
}
template <class T>
static inline T abs_(T x) {
    return x < 0 ? -x : x;
}
static inline float abs_(float x) { return __builtin_fabsf(x); }
static inline double abs_(double x) { return __builtin_fabs(x); }
template <class T>
static inline T sign(T x) {
    return T((x > 0) - (x < 0));
}
template <class T>
static inline T relu(T x) {
    return x < 0 ? T(0) : x;
}
template <class T>
static inline T silu(T x) {
    return x / (T(1) + exp_(-x));
}
template <class T>
static inline T softplus(T x) {
    return x > 20 ? x : log1p_(exp_(x));
}
template <class T>
static inline T gelu(T x) {
    return x * T(0.5) * (T(1) + erf_(x * T(0.70710678118654752440)));
}
template <class T>
static inline T gelu_tanh(T x) {
    return T(0.5) * x * (T(1) + tanh_(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));
}
template <class T>
static inline T maximum(T a, T b) {
    return a > b || a != a ? a : b;
}
template <class T>
static inline T minimum(T a, T b) {
    return a < b || a != a ? a : b;
}

// Rounded, whatever is added to it: Python's floats are not multiplied and added at once.
static inline double product(double a, double b) {
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    return __builtin_assoc_barrier(a * b);
#else
    volatile double y = a * b;
    return y;
#endif
}
static inline float remainder_(float a, float b) {
    float m = fmodf(a, b);
    return m != 0 && (b < 0) != (m < 0) ? m + b : m;
}
static inline double remainder_(double a, double b) {
    double m = fmod(a, b);
    return m != 0 && (b < 0) != (m < 0) ? m + b : m;
}
template <class T>
static inline T floor_div(T a, T b) {
    if (b == 0) return a / b;
    T m = fmod_(a, b), q = (a - m) / b;
    if (m != 0 && (b < 0) != (m < 0)) q -= 1;
    if (q == 0) return T(copysign(0., double(a / b)));
    T f = floor_(q);
    return q - f > T(0.5) ? f + 1 : f;
}

// Integers: a division by zero makes the row bad; the lowest number by -1 wraps
template <class T>
static inline T int_fmod(T a, T b, uint8_t *bad) {
    if (b == 0) return *bad = 1, T(0);
    return sizeof(T) >= 4 && b == T(-1) ? T(0) : T(a % b);
}
template <class T>
static inline T int_remainder(T a, T b, uint8_t *bad) {
    T m = int_fmod(a, b, bad);
    return m != 0 && (m < 0) != (b < 0) ? T(m + b) : m;
}
template <class T>
static inline T int_floor_div(T a, T b, uint8_t *bad) {
    if (b == 0) return *bad = 1, T(0);
    if (T(-1) < 0 && b == T(-1)) return T(-a);
    T q = T(a / b);
    return T(a % b) != 0 && (a < 0) != (b < 0) ? T(q - 1) : q;
}
template <class T>
static inline T int_pow(T a, T b) {
    if (b < 0) return a == 1 ? T(1) : a == T(-1) ? (b % 2 ? T(-1) : T(1)) : T(0);
    T y = 1;
    for (; b; b >>= 1, a = T(a * a))
        if (b & 1) y = T(y * a);
    return y;
}
static inline int64_t checked(int64_t index, int64_t limit, uint8_t *bad) {
    bool inside = uint64_t(index) < uint64_t(limit);
    if (!inside) *bad = 1;
    return inside ? index : 0;
}
template <class T>
static inline uint8_t u8(T x) {
    return uint8_t(int64_t(x));
}

// ---- Reductions over values already computed, [n] contiguous; LANES partial results, then a tree

enum { VALUES = 512, LANES = 32 };  // VALUES are computed at a time

template <class T>
constexpr T lowest(T) {
    return T(-1) < T(0) ? T(uint64_t(1) << (8 * sizeof(T) - 1)) : T(0);
}
template <class T>
constexpr T highest(T x) {
    return T(~lowest(x));
}
constexpr float lowest(float) { return -INFINITY; }
constexpr float highest(float) { return INFINITY; }
constexpr double lowest(double) { return -INFINITY; }
constexpr double highest(double) { return INFINITY; }

struct Value {
    template <class O, class T>
    static O from(T x) {
        return O(x);
    }
};
struct Truth {
    template <class O, class T>
    static O from(T x) {
        return O(x != 0);
    }
};
struct Sum : Value {
    template <class T>
    static T first() {
        return T(0);
    }
    template <class T>
    static T join(T a, T b) {
        return T(a + b);
    }
};
struct Prod : Value {
    template <class T>
    static T first() {
        return T(1);
    }
    template <class T>
    static T join(T a, T b) {
        return T(a * b);
    }
};
struct Amax : Value {
    template <class T>
    static T first() {
        return lowest(T(0));
    }
    template <class T>
    static T join(T a, T b) {
        return b > a || b != b ? b : a;
    }
};
struct Amin : Value {
    template <class T>
    static T first() {
        return highest(T(0));
    }
    template <class T>
    static T join(T a, T b) {
        return b < a || b != b ? b : a;
    }
};
struct Any : Truth {
    template <class T>
    static T first() {
        return T(0);
    }
    template <class T>
    static T join(T a, T b) {
        return T(a | b);
    }
};
struct All : Truth {
    template <class T>
    static T first() {
        return T(1);
    }
    template <class T>
    static T join(T a, T b) {
        return T(a & b);
    }
};

template <class Op, class T>
struct Lanes {
    T lane[LANES];
    Lanes() {
        for (int l = 0; l < LANES; ++l) lane[l] = Op::template first<T>();
    }
    void add(const T *x, int64_t n) {
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 1
            for (int l = 0; l < LANES; ++l) lane[l] = Op::template join<T>(lane[l], x[i + l]);
        for (int l = 0; i < n; ++i, ++l) lane[l] = Op::template join<T>(lane[l], x[i]);
    }
    T result() {
        for (int w = LANES / 2; w; w /= 2)
            for (int l = 0; l < w; ++l) lane[l] = Op::template join<T>(lane[l], lane[l + w]);
        return lane[0];
    }
};

// The first position of the extreme value; nan is the most extreme
template <class Op, class T>
struct Arg {
    T best = T(0);
    int64_t at = -1, seen = 0;
    void add(const T *x, int64_t n) {
        Lanes<Op, T> lanes;
        lanes.add(x, n);
        const T y = lanes.result();
        if (at < 0 ||
            (best == best && (y != y || (y != best && Op::template join<T>(best, y) == y)))) {
            int64_t i = 0;
            while (!(x[i] == y || (y != y && x[i] != x[i]))) ++i;
            best = y, at = seen + i;
        }
        seen += n;
    }
};

// ---- Products of data with data: c[m, n] = sum over k of a[m, k] b[k, n], any strides, c
// contiguous

template <class T>
static inline T dot(const T *a, const T *b, int64_t n) {
    T lane[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; ++l) lane[l] += a[i + l] * b[i + l];
    for (int l = 0; i < n; ++i, ++l) lane[l] += a[i] * b[i];
    for (int w = LANES / 2; w; w /= 2)
        for (int l = 0; l < w; ++l) lane[l] += lane[l + w];
    return lane[0];
}

template <class T>
static void matmul(const T *__restrict a, int64_t am, int64_t ak, const T *__restrict b, int64_t bk,
                   int64_t bn, T *__restrict c, int64_t M, int64_t N, int64_t K) {
    if (ak == 1 && bk == 1) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < N; ++n) c[m * N + n] = dot(a + m * am, b + n * bn, K);
        return;
    }
    for (int64_t m = 0; m < M; ++m, a += am, c += N) {
        for (int64_t n = 0; n < N; ++n) c[n] = T(0);
        for (int64_t k = 0; k < K; ++k) {
            const T x = a[k * ak], *row = b + k * bk;
            if (bn == 1)
                for (int64_t n = 0; n < N; ++n) c[n] += x * row[n];
            else
                for (int64_t n = 0; n < N; ++n) c[n] += x * row[n * bn];
        }
    }
}

}  // namespace cellc
