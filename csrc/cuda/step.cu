// A whole NPC step in one cooperative launch: eq. 2 of every layer, a barrier for the whole device, and then eqs. 3, 4,
// 7 and the weight update. importance.h and update.h hold the two halves.

#include "importance.h"
#include "network.h"

namespace npc::cuda {
namespace {

using StepNetwork = Network<120, 36>;

struct NetworkStep {
  StepNetwork network;
  int64_t blocks[StepNetwork::kLayers + 1];  // of eq. 2, counted up through the layers
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
    if (w.packed) importance_block<Layout::rows, false, Pack<T>, T>(w, block, shared);
    else importance_block<Layout::rows, false, Single<T>, T>(w, block, shared);
  } else {
    if (w.packed) importance_block<Layout::columns, false, Pack<T>, T>(w, block, shared);
    else importance_block<Layout::columns, false, Single<T>, T>(w, block, shared);
  }
}

__device__ __forceinline__ void importance_of_all(const NetworkStep& step, ImportanceShared& shared) {
  int layer = 0;
  for (int64_t block = blockIdx.x; block < step.blocks[step.network.layer_count]; block += gridDim.x) {
    while (block >= step.blocks[layer + 1]) ++layer;
    const ImportanceWork& work = step.importance[layer];
    const int64_t own = block - step.blocks[layer];
    switch (work.params.dtype) {
      case DType::float32: importance_typed<float>(work, own, shared); break;
      case DType::float16: importance_typed<__half>(work, own, shared); break;
      default: importance_typed<__nv_bfloat16>(work, own, shared); break;
    }
    __syncthreads();  // shared memory may be written again
  }
}

__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ NetworkStep step) {
  if (overflowed(step.network)) return;
  StepShared& shared = shared_memory<StepShared>();
  importance_of_all(step, shared.importance);
  grid_barrier();
  for (int64_t item = blockIdx.x; item < step.network.items; item += gridDim.x) {
    update_item(step.network, item, shared.update);
  }
}

// Describes a part of a network, whose layers are all measured, and takes its scratch.
NetworkStep describe_step(const ImportanceParams* inputs, const UpdateParams& params, const Part& part,
                          int64_t resident, Scratch& scratch) {
  NetworkStep step{};
  StepNetwork& network = step.network;
  network = describe<StepNetwork>(params, part, resident);
  network.arrived = scratch.counters(network.layer_count);
  const int64_t blocks = int64_t{kBlocksPerProcessor} * processors();  // as in launch_importance(): the same bits
  for (int layer = 0; layer < network.layer_count; ++layer) {
    step.blocks[layer + 1] = step.blocks[layer];
    if (!part.moves_average[layer]) continue;
    ImportanceWork& work = step.importance[layer];
    work = divide_importance(inputs[part.layers[layer]], blocks);
    work.arrived = scratch.counters(work.partial_sums() > 0 ? work.tiles : 0);
    work.partial = scratch.floats(work.partial_sums());
    float* measured = scratch.floats(work.params.neurons);
    network.layers[layer].measured = measured;
    work.params.out = measured;
    step.blocks[layer + 1] += work.blocks();
  }
  return step;
}

}  // namespace

int64_t launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, const Stream& stream,
                            const Workspace& workspace) {
  const OnDevice guard(stream.device);
  const int64_t resident = resident_blocks(step_kernel);
  // Every layer is measured; describe_step() says where its sums will be.
  std::vector<LayerParams> layers(params.layers, params.layers + params.layer_count);
  for (LayerParams& layer : layers) layer.measured = layer.importance;
  UpdateParams measured = params;
  measured.layers = layers.data();

  Scratch scratch(workspace);
  std::vector<NetworkStep> steps;
  for (const Part& part : divide_network<StepNetwork>(measured)) {
    steps.push_back(describe_step(inputs, measured, part, resident, scratch));
  }
  // All scratch is there before the first launch, so that a step is done as a whole or not at all.
  if (scratch.missing()) return scratch.needed();
  for (const NetworkStep& step : steps) {
    const int64_t blocks = std::max(step.network.items, step.blocks[step.network.layer_count]);
    if (blocks > 0) launch(step_kernel, std::min(blocks, resident), true, stream, step);
  }
  return 0;
}

}  // namespace npc::cuda
