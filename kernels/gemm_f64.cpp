// Products of doubles, for cells that have some: few do, and compiling them takes as long as all else.
//
// Duty: compiled once a machine, when first wanted; runtime.cpp is told of it by cellc_use_f64.
#include "gemm.h"

using namespace cellc;

extern "C" {

void cellc_gemm_f64(const double *const *a, int64_t m, const double *w, const double *bias,
                    double *const *c, int64_t k, int64_t n, int64_t begin, int64_t end) {
    gemm(a, m, w, bias, c, k, n, begin, end);
}
void cellc_pack_f64(const double *w, int64_t k, int64_t n, double *out) { pack<double>(w, k, n, out); }
}
