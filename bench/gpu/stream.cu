// The ceiling: a kernel that reads some arrays, writes some, in place or elsewhere, and does next to
// nothing else. No kernel with the same mix of reads and writes should be faster.
//
// A block moves kPacks * 256 packs of 16 bytes of each array. A thread has all its loads in flight
// before it stores.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256, kMostArrays = 8;

struct Arrays {
  float4* at[kMostArrays];
  int first_written;  // 0: in place
};

template <int kReads, int kWrites, int kPacks>
__global__ void __launch_bounds__(kThreads) stream_kernel(Arrays arrays, int64_t packs, float* never) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kPacks * kThreads) + threadIdx.x;
  float4 read[kPacks][kReads];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      const int64_t at = first + k * kThreads;
      read[k][r] = at < packs ? arrays.at[r][at] : float4{};
    }
  }
  constexpr float share = 1.0f / kReads;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float4 mean{};
#pragma unroll
    for (int r = 0; r < kReads; ++r) {
      mean.x += share * read[k][r].x;
      mean.y += share * read[k][r].y;
      mean.z += share * read[k][r].z;
      mean.w += share * read[k][r].w;
    }
    const int64_t at = first + k * kThreads;
#pragma unroll
    for (int w = 0; w < kWrites; ++w) {
      if (at < packs) arrays.at[arrays.first_written + w][at] = mean;
    }
    sum += mean.x + mean.y + mean.z + mean.w;
  }
  if (kWrites == 0 && sum == 1e30f) *never = sum;  // keeps the loads from being optimized away
}

template <int kReads, int kWrites, int kPacks>
int launch(const Arrays& arrays, int64_t packs, float* never, cudaStream_t stream) {
  const int64_t per_block = int64_t{kPacks} * kThreads;
  stream_kernel<kReads, kWrites, kPacks>
      <<<static_cast<unsigned>((packs + per_block - 1) / per_block), kThreads, 0, stream>>>(arrays, packs, never);
  return static_cast<int>(cudaGetLastError());
}

template <int kReads, int kWrites>
int launch_packs(int per_thread, const Arrays& arrays, int64_t packs, float* never, cudaStream_t stream) {
  switch (per_thread) {
    case 1: return launch<kReads, kWrites, 1>(arrays, packs, never, stream);
    case 2: return launch<kReads, kWrites, 2>(arrays, packs, never, stream);
    case 4: return launch<kReads, kWrites, 4>(arrays, packs, never, stream);
    default: return -1;
  }
}

}  // namespace

// Reads the first `reads` arrays, of `packs` times 16 bytes each, and writes the mean of what it read
// to `writes` arrays, from number `first_written` on. Returns 0, a CUDA error, or -1 if there is no
// such mix.
extern "C" int npc_bench_stream(int reads, int writes, int first_written, int per_thread, float* const* arrays,
                                int64_t packs, float* never, void* stream) {
  if (reads < 1 || writes < 0 || first_written < 0 || first_written + writes > kMostArrays) return -1;
  Arrays pointers{};
  const int count = first_written + writes > reads ? first_written + writes : reads;
  for (int i = 0; i < count; ++i) pointers.at[i] = reinterpret_cast<float4*>(arrays[i]);
  pointers.first_written = first_written;
  const auto on = static_cast<cudaStream_t>(stream);
  if (reads == 2 && writes == 0) return launch_packs<2, 0>(per_thread, pointers, packs, never, on);
  if (reads == 1 && writes == 1) return launch_packs<1, 1>(per_thread, pointers, packs, never, on);
  if (reads == 2 && writes == 1) return launch_packs<2, 1>(per_thread, pointers, packs, never, on);
  if (reads == 3 && writes == 2) return launch_packs<3, 2>(per_thread, pointers, packs, never, on);
  if (reads == 4 && writes == 3) return launch_packs<4, 3>(per_thread, pointers, packs, never, on);
  return -1;
}
