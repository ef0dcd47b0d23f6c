// Layers whose C is moved before the update: those of very many neurons, and those whose parameters are in several
// launches.
//
// In update.h every block sums its layer's whole measured importance again, which costs little while that is small.
// A head of 128,000 neurons by 4,096 has 32,000 blocks: 16 GB out of the cache, beside 6.3 GB of memory traffic. So the
// importance of a layer above kWide neurons is summed once, and its C is moved before the update, in one cooperative
// launch: blocks sum chunks of kChunk neurons, meet, add up the sums of all chunks in the same order, and move the C of
// their chunks (eqs. 3 and 4). The update then could no longer tell which neurons this step freezes, so the launch also
// writes their plasticity (eq. 7), which the update reads. step.cu does the same within its launch; chunks do not
// depend on the number of blocks, so both give the same bits.
//
// A layer whose parameters are in several launches goes the same way, whatever its size.
//
// Traffic: 8 bytes a neuron for the sum and C read and written, from the cache the second time; 4 for its plasticity.
#pragma once

#include <vector>

#include "elements.h"
#include "layer.h"
#include "workspace.h"

namespace npc::cuda {

constexpr int64_t kWide = 4096;   // neurons: layers above have their C moved before
constexpr int64_t kChunk = 1024;  // neurons

// Chunks are counted through all layers.
template <int kLayers_>
struct WideLayers {
  static constexpr int kLayers = kLayers_;
  ChunkSum* sums;  // scratch, [chunks]
  int layer_count;
  int64_t first_chunk[kLayers + 1];  // of each layer, and the end
  Layer layers[kLayers];

  void add(const Layer& layer) {
    layers[layer_count] = layer;
    first_chunk[layer_count + 1] = first_chunk[layer_count] + (layer.neurons + kChunk - 1) / kChunk;
    ++layer_count;
  }
  __host__ __device__ int64_t chunks() const { return first_chunk[layer_count]; }
};

// The neurons [begin, end) of a chunk of a layer.
template <class W>
__device__ __forceinline__ Interval neurons_of(const W& wide, int layer, int64_t chunk) {
  const int64_t begin = (chunk - wide.first_chunk[layer]) * kChunk, neurons = wide.layers[layer].neurons;
  return {begin, begin + kChunk < neurons ? begin + kChunk : neurons};
}

// The first half, before the grid's barrier.
template <class W>
__device__ __forceinline__ void sum_chunks(const W& wide, SumShared& shared) {
  int layer = 0;
  for (int64_t chunk = blockIdx.x; chunk < wide.chunks(); chunk += gridDim.x) {
    while (chunk >= wide.first_chunk[layer + 1]) ++layer;
    const Interval neurons = neurons_of(wide, layer, chunk);
    const ChunkSum sum = sum_of(wide.layers[layer], neurons.begin, neurons.end, shared);
    if (thread() == 0) wide.sums[chunk] = sum;
  }
}

template <class W>
__device__ __forceinline__ Total total_of_chunks(const W& wide, int layer, SumShared& shared) {
  double sum = 0;
  int64_t active = 0;
  for (int64_t chunk = wide.first_chunk[layer] + thread(); chunk < wide.first_chunk[layer + 1]; chunk += kThreads) {
    sum += wide.sums[chunk].sum;
    active += wide.sums[chunk].active;
  }
  const double total = sum_over_block(sum, shared.totals);
  active = sum_over_block(active, shared.counts);
  return {static_cast<float>(total), static_cast<float>(active)};
}

// The second half, behind the barrier.
template <class W>
__device__ __forceinline__ void average_chunks(const W& wide, SumShared& shared) {
  Total total = {0.0f, 0.0f};
  int layer = 0, summed = -1;
  for (int64_t chunk = blockIdx.x; chunk < wide.chunks(); chunk += gridDim.x) {
    while (chunk >= wide.first_chunk[layer + 1]) ++layer;
    if (layer != summed) total = total_of_chunks(wide, layer, shared);
    summed = layer;
    const Layer& own = wide.layers[layer];
    const Interval neurons = neurons_of(wide, layer, chunk);
    for (int64_t i = neurons.begin + thread(); i < neurons.end; i += kThreads) {
      const float average = averaged(own, total, i);
      own.plasticity[i] = plasticity_of(own, average, i);
      own.importance[i] = average;
    }
    if (chunk == wide.first_chunk[layer] && thread() == 0 && !isfinite(total.sum)) ++*own.nonfinite_steps;
  }
}

inline bool is_wide(const LayerParams& layer) { return layer.neurons > kWide; }

// The scratch that a layer needs whose C is moved before.
inline int64_t wide_scratch_bytes(const LayerParams& layer) {
  return Scratch::bytes_of<ChunkSum>((layer.neurons + kChunk - 1) / kChunk) +
         Scratch::bytes_of<float>(layer.neurons);
}

// Moves the C of those of `layers` that are to be moved before (`first`, of each layer), and sets their plasticity.
void move_first(std::vector<Layer>& layers, const std::vector<bool>& first, const float* found_inf, Scratch& scratch,
                const Stream& stream);

}  // namespace npc::cuda
