// The arithmetic of elastic averaging, one kernel per line of the listings. What all kernels assume of n, alignment and
// rounding, and what nonfinite is, stands in vectors.cuh.

// d <- alpha (x - c), and whether this was refused for not being finite: then d <- 0 and x <- c.
__device__ __forceinline__ bool difference_refused(float& d, float& x, const float c, const float alpha)
{
    d = __fmul_rn(alpha, __fsub_rn(x, c));
    const bool refused = !is_finite(d);
    if (refused) {
        d = 0.0f;
        x = c;
    }
    return refused;
}

// pull: d <- alpha (x - c);  c <- c + d;  where d is not finite: d <- 0, x <- c, counted
//
// x: read, and written only where d is not finite.   c: read and written, may be mapped host memory.   d: write only.
// 16 bytes per element; bound by the slower memory.

extern "C" __global__ void pull(float* x, float* c, float* d, const float alpha, const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& x, float& c, float& d) {
        refused += difference_refused(d, x, c, alpha);
        c = __fadd_rn(c, d);
    };
    for_each(n, one, Seldom{x}, Updated{c}, Written{d});
    add_refused(nonfinite, refused);
}

// pull_center_first: c <- c + alpha (x - c);  d <- alpha (x - c), with the new c
// where either difference is not finite: it is 0, and x <- c, counted for each
//
// x: read, and written only where a difference is not finite.   c: read and written, may be mapped host memory.
// d: write only.   16 bytes per element; bound by the slower memory.

extern "C" __global__ void pull_center_first(float* x, float* c, float* d, const float alpha, const Count n,
                                             Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& x, float& c, float& d) {
        refused += difference_refused(d, x, c, alpha);
        c = __fadd_rn(c, d);
        refused += difference_refused(d, x, c, alpha);
    };
    for_each(n, one, Seldom{x}, Updated{c}, Written{d});
    add_refused(nonfinite, refused);
}

// pull_worker_first: x <- (x - alpha (x - c)) - lr g;  d <- alpha (x - c), with the new x;  c <- c + d
// where either difference is not finite: it is 0, and x <- c, counted for each
//
// x: read and written.   c: read and written, may be mapped host memory.   d: write only.   g: read.
// 24 bytes per element; bound by the slower memory.

extern "C" __global__ void pull_worker_first(float* x, float* c, float* d, const float* g, const float lr,
                                             const float alpha, const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& x, float& c, float& d, const float g) {
        refused += difference_refused(d, x, c, alpha);
        x = __fsub_rn(__fsub_rn(x, d), __fmul_rn(lr, g));
        refused += difference_refused(d, x, c, alpha);
        c = __fadd_rn(c, d);
    };
    for_each(n, one, Updated{x}, Updated{c}, Written{d}, Read{g});
    add_refused(nonfinite, refused);
}

// difference: d <- alpha (x - c);  where d is not finite: d <- 0, x <- c, counted
//
// d: write only.   x: read, and written only where d is not finite.   c: read, may be mapped host memory.
// 12 bytes per element; bound by the slower memory.

extern "C" __global__ void difference(float* d, float* x, const float* c, const float alpha, const Count n,
                                      Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& d, float& x, const float c) { refused += difference_refused(d, x, c, alpha); };
    for_each(n, one, Written{d}, Seldom{x}, Read{c});
    add_refused(nonfinite, refused);
}

// descend: x <- (x - d) - lr g
//
// x: read and written.   g: read.   d: read, or null for x <- x - lr g (x - 0 is x, to the bit).
// 16 bytes per element, 12 without d; bound by device memory.

extern "C" __global__ void descend(float* x, const float* g, const float* d, const float lr, const Count n)
{
    const auto one = [&](float& x, const float g, const float d) {
        x = __fsub_rn(__fsub_rn(x, d), __fmul_rn(lr, g));
    };
    for_each(n, one, Updated{x}, Read{g}, Optional{d});
}

// nesterov: v <- momentum v - lr g;  x <- (x - d) + v
//
// x, v: read and written.   g: read.   d: read, or null for x <- x + v.
// 24 bytes per element, 20 without d; bound by device memory.

extern "C" __global__ void nesterov(float* x, float* v, const float* g, const float* d, const float lr,
                                    const float momentum, const Count n)
{
    const auto one = [&](float& x, float& v, const float g, const float d) {
        v = __fsub_rn(__fmul_rn(momentum, v), __fmul_rn(lr, g));
        x = __fadd_rn(__fsub_rn(x, d), v);
    };
    for_each(n, one, Updated{x}, Updated{v}, Read{g}, Optional{d});
}

// lookahead: y <- x + momentum v
//
// y: write only.   x, v: read.   12 bytes per element; bound by device memory.

extern "C" __global__ void lookahead(float* y, const float* x, const float* v, const float momentum, const Count n)
{
    const auto one = [&](float& y, const float x, const float v) { y = __fadd_rn(x, __fmul_rn(momentum, v)); };
    for_each(n, one, Written{y}, Read{x}, Read{v});
}

// add_decay: g <- g + weight_decay x
//
// g: read and written.   x: read.   12 bytes per element; bound by device memory.

extern "C" __global__ void add_decay(float* g, const float* x, const float weight_decay, const Count n)
{
    const auto one = [&](float& g, const float x) { g = __fadd_rn(g, __fmul_rn(weight_decay, x)); };
    for_each(n, one, Updated{g}, Read{x});
}
