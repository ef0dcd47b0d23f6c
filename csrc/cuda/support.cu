// Whether the kernels run on a GPU: the driver must be new enough, and the module must have code for
// the GPU.

#include <algorithm>
#include <sstream>

#include "launch.h"

namespace npc::cuda {
namespace {

// The oldest CUDA version that a driver must support: the major version of the runtime that is
// linked in, and at least 12.1, because kernels have more than 4 KB of arguments.
constexpr int kNeededDriver = std::max(12010, CUDART_VERSION / 1000 * 1000);

// The first driver of that version, where its number is known.
const char* needed_driver_name() { return kNeededDriver == 12010 ? "530" : kNeededDriver == 13000 ? "580" : ""; }

// As in "13.0".
std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// As in "sm_80, sm_90+PTX", from "80 90+PTX".
std::string listed(const std::string& archs) {
  std::istringstream words(archs);
  std::string result;
  for (std::string arch; words >> arch;) result += (result.empty() ? "sm_" : ", sm_") + arch;
  return result;
}

std::string arch_of(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "reading a GPU's architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "reading a GPU's architecture");
  return std::to_string(major) + std::to_string(minor);
}

// Both calls look up the kernel for the current device, and load it if loading is lazy.
cudaError_t find_kernel(const void* kernel) {
  cudaFuncAttributes attributes = {};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  int blocks = 0;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
}

// Whether code compiled for this GPU would have been found.
bool lacks_code(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled: return true;
    default: return false;
  }
}

}  // namespace

Versions versions() {
  Versions result{CUDART_VERSION, 0, kNeededDriver, needed_driver_name()};
  if (cudaDriverGetVersion(&result.driver) != cudaSuccess) cudaGetLastError();
  return result;
}

std::string why_not_with_this_driver() {
  const Versions here = versions();
  if (here.driver >= here.needed_driver) return "";
  const std::string name = here.needed_driver_name;
  return (here.driver == 0 ? "there is no NVIDIA driver"
                           : "the NVIDIA driver supports CUDA " + dotted(here.driver) + " at most") +
         ", but the kernels were compiled with CUDA " + dotted(here.runtime) + " and need a driver for CUDA " +
         dotted(here.needed_driver) + " or newer" + (name.empty() ? "" : " (driver " + name + " or newer)") +
         "; update the driver" +
         (here.needed_driver > 12010 ? ", or compile npc_ext with an older toolkit (NPC_EXT_NVCC=/path/to/nvcc): CUDA "
                                       "12.1 or newer, whose kernels need driver 530 or newer"
                                     : "");
}

Obstacle why_not_on(int device, const std::string& archs) {
  if (const std::string reason = why_not_with_this_driver(); !reason.empty()) return {reason, false};
  try {
    const RelaxedCapture relaxed;  // loading a kernel may allocate
    const OnDevice guard(device);
    const cudaError_t error = find_kernel(any_kernel());
    if (error == cudaSuccess) return {"", false};
    cudaGetLastError();  // clears it, so that no later call reports it
    if (!lacks_code(error)) check(error, "looking for a kernel");
    const std::string arch = arch_of(device);
    return {"the module has code for " + listed(archs) + ", but GPU " + std::to_string(device) + " is sm_" + arch +
                " (" + cudaGetErrorName(error) + ")",
            true};
  } catch (const std::runtime_error& error) {
    return {error.what(), false};
  }
}

}  // namespace npc::cuda
