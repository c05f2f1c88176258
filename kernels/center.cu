// What moves the center, or prepares what will, outside elastic averaging: pushes, momentum at the center, averages.
// What all kernels assume of n, alignment and rounding, and what nonfinite is, stands in vectors.cuh.

// push: c <- c + v;  x <- c;  v <- 0;  where v is not finite: c <- c + 0, counted
//
// c: read and written, may be mapped host memory.   x: write only.   v: read and written.
// 20 bytes per element; bound by the slower memory.

extern "C" __global__ void push(float* c, float* x, float* v, const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& c, float& x, float& v) {
        const bool finite = is_finite(v);
        refused += !finite;
        c = __fadd_rn(c, finite ? v : 0.0f);
        x = c;
        v = 0.0f;
    };
    for_each(n, one, Updated{c}, Written{x}, Updated{v});
    add_refused(nonfinite, refused);
}

// nesterov_at_center: v <- momentum v - lr g;  c <- (c - lr g) + momentum v;  x <- c
// where g is not finite: v and c stay, counted
//
// c: read and written, may be mapped host memory.   v: likewise.   x: write only.   g: read.
// 24 bytes per element; bound by the slower memory.

extern "C" __global__ void nesterov_at_center(float* c, float* v, float* x, const float* g, const float lr,
                                              const float momentum, const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& c, float& v, float& x, const float g) {
        if (is_finite(g)) {
            const float step = __fmul_rn(lr, g);
            v = __fsub_rn(__fmul_rn(momentum, v), step);
            c = __fadd_rn(__fsub_rn(c, step), __fmul_rn(momentum, v));
        } else {
            ++refused;
        }
        x = c;
    };
    for_each(n, one, Updated{c}, Updated{v}, Written{x}, Read{g});
    add_refused(nonfinite, refused);
}

// heavy_ball: v <- momentum v + g;  c <- c - lr v;  where g is not finite: v and c stay, counted
//
// c: read and written, may be mapped host memory.   v: likewise.   g: read.
// 20 bytes per element; bound by the slower memory.

extern "C" __global__ void heavy_ball(float* c, float* v, const float* g, const float lr, const float momentum,
                                      const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& c, float& v, const float g) {
        if (is_finite(g)) {
            v = __fadd_rn(__fmul_rn(momentum, v), g);
            c = __fsub_rn(c, __fmul_rn(lr, v));
        } else {
            ++refused;
        }
    };
    for_each(n, one, Updated{c}, Updated{v}, Read{g});
    add_refused(nonfinite, refused);
}

// nesterov_ball: v <- momentum v + g;  c <- c - lr (g + momentum v);  where g is not finite: v and c stay, counted
//
// c: read and written, may be mapped host memory.   v: likewise.   g: read.
// 20 bytes per element; bound by the slower memory.

extern "C" __global__ void nesterov_ball(float* c, float* v, const float* g, const float lr, const float momentum,
                                         const Count n, Count* nonfinite)
{
    Count refused = 0;
    const auto one = [&](float& c, float& v, const float g) {
        if (is_finite(g)) {
            v = __fadd_rn(__fmul_rn(momentum, v), g);
            c = __fsub_rn(c, __fmul_rn(lr, __fadd_rn(g, __fmul_rn(momentum, v))));
        } else {
            ++refused;
        }
    };
    for_each(n, one, Updated{c}, Updated{v}, Read{g});
    add_refused(nonfinite, refused);
}

// average: z <- (1 - a) z + a c        1 - a is rounded to float32
//
// z: read and written, may be mapped host memory.   c: read, likewise.
// 12 bytes per element; bound by the slower memory.

extern "C" __global__ void average(float* z, const float* c, const float a, const Count n)
{
    const float old = __fsub_rn(1.0f, a);
    const auto one = [&](float& z, const float c) { z = __fadd_rn(__fmul_rn(old, z), __fmul_rn(a, c)); };
    for_each(n, one, Updated{z}, Read{c});
}

// add: y <- y + x
//
// y: read and written, may be mapped host memory.   x: read.
// 12 bytes per element; bound by the slower memory.

extern "C" __global__ void add(float* y, const float* x, const Count n)
{
    const auto one = [&](float& y, const float x) { y = __fadd_rn(y, x); };
    for_each(n, one, Updated{y}, Read{x});
}

// subtract: y <- y - x
//
// y: read and written.   x: read.   12 bytes per element; bound by device memory.

extern "C" __global__ void subtract(float* y, const float* x, const Count n)
{
    const auto one = [&](float& y, const float x) { y = __fsub_rn(y, x); };
    for_each(n, one, Updated{y}, Read{x});
}

// copy: y <- x
//
// y: write only.   x: read.   Both may be mapped host memory.   8 bytes per element; bound by the slower memory.

extern "C" __global__ void copy(float* y, const float* x, const Count n)
{
    const auto one = [&](float& y, const float x) { y = x; };
    for_each(n, one, Written{y}, Read{x});
}

// fill: y <- value
//
// y: write only, may be mapped host memory.   4 bytes per element; bound by the slower memory.

extern "C" __global__ void fill(float* y, const float value, const Count n)
{
    const auto one = [&](float& y) { y = value; };
    for_each(n, one, Written{y});
}

// accumulate: x <- x - lr g;  v <- v - lr g, which a later push brings to the center
//
// x, v: read and written.   g: read.   20 bytes per element; bound by device memory.

extern "C" __global__ void accumulate(float* x, float* v, const float* g, const float lr, const Count n)
{
    const auto one = [&](float& x, float& v, const float g) {
        const float step = __fmul_rn(lr, g);
        x = __fsub_rn(x, step);
        v = __fsub_rn(v, step);
    };
    for_each(n, one, Updated{x}, Updated{v}, Read{g});
}
