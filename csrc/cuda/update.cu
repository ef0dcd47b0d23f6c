// Eqs. 3, 4, 7 and SGD's step of a whole network in one launch. update.h says how.

#include "network.h"

namespace npc::cuda {
namespace {

using SmallNetwork = Network<24, 12>;
using LargeNetwork = Network<210, 70>;

template <class Kind, class N>
__global__ void __launch_bounds__(kThreads, Sgd<Kind>::kBlocks) update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  update_item<Sgd, Kind>(network, blockIdx.x, shared_memory<UpdateShared>());
}

struct SgdKernels {
  static constexpr bool kMomentum = true;
  template <class Kind, class N>
  static Kernel<N> get() {
    return update_kernel<Kind, N>;
  }
};

}  // namespace

const void* any_kernel() {
  return reinterpret_cast<const void*>(update_kernel<Kind<float, false, false>, SmallNetwork>);
}

void launch_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  launch_parts<SgdKernels, SmallNetwork, LargeNetwork>(params, stream);
}

}  // namespace npc::cuda
