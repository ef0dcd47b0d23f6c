// Eqs. 3, 4, 7 and the weight update of all layers on the device.
//
// The elements of all parameters are divided into items of at most kItem elements, each of one parameter; a block works
// on one item at a time. It sums its layer's measured importance (as every block of the layer does, in the same order,
// so that all agree), computes the new average C and from it and the old one the plasticity of the neurons that its
// elements belong to, and moves the elements. C itself is written by the layer's last block to have read it. Layers of
// very many neurons and those whose parameters are in several launches have their C moved before, and their plasticity
// written (wide.h).
//
// The last block of a parameter counts its steps, where they are counted.
//
// Traffic: 3 * sizeof(T) bytes an element (value read and written, gradient read), 5 * sizeof(T) with momentum; nothing
// for the elements of frozen neurons, whose first moment was cleared in the step that froze them. A layer's importance
// comes out of the cache for all blocks but the first.
#pragma once

#include "elements.h"

namespace npc::cuda {

constexpr int kRuns = 1024;          // runs of one neuron that an item holds at most, but for the one it begins in
constexpr int64_t kManyElements = int64_t{1} << 31;

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

// Moves the numbers of one pack, all of one neuron.
template <class P, class T>
__device__ __forceinline__ void move(const Parameter& p, const Step& step, const Rounding& rounding, int64_t at,
                                     float rate) {
  T* value = static_cast<T*>(p.value) + at;
  P values = load<P>(value);
  const P gradients = load<P>(static_cast<const T*>(p.gradient) + at);
  const bool has_momentum = p.momentum != nullptr;
  P velocities = {};
  if (has_momentum) velocities = load<P>(static_cast<T*>(p.momentum) + at);
  for (int k = 0; k < P::size; ++k) {
    float velocity = to_float(velocities.at[k]);
    const float result = moved(step, to_float(values.at[k]), to_float(gradients.at[k]), rate, has_momentum, velocity);
    round_value(result, rounding, at + k, values.at[k]);
    from_float(velocity, velocities.at[k]);
  }
  store(value, values);
  if (has_momentum) store(static_cast<T*>(p.momentum) + at, velocities);
}

// Sets the momentum of one pack to 0.
template <class P, class T>
__device__ __forceinline__ void clear_first_moment(const Parameter& p, int64_t at) {
  if (p.momentum != nullptr) store(static_cast<T*>(p.momentum) + at, P{});
}

// Moves the numbers of one pack at their neuron's plasticity, or leaves them alone.
template <class P, class T, class Q, class S>
__device__ __forceinline__ void move_or_clear(const Q& p, const S& step, const Rounding& rounding, int64_t at,
                                              float plasticity) {
  if (plasticity > 0.0f) move<P, T>(p, step, rounding, at, plasticity * step.lr);
  else if (plasticity < 0.0f) clear_first_moment<P, T>(p, at);
}

// Elements [begin, end) of a parameter; `shared.plasticity` begins with the run that element `begin` belongs to.
// P and S: Parameter and Step, or those of another step, for which there are a move() and a clear_first_moment().
template <class T, class P, class S>
__device__ void move_elements(const P& p, const S& step, int64_t begin, int64_t end, const UpdateShared& shared) {
  const Rounding rounding = rounding_of(p, begin);
  const int64_t offset = p.layer < 0 ? 0 : begin % p.run;
  // An item is shorter than a run of so many elements, and so lies in two of them at most.
  const auto run_of = [&](int64_t local) -> int {
    if (p.run >= kManyElements) return local >= p.run;
    return static_cast<int>(static_cast<uint32_t>(local) / static_cast<uint32_t>(p.run));
  };
  constexpr int size = Pack<T>::size;
  const int64_t packs = p.packed ? (end - begin) / size : 0;
#pragma unroll 2
  for (int64_t pack = thread(); pack < packs; pack += kThreads) {
    const int64_t at = begin + pack * size, local = offset + pack * size;
    if (p.layer < 0) {
      move<Pack<T>, T>(p, step, rounding, at, step.lr);
      continue;
    }
    const int run = run_of(local);
    if (run_of(local + size - 1) == run) {
      move_or_clear<Pack<T>, T>(p, step, rounding, at, shared.plasticity[run]);
      continue;
    }
    for (int k = 0; k < size; ++k) {
      move_or_clear<Single<T>, T>(p, step, rounding, at + k, shared.plasticity[run_of(local + k)]);
    }
  }
  for (int64_t at = begin + packs * size + thread(); at < end; at += kThreads) {
    if (p.layer < 0) move<Single<T>, T>(p, step, rounding, at, step.lr);
    else move_or_clear<Single<T>, T>(p, step, rounding, at, shared.plasticity[run_of(offset + at - begin)]);
  }
}

// One item. All threads of the block call it, and may call it again at once.
template <class N>
__device__ __forceinline__ void update_item(const N& network, int64_t item, UpdateShared& shared) {
  const auto& p = parameter_of(network, item);
  const auto [begin, end] = elements_of(p, item);
  if (p.layer >= 0) {
    const Layer& layer = network.layers[p.layer];
    const bool measured = layer.measured != nullptr;
    const Total total = measured ? total_of(layer, shared) : Total{0.0f, 0.0f};
    const int64_t first_run = begin / p.run;
    const int runs = begin < end ? static_cast<int>((end - 1) / p.run - first_run) + 1 : 0;
    for (int run = thread(); run < runs; run += kThreads) {
      const int64_t neuron = neuron_of_run(p, first_run + run);
      shared.plasticity[run] = layer.plasticity != nullptr
                                   ? layer.plasticity[neuron]
                                   : plasticity_of(layer, averaged(layer, total, neuron), neuron);
    }
    if (!measured) {
      __syncthreads();
    } else if (arrives_last(network.arrived + p.layer, layer.items, shared.last)) {
      for (int64_t i = thread(); i < layer.neurons; i += kThreads) {
        layer.importance[i] = averaged(layer, total, i);
      }
      if (thread() == 0 && !isfinite(total.sum)) ++*layer.skipped;
    }
  }
  if (begin < end) {
    const auto step = step_of(p, network.grad_scale);
    switch (p.dtype) {
      case DType::float32: move_elements<float>(p, step, begin, end, shared); break;
      case DType::float16: move_elements<__half>(p, step, begin, end, shared); break;
      default: move_elements<__nv_bfloat16>(p, step, begin, end, shared); break;
    }
  }
  if (p.steps == nullptr) {
    __syncthreads();  // shared.plasticity may be written again
  } else {
    unsigned* counter = network.arrived + network.layer_count + (&p - network.parameters);
    if (arrives_last(counter, static_cast<unsigned>(items_of(p)), shared.last) && thread() == 0) ++*p.steps;
  }
}

}  // namespace npc::cuda
