// The alternating direction method of multipliers, one exchange. What all kernels assume of n, alignment and rounding,
// and what nonfinite is, stands in vectors.cuh.

// admm: l <- l - (x - c);  x <- ((x - lr g) + lr rho (l + c)) / (1 + lr rho);  c <- c + ((x - l) - y) / p;  y <- x - l
// where x - l is not finite: x <- c, l <- x - y, c <- c + (y - y) / p, y stays, counted
// l is the multiplier, p the workers as float32; lr rho and 1 + lr rho are rounded to float32, one after the other
//
// x, multiplier: read and written.   c: read and written, may be mapped host memory.   y: read and written, what this
// worker last brought to the center.   g: read.   36 bytes per element; bound by the slower memory.

extern "C" __global__ void admm(float* x, float* c, float* multiplier, float* y, const float* g, const float lr,
                                const float rho, const float workers, const Count n, Count* nonfinite)
{
    const float weight = __fmul_rn(lr, rho), total = __fadd_rn(1.0f, weight);
    Count refused = 0;
    const auto one = [&](float& x, float& c, float& l, float& y, const float g) {
        l = __fsub_rn(l, __fsub_rn(x, c));
        x = __fdiv_rn(__fadd_rn(__fsub_rn(x, __fmul_rn(lr, g)), __fmul_rn(weight, __fadd_rn(l, c))), total);
        float brought = __fsub_rn(x, l);
        if (!is_finite(brought)) {
            x = c;
            l = __fsub_rn(x, y);
            brought = y;
            ++refused;
        }
        c = __fadd_rn(c, __fdiv_rn(__fsub_rn(brought, y), workers));
        y = brought;
    };
    for_each(n, one, Updated{x}, Updated{c}, Updated{multiplier}, Updated{y}, Read{g});
    add_refused(nonfinite, refused);
}
