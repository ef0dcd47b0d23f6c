// The CUDA runtime, and what depends on the GPU itself. The tests also compile the kernels for the
// CPU; then cuda_on_cpu.h in tests/ stands in for both.
#pragma once

#if defined(NPC_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <cuda/atomic>
#include <type_traits>

namespace npc::cuda {

constexpr int kThreads = 256;                             // in every block
constexpr int64_t kFirstBytes = int64_t{4} << 20;         // of a stream's workspace; more than most launches need
constexpr int64_t kFirstCaptureBytes = int64_t{1} << 20;  // of a workspace inside a CUDA graph

// The block's shared memory as a T, the same for all its threads.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The 16 bytes that one access moves between memory and registers.
struct alignas(16) Words {
  uint32_t at[4];
};

// Reads if `wanted`; otherwise `words` stays as it is. The compiler can neither split this access
// nor move it past another.
__device__ __forceinline__ void load_16_bytes_if(bool wanted, const void* from, Words& words) {
  asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %4, 0; @wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%5]; }"
               : "+r"(words.at[0]), "+r"(words.at[1]), "+r"(words.at[2]), "+r"(words.at[3])
               : "r"(static_cast<uint32_t>(wanted)), "l"(__cvta_generic_to_global(from))
               : "memory");
}

__device__ __forceinline__ void store_16_bytes(void* to, const Words& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.at[0]),
               "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3])
               : "memory");
}

// For two numbers in a word: all bits of those that are at most 0. NaN is not.
template <class T>
__device__ __forceinline__ uint32_t at_most_zero(uint32_t pair) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair numbers;
  memcpy(&numbers, &pair, sizeof(pair));
  return __hle2_mask(numbers, Pair{});
}

// Starts to bring the data at an address into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// Waits until every thread of a cooperative launch is here. What they wrote before is visible
// afterwards.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace npc::cuda
#endif
