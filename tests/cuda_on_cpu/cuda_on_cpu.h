// CUDA on the CPU, for the tests: implements what csrc/cuda uses of the CUDA runtime.
//
// Every thread of a block is a thread of the process if a sanitizer runs, and otherwise a fiber
// (threads.h). They meet at __syncthreads(), at shuffles and, in a cooperative launch, at the grid's
// barrier, and nowhere else. So the thread sanitizer sees a missing barrier, and the address sanitizer
// sees an index out of bounds. A block's shared memory is heap memory of its exact size, filled with
// garbage before each block. "Device memory" is the process's memory.
//
// An environment variable breaks the kernels, so that tests can show that the thread sanitizer
// objects: with CUDA_ON_CPU_WITHOUT_BARRIER_IN=name the barriers in the function of that name do
// nothing.
//
// Tests find the variables marked CUDA_ON_CPU_STATE by their names and set them: they describe the
// "GPU" and say whether streams capture. As on a GPU, a capture forbids allocations, unless the
// thread's capture mode is relaxed. A capture here runs kernels at once. Anything else that would
// become a node of the graph is an error, because npc_ext launches kernels only.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string_view>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::isfinite;
using std::isinf;

// ------------------------------------------------------------------------------------------------ blocks and barriers

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr int kProcessors = 2;
constexpr int kBlocksAtATime = 2;  // of a launch that is not cooperative; they share no barrier

struct Warp {
  Barrier barrier{kWarp};
  uint64_t lanes[kWarp];
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / kWarp) {}
  Barrier barrier;
  std::vector<Warp> warps;
  std::mutex mutex;
  std::unique_ptr<unsigned char[]> shared;
  const std::type_info* shared_type = nullptr;
};

inline thread_local Barrier* grid;

inline bool without_barrier(const char* function) {
  static const char* const name = std::getenv("CUDA_ON_CPU_WITHOUT_BARRIER_IN");
  return name != nullptr && std::string_view(function) == name;
}

inline void syncthreads(const char* function) {
  if (!without_barrier(function)) block->barrier.arrive_and_wait();
}

template <class T>
T shuffle_xor(T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned thread = threadIdx.x;
  Warp& warp = block->warps[thread / kWarp];
  std::memcpy(&warp.lanes[thread % kWarp], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  std::memcpy(&value, &warp.lanes[(thread % kWarp) ^ offset], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::syncthreads(__func__)
#define __shfl_xor_sync(mask, value, offset) cuda_on_cpu::shuffle_xor(value, offset)

// Variables that tests set and read. There are more below.
#define CUDA_ON_CPU_STATE __attribute__((used, visibility("default"))) inline
CUDA_ON_CPU_STATE std::atomic<long long> cuda_on_cpu_loads = 0;     // of 16 bytes, so far
CUDA_ON_CPU_STATE std::atomic<long long> cuda_on_cpu_launches = 0;  // of kernels, so far

namespace npc::cuda {

constexpr int kThreads = 64;  // two warps: enough for what goes on between warps
// Workspaces are as small as they can be, so that the address sanitizer sees an index beyond their
// end.
constexpr int64_t kFirstBytes = 0, kFirstCaptureBytes = 0;

template <class T>
T& shared_memory() {
  ::cuda_on_cpu::Block& block = *::cuda_on_cpu::block;
  const std::lock_guard<std::mutex> lock(block.mutex);
  if (block.shared_type == nullptr) {
    block.shared_type = &typeid(T);
    block.shared.reset(new unsigned char[sizeof(T)]);
    std::memset(block.shared.get(), 0xCB, sizeof(T));
  }
  return *reinterpret_cast<T*>(block.shared.get());
}

struct __attribute__((may_alias, aligned(16))) Words {
  uint32_t at[4];
};
inline void load_16_bytes_if(bool wanted, const void* from, Words& words) {
  if (!wanted) return;
  words = *static_cast<const Words*>(from);
  cuda_on_cpu_loads.fetch_add(1, std::memory_order_relaxed);
}
inline void store_16_bytes(void* to, const Words& words) { *static_cast<Words*>(to) = words; }

inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }

inline void grid_barrier() {
  if (!::cuda_on_cpu::without_barrier("grid_barrier")) ::cuda_on_cpu::grid->arrive_and_wait();
}

}  // namespace npc::cuda

namespace cuda {

enum thread_scope { thread_scope_device };
using std::memory_order_acq_rel;
using std::memory_order_relaxed;

template <class T, thread_scope>
struct atomic_ref : std::atomic_ref<T> {
  using std::atomic_ref<T>::atomic_ref;
};

}  // namespace cuda

// ------------------------------------------------------------------------------------------------------------- numbers

struct __half {
  _Float16 value;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 b) { return std::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits = std::bit_cast<uint32_t>(f);
  if (std::isnan(f)) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }

namespace npc::cuda {

template <class T>
uint32_t at_most_zero(uint32_t pair) {
  T numbers[2];
  std::memcpy(numbers, &pair, sizeof(pair));
  uint32_t bits = 0;
  for (int i = 0; i < 2; ++i) {
    float number;
    if constexpr (std::is_same_v<T, __half>) number = __half2float(numbers[i]);
    else number = __bfloat162float(numbers[i]);
    if (number <= 0.0f) bits |= 0xffffu << 16 * i;
  }
  return bits;
}

}  // namespace npc::cuda

// ------------------------------------------------------------------------------------------------------------- runtime

CUDA_ON_CPU_STATE unsigned long long cuda_on_cpu_capture = 0;  // the id of the capture that all streams are in, or 0
CUDA_ON_CPU_STATE long long cuda_on_cpu_free_bytes = -1;       // device memory that is left, -1: any amount
CUDA_ON_CPU_STATE int cuda_on_cpu_driver = 13000;              // the CUDA version that the driver supports
CUDA_ON_CPU_STATE int cuda_on_cpu_kernel_error = 0;            // a cudaError_t: looking for a kernel fails so

#define CUDART_VERSION 13000
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureImplicit = 906,
};
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum { cudaLaunchAttributeCooperative };
enum { cudaStreamNonBlocking = 1 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace cuda_on_cpu {

inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline char created_stream;  // the handle of every stream that is created: none of them captures

inline bool captures(cudaStream_t stream) { return cuda_on_cpu_capture != 0 && stream != &created_stream; }
inline bool forbids_unsafe_calls() { return cuda_on_cpu_capture != 0 && capture_mode != cudaStreamCaptureModeRelaxed; }

}  // namespace cuda_on_cpu

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    default: return "another error";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "another error";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = cuda_on_cpu_driver, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? cuda_on_cpu::kProcessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return static_cast<cudaError_t>(cuda_on_cpu_kernel_error);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, cuda_on_cpu::capture_mode), cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  *status = cuda_on_cpu::captures(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return *id = cuda_on_cpu_capture, cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = &cuda_on_cpu::created_stream, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return cuda_on_cpu::captures(stream) || cuda_on_cpu::forbids_unsafe_calls() ? cudaErrorStreamCaptureUnsupported
                                                                              : cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

// Heap memory of the exact size, filled with garbage.
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (cuda_on_cpu::forbids_unsafe_calls()) return cudaErrorStreamCaptureUnsupported;
  if (cuda_on_cpu_free_bytes >= 0 && static_cast<long long>(bytes) > cuda_on_cpu_free_bytes) {
    return cudaErrorMemoryAllocation;
  }
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xCB, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (cuda_on_cpu::captures(stream)) return cudaErrorStreamCaptureUnsupported;
  return std::memset(memory, value, bytes), cudaSuccess;
}

struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

// Runs the kernel and returns when it is done.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative;
  const int blocks = static_cast<int>(config->gridDim.x), threads = static_cast<int>(config->blockDim.x);
  const int at_a_time = cooperative ? blocks : std::min(blocks, cuda_on_cpu::kBlocksAtATime);
  if (cooperative && blocks > 2 * cuda_on_cpu::kProcessors) return cudaErrorCooperativeLaunchTooLarge;
  ++cuda_on_cpu_launches;
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  cuda_on_cpu::Barrier grid(at_a_time * threads);
  std::vector<std::unique_ptr<cuda_on_cpu::Block>> slots;
  for (int slot = 0; slot < at_a_time; ++slot) slots.push_back(std::make_unique<cuda_on_cpu::Block>(threads));
  cuda_on_cpu::run_threads(at_a_time * threads, [&](int index) {
    const int thread = index % threads;
    cuda_on_cpu::block = slots[index / threads].get();
    cuda_on_cpu::grid = &grid;
    threadIdx = dim3(thread, 0, 0);
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    for (int number = index / threads; number < blocks; number += at_a_time) {
      blockIdx = dim3(number, 0, 0);
      std::apply(kernel, copies);
      cuda_on_cpu::block->barrier.arrive_and_wait();
      if (thread == 0) cuda_on_cpu::block->shared_type = nullptr;  // the next block finds garbage again
      cuda_on_cpu::block->barrier.arrive_and_wait();
    }
  });
  return cudaSuccess;
}
