// What every generated kernel includes: its interface to runtime.cpp, which drives it.
//
// Duty: the types that a kernel, the runtime and cpp.py share, and the stages that are calls into
// the runtime or loops over arena rows: products with packed weights, ragged reductions.
#pragma once
#include "functions.h"

namespace cellc {

// ---- What Python fills in (cpp.py), and what a kernel exports

struct Operand {  // an input or output: arena, slots [N]; a ragged input also has offsets [N + 1]
    char *base;
    const int32_t *slots, *offsets;
};

struct Launch {  // followed by one Operand a cell input, then one a cell output
    int64_t num_steps;
    const int32_t *steps;
    int64_t threads, team;  // most threads, and whose: launches of two teams run side by side
    uint8_t *bad;  // [N], zero; a row whose data is invalid sets its byte
    const void *const *params;
    const Operand *operands() const { return reinterpret_cast<const Operand *>(this + 1); }
};

struct Runtime;

struct Vector {  // of one call, of a ragged input: rows slots[0], slots[1], ..
    char *base;
    const int32_t *slots;
    int64_t size;
    template <class T>
    T *row(int64_t numel, int64_t j) const {
        return reinterpret_cast<T *>(base) + numel * slots[j];
    }
};

struct Tile {  // some rows of one step; at[x][r] is row r of input, output or buffer x, in this
               // order; of a buffer along vectors its first row
    int64_t rows, first;
    char *const *const *at;
    const void *const *params;
    const Operand *operands;
    uint8_t *bad;
    const Runtime *runtime;
    template <class T>
    T *row(int64_t x, int64_t r) const {
        return reinterpret_cast<T *>(at[x][r]);
    }
    Vector vector(int64_t x, int64_t r) const {
        const Operand &o = operands[x];
        const int32_t begin = o.offsets[first + r];
        return {o.base, o.slots + begin, o.offsets[first + r + 1] - begin};
    }
    template <class T>
    const T *param(int64_t p) const {
        return static_cast<const T *>(params[p]);
    }
};

typedef void (*Stage)(const Tile &, int64_t part, int64_t parts);

struct Kernel {
    int64_t num_inputs, num_outputs, num_buffers;
    const int64_t *row_bytes;  // of inputs (ragged: 0), outputs, buffers
    const int64_t *vectors;    // of buffers: the ragged input along which there is a row a position,
                               // or -1
    int64_t num_stages;
    const Stage *stages;
    int64_t max_tile;             // rows that share scratch
    double row_ns, weight_bytes;  // estimated cost of a row, and what a step must read at least
};

struct bf16 {  // the upper half of a float
    uint16_t bits;
};

struct Runtime {
    void (*gemm_f32)(const float *const *, int64_t, const float *, const float *, float *const *,
                     int64_t, int64_t, int64_t, int64_t);
    void (*gemm_f64)(const double *const *, int64_t, const double *, const double *,
                     double *const *, int64_t, int64_t, int64_t, int64_t);
    void (*gemm_bf16)(const Runtime *, const float *const *, int64_t, const bf16 *, const float *,
                      float *const *, int64_t, int64_t, int64_t, int64_t);
    void (*gemm_i8)(const Runtime *, const float *const *, int64_t, const int8_t *, const float *,
                    float *const *, int64_t, int64_t, int64_t, int64_t);
};

// ---- Splitting a stage between threads

struct Range {
    int64_t begin, end;
};

static inline Range split(int64_t n, int64_t part, int64_t parts, int64_t unit = 1) {
    int64_t units = (n + unit - 1) / unit, begin = units * part / parts * unit,
            end = units * (part + 1) / parts * unit;
    return {begin, end < n ? end : n};
}

struct Share {  // of a map: some of the rows, or of all rows some of the points
    Range rows, points;
    Share(int64_t n, int64_t size, int64_t part, int64_t parts)
        : rows(n < parts ? Range{0, n} : split(n, part, parts)),
          points(n < parts ? split(size, part, parts, 16) : Range{0, size}) {}
};

// ---- Products: out rows [m, N] = x rows [m, K] @ packed weight + bias

#if defined(__AVX512F__)
enum { VBYTES = 64, MR = 6, NV = 4 };
#elif defined(__AVX__)
enum { VBYTES = 32, MR = 6, NV = 2 };
#elif defined(__aarch64__)
enum { VBYTES = 16, MR = 6, NV = 4 };
#else
enum { VBYTES = 16, MR = 4, NV = 2 };
#endif
enum { CHUNK = 48, DEPTH = 1024 };  // rows, and depth, that one panel is used for while it is in L2

template <class T>
constexpr int64_t panel_columns() {
    return NV * VBYTES / int64_t(sizeof(T));
}

static inline void gemm(const Runtime *rt, const float *const *a, int64_t m, const float *w,
                        const float *bias, float *const *c, int64_t k, int64_t n, Range p) {
    rt->gemm_f32(a, m, w, bias, c, k, n, p.begin, p.end);
}
static inline void gemm(const Runtime *rt, const double *const *a, int64_t m, const double *w,
                        const double *bias, double *const *c, int64_t k, int64_t n, Range p) {
    rt->gemm_f64(a, m, w, bias, c, k, n, p.begin, p.end);
}
static inline void gemm(const Runtime *rt, const float *const *a, int64_t m, const bf16 *w,
                        const float *bias, float *const *c, int64_t k, int64_t n, Range p) {
    rt->gemm_bf16(rt, a, m, w, bias, c, k, n, p.begin, p.end);
}
static inline void gemm(const Runtime *rt, const float *const *a, int64_t m, const int8_t *w,
                        const float *bias, float *const *c, int64_t k, int64_t n, Range p) {
    rt->gemm_i8(rt, a, m, w, bias, c, k, n, p.begin, p.end);
}

struct Matrix {  // `count` rows of a view of row operand x: the i-th begins at offset + i * stride
    int64_t x, offset, count, stride;
};

template <class T, class B = T>  // B: of the weight
static inline void product(const Tile &t, Matrix x, int64_t depth, int64_t columns, int64_t weight,
                           int64_t bias, int64_t out, int64_t part, int64_t parts) {
    Range panels = split((columns + panel_columns<T>() - 1) / panel_columns<T>(), part, parts);
    const T *a[CHUNK];
    T *c[CHUNK];
    int64_t total = t.rows * x.count, r = 0, i = 0;
    while (total > 0) {
        int64_t m = 0;
        for (; m < CHUNK && m < total; ++m) {
            a[m] = t.row<const T>(x.x, r) + x.offset + i * x.stride;
            c[m] = t.row<T>(out, r) + i * columns;
            if (++i == x.count) i = 0, ++r;
        }
        total -= m;
        gemm(t.runtime, a, m, t.param<B>(weight), bias < 0 ? nullptr : t.param<T>(bias), c, depth,
             columns, panels);
    }
}

// ---- Ragged vectors of rows: out[r] = op over rows slots[offsets[r]:offsets[r + 1]] of input x

template <class Op, class T, class O>
static inline void ragged(const Tile &t, int64_t x, int64_t size, int64_t out, bool mean, bool some,
                          Range share) {
    const Operand &rows = t.operands[x];
    for (int64_t r = share.begin; r < share.end; ++r) {
        const int64_t begin = rows.offsets[t.first + r], end = rows.offsets[t.first + r + 1];
        O *__restrict y = t.row<O>(out, r);
        for (int64_t i = 0; i < size; ++i)
            y[i] = some && begin == end ? O(0) : Op::template first<O>();
        if (some && begin == end) t.bad[r] = 1;
        for (int64_t j = begin; j < end; ++j) {
            const T *__restrict row = reinterpret_cast<const T *>(rows.base) + size * rows.slots[j];
            for (int64_t i = 0; i < size; ++i)
                y[i] = Op::template join<O>(y[i], Op::template from<O>(row[i]));
        }
        if (mean)
            for (int64_t i = 0; i < size; ++i) y[i] = y[i] / O(end - begin);
    }
}

}  // namespace cellc
