// A whole NPC step in one cooperative launch: eq. 2 of every layer, a barrier of the whole grid,
// and then eqs. 3, 4, 7 and the weight update. importance.h and update.h have the two halves.

#include "importance.h"
#include "network.h"

namespace npc::cuda {
namespace {

using StepNetwork = Network<114, 34>;

struct NetworkStep {
  StepNetwork network;
  WideLayers<StepNetwork::kLayers> wide;
  int64_t blocks[StepNetwork::kLayers + 1];  // eq. 2's blocks before each layer, and of all
  ImportanceWork importance[StepNetwork::kLayers];
};
static_assert(sizeof(NetworkStep) <= kMostArguments);

struct StepShared {
  union {
    ImportanceShared importance;
    UpdateShared update;
  };
};

template <class T>
__device__ __forceinline__ void importance_typed(const ImportanceWork& w, int64_t block, ImportanceShared& shared) {
  if (w.layout == Layout::rows) {
    if (w.packed) importance_block<Layout::rows, false, Pack<T>>(w, block, shared);
    else importance_block<Layout::rows, false, Single<T>>(w, block, shared);
  } else {
    if (w.packed) importance_block<Layout::columns, false, Pack<T>>(w, block, shared);
    else importance_block<Layout::columns, false, Single<T>>(w, block, shared);
  }
}

__device__ __forceinline__ void importance_of_all(const NetworkStep& step, ImportanceShared& shared) {
  int layer = 0;
  for (int64_t block = blockIdx.x; block < step.blocks[step.network.layer_count]; block += gridDim.x) {
    while (block >= step.blocks[layer + 1]) ++layer;
    const ImportanceWork& work = step.importance[layer];
    const int64_t in_layer = block - step.blocks[layer];
    with_type(work.params.dtype, [&](auto number) { importance_typed<decltype(number)>(work, in_layer, shared); });
    __syncthreads();  // shared memory may be written again
  }
}

__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ NetworkStep step) {
  if (overflowed(step.network)) return;
  StepShared& shared = shared_memory<StepShared>();
  importance_of_all(step, shared.importance);
  grid_barrier();
  if (step.wide.layer_count > 0) {
    sum_chunks(step.wide, shared.update.sums);
    grid_barrier();
    average_chunks(step.wide, shared.update.sums);
    grid_barrier();
  }
  for (int64_t item = blockIdx.x; item < step.network.items; item += gridDim.x) {
    with_type(parameter_of(step.network, item).dtype, [&](auto number) {
      using T = decltype(number);
      update_item<Sgd, Kind<T, true, std::is_same_v<T, __nv_bfloat16>>>(step.network, item, shared.update);
    });
  }
}

// The scratch memory that a layer needs.
int64_t scratch_bytes(const LayerParams& layer, const ImportanceWork& work, bool moves_first) {
  return Scratch::bytes_of<float>(work.partial_sums()) + Scratch::bytes_of<float>(work.params.neurons) +
         (moves_first ? wide_scratch_bytes(layer) : 0);
}

// Describes a part of a network whose layers are all measured, and takes its scratch memory. works:
// eq. 2 of every layer. done: the layers that earlier launches measure, and whose C they move if it
// is moved before the update.
NetworkStep describe_step(const std::vector<ImportanceWork>& works, const UpdateParams& params,
                          const std::vector<Layer>& layers, std::vector<bool>& done, const Part& part, int64_t resident,
                          Scratch& scratch) {
  NetworkStep step{};
  StepNetwork& network = step.network;
  network = describe<StepNetwork>(params, layers, part, resident);
  network.arrived = scratch.counters(network.layer_count);
  for (int layer = 0; layer < network.layer_count; ++layer) {
    step.blocks[layer + 1] = step.blocks[layer];
    const int64_t index = part.layers[layer];
    if (done[index]) continue;
    done[index] = true;
    ImportanceWork& work = step.importance[layer];
    work = works[index];
    work.arrived = scratch.counters(work.partial_sums() > 0 ? work.tiles : 0);
    work.partial = scratch.array<float>(work.partial_sums());
    work.params.out = const_cast<float*>(layers[index].measured);
    step.blocks[layer + 1] += work.blocks();
    if (layers[index].plasticity != nullptr) step.wide.add(layers[index]);
  }
  step.wide.sums = scratch.array<ChunkSum>(step.wide.chunks());
  return step;
}

}  // namespace

void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  const int64_t resident = resident_blocks(step_kernel);
  const std::vector<Part> parts = divide_network<StepNetwork>(params, false);
  const std::vector<bool> first = layers_to_move_first(params, parts);
  std::vector<ImportanceWork> works;
  int64_t bytes = 0;
  for (int64_t layer = 0; layer < params.layer_count; ++layer) {
    works.push_back(divide_importance(inputs[layer]));
    bytes += scratch_bytes(params.layers[layer], works.back(), first[layer]);
  }

  // All scratch memory is allocated before the first launch, so that a step happens as a whole or
  // not at all.
  Scratch scratch(stream, bytes);
  std::vector<Layer> layers = layers_of(params);
  for (int64_t layer = 0; layer < params.layer_count; ++layer) {
    layers[layer].measured = scratch.array<float>(layers[layer].neurons);
    if (first[layer]) layers[layer].plasticity = scratch.array<float>(layers[layer].neurons);
  }
  std::vector<NetworkStep> steps;
  std::vector<bool> done(params.layer_count);
  for (const Part& part : parts) {
    steps.push_back(describe_step(works, params, layers, done, part, resident, scratch));
  }
  for (const NetworkStep& step : steps) {
    const int64_t blocks = std::max({step.network.items, step.blocks[step.network.layer_count], step.wide.chunks()});
    if (blocks > 0) launch(step_kernel, std::min(blocks, resident), true, stream, step);
  }
}

}  // namespace npc::cuda
