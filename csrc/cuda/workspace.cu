// Allocates and keeps the workspaces that workspace.h describes.

#include "workspace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace npc::cuda {
namespace {

// Ids are unique in a process.
struct Capture {
  bool active;
  unsigned long long id;
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  if (error == cudaErrorStreamCaptureImplicit) {  // the default stream, which does not capture, while another one does
    cudaGetLastError();
    return {false, 0};
  }
  check(error, "asking whether a stream captures");
  if (status == cudaStreamCaptureStatusNone) return {false, 0};
  return {true, id};
}

// Sets the counters to zero. Inside a capture, the memset must run now and must not become a node
// of the graph. So it runs on a stream that depends on nothing, and this waits for it.
cudaError_t clear(void* data, cudaStream_t stream, const Capture& capture) {
  if (!capture.active) return cudaMemsetAsync(data, 0, kZeroedBytes, stream);
  cudaStream_t aside = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(data, 0, kZeroedBytes, aside);
  if (error == cudaSuccess) error = cudaStreamSynchronize(aside);
  cudaStreamDestroy(aside);
  return error;
}

struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;
  std::mutex turn;  // of the operations that use it
};

void* allocate(const Stream& stream, int64_t bytes, const Capture& capture) {
  const RelaxedCapture relaxed;
  void* data = nullptr;
  if (const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes)); error != cudaSuccess) {
    cudaGetLastError();  // clears it, so that no later call reports it
    throw std::runtime_error("npc_ext: cannot allocate " + std::to_string(bytes) + " bytes of scratch on GPU " +
                             std::to_string(stream.device) + " (" + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error) +
                             "); free memory there, for example with torch.cuda.empty_cache()");
  }
  if (const cudaError_t error = clear(data, static_cast<cudaStream_t>(stream.handle), capture); error != cudaSuccess) {
    cudaFree(data);
    check(error, "clearing scratch");
  }
  return data;
}

struct Workspaces {
  std::mutex mutex;
  std::map<std::tuple<int, void*, bool, unsigned long long>, Memory> newest;  // device, stream, capture
  std::map<int, int64_t> bytes;                                               // of all workspaces, by device
};

// Never destroyed: host threads may still launch while the process ends.
Workspaces& workspaces() {
  static Workspaces& all = *new Workspaces;
  return all;
}

}  // namespace

Workspace workspace_of(const Stream& stream, int64_t bytes) {
  const Capture capture = capture_of(static_cast<cudaStream_t>(stream.handle));
  Workspaces& all = workspaces();
  std::unique_lock<std::mutex> lock(all.mutex);
  Memory& newest = all.newest[{stream.device, stream.handle, capture.active, capture.id}];
  lock.unlock();  // the map never moves its elements
  std::unique_lock<std::mutex> turn(newest.turn);
  if (newest.bytes < bytes) {
    const int64_t first = capture.active ? kFirstCaptureBytes : kFirstBytes;
    const int64_t larger = std::max({bytes, first, 2 * newest.bytes});
    newest.data = allocate(stream, larger, capture);
    newest.bytes = larger;
    lock.lock();
    all.bytes[stream.device] += larger;
  }
  return {newest.data, newest.bytes, std::move(turn)};
}

int64_t workspace_bytes(int device) {
  Workspaces& all = workspaces();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.bytes.find(device);
  return found == all.bytes.end() ? 0 : found->second;
}

}  // namespace npc::cuda
