// How all kernels are launched: on the given device and stream, with arguments by value, and with
// errors checked.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "../api.h"
#include "runtime.h"

namespace npc::cuda {

constexpr int kWarp = 32;

// Why the installed driver cannot run the kernels, and how to fix that; empty if it can.
std::string why_not_with_this_driver();

// One of the kernels; all are compiled for the same GPUs.
const void* any_kernel();

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that no later call reports it
  const std::string why = why_not_with_this_driver();
  throw std::runtime_error(std::string("npc_ext: ") + what + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error) + (why.empty() ? "" : "; " + why));
}

// While it lives, this thread may allocate memory even if a stream captures. The memory is no part
// of the graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "choosing the capture mode"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device the current one while it lives.
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

// The number of a kernel's blocks that the current device runs at the same time, which a
// cooperative launch may not exceed. Asking takes microseconds, so the answers are kept. Thread
// safe.
inline int resident_blocks(const void* kernel) {
  static std::mutex& mutex = *new std::mutex;  // never destroyed: host threads may still launch while the process ends
  static auto& known = *new std::map<std::pair<int, const void*>, int>;
  int device = 0;
  check(cudaGetDevice(&device), "reading the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device, kernel}];
  if (blocks == 0) {
    const RelaxedCapture relaxed;  // the first question loads the kernel, which may allocate
    int per_processor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0),
          "reading a kernel's size");
    blocks = per_processor * processors();
  }
  return blocks;
}

template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...)) {
  return resident_blocks(reinterpret_cast<const void*>(kernel));
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

}  // namespace npc::cuda
