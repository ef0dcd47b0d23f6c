// Eqs. 3, 4, 7 and the weight update of all layers on the device.
//
// The elements of all parameters are divided into items of at most kItem elements, each of one parameter; a block works
// on one item. It
//
//   1. asks for the item's first packs, except those of neurons that are frozen already, so that they are on their way;
//   2. sums its layer's measured importance, as every block of the layer does, in the same order, so that all agree;
//   3. fills a table with the plasticity of the neurons that the item's elements belong to, from their C and its new
//      value, and arrives at the layer's counter;
//   4. moves the elements, several packs a thread at a time (elements.h). A pack whose neurons are all frozen is neither
//      read nor written; one that lies in a frozen neuron and another writes the frozen bits back as they were;
//   5. writes the layer's new C, if it was the last block to arrive: the others have read the old one.
//
// Layers of very many neurons, and those whose parameters are in several launches, have their C moved before, and their
// plasticity written (wide.h). The last block of a parameter counts its steps, where they are counted.
//
// Traffic: 3 * sizeof(T) bytes an element (value read and written, gradient read), 5 * sizeof(T) with momentum; nothing
// for the elements of frozen neurons, whose first moment was cleared in the step that froze them. A layer's importance
// comes out of the cache for all blocks but the first.
#pragma once

#include "elements.h"

namespace npc::cuda {

constexpr int kRuns = 4096;  // runs of one neuron that an item holds at most, but for the one it begins in

struct Layer {
  float* importance;
  const float* measured;
  float* plasticity;  // [neurons], in scratch, of layers whose C is moved before; else null
  int64_t* skipped;
  int64_t neurons;
  float alpha, beta, delta, one_minus_delta;
  bool error_function, active_only;
  unsigned items;  // that read the layer's importance
};

struct Parameter : Elements {
  int64_t outer, middle, run;
  int layer, first_neuron;
};

// The whole network, by value in the kernel's arguments. P: Parameter, or what another step needs beside it.
template <int kParameters_, int kLayers_, class P = Parameter>
struct Network {
  static constexpr int kParameters = kParameters_, kLayers = kLayers_;
  using OneParameter = P;
  const float* grad_scale;
  const float* found_inf;
  unsigned* arrived;  // [layer_count], and [parameter_count] more where steps are counted, zero
  int64_t items;
  int parameter_count, layer_count;
  Layer layers[kLayers];
  P parameters[kParameters];
};

struct UpdateShared {
  float plasticity[kRuns + 2];  // of the neurons that an item's runs belong to
  double totals[kWarps];
  int64_t counts[kWarps];
  bool last;
};

// The sum over measured importance of some neurons of a layer, and how many of them count in eq. 3's mean.
struct ChunkSum {
  double sum;
  int64_t active;
};

// The same of a whole layer.
struct Total {
  float sum, neurons;
};

// The sum over neurons [begin, end), in all threads of the block.
__device__ inline ChunkSum sum_of(const Layer& layer, int64_t begin, int64_t end, UpdateShared& shared) {
  double sum = 0;
  int64_t active = 0;
  for (int64_t i = begin + thread(); i < end; i += kThreads) {
    sum += layer.measured[i];
    active += !received_no_gradient(layer.measured[i]);
  }
  const double total = sum_over_block(sum, shared.totals);
  return {total, layer.active_only ? sum_over_block(active, shared.counts) : end - begin};
}

__device__ inline Total total_of(const Layer& layer, UpdateShared& shared) {
  const ChunkSum all = sum_of(layer, 0, layer.neurons, shared);
  return {static_cast<float>(all.sum), static_cast<float>(all.active)};
}

// Whether a neuron takes part in the step; a layer that was not measured has all of them do so.
__device__ __forceinline__ bool takes_part(const Layer& layer, int64_t neuron) {
  return !layer.active_only || layer.measured == nullptr || !received_no_gradient(layer.measured[neuron]);
}

// C_i after eqs. 3 and 4. Sums that are zero or not finite leave it as it is.
__device__ __forceinline__ float averaged(const Layer& layer, const Total& total, int64_t neuron) {
  const float average = layer.importance[neuron];
  if (!(total.sum > 0.0f) || isinf(total.sum) || !takes_part(layer, neuron)) return average;
  const float normalized = normalized_importance(layer.measured[neuron], total.sum, total.neurons);
  return moving_average(average, normalized, layer.delta, layer.one_minus_delta);
}

// Eq. 7 of a neuron whose C moves to `average` and is not written yet, as rules.h says what it tells.
__device__ __forceinline__ float plasticity_of(const Layer& layer, float average, int64_t neuron) {
  if (!takes_part(layer, neuron)) return 0.0f;
  const float plasticity = layer.error_function ? plasticity_erf(average, layer.alpha, layer.beta)
                                                : plasticity_sigmoid(average, layer.alpha, layer.beta);
  return plasticity_after(layer.importance[neuron], layer.beta, plasticity);
}

__device__ __forceinline__ int64_t neuron_of_run(const Parameter& p, int64_t run) {
  if (p.outer == 1) return p.first_neuron + run;
  return p.first_neuron + run / (p.outer * p.middle) * p.middle + run % p.middle;
}

// Whether a parameter's neurons follow each other again and again, so few of them that a table holds them all.
__host__ __device__ inline bool repeats(const Parameter& p) {
  return p.outer > 1 && p.middle <= kRuns && p.outer * p.middle * p.run == p.size;
}

// To which neurons an item's elements belong, as places in a table of their plasticity: run after run, or, if the
// parameter repeats, neuron after neuron. Lengths count elements, and none is longer than an item may be.
struct Runs {
  int first, others;      // length of the item's first run, and of each other
  int place, places;      // of the first run, and how many there are before the first comes again
  float per_other, per_places;  // 1 / others and 1 / places; 0 if places do not come again

  // floor(number / divisor), exact for numbers below 2^21.
  static __device__ __forceinline__ int divided(int number, float per_divisor) {
    return static_cast<int>((static_cast<float>(number) + 0.5f) * per_divisor);
  }

  __device__ __forceinline__ int run_of(int at) const { return at < first ? 0 : 1 + divided(at - first, per_other); }
  __device__ __forceinline__ int place_of(int run) const {
    const int at = place + run;
    return per_places == 0.0f ? at : at - divided(at, per_places) * places;
  }
};

// What a visitor finds out about a pack before it loads it.
struct PackPlasticity {
  bool any;             // of its elements has a plasticity that differs from 0
  float first, second;  // of the neurons that it belongs to, two at most if no run is shorter than a pack
  int split;            // the element with which the second begins
};

// The plasticity of an item's elements, by the table.
struct FromTable {
  const Runs& runs;
  const float* table;

  template <int size>
  __device__ __forceinline__ PackPlasticity find(int at) const {
    const int run = runs.run_of(at), split = runs.first + run * runs.others - at;
    PackPlasticity found = {false, table[runs.place_of(run)], 0.0f, split};
    if (runs.others >= size) {
      found.second = split < size ? table[runs.place_of(run + 1)] : found.first;
      found.any = found.first != 0.0f || found.second != 0.0f;
    } else {
      for_each<size>(at, [&](int, float plasticity) { found.any |= plasticity != 0.0f; });
    }
    return found;
  }

  template <int size>
  __device__ __forceinline__ void expand(const PackPlasticity& found, int at, float (&plasticity)[size]) const {
    if (runs.others >= size) {
#pragma unroll
      for (int k = 0; k < size; ++k) plasticity[k] = k < found.split ? found.first : found.second;
    } else {
      for_each<size>(at, [&](int k, float one) { plasticity[k] = one; });
    }
  }

 private:
  // Where a pack may belong to many neurons.
  template <int size, class Visit>
  __device__ __forceinline__ void for_each(int at, const Visit& visit) const {
    int run = runs.run_of(at), end = runs.first + run * runs.others - at;
    float current = table[runs.place_of(run)];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      if (k == end) {
        current = table[runs.place_of(++run)];
        end += runs.others;
      }
      visit(k, current);
    }
  }
};

__device__ __forceinline__ Runs runs_of(const Parameter& p, int64_t begin, int64_t first_run) {
  constexpr int most = kItem + kThreads;
  const auto at_most = [](int64_t length) { return length < most ? static_cast<int>(length) : most; };
  const int others = at_most(p.run), first = at_most((first_run + 1) * p.run - begin);
  if (!repeats(p)) return {first, others, 0, 0, 1.0f / others, 0.0f};
  const int places = static_cast<int>(p.middle);
  return {first, others, static_cast<int>(first_run % p.middle), places, 1.0f / others, 1.0f / places};
}

// The step of SGD; a visitor as elements.h says.
template <class Kind>
struct Sgd {
  using T = typename Kind::T;
  static constexpr int kPacks = Kind::kMomentum ? 2 : 4;
  static constexpr int kBlocks = Kind::kRandom && !Kind::kMomentum ? 2 : 3;  // a multiprocessor: what registers allow

  template <class P>
  struct Packs {
    P value, gradient, momentum;
  };

  T* value;
  const T* gradient;
  T* momentum;
  Step step;
  Rounding<Kind> rounding;

  __device__ __forceinline__ Sgd(const Parameter& p, int64_t begin, const float* grad_scale)
      : value(static_cast<T*>(p.value) + begin),
        gradient(static_cast<const T*>(p.gradient) + begin),
        momentum(from(static_cast<T*>(p.momentum), begin)),
        step(step_of(p, grad_scale)),
        rounding(p, begin) {}

  __device__ __forceinline__ bool has_momentum() const { return Kind::kMomentum && momentum != nullptr; }

  template <class P>
  __device__ __forceinline__ void load(bool wanted, int at, Packs<P>& packs) const {
    load_if(wanted, value + at, packs.value);
    load_if(wanted, gradient + at, packs.gradient);
    if constexpr (Kind::kMomentum) load_if(wanted && has_momentum(), momentum + at, packs.momentum);
  }

  __device__ __forceinline__ void prefetch(int at) const {
    ::npc::cuda::prefetch(value + at);
    ::npc::cuda::prefetch(gradient + at);
    if (has_momentum()) ::npc::cuda::prefetch(momentum + at);
  }

  template <class P>
  __device__ __forceinline__ void use(int at, Packs<P>& packs, const float (&plasticity)[P::size]) const {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float before = to_float(packs.value.at[k]);
      float velocity = to_float(packs.momentum.at[k]);
      const float rate = plasticity[k] * step.lr;
      const float after = moved(step, before, to_float(packs.gradient.at[k]), rate, has_momentum(), velocity);
      if (plasticity[k] > 0.0f) packs.value.at[k] = rounding(after, at + k);
      if (plasticity[k] != 0.0f) from_float(plasticity[k] > 0.0f ? velocity : 0.0f, packs.momentum.at[k]);
    }
    store(value + at, packs.value);
    if (has_momentum()) store(momentum + at, packs.momentum);
  }
};

// Writes the plasticity of the neurons of an item as Runs finds it, `places` of them.
__device__ inline void fill_table(const Parameter& p, const Layer& layer, const Total& total, int64_t first_run,
                                  int places, float* table) {
  for (int place = thread(); place < places; place += kThreads) {
    const int64_t neuron = repeats(p) ? p.first_neuron + place : neuron_of_run(p, first_run + place);
    table[place] = layer.plasticity != nullptr ? layer.plasticity[neuron]
                                               : plasticity_of(layer, averaged(layer, total, neuron), neuron);
  }
}

// Whether a neuron may move in this step, as far as that is known before the layer's sums are.
__device__ __forceinline__ bool may_move(const Layer& layer, int64_t neuron) {
  return layer.plasticity != nullptr ? layer.plasticity[neuron] != 0.0f : !(layer.importance[neuron] >= layer.beta);
}

// Counts a step of the parameter if this is the last of its blocks, where steps are counted; a barrier for the block.
template <class N, class P>
__device__ __forceinline__ void count_step(const N& network, const P& p, UpdateShared& shared) {
  if (p.steps == nullptr) return __syncthreads();
  unsigned* counter = network.arrived + network.layer_count + (&p - network.parameters);
  if (arrives_last(counter, static_cast<unsigned>(items_of(p)), shared.last) && thread() == 0) ++*p.steps;
}

// One item. All threads of the block call it, and may call it again at once.
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
    prefetch_elements(p, visitor, count, [&](int at) {
      return may_move(layer, first_neuron + runs.place_of(runs.run_of(at)));
    });
  }
  const bool measured = layer.measured != nullptr;
  const Total total = measured ? total_of(layer, shared) : Total{0.0f, 0.0f};
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
      if (thread() == 0 && !isfinite(total.sum)) ++*layer.skipped;
    }
  }
  count_step(network, p, shared);
}

}  // namespace npc::cuda
