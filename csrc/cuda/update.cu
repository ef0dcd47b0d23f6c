// Eqs. 3, 4, 7 and the weight update of a whole network in one launch; update.h says how.

#include "network.h"

namespace npc::cuda {
namespace {

using SmallNetwork = Network<24, 12>;
using LargeNetwork = Network<240, 80>;
static_assert(sizeof(LargeNetwork) <= kMostArguments);

template <class N>
__global__ void __launch_bounds__(kThreads, 3) update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  update_item(network, blockIdx.x, shared_memory<UpdateShared>());
}

template <class N>
void launch_part(const UpdateParams& params, const Part& part, int64_t blocks, unsigned* arrived,
                 const Stream& stream) {
  N network = describe<N>(params, part, blocks);
  network.arrived = arrived;
  if (network.items > 0) launch(update_kernel<N>, network.items, false, stream, network);
}

}  // namespace

int64_t launch_update(const UpdateParams& params, const Stream& stream, const Workspace& workspace) {
  const OnDevice guard(stream.device);
  Scratch scratch(workspace);
  unsigned* arrived = scratch.counters(LargeNetwork::kLayers);  // launches follow each other, so they can share
  if (scratch.missing()) return scratch.needed();
  const int64_t blocks = int64_t{kBlocksPerProcessor} * processors();
  for (const Part& part : divide_network<LargeNetwork>(params)) {
    fits<SmallNetwork>(part) ? launch_part<SmallNetwork>(params, part, blocks, arrived, stream)
                             : launch_part<LargeNetwork>(params, part, blocks, arrived, stream);
  }
  return 0;
}

}  // namespace npc::cuda
