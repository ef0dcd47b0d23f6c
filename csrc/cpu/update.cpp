// Eqs. 3, 4, 7 and the weight updates on the CPU: divides the work among threads. The loops are in
// update.h, adam.h, anchored.h and connections.h.
//
// The calling thread computes every layer's rates first, one float per neuron. Then the threads
// move all elements of all parameters, in equal shares. With anchors (EWC, MAS, SI) there are no
// rates to compute. With connections (CPC) the threads go through the elements twice, because the
// rates depend on the layer's sum.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../rules.h"
#include "kernels.h"
#include "parallel.h"

namespace npc::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;

// Eqs. 3, 4 and 7: moves C and writes the plasticity of every neuron. A sum that is not finite is
// counted and leaves C as it is; so does a sum of zero, uncounted.
void move_layer(const LayerParams& layer, float* plasticity) {
  double sum = 0;
  int64_t active = layer.neurons;
  if (layer.measured != nullptr) {
    for (int64_t i = 0; i < layer.neurons; ++i) {
      sum += layer.measured[i];
      active -= layer.active_only && received_no_gradient(layer.measured[i]);
    }
  }
  const float total = static_cast<float>(sum);
  if (!std::isfinite(total)) ++*layer.nonfinite_steps;
  kernels().plasticity(layer, layer.importance, layer.measured, plasticity, layer.neurons, total,
                       static_cast<float>(active));
}

double gradient_factor(const ParameterParams& parameter, const UpdateParams& params) {
  return (parameter.maximize ? -1.0 : 1.0) / (params.grad_scale == nullptr ? 1.0f : *params.grad_scale);
}

bool overflowed(const UpdateParams& params) { return params.found_inf != nullptr && *params.found_inf != 0; }

// The elements of all parameters.
int64_t elements(const UpdateParams& params) {
  int64_t count = 0;
  for (int64_t i = 0; i < params.parameter_count; ++i) count += params.parameters[i].size;
  return count;
}

// The number of equal shares that the elements of all parameters are divided into.
int shares_of(const UpdateParams& params, Threads threads) {
  return static_cast<int>(std::clamp<int64_t>(elements(params) / kElementsPerThread, 1, threads.count));
}

// Where a share begins in a parameter: on a cache line, if the parameter does.
int64_t boundary(int64_t element, int64_t size) {
  constexpr int64_t line = 64;  // elements; at least 64 bytes of any type
  return std::clamp((element + line - 1) / line * line, int64_t{0}, size);
}

// Calls work(share, elements) for the elements of every share, on one thread per share.
template <class Work>
void for_each_share(const UpdateParams& params, int shares, const Work& work) {
  const int64_t size = elements(params);
  parallel(shares, [&](int share) {
    const int64_t begin = size * share / shares, end = size * (share + 1) / shares;
    int64_t first = 0;  // of this parameter, counted over all of them
    for (int64_t i = 0; i < params.parameter_count && first < end; ++i) {
      const ParameterParams& parameter = params.parameters[i];
      const int64_t from = boundary(begin - first, parameter.size), to = boundary(end - first, parameter.size);
      if (from < to) work(share, Elements{parameter, gradient_factor(parameter, params), from, to});
      first += parameter.size;
    }
  });
}

// Eqs. 3, 4 and 7 of all layers: moves their C and holds the plasticity of their neurons.
class Plasticity {
 public:
  explicit Plasticity(const UpdateParams& params) : of_layer_(params.layer_count) {
    int64_t neurons = 0;
    for (int64_t l = 0; l < params.layer_count; ++l) neurons += params.layers[l].neurons;
    values_.resize(neurons);
    float* next = values_.data();
    for (int64_t l = 0; l < params.layer_count; ++l) {
      move_layer(params.layers[l], next);
      of_layer_[l] = next;
      next += params.layers[l].neurons;
    }
  }

  // The plasticity of a parameter's neurons; null for plain rates.
  const float* of(const ParameterParams& parameter) const {
    return parameter.layer < 0 ? nullptr : of_layer_[parameter.layer] + parameter.first_neuron;
  }

 private:
  std::vector<float> values_;
  std::vector<const float*> of_layer_;
};

void count_steps(const UpdateParams& params) {
  for (int64_t i = 0; i < params.parameter_count; ++i) {
    if (params.parameters[i].steps != nullptr) ++*params.parameters[i].steps;
  }
}

// The loop for a parameter's dtype.
template <class Loop>
Loop of_dtype(Loop const (&loops)[kDTypes], const ParameterParams& parameter) {
  return loops[static_cast<int>(parameter.dtype)];
}

// `descend`: the loops for each dtype.
template <class Descend>
void move_neurons(const UpdateParams& params, Threads threads, const Descend& descend) {
  if (overflowed(params)) return;
  const Plasticity plasticity(params);
  for_each_share(params, shares_of(params, threads), [&](int, const Elements& elements) {
    of_dtype(descend, elements.parameter)(elements, plasticity.of(elements.parameter));
  });
  count_steps(params);
}

}  // namespace

void launch_update(const UpdateParams& params, Threads threads) { move_neurons(params, threads, kernels().descend); }

void launch_adam_update(const UpdateParams& params, Threads threads) {
  move_neurons(params, threads, kernels().descend_adam);
}

void launch_anchored_update(const UpdateParams& params, Threads threads) {
  if (overflowed(params)) return;
  for_each_share(params, shares_of(params, threads), [&](int, const Elements& elements) {
    of_dtype(kernels().descend_anchored, elements.parameter)(elements);
  });
}

void launch_connection_update(const UpdateParams& params, Threads threads) {
  if (overflowed(params)) return;
  const int shares = shares_of(params, threads);
  std::vector<ConnectionTotal> partial(shares * params.layer_count);
  for_each_share(params, shares, [&](int share, const Elements& elements) {
    const int64_t layer = elements.parameter.layer;
    if (layer < 0) return;
    partial[share * params.layer_count + layer] +=
        of_dtype(kernels().measure_connections, elements.parameter)(elements);
  });

  std::vector<float> totals(params.layer_count);
  std::vector<double> connections(params.layer_count);
  for (int64_t i = 0; i < params.parameter_count; ++i) {
    const ParameterParams& parameter = params.parameters[i];
    if (parameter.layer >= 0) connections[parameter.layer] += static_cast<double>(parameter.size);
  }
  for (int64_t l = 0; l < params.layer_count; ++l) {
    ConnectionTotal total;
    for (int share = 0; share < shares; ++share) total += partial[share * params.layer_count + l];
    totals[l] = static_cast<float>(total.sum);
    if (params.layers[l].active_only) connections[l] = static_cast<double>(total.active);
    if (!std::isfinite(totals[l])) ++*params.layers[l].nonfinite_steps;
  }
  for_each_share(params, shares, [&](int, const Elements& elements) {
    const int64_t l = elements.parameter.layer;
    if (l < 0) {
      of_dtype(kernels().descend, elements.parameter)(elements, nullptr);
    } else {
      of_dtype(kernels().descend_connections, elements.parameter)(elements, params.layers[l], totals[l],
                                                                  static_cast<float>(connections[l]));
    }
  });
}

void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, Threads threads) {
  if (overflowed(params)) return;
  std::vector<LayerParams> layers(params.layers, params.layers + params.layer_count);
  std::vector<std::vector<float>> measured(params.layer_count);
  for (int64_t l = 0; l < params.layer_count; ++l) {
    ImportanceParams input = inputs[l];
    measured[l].resize(layers[l].neurons);
    if (input.dtype == DType::float64) {
      std::vector<double> sums(layers[l].neurons);
      input.out = sums.data();
      launch_importance(input, threads);
      std::transform(sums.begin(), sums.end(), measured[l].begin(), [](double a) { return static_cast<float>(a); });
    } else {
      input.out = measured[l].data();
      launch_importance(input, threads);
    }
    layers[l].measured = measured[l].data();
  }
  UpdateParams update = params;
  update.layers = layers.data();
  launch_update(update, threads);
}

}  // namespace npc::cpu
