// AMSGrad at the center, for the rule that applies it to gradients of the past. What all kernels assume of n, alignment
// and rounding, and what nonfinite is, stands in vectors.cuh.

// As np.maximum: a NaN wins. Which zero wins over the other is left open.
__device__ __forceinline__ float larger(const float a, const float b) { return a >= b || a != a ? a : b; }

// amsgrad: m <- beta1 m + (1 - beta1) g;  v <- beta2 v + ((1 - beta2) g) g;  vhat <- max(vhat, v);
//          c <- c - (lr m) / (sqrt(vhat) + epsilon);  x <- c        1 - beta1 and 1 - beta2 are rounded to float32
// where ((1 - beta2) g) g is not finite: all but x stay, counted
//
// c: read and written, may be mapped host memory.   m, v, vhat: likewise; v and vhat are at least +0.
// x: write only.   g: read.   40 bytes per element; bound by the slower memory.

extern "C" __global__ void amsgrad(float* c, float* m, float* v, float* vhat, float* x, const float* g, const float lr,
                                   const float beta1, const float beta2, const float epsilon, const Count n,
                                   Count* nonfinite)
{
    const float new1 = __fsub_rn(1.0f, beta1), new2 = __fsub_rn(1.0f, beta2);
    Count refused = 0;
    const auto one = [&](float& c, float& m, float& v, float& vhat, float& x, const float g) {
        const float square = __fmul_rn(__fmul_rn(new2, g), g);
        if (is_finite(square)) {
            m = __fadd_rn(__fmul_rn(beta1, m), __fmul_rn(new1, g));
            v = __fadd_rn(__fmul_rn(beta2, v), square);
            vhat = larger(vhat, v);
            c = __fsub_rn(c, __fdiv_rn(__fmul_rn(lr, m), __fadd_rn(__fsqrt_rn(vhat), epsilon)));
        } else {
            ++refused;
        }
        x = c;
    };
    for_each(n, one, Updated{c}, Updated{m}, Updated{v}, Updated{vhat}, Written{x}, Read{g});
    add_refused(nonfinite, refused);
}
