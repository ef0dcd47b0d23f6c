// For all kernels: types of numbers, sums over warps and blocks, and which block arrives last.
#pragma once

#include <cstdint>

#include "launch.h"
#include "packs.h"

namespace npc::cuda {

// Calls work() with a number of the given type: float, __half or __nv_bfloat16.
#pragma nv_exec_check_disable
template <class Work>
__host__ __device__ __forceinline__ auto with_type(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::float32: return work(float{});
    case DType::float16: return work(__half{});
    default: return work(__nv_bfloat16{});
  }
}

// The sum over `lanes` neighbouring threads of a warp (a power of two), in all of them. All threads
// of the warp call it.
template <class T>
__device__ __forceinline__ T sum_over_lanes(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

constexpr int kWarps = kThreads / kWarp;

// This thread's number in its block.
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// The sum over a block, always in the same order, for all of its threads. All threads call it;
// `scratch` is in shared memory.
template <class T>
__device__ __forceinline__ T sum_over_block(T value, T (&scratch)[kWarps]) {
  value = sum_over_lanes(value, kWarp);
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  __syncthreads();  // scratch may be used again
  return sum;
}

// Whether this is the last of `expected` arrivals at a counter, which then starts at 0 again. What
// the others did before they arrived happens before what the last one does afterwards. One thread
// of a block calls it for the block.
__device__ __forceinline__ bool arrive(unsigned* counter, unsigned expected) {
  ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device> arrived(*counter);
  const bool last = arrived.fetch_add(1, ::cuda::memory_order_acq_rel) + 1 == expected;
  if (last) arrived.store(0, ::cuda::memory_order_relaxed);
  return last;
}

// The same for everything that the block's threads did. All threads call it; `last` is in shared
// memory.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned expected, bool& last) {
  __syncthreads();
  if (thread() == 0) last = arrive(counter, expected);
  __syncthreads();
  return last;
}

}  // namespace npc::cuda
