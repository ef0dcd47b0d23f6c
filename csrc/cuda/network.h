// Turns the structs of api.h into what the device reads (update.h), in as few launches as can hold
// it.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "update.h"
#include "wide.h"

namespace npc::cuda {

// The layers and parameters of one launch, as indices into UpdateParams.
struct Part {
  std::vector<int64_t> layers, parameters;
  DType dtype = DType::float32;                            // of the parameters, if these are divided by type
  bool has_momentum = false, stochastic_rounding = false;  // whether any parameter has it
  size_t places = 0;  // in Network::parameters: one for each parameter and for each layer without any, see describe()

  void add(int64_t index, const ParameterParams& parameter) {
    parameters.push_back(index);
    ++places;
    has_momentum |= parameter.momentum != nullptr;
    stochastic_rounding |= parameter.stochastic_rounding;
  }
};

template <class N>
using Kernel = void (*)(N);

// The kernel for a part. Kernels::get<Kind, N>() is the kernel that is compiled for a kind of
// parameters, and Kernels::kMomentum says whether the method has momentum.
template <class Kernels, class N, class T>
Kernel<N> kernel_of_type(const Part& part) {
  constexpr bool kMomentum = Kernels::kMomentum, kRandom = std::is_same_v<T, __nv_bfloat16>;
  const bool has_momentum = kMomentum && part.has_momentum;
  if (kRandom && part.stochastic_rounding) {
    return has_momentum ? Kernels::template get<Kind<T, kMomentum, kRandom>, N>()
                        : Kernels::template get<Kind<T, false, kRandom>, N>();
  }
  return has_momentum ? Kernels::template get<Kind<T, kMomentum, false>, N>()
                      : Kernels::template get<Kind<T, false, false>, N>();
}

template <class Kernels, class N>
Kernel<N> kernel_of(const Part& part) {
  return with_type(part.dtype, [&](auto number) { return kernel_of_type<Kernels, N, decltype(number)>(part); });
}

// Divides a network into launches. If `by_type`, each launch has parameters of one type. A layer's
// parameters may be in several launches.
template <class N>
std::vector<Part> divide_network(const UpdateParams& params, bool by_type) {
  constexpr size_t most_layers = N::kLayers, most_places = N::kParameters;
  const size_t plain = params.layer_count;  // stands for the parameters outside layers
  const auto type_of = [&](int64_t i) { return by_type ? params.parameters[i].dtype : DType::float32; };
  const DType home = params.parameter_count > 0 ? type_of(0) : DType::float32;  // the type of layers without parameters
  std::vector<std::vector<int64_t>> of_layer(plain + 1);
  bool present[kDTypes] = {};
  present[static_cast<int>(home)] = true;
  for (int64_t i = 0; i < params.parameter_count; ++i) {
    const int64_t layer = params.parameters[i].layer;
    of_layer[layer < 0 ? plain : layer].push_back(i);
    present[static_cast<int>(type_of(i))] = true;
  }
  std::vector<Part> parts;
  std::vector<int64_t> members;  // the parameters of a layer and a type
  for (const DType type : {DType::float32, DType::float16, DType::bfloat16}) {
    if (!present[static_cast<int>(type)]) continue;
    const size_t begin = parts.size();
    for (size_t layer = 0; layer <= plain; ++layer) {
      members.clear();
      for (const int64_t i : of_layer[layer]) {
        if (type_of(i) == type) members.push_back(i);
      }
      const bool empty = of_layer[layer].empty();
      if (members.empty() && (layer == plain || type != home || !empty)) continue;
      const auto new_part = [&] { parts.emplace_back().dtype = type; };
      const auto begin_layer = [&] {
        if (layer < plain) parts.back().layers.push_back(layer);
      };
      if (parts.size() == begin) new_part();
      const size_t places = parts.back().places + (empty ? 1 : members.size());
      const bool full = parts.back().layers.size() == most_layers || (places > most_places && parts.back().places > 0);
      if (full && layer < plain) new_part();
      begin_layer();
      if (empty) ++parts.back().places;
      for (const int64_t i : members) {
        if (parts.back().places == most_places) {
          new_part();
          begin_layer();
        }
        parts.back().add(i, params.parameters[i]);
      }
    }
  }
  return parts;
}

// For each layer, whether its C is moved before the update, if it was measured: it is if the layer
// is wide or in several parts.
inline std::vector<bool> layers_to_move_first(const UpdateParams& params, const std::vector<Part>& parts) {
  std::vector<int> count(params.layer_count);
  for (const Part& part : parts) {
    for (const int64_t layer : part.layers) ++count[layer];
  }
  std::vector<bool> first(params.layer_count);
  for (int64_t layer = 0; layer < params.layer_count; ++layer) {
    first[layer] = is_wide(params.layers[layer]) || count[layer] > 1;
  }
  return first;
}

template <class N>
bool fits(const Part& part) {
  return part.layers.size() <= N::kLayers && part.places <= N::kParameters;
}

// An overload fills in what another step needs besides a Parameter.
inline void fill(Parameter& parameter, const ParameterParams& from) {
  static_cast<Elements&>(parameter) = elements(from);
  parameter.outer = from.outer, parameter.middle = from.middle, parameter.run = from.run;
  parameter.first_neuron = static_cast<int>(from.first_neuron);
}

inline Layer layer_of(const LayerParams& from) {
  return {from.importance,
          from.measured,
          nullptr,
          from.nonfinite_steps,
          from.neurons,
          static_cast<float>(from.alpha),
          static_cast<float>(from.beta),
          static_cast<float>(from.delta),
          static_cast<float>(1 - from.delta),
          from.error_function,
          from.active_only,
          0};
}

inline std::vector<Layer> layers_of(const UpdateParams& params) {
  std::vector<Layer> layers;
  for (int64_t layer = 0; layer < params.layer_count; ++layer) layers.push_back(layer_of(params.layers[layer]));
  return layers;
}

// What the device reads of a part. `layers`: those of the whole network. `blocks`: how many the
// device runs at a time.
template <class N>
N describe(const UpdateParams& params, const std::vector<Layer>& layers, const Part& part, int64_t blocks) {
  N network{};
  network.grad_scale = params.grad_scale;
  network.found_inf = params.found_inf;
  std::vector<int> place(params.layer_count, -1);
  for (const int64_t index : part.layers) {
    Layer layer = layers[index];
    if (layer.plasticity != nullptr) layer.measured = nullptr;  // this launch does not move C
    place[index] = network.layer_count;
    network.layers[network.layer_count++] = layer;
  }
  int64_t size = 0;
  for (const int64_t index : part.parameters) size += params.parameters[index].size;
  const int64_t item = item_size(size, blocks);
  using P = typename N::OneParameter;
  for (const int64_t index : part.parameters) {
    const ParameterParams& from = params.parameters[index];
    if (from.size == 0 && from.steps == nullptr) continue;
    P parameter{};
    fill(parameter, from);
    parameter.layer = from.layer < 0 ? -1 : place[from.layer];
    const int64_t most = repeats(parameter) ? kItem : kRuns * std::min<int64_t>(parameter.run, kItem);
    parameter.item_size = static_cast<int>(std::min(item, most));
    parameter.first_item = network.items;
    const int64_t items = items_of(parameter);
    network.items += items;
    if (parameter.layer >= 0) network.layers[parameter.layer].items += static_cast<unsigned>(items);
    network.parameters[network.parameter_count++] = parameter;
  }
  // A layer without parameters gets an item without elements, which moves its C.
  for (int layer = 0; layer < network.layer_count; ++layer) {
    if (network.layers[layer].items > 0 || network.layers[layer].measured == nullptr) continue;
    network.layers[layer].items = 1;
    P nothing{};
    nothing.outer = nothing.middle = nothing.run = nothing.item_size = 1;
    nothing.layer = layer;
    nothing.first_item = network.items++;
    network.parameters[network.parameter_count++] = nothing;
  }
  return network;
}

template <class Kernels, class N>
void launch_part(const UpdateParams& params, const std::vector<Layer>& layers, const Part& part, unsigned* arrived,
                 const Stream& stream) {
  const Kernel<N> kernel = kernel_of<Kernels, N>(part);
  N network = describe<N>(params, layers, part, resident_blocks(kernel));
  network.arrived = arrived;
  if (network.items > 0) launch(kernel, network.items, false, stream, network);
}

// Launches all parts of a network one after the other: as a Small if that holds the part, else as a
// Large.
template <class Kernels, class Small, class Large>
void launch_parts(const UpdateParams& params, const Stream& stream) {
  static_assert(sizeof(Large) <= kMostArguments);
  const std::vector<Part> parts = divide_network<Large>(params, true);
  std::vector<bool> first = layers_to_move_first(params, parts);
  int64_t bytes = 0;
  for (int64_t layer = 0; layer < params.layer_count; ++layer) {
    first[layer] = first[layer] && params.layers[layer].measured != nullptr;
    if (first[layer]) bytes += wide_scratch_bytes(params.layers[layer]);
  }
  Scratch scratch(stream, bytes);
  unsigned* arrived = scratch.counters(Large::kLayers + Large::kParameters);  // launches follow each other
  std::vector<Layer> layers = layers_of(params);
  move_first(layers, first, params.found_inf, scratch, stream);
  for (const Part& part : parts) {
    fits<Small>(part) ? launch_part<Kernels, Small>(params, layers, part, arrived, stream)
                      : launch_part<Kernels, Large>(params, layers, part, arrived, stream);
  }
}

}  // namespace npc::cuda
