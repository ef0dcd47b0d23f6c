// The CUDA runtime, and the few things of it that a host compiler can be taught: the tests compile the kernels for the
// CPU too, with a header of theirs in its place (tests/cuda_on_cpu).
#pragma once

#if defined(NPC_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cuda/atomic>

namespace npc::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int64_t kFirstBytes = int64_t{4} << 20;         // of a stream's workspace; more than most launches need
constexpr int64_t kFirstCaptureBytes = int64_t{1} << 20;  // of a workspace inside a CUDA graph

// The block's shared memory as a T, the same for all its threads.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// Waits until every thread of a cooperative launch is here; what they wrote before is visible after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace npc::cuda
#endif
