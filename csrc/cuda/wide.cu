// Eqs. 3, 4 and 7 before the update. wide.h says of which layers, and how.

#include "wide.h"

#include <algorithm>

namespace npc::cuda {
namespace {

// By value in the kernel's arguments.
struct WideNetwork {
  const float* found_inf;
  WideLayers<32> wide;
};

__global__ void __launch_bounds__(kThreads, 2) wide_average_kernel(const __grid_constant__ WideNetwork network) {
  if (overflowed(network)) return;
  SumShared& shared = shared_memory<SumShared>();
  sum_chunks(network.wide, shared);
  grid_barrier();
  average_chunks(network.wide, shared);
}

void launch_wide(WideNetwork& network, Scratch& scratch, const Stream& stream) {
  if (network.wide.layer_count == 0) return;
  const int64_t chunks = network.wide.chunks();
  network.wide.sums = scratch.array<ChunkSum>(chunks);
  launch(wide_average_kernel, std::min<int64_t>(chunks, resident_blocks(wide_average_kernel)), true, stream, network);
  network.wide = {};
}

}  // namespace

void move_first(std::vector<Layer>& layers, const std::vector<bool>& first, const float* found_inf, Scratch& scratch,
                const Stream& stream) {
  WideNetwork network{found_inf, {}};
  for (size_t index = 0; index < layers.size(); ++index) {
    if (!first[index]) continue;
    layers[index].plasticity = scratch.array<float>(layers[index].neurons);
    network.wide.add(layers[index]);
    if (network.wide.layer_count == decltype(network.wide)::kLayers) launch_wide(network, scratch, stream);
  }
  launch_wide(network, scratch, stream);
}

}  // namespace npc::cuda
