// The one way a kernel is launched: on the given device and stream, checked, with 64-bit arguments by value.
#pragma once

#include <stdexcept>
#include <string>

#include "../api.h"
#include "runtime.h"

namespace npc::cuda {

constexpr int kWarp = 32;
constexpr int kBlocksPerProcessor = 8;  // as many as work is divided for, on each multiprocessor

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else is told of it later
  throw std::runtime_error(std::string("npc_ext: ") + what + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// Makes a device the current one, and the previous one again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&previous_), "reading the current device");
    if (device != previous_) check(cudaSetDevice(device), "choosing the device");
    changed_ = device != previous_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "reading the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading a device's size");
  return count;
}

// How many blocks of a kernel the current device runs at the same time, which a cooperative launch may not exceed.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...)) {
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0), "reading a kernel's size");
  return per_processor * processors();
}

// `cooperative`: all blocks run at the same time and may meet in grid_barrier().
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, bool cooperative, const Stream& stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

// Takes a launch's scratch out of a workspace: counters, which are zero between launches, and floats.
class Scratch {
 public:
  explicit Scratch(const Workspace& workspace) : workspace_(workspace) {}

  unsigned* counters(int64_t count) {
    unsigned* first = static_cast<unsigned*>(workspace_.data) + counters_;
    counters_ += count;
    if (counters_ > kCounters) throw std::length_error("npc_ext: a launch needs more counters than there are");
    return first;
  }
  float* floats(int64_t count) {
    float* first = static_cast<float*>(workspace_.data) + kCounters + floats_;
    floats_ += (count + 3) / 4 * 4;  // each begins on 16 bytes
    return first;
  }
  bool missing() const { return workspace_.bytes < needed(); }
  int64_t needed() const { return (kCounters + floats_) * int64_t{sizeof(float)}; }

 private:
  static constexpr int64_t kCounters = kZeroedBytes / sizeof(unsigned);
  Workspace workspace_;
  int64_t counters_ = 0, floats_ = 0;
};

}  // namespace npc::cuda
