// How every kernel goes through its vectors. `source` puts this text in front of that of a .cu file, so none has to
// include it: NVRTC compiles the two as one, and so does g++, with a shim in front. Common to every kernel:
//
//   n          any number of elements, 0 too; the loops are grid-stride, so any one-dimensional grid and block will do.
//   bases      4-byte aligned. Where all of a kernel's are 16-byte aligned it moves 16 bytes an access, and one by one
//              only the last n mod 4 elements; otherwise it moves every element one by one.
//   bits       each operation rounds once, to nearest (no fma), so the result equals float32 arithmetic in NumPy to the
//              bit, but for the sign and payload of a NaN.
//   scalars    come as float32; what is derived from them, such as 1 - beta1, is rounded to float32 in the kernel.
//   arguments  vectors in the order of backend/cpu.py, one that may be null last; scalars; n; nonfinite.
//   vectors    float32[n] on the device; the center's may be mapped host memory. A written one overlaps no other.
//   nonfinite  one counter on the device, the caller's to clear: a guarded kernel adds how many elements it refused.

using Count = unsigned long long;

__device__ __forceinline__ Count first_index() { return static_cast<Count>(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ Count grid_stride() { return static_cast<Count>(gridDim.x) * blockDim.x; }

__device__ __forceinline__ bool is_finite(const float value)
{
    return fabsf(value) <= 3.402823466e+38f;  // the largest float32; false for NaN
}

// Once a thread, and only if it refused any, so that the threads of a launch do not queue at one address.
__device__ __forceinline__ void add_refused(Count* nonfinite, const Count refused)
{
    if (refused != 0)
        atomicAdd(nonfinite, refused);
}

// Vectors are moved in chunks: float4, or float where fours do not fit.

template <class Chunk>
__device__ __forceinline__ const Chunk* as(const float* vector)
{
    return reinterpret_cast<const Chunk*>(vector);
}

template <class Chunk>
__device__ __forceinline__ Chunk* as(float* vector)
{
    return reinterpret_cast<Chunk*>(vector);
}

__device__ __forceinline__ bool differ(const float a, const float b) { return a != b; }

__device__ __forceinline__ bool differ(const float4& a, const float4& b)
{
    return a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
}

// What a kernel does with a vector.

struct Read {
    const float* base;
    template <class Chunk> __device__ Chunk load(const Count i) const { return as<Chunk>(base)[i]; }
    template <class Chunk> __device__ void store(Count, const Chunk&, const Chunk&) const {}
};

struct Optional {  // read; zeros where the vector is absent, a null pointer
    const float* base;
    template <class Chunk> __device__ Chunk load(const Count i) const { return base ? as<Chunk>(base)[i] : Chunk{}; }
    template <class Chunk> __device__ void store(Count, const Chunk&, const Chunk&) const {}
};

struct Written {  // never read
    float* base;
    template <class Chunk> __device__ Chunk load(Count) const { return Chunk{}; }
    template <class Chunk> __device__ void store(const Count i, const Chunk&, const Chunk& now) const
    {
        as<Chunk>(base)[i] = now;
    }
};

struct Updated {  // read, then written
    float* base;
    template <class Chunk> __device__ Chunk load(const Count i) const { return as<Chunk>(base)[i]; }
    template <class Chunk> __device__ void store(const Count i, const Chunk&, const Chunk& now) const
    {
        as<Chunk>(base)[i] = now;
    }
};

struct Seldom {  // read, and written only where the chunk changed: a worker where it is refused
    float* base;
    template <class Chunk> __device__ Chunk load(const Count i) const { return as<Chunk>(base)[i]; }
    template <class Chunk> __device__ void store(const Count i, const Chunk& before, const Chunk& now) const
    {
        if (differ(now, before))
            as<Chunk>(base)[i] = now;
    }
};

template <class Chunk, class Use>
struct Held {
    Use use;
    Chunk before, now;
};

template <class Chunk, class Use>
__device__ __forceinline__ Held<Chunk, Use> held(const Use use, const Count i)
{
    const Chunk chunk = use.template load<Chunk>(i);
    return {use, chunk, chunk};
}

template <class One, class... Uses>
__device__ __forceinline__ void apply(const One& one, Held<float, Uses>&... chunks)
{
    one(chunks.now...);
}

template <class One, class... Uses>
__device__ __forceinline__ void apply(const One& one, Held<float4, Uses>&... chunks)
{
    one(chunks.now.x...);
    one(chunks.now.y...);
    one(chunks.now.z...);
    one(chunks.now.w...);
}

// All chunks are loaded before any is stored.
template <class One, class... Chunks>
__device__ __forceinline__ void process(const Count i, const One& one, Chunks... chunks)
{
    apply(one, chunks...);
    (chunks.use.store(i, chunks.before, chunks.now), ...);
}

// one(a, b, ...) for every element of the vectors a, b, ...
template <class One, class... Uses>
__device__ __forceinline__ void for_each(const Count n, const One& one, const Uses... vectors)
{
    const Count addresses = (reinterpret_cast<Count>(vectors.base) | ...);  // a null pointer counts as aligned
    const Count fours = addresses % sizeof(float4) == 0 ? n / 4 : 0;
    for (Count i = first_index(); i < fours; i += grid_stride())
        process(i, one, held<float4>(vectors, i)...);
    for (Count i = 4 * fours + first_index(); i < n; i += grid_stride())
        process(i, one, held<float>(vectors, i)...);
}
