// Eqs. 3, 4, 7 and the weight update of all layers on the device.
//
// The elements of all parameters are divided into items of at most kItem elements. Each item is
// part of one parameter, and a block works on one item:
//
//   1. It starts to bring the item's first packs into the L2 cache, except those of neurons that
//      are already frozen.
//   2. It sums its layer's measured importance. All blocks of the layer do so in the same order, so
//      that they agree.
//   3. It fills a table with the plasticity of the item's neurons, from their old C and their new
//      one, and arrives at the layer's counter.
//   4. It moves the elements, several packs a thread at a time (elements.h). A pack whose neurons
//      are all frozen is neither read nor written. In a pack that is partly frozen, the frozen
//      elements are written back as they were.
//   5. If it was the last block to arrive, it writes the layer's new C: all others have read the
//      old one.
//
// Where a layer has very many neurons, or its parameters are in several launches, C is moved and
// the plasticity written before the update (wide.h). The last block of a parameter counts its
// steps, where they are counted.
//
// Traffic: 3 * sizeof(T) bytes an element (value read and written, gradient read), or 5 * sizeof(T)
// with momentum. The elements of frozen neurons cause none. All blocks of a layer but the first
// read its importance from the cache.
#pragma once

#include "runs.h"

namespace npc::cuda {

// The whole network, by value in the kernel's arguments. P: Parameter, or a struct with what
// another step also needs.
template <int kParameters_, int kLayers_, class P = Parameter>
struct Network {
  static constexpr int kParameters = kParameters_, kLayers = kLayers_;
  using OneParameter = P;
  const float* grad_scale;
  const float* found_inf;
  unsigned* arrived;  // [layer_count], and [parameter_count] more where steps are counted; all zero
  int64_t items;
  int parameter_count, layer_count;
  Layer layers[kLayers];
  P parameters[kParameters];
};

struct UpdateShared {
  float plasticity[kRuns + 2];  // of the neurons of an item's runs
  SumShared sums;
  bool last;
};

// SGD's step; a visitor (elements.h).
template <class Kind>
struct Sgd : Weights<typename Kind::T, Kind::kMomentum> {
  using Base = Weights<typename Kind::T, Kind::kMomentum>;
  static constexpr int kPacks = Kind::kMomentum ? 2 : 4;
  static constexpr int kBlocks = Kind::kRandom && !Kind::kMomentum ? 2 : 3;  // of a multiprocessor, as registers allow

  Step step;
  Rounding<Kind> rounding;

  __device__ __forceinline__ Sgd(const Parameter& p, int64_t begin, const float* grad_scale)
      : Base(p, begin), step(step_of(p, grad_scale)), rounding(p, begin) {}

  template <class P>
  __device__ __forceinline__ void use(int at, WeightPacks<P>& packs, const float (&plasticity)[P::size]) const {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float before = to_float(packs.value.at[k]), rate = plasticity[k] * step.lr;
      float velocity = to_float(packs.momentum.at[k]);
      const float after = moved(step, before, to_float(packs.gradient.at[k]), rate, this->has_momentum(), velocity);
      if (plasticity[k] > 0.0f) packs.value.at[k] = rounding(after, at + k);
      if (plasticity[k] != 0.0f) from_float(plasticity[k] > 0.0f ? velocity : 0.0f, packs.momentum.at[k]);
    }
    this->write(at, packs);
  }
};

// Counts a step of the parameter, where steps are counted, if this is the last of its blocks. A
// barrier for the block.
template <class N, class P>
__device__ __forceinline__ void count_step(const N& network, const P& p, UpdateShared& shared) {
  if (p.steps == nullptr) return __syncthreads();
  unsigned* counter = network.arrived + network.layer_count + (&p - network.parameters);
  if (arrives_last(counter, static_cast<unsigned>(items_of(p)), shared.last) && thread() == 0) ++*p.steps;
}

// Works on one item. All threads of the block call it, and may call it again right away.
template <template <class> class Visitor, class Kind, class N>
__device__ __forceinline__ void update_item(const N& network, int64_t item, UpdateShared& shared) {
  const auto& p = parameter_of(network, item);
  const Interval elements = elements_of(p, item);
  const int count = static_cast<int>(elements.end - elements.begin);
  Visitor<Kind> visitor(p, elements.begin, network.grad_scale);
  if (p.layer < 0) {
    use_elements(p, visitor, count, Everywhere{});
    count_step(network, p, shared);
    return;
  }
  const Layer& layer = network.layers[p.layer];
  const int64_t first_run = elements.begin / p.run;
  const Runs runs = runs_of(p, elements.begin, first_run);
  const int places = repeats(p) ? runs.places : runs.run_of(count - 1) + (count > 0);
  if (p.outer == 1 || repeats(p)) {
    const int64_t first_neuron = p.first_neuron + (repeats(p) ? 0 : first_run);
    prefetch_elements(p, visitor, count,
                      [&](int at) { return may_move(layer, first_neuron + runs.place_of(runs.run_of(at))); });
  }
  const bool measured = layer.measured != nullptr;
  const Total total = measured ? total_of(layer, shared.sums) : Total{0.0f, 0.0f};
  fill_table(p, layer, total, first_run, places, shared.plasticity);
  __syncthreads();
  bool last = false;
  if (measured && thread() == 0) last = arrive(network.arrived + p.layer, layer.items);
  use_elements(p, visitor, count, FromTable{runs, shared.plasticity});
  if (measured) {
    if (thread() == 0) shared.last = last;
    __syncthreads();
    if (shared.last) {
      for (int64_t i = thread(); i < layer.neurons; i += kThreads) layer.importance[i] = averaged(layer, total, i);
      if (thread() == 0 && !isfinite(total.sum)) ++*layer.nonfinite_steps;
    }
  }
  count_step(network, p, shared);
}

}  // namespace npc::cuda
