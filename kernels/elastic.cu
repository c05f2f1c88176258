// The arithmetic of elastic averaging, one kernel per line of the listings. No header is included: NVRTC compiles this
// text as it stands, and g++ compiles it with a shim in front. Common to every kernel of this file:
//
//   n      any number of elements, 0 too; the loops are grid-stride, so any one-dimensional grid and block will do.
//   bases  4-byte aligned. Where all of a kernel's are 16-byte aligned it moves 16 bytes an access, and one by one only
//          the last n mod 4 elements; otherwise it moves every element one by one.
//   bits   each operation rounds once, to nearest (no fma), so the result equals float32 arithmetic in NumPy bit for bit.
//   names  vectors that are written come before those that are only read. Written vectors overlap no other vector.

using Count = unsigned long long;

__device__ __forceinline__ Count first_index() { return static_cast<Count>(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ Count grid_stride() { return static_cast<Count>(gridDim.x) * blockDim.x; }

// How many float4 the vectors at these addresses may be moved as: n / 4 if every one is 16-byte aligned, else none.
// A null pointer, an absent vector, counts as aligned.
template <class... Pointers>
__device__ __forceinline__ Count count_of_fours(const Count n, const Pointers*... bases)
{
    const Count addresses = (reinterpret_cast<Count>(bases) | ...);
    return addresses % sizeof(float4) == 0 ? n / 4 : 0;
}

__device__ __forceinline__ float4* as_fours(float* vector) { return reinterpret_cast<float4*>(vector); }

__device__ __forceinline__ const float4* as_fours(const float* vector)
{
    return reinterpret_cast<const float4*>(vector);
}

__device__ __forceinline__ bool is_finite(const float value)
{
    return fabsf(value) <= 3.402823466e+38f;  // the largest float32; false for NaN
}

// pull: d <- alpha (x - c);  c <- c + d;  where d is not finite: d <- 0, x <- c, and nonfinite <- nonfinite + 1
//
// x: float32[n] on the device, written only where d is not finite.   d: float32[n] on the device, write only.
// c: float32[n], may be mapped host memory.   nonfinite: one counter on the device, the caller's to clear.
// 16 bytes per element (x read, c read and written, d written); bound by the slower memory.

__device__ __forceinline__ unsigned pull_one(float& x, float& c, float& d, const float alpha)
{
    d = __fmul_rn(alpha, __fsub_rn(x, c));
    const bool refused = !is_finite(d);
    if (refused) {
        d = 0.0f;
        x = c;
    }
    c = __fadd_rn(c, d);
    return refused;
}

extern "C" __global__ void pull(float* x, float* c, float* d, const float alpha, const Count n, Count* nonfinite)
{
    const Count fours = count_of_fours(n, x, c, d);
    Count refused = 0;
    for (Count i = first_index(); i < fours; i += grid_stride()) {
        float4 xs = as_fours(x)[i], cs = as_fours(c)[i], ds;
        const unsigned refused_here = pull_one(xs.x, cs.x, ds.x, alpha) + pull_one(xs.y, cs.y, ds.y, alpha)
                                    + pull_one(xs.z, cs.z, ds.z, alpha) + pull_one(xs.w, cs.w, ds.w, alpha);
        as_fours(c)[i] = cs;
        as_fours(d)[i] = ds;
        if (refused_here != 0) {
            as_fours(x)[i] = xs;
            refused += refused_here;
        }
    }
    for (Count i = 4 * fours + first_index(); i < n; i += grid_stride())
        refused += pull_one(x[i], c[i], d[i], alpha);
    if (refused != 0)
        atomicAdd(nonfinite, refused);
}

// descend: x <- (x - d) - lr g
//
// x: float32[n] on the device.   d: float32[n] on the device, or null for x <- x - lr g (x - 0 is x, to the bit).
// g: float32[n] on the device.   16 bytes per element, 12 without d; bound by device memory.

__device__ __forceinline__ float descended(const float x, const float d, const float g, const float lr)
{
    return __fsub_rn(__fsub_rn(x, d), __fmul_rn(lr, g));
}

extern "C" __global__ void descend(float* x, const float* d, const float* g, const float lr, const Count n)
{
    const Count fours = count_of_fours(n, x, d, g);
    for (Count i = first_index(); i < fours; i += grid_stride()) {
        const float4 gs = as_fours(g)[i];
        const float4 ds = d ? as_fours(d)[i] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        float4 xs = as_fours(x)[i];
        xs.x = descended(xs.x, ds.x, gs.x, lr);
        xs.y = descended(xs.y, ds.y, gs.y, lr);
        xs.z = descended(xs.z, ds.z, gs.z, lr);
        xs.w = descended(xs.w, ds.w, gs.w, lr);
        as_fours(x)[i] = xs;
    }
    for (Count i = 4 * fours + first_index(); i < n; i += grid_stride())
        x[i] = descended(x[i], d ? d[i] : 0.0f, g[i], lr);
}

// nesterov: v <- momentum v - lr g;  x <- (x - d) + v
//
// x, v: float32[n] on the device.   d: float32[n] on the device, or null for x <- x + v.
// g: float32[n] on the device.   24 bytes per element, 20 without d; bound by device memory.

__device__ __forceinline__ void nesterov_one(float& x, float& v, const float d, const float g, const float lr,
                                             const float momentum)
{
    v = __fsub_rn(__fmul_rn(momentum, v), __fmul_rn(lr, g));
    x = __fadd_rn(__fsub_rn(x, d), v);
}

extern "C" __global__ void nesterov(float* x, float* v, const float* d, const float* g, const float lr,
                                    const float momentum, const Count n)
{
    const Count fours = count_of_fours(n, x, v, d, g);
    for (Count i = first_index(); i < fours; i += grid_stride()) {
        const float4 gs = as_fours(g)[i];
        const float4 ds = d ? as_fours(d)[i] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        float4 xs = as_fours(x)[i], vs = as_fours(v)[i];
        nesterov_one(xs.x, vs.x, ds.x, gs.x, lr, momentum);
        nesterov_one(xs.y, vs.y, ds.y, gs.y, lr, momentum);
        nesterov_one(xs.z, vs.z, ds.z, gs.z, lr, momentum);
        nesterov_one(xs.w, vs.w, ds.w, gs.w, lr, momentum);
        as_fours(x)[i] = xs;
        as_fours(v)[i] = vs;
    }
    for (Count i = 4 * fours + first_index(); i < n; i += grid_stride())
        nesterov_one(x[i], v[i], d ? d[i] : 0.0f, g[i], lr, momentum);
}

// lookahead: y <- x + momentum v
// add_decay: g <- g + weight_decay x
//
// Both are add_scaled: out <- a + s b, where out may be a itself, element for element.
// out, a, b: float32[n] on the device.   12 bytes per element; bound by device memory.

__device__ __forceinline__ float plus_scaled(const float a, const float b, const float s)
{
    return __fadd_rn(a, __fmul_rn(s, b));
}

__device__ __forceinline__ void add_scaled(float* out, const float* a, const float* b, const float s, const Count n)
{
    const Count fours = count_of_fours(n, out, a, b);
    for (Count i = first_index(); i < fours; i += grid_stride()) {
        const float4 as = as_fours(a)[i], bs = as_fours(b)[i];
        as_fours(out)[i] = float4{plus_scaled(as.x, bs.x, s), plus_scaled(as.y, bs.y, s),
                                  plus_scaled(as.z, bs.z, s), plus_scaled(as.w, bs.w, s)};
    }
    for (Count i = 4 * fours + first_index(); i < n; i += grid_stride())
        out[i] = plus_scaled(a[i], b[i], s);
}

extern "C" __global__ void lookahead(float* y, const float* x, const float* v, const float momentum, const Count n)
{
    add_scaled(y, x, v, momentum, n);
}

extern "C" __global__ void add_decay(float* g, const float* x, const float weight_decay, const Count n)
{
    add_scaled(g, g, x, weight_decay, n);
}
