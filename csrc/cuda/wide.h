// Layers whose C is moved before the update: those with very many neurons, and those with
// parameters in several launches.
//
// In update.h every block of a layer sums the layer's whole measured importance, which costs little
// while there is little of it. A head of 128,000 neurons by 4,096 has 32,000 blocks: they would
// read 16 GB from the cache, in addition to 6.3 GB of memory traffic. So the importance of a layer
// above kWide neurons is summed once, and its C is moved before the update, in one cooperative
// launch. Blocks sum chunks of kChunk neurons, meet at a barrier, add up the sums of all chunks in
// the same order, and move the C of their chunks (eqs. 3 and 4). The update can then no longer tell
// which neurons this step freezes, so the launch also writes their plasticity (eq. 7) for the
// update to read. step.cu does the same within its launch. Chunks do not depend on the number of
// blocks, so both give the same bits.
//
// A layer with parameters in several launches is treated in the same way, whatever its size.
//
// Traffic: 8 bytes a neuron for the sum, and for C read and written, from the cache the second
// time; 4 for plasticity.
#pragma once

#include <vector>

#include "elements.h"
#include "layer.h"
#include "workspace.h"

namespace npc::cuda {

constexpr int64_t kWide = 4096;   // neurons; the C of larger layers is moved before the update
constexpr int64_t kChunk = 1024;  // neurons

// Chunks are numbered through all layers.
template <int kLayers_>
struct WideLayers {
  static constexpr int kLayers = kLayers_;
  ChunkSum* sums;  // scratch, [chunks]
  int layer_count;
  int64_t first_chunk[kLayers + 1];  // of each layer, and after the last
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

// The first half, before the barrier of the grid.
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

// The second half, after the barrier.
template <class W>
__device__ __forceinline__ void average_chunks(const W& wide, SumShared& shared) {
  Total total = {0.0f, 0.0f};
  int layer = 0, summed = -1;
  for (int64_t chunk = blockIdx.x; chunk < wide.chunks(); chunk += gridDim.x) {
    while (chunk >= wide.first_chunk[layer + 1]) ++layer;
    if (layer != summed) total = total_of_chunks(wide, layer, shared);
    summed = layer;
    const Layer& current = wide.layers[layer];
    const Interval neurons = neurons_of(wide, layer, chunk);
    for (int64_t i = neurons.begin + thread(); i < neurons.end; i += kThreads) {
      const float average = averaged(current, total, i);
      current.plasticity[i] = plasticity_of(current, average, i);
      current.importance[i] = average;
    }
    if (chunk == wide.first_chunk[layer] && thread() == 0 && !isfinite(total.sum)) ++*current.nonfinite_steps;
  }
}

inline bool is_wide(const LayerParams& layer) { return layer.neurons > kWide; }

// The scratch memory that a layer needs if its C is moved before the update.
inline int64_t wide_scratch_bytes(const LayerParams& layer) {
  return Scratch::bytes_of<ChunkSum>((layer.neurons + kChunk - 1) / kChunk) + Scratch::bytes_of<float>(layer.neurons);
}

// Moves the C of the layers for which `first` is true, and sets their plasticity.
void move_first(std::vector<Layer>& layers, const std::vector<bool>& first, const float* found_inf, Scratch& scratch,
                const Stream& stream);

}  // namespace npc::cuda
