// As much of CUDA C++ as the grid-stride kernels need to run on the CPU, one thread after another, built by g++:
//
//     g++ -std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -shared -fPIC -include cuda_shim.h -x c++ exports.cpp
//
// where exports.cpp includes the .cu file and says SHIM_EXPORT(name) for each kernel. No __syncthreads, no __shared__.
#pragma once
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <thread>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) float4 { float x, y, z, w; };

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

// With -ffp-contract=off each of these rounds once, as on the GPU.
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }

static inline void __nanosleep(unsigned ns) { std::this_thread::sleep_for(std::chrono::nanoseconds(ns)); }
static inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// The threads of a launch run one after another; those of another lane of the exchange run beside them.
template <class T>
static inline T atomicAdd(T* address, T value)
{
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

namespace shim {

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<A*>(arguments[I])...);
}

// arguments[i] is the address of the i-th argument: the convention of cuLaunchKernel.
template <class... A>
void launch(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments)
{
    gridDim = dim3{grid};
    blockDim = dim3{block};
    for (unsigned b = 0; b < grid; ++b)
        for (unsigned t = 0; t < block; ++t) {
            blockIdx = dim3{b, 0, 0};
            threadIdx = dim3{t, 0, 0};
            call(kernel, arguments, std::index_sequence_for<A...>{});
        }
}

}  // namespace shim

#define SHIM_EXPORT(kernel) \
    extern "C" void launch_##kernel(unsigned grid, unsigned block, void** arguments) \
    { \
        shim::launch(kernel, grid, block, arguments); \
    }
