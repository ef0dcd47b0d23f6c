// Eqs. 3, 4, 7 and the weight update on the CPU: every layer's rates first (one float per neuron, on the calling
// thread), then all elements of all parameters in equal shares, one per thread.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace npc::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;

// Eqs. 3 and 4. Sums that are not finite are counted and stay out of the average; sums of zero change nothing.
void average_layer(const LayerParams& layer) {
  double sum = 0;
  int64_t active = 0;
  for (int64_t i = 0; i < layer.neurons; ++i) {
    sum += layer.measured[i];
    active += layer.measured[i] > 0;
  }
  const float total = static_cast<float>(sum);
  if (!std::isfinite(total)) {
    ++*layer.skipped;
  } else if (total > 0) {
    const auto neurons = static_cast<float>(layer.active_only ? active : layer.neurons);
    kernels().average(layer.importance, layer.measured, layer.neurons, total, neurons,
                      static_cast<float>(layer.delta), static_cast<float>(1 - layer.delta));
  }
}

void descend(const ParameterParams& parameter, const std::vector<const float*>& plasticity, float grad_scale,
             int64_t begin, int64_t end) {
  const double factor = (parameter.maximize ? -1.0 : 1.0) / grad_scale;
  const float* rates = parameter.layer < 0 ? nullptr : plasticity[parameter.layer];
  kernels().descend[static_cast<int>(parameter.dtype)](parameter, rates, factor, begin, end);
}

}  // namespace

void launch_update(const UpdateParams& params, int threads) {
  if (params.found_inf != nullptr && *params.found_inf != 0) return;
  const float grad_scale = params.grad_scale == nullptr ? 1.0f : *params.grad_scale;

  int64_t neurons = 0;
  for (int64_t l = 0; l < params.layer_count; ++l) neurons += params.layers[l].neurons;
  std::vector<float> scratch(neurons);
  std::vector<const float*> plasticity(params.layer_count);
  float* next = scratch.data();
  for (int64_t l = 0; l < params.layer_count; ++l) {
    const LayerParams& layer = params.layers[l];
    if (layer.measured != nullptr) average_layer(layer);
    kernels().plasticity(layer.importance, next, layer.neurons, static_cast<float>(layer.alpha),
                         static_cast<float>(layer.beta), layer.error_function);
    plasticity[l] = next;
    next += layer.neurons;
  }

  int64_t size = 0;
  for (int64_t i = 0; i < params.parameter_count; ++i) size += params.parameters[i].size;
  const int shares = static_cast<int>(std::clamp<int64_t>(size / kElementsPerThread, 1, threads));
  parallel(shares, [&](int index) {
    const int64_t begin = size * index / shares, end = size * (index + 1) / shares;
    int64_t first = 0;  // of this parameter, counted over all of them
    for (int64_t i = 0; i < params.parameter_count && first < end; ++i) {
      const ParameterParams& parameter = params.parameters[i];
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, parameter.size);
      if (from < to) descend(parameter, plasticity, grad_scale, from, to);
      first += parameter.size;
    }
  });
}

void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, int threads) {
  if (params.found_inf != nullptr && *params.found_inf != 0) return;
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
