// From the parameter structs of api.h to what the device reads (update.h), in as few launches as hold it.
#pragma once

#include <algorithm>
#include <vector>

#include "update.h"
#include "wide.h"

namespace npc::cuda {

// The layers and parameters of one launch, as indices into UpdateParams.
struct Part {
  std::vector<int64_t> layers, parameters;
};

// Divides a network into launches. A layer's parameters may end in another launch than they begin in.
template <class N>
std::vector<Part> divide_network(const UpdateParams& params) {
  constexpr size_t most_layers = N::kLayers, most_parameters = N::kParameters - N::kLayers;  // see fits()
  std::vector<std::vector<int64_t>> of_layer(params.layer_count + 1);  // the last: parameters of no layer
  for (int64_t i = 0; i < params.parameter_count; ++i) {
    const int64_t layer = params.parameters[i].layer;
    of_layer[layer < 0 ? params.layer_count : layer].push_back(i);
  }
  std::vector<Part> parts(1);
  for (int64_t layer = 0; layer <= params.layer_count; ++layer) {
    const bool plain = layer == params.layer_count;
    const auto begin_layer = [&] {
      if (!plain) parts.back().layers.push_back(layer);
    };
    const size_t places = parts.back().parameters.size() + of_layer[layer].size();
    const bool full = parts.back().layers.size() == most_layers ||
                      (places > most_parameters && !parts.back().parameters.empty());
    if (full && !plain) parts.emplace_back();
    begin_layer();
    for (const int64_t parameter : of_layer[layer]) {
      if (parts.back().parameters.size() == most_parameters) {
        parts.emplace_back();
        begin_layer();
      }
      parts.back().parameters.push_back(parameter);
    }
  }
  return parts;
}

// Of each layer whether its C, if it was measured, is moved before the update: of wide ones and those in several parts.
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

// Whether a launch holds a part; each of its layers may need the place of a parameter more, see describe().
template <class N>
bool fits(const Part& part) {
  return part.layers.size() <= N::kLayers && part.parameters.size() + part.layers.size() <= N::kParameters;
}

// What another step needs beside a Parameter is filled in by an overload.
inline void fill(Parameter& parameter, const ParameterParams& from) {
  static_cast<Elements&>(parameter) = elements(from);
  parameter.outer = from.outer, parameter.middle = from.middle, parameter.run = from.run;
  parameter.first_neuron = static_cast<int>(from.first_neuron);
}

inline Layer layer_of(const LayerParams& from) {
  return {from.importance, from.measured, nullptr, from.skipped, from.neurons,
          static_cast<float>(from.alpha), static_cast<float>(from.beta), static_cast<float>(from.delta),
          static_cast<float>(1 - from.delta), from.error_function, from.active_only, 0};
}

inline std::vector<Layer> layers_of(const UpdateParams& params) {
  std::vector<Layer> layers;
  for (int64_t layer = 0; layer < params.layer_count; ++layer) layers.push_back(layer_of(params.layers[layer]));
  return layers;
}

// `layers`: of the whole network. `blocks`: how many the device runs at a time.
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
  const int64_t item = item_size(size, blocks, kRuns);
  using P = typename N::OneParameter;
  const auto add = [&](P parameter) {
    parameter.item_size = static_cast<int>(std::min(item, kRuns * std::min<int64_t>(parameter.run, kItem)));
    parameter.first_item = network.items;
    const int64_t items = items_of(parameter);
    network.items += items;
    if (parameter.layer >= 0) network.layers[parameter.layer].items += static_cast<unsigned>(items);
    network.parameters[network.parameter_count++] = parameter;
  };
  for (const int64_t index : part.parameters) {
    const ParameterParams& from = params.parameters[index];
    if (from.size == 0 && from.steps == nullptr) continue;
    P parameter{};
    fill(parameter, from);
    parameter.layer = from.layer < 0 ? -1 : place[from.layer];
    add(parameter);
  }
  // C moves also where nothing depends on it: an item without elements sees to that.
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

// Launches all parts of a network, one after the other, by launch_one(network): as a Small where that holds it, else as a
// Large.
template <class Small, class Large, class LaunchOne>
void launch_parts(const UpdateParams& params, const Stream& stream, const LaunchOne& launch_one) {
  static_assert(sizeof(Large) <= kMostArguments);
  const std::vector<Part> parts = divide_network<Large>(params);
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
  const int64_t blocks = int64_t{kBlocksPerProcessor} * processors();
  const auto launch_as = [&](auto network) {
    network.arrived = arrived;
    if (network.items > 0) launch_one(network);
  };
  for (const Part& part : parts) {
    fits<Small>(part) ? launch_as(describe<Small>(params, layers, part, blocks))
                      : launch_as(describe<Large>(params, layers, part, blocks));
  }
}

}  // namespace npc::cuda
