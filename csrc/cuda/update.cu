// Eqs. 3, 4, 7 and the weight update of a whole network in one launch; update.h says how.

#include "network.h"

namespace npc::cuda {
namespace {

using SmallNetwork = Network<24, 12>;
using LargeNetwork = Network<210, 70>;

template <class N>
__global__ void __launch_bounds__(kThreads, 3) update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  update_item(network, blockIdx.x, shared_memory<UpdateShared>());
}

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(update_kernel<SmallNetwork>); }

void launch_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  launch_parts<SmallNetwork, LargeNetwork>(params, stream, [&](const auto& network) {
    launch(update_kernel<std::decay_t<decltype(network)>>, network.items, false, stream, network);
  });
}

}  // namespace npc::cuda
