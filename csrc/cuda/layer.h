// Eqs. 3, 4 and 7 of a layer on the device: the sum of its measured importance, its C and its
// neurons' plasticity.
#pragma once

#include "../rules.h"
#include "device.h"

namespace npc::cuda {

struct Layer {
  float* importance;
  const float* measured;
  float* plasticity;  // [neurons], in scratch memory, if C is moved before the update; else null
  int64_t* nonfinite_steps;
  int64_t neurons;
  float alpha, beta, delta, one_minus_delta;
  bool error_function, active_only;
  unsigned items;  // how many items read the layer's importance
};

struct SumShared {
  double totals[kWarps];
  int64_t counts[kWarps];
};

// The sum of the measured importance of some of a layer's neurons, and how many of them count in
// eq. 3's mean.
struct ChunkSum {
  double sum;
  int64_t active;
};

// The same of a whole layer.
struct Total {
  float sum, neurons;
};

// The sum over neurons [begin, end), in all of a block's threads.
__device__ inline ChunkSum sum_of(const Layer& layer, int64_t begin, int64_t end, SumShared& shared) {
  double sum = 0;
  int64_t active = 0;
  constexpr int kBatch = 4;
  for (int64_t first = begin + thread(); first < end; first += kBatch * kThreads) {
    Single<float> measured[kBatch] = {};
    bool wanted[kBatch];
    for (int k = 0; k < kBatch; ++k) wanted[k] = first + k * kThreads < end;
    for (int k = 0; k < kBatch; ++k) load_if(wanted[k], layer.measured + first + k * kThreads, measured[k]);
    for (int k = 0; k < kBatch; ++k) {
      sum += measured[k].at[0];
      active += wanted[k] && !received_no_gradient(measured[k].at[0]);
    }
  }
  const double total = sum_over_block(sum, shared.totals);
  return {total, layer.active_only ? sum_over_block(active, shared.counts) : end - begin};
}

__device__ inline Total total_of(const Layer& layer, SumShared& shared) {
  const ChunkSum all = sum_of(layer, 0, layer.neurons, shared);
  return {static_cast<float>(all.sum), static_cast<float>(all.active)};
}

// Whether a neuron takes part in the step. In a layer that was not measured, all neurons do.
__device__ __forceinline__ bool takes_part(const Layer& layer, int64_t neuron) {
  return !layer.active_only || layer.measured == nullptr || !received_no_gradient(layer.measured[neuron]);
}

// C_i after eqs. 3 and 4. A sum that is zero or not finite leaves C_i as it is.
__device__ __forceinline__ float averaged(const Layer& layer, const Total& total, int64_t neuron) {
  const float average = layer.importance[neuron];
  if (!(total.sum > 0.0f) || isinf(total.sum) || !takes_part(layer, neuron)) return average;
  const float normalized = normalized_importance(layer.measured[neuron], total.sum, total.neurons);
  return moving_average(average, normalized, layer.delta, layer.one_minus_delta);
}

// Eq. 7 of a neuron (rules.h) whose C moves to `average`, before that is written.
__device__ __forceinline__ float plasticity_of(const Layer& layer, float average, int64_t neuron) {
  if (!takes_part(layer, neuron)) return 0.0f;
  const float plasticity = layer.error_function ? plasticity_erf(average, layer.alpha, layer.beta)
                                                : plasticity_sigmoid(average, layer.alpha, layer.beta);
  return plasticity_after(layer.importance[neuron], layer.beta, plasticity);
}

// Whether a neuron may move in this step, as far as this is known before the layer's sum is.
__device__ __forceinline__ bool may_move(const Layer& layer, int64_t neuron) {
  return layer.plasticity != nullptr ? layer.plasticity[neuron] != 0.0f : !(layer.importance[neuron] >= layer.beta);
}

}  // namespace npc::cuda
