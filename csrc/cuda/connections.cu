// CPC: every connection has an importance and a learning rate. One cooperative launch.
//
//   c = |w dL/dw|, and -0.0 where dL/dw is 0
//
// Eqs. 3 (over the layer's connections), 4, 7 and the weight update follow, element by element.
//
// First every block sums c over its items, layer by layer, and writes one partial sum for each
// layer. After a barrier of the whole grid it adds up the partial sums of the layers that its items
// are in, in the same order as all other blocks, and moves its elements. An item is at most kItem
// elements of one parameter; block k works on items k, k + blocks, ...
//
// Traffic for float32: w and dL/dw read twice (8 bytes an element), C read and written, w written.
// That is 28 bytes, or 20 where the network fits the cache.

#include <vector>

#include "elements.h"
#include "workspace.h"

namespace npc::cuda {
namespace {

struct ConnectionParameter : Elements {
  float* importance;
  int layer;  // -1: none, the rate is lr
};

struct ConnectionLayer {
  int64_t* nonfinite_steps;
  int64_t connections;
  float alpha, beta, delta, one_minus_delta;
  bool error_function, active_only;
};

// By value in the kernel's arguments.
template <int kParameters_, int kLayers_>
struct ConnectionNetwork {
  static constexpr int kParameters = kParameters_, kLayers = kLayers_;
  const float* grad_scale;
  const float* found_inf;
  float* partial_sums;    // [layers, blocks]
  float* partial_counts;  // [layers, blocks], of connections that received a gradient
  int64_t items;
  int parameter_count, layer_count;
  ConnectionLayer layers[kLayers];
  ConnectionParameter parameters[kParameters];
};
using SmallNetwork = ConnectionNetwork<24, 12>;
using LargeNetwork = ConnectionNetwork<220, 110>;
static_assert(sizeof(LargeNetwork) <= kMostArguments);

struct ConnectionShared {
  double totals[kWarps], counts[kWarps];
};

struct Total {
  float sum, connections;
};

__device__ __forceinline__ float connection_importance(float value, float gradient) {
  const float c = fabsf(value * gradient);
  return c == 0.0f && gradient == 0.0f ? kNoGradient : c;
}

// Two visitors (elements.h): the first sums importance, the second moves the elements.
template <class T>
struct Measure : Weights<T, false> {
  static constexpr int kPacks = 4;

  float sum = 0, active = 0;  // of one thread, over an item

  __device__ __forceinline__ Measure(const ConnectionParameter& p, int64_t begin) : Weights<T, false>(p, begin) {}

  template <class P>
  __device__ __forceinline__ void use(int, const WeightPacks<P>& packs, const float (&)[P::size]) {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float c = connection_importance(to_float(packs.value.at[k]), to_float(packs.gradient.at[k]));
      sum += c;
      active += received_no_gradient(c) ? 0.0f : 1.0f;
    }
  }
};

template <class T>
struct Move : Weights<T, true> {
  using Base = Weights<T, true>;
  static constexpr int kPacks = 2;

  template <class P>
  struct Packs : WeightPacks<P> {
    Floats<P> importance;
  };

  float* importance;             // null for parameters of no layer
  const ConnectionLayer& layer;  // any, for those
  Total total;
  Step step;

  __device__ __forceinline__ Move(const ConnectionParameter& p, const ConnectionLayer& layer, const Total& total,
                                  int64_t begin, const float* grad_scale)
      : Base(p, begin),
        importance(p.layer < 0 ? nullptr : p.importance + begin),
        layer(layer),
        total(total),
        step(step_of(p, grad_scale)) {}

  template <class P>
  __device__ __forceinline__ void load(bool wanted, int at, Packs<P>& packs) const {
    Base::load(wanted, at, packs);
    load_if(wanted && importance != nullptr, importance + at, packs.importance);
  }

  // Moves the C of one connection and returns the plasticity with which its weight moves.
  __device__ __forceinline__ float move_importance(float value, float gradient, float& average) const {
    const float before = average, c = connection_importance(value, gradient);
    if (layer.active_only && received_no_gradient(c)) return 0.0f;  // takes no part: as it is, to the bit
    if (total.sum > 0.0f && !isinf(total.sum)) {
      const float normalized = normalized_importance(c, total.sum, total.connections);
      average = moving_average(average, normalized, layer.delta, layer.one_minus_delta);
    }
    const float share = layer.error_function ? plasticity_erf(average, layer.alpha, layer.beta)
                                             : plasticity_sigmoid(average, layer.alpha, layer.beta);
    return plasticity_after(before, layer.beta, share);
  }

  template <class P>
  __device__ __forceinline__ void use(int at, Packs<P>& packs, const float (&)[P::size]) const {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float before = to_float(packs.value.at[k]), d = to_float(packs.gradient.at[k]);
      const float plasticity = importance == nullptr ? 1.0f : move_importance(before, d, packs.importance.at[k]);
      float velocity = to_float(packs.momentum.at[k]);
      const float after = moved(step, before, d, plasticity * step.lr, this->has_momentum(), velocity);
      if (plasticity > 0.0f) from_float(after, packs.value.at[k]);
      if (plasticity != 0.0f) from_float(plasticity > 0.0f ? velocity : 0.0f, packs.momentum.at[k]);
    }
    this->write(at, packs);
    if (importance != nullptr) store(importance + at, packs.importance);
  }
};

// The first half: a block's partial sums. Its items come layer by layer, because parameters are
// sorted.
template <class N>
__device__ __forceinline__ void measure(const N& network, ConnectionShared& shared) {
  const auto place = [&](int layer) { return static_cast<int64_t>(layer) * gridDim.x + blockIdx.x; };
  double sum = 0, active = 0;
  int layer = -1;
  const auto flush = [&] {
    const double block_sum = sum_over_block(sum, shared.totals), block_active = sum_over_block(active, shared.counts);
    if (thread() == 0) {
      network.partial_sums[place(layer)] = static_cast<float>(block_sum);
      network.partial_counts[place(layer)] = static_cast<float>(block_active);
    }
    sum = active = 0;
  };
  for (int l = thread(); l < network.layer_count; l += kThreads) {
    network.partial_sums[place(l)] = network.partial_counts[place(l)] = 0.0f;
  }
  __syncthreads();  // zeros before sums
  for (int64_t item = blockIdx.x; item < network.items; item += gridDim.x) {
    const ConnectionParameter& p = parameter_of(network, item);
    if (p.layer < 0) continue;
    if (p.layer != layer && layer >= 0) flush();
    layer = p.layer;
    const Interval elements = elements_of(p, item);
    with_type(p.dtype, [&](auto number) {
      Measure<decltype(number)> visitor(p, elements.begin);
      use_elements(p, visitor, static_cast<int>(elements.end - elements.begin), Everywhere{});
      sum += visitor.sum;
      active += visitor.active;
    });
  }
  if (layer >= 0) flush();
}

template <class N>
__device__ __forceinline__ Total total_of(const N& network, int layer, ConnectionShared& shared) {
  double sum = 0, active = 0;
  for (int64_t block = thread(); block < gridDim.x; block += kThreads) {
    sum += network.partial_sums[static_cast<int64_t>(layer) * gridDim.x + block];
    active += network.partial_counts[static_cast<int64_t>(layer) * gridDim.x + block];
  }
  const double total = sum_over_block(sum, shared.totals), count = sum_over_block(active, shared.counts);
  const ConnectionLayer& current = network.layers[layer];
  return {static_cast<float>(total),
          current.active_only ? static_cast<float>(count) : static_cast<float>(current.connections)};
}

template <class N>
__global__ void __launch_bounds__(kThreads, 2) connection_update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  ConnectionShared& shared = shared_memory<ConnectionShared>();
  measure(network, shared);
  grid_barrier();
  for (int layer = static_cast<int>(blockIdx.x); layer < network.layer_count; layer += static_cast<int>(gridDim.x)) {
    const Total total = total_of(network, layer, shared);
    if (thread() == 0 && !isfinite(total.sum)) ++*network.layers[layer].nonfinite_steps;
  }
  Total total = {0.0f, 0.0f};
  int layer = -1;
  for (int64_t item = blockIdx.x; item < network.items; item += gridDim.x) {
    const ConnectionParameter& p = parameter_of(network, item);
    if (p.layer >= 0 && p.layer != layer) {
      layer = p.layer;
      total = total_of(network, layer, shared);
    }
    const Interval elements = elements_of(p, item);
    with_type(p.dtype, [&](auto number) {
      Move<decltype(number)> visitor(p, network.layers[p.layer < 0 ? 0 : p.layer], total, elements.begin,
                                     network.grad_scale);
      use_elements(p, visitor, static_cast<int>(elements.end - elements.begin), Everywhere{});
    });
  }
}

// The layers and parameters of one launch, as indices into UpdateParams. A layer's parameters stay
// together.
struct Part {
  std::vector<int64_t> layers, parameters;
};

std::vector<Part> divide(const UpdateParams& params) {
  std::vector<Part> parts(1);
  for (int64_t layer = -1; layer < params.layer_count; ++layer) {
    std::vector<int64_t> in_layer;
    for (int64_t i = 0; i < params.parameter_count; ++i) {
      if (params.parameters[i].layer == layer && params.parameters[i].size > 0) in_layer.push_back(i);
    }
    const auto room = [&] { return size_t{LargeNetwork::kParameters} - parts.back().parameters.size(); };
    if (layer >= 0) {
      if (in_layer.size() > size_t{LargeNetwork::kParameters}) {
        throw std::length_error("npc_ext: a layer has more than " + std::to_string(LargeNetwork::kParameters) +
                                " parameters");
      }
      if (in_layer.size() > room() || parts.back().layers.size() == size_t{LargeNetwork::kLayers}) parts.emplace_back();
      parts.back().layers.push_back(layer);
    }
    for (const int64_t parameter : in_layer) {
      if (room() == 0) parts.emplace_back();  // only parameters outside layers come here
      parts.back().parameters.push_back(parameter);
    }
  }
  return parts;
}

// The floats of scratch memory that a part needs on a device that runs `resident` blocks at a time.
int64_t scratch_floats(const Part& part, int64_t resident) {
  return 2 * static_cast<int64_t>(part.layers.size()) * resident;
}

// scratch: as many floats as scratch_floats() says.
template <class N>
void launch_part(const UpdateParams& params, const Part& part, float* scratch, const Stream& stream) {
  N network{};
  network.grad_scale = params.grad_scale;
  network.found_inf = params.found_inf;
  std::vector<int> place(params.layer_count, -1);
  for (const int64_t index : part.layers) {
    const LayerParams& from = params.layers[index];
    place[index] = network.layer_count;
    network.layers[network.layer_count++] = {from.nonfinite_steps,
                                             0,
                                             static_cast<float>(from.alpha),
                                             static_cast<float>(from.beta),
                                             static_cast<float>(from.delta),
                                             static_cast<float>(1 - from.delta),
                                             from.error_function,
                                             from.active_only};
  }
  int64_t size = 0;
  for (const int64_t index : part.parameters) size += params.parameters[index].size;
  const int64_t resident = resident_blocks(connection_update_kernel<N>);
  const int64_t item = item_size(size, resident);
  for (const int64_t index : part.parameters) {
    const ParameterParams& from = params.parameters[index];
    ConnectionParameter p{elements(from), from.importance, from.layer < 0 ? -1 : place[from.layer]};
    p.packed = p.packed && on_16_bytes(p.importance);
    add_parameter(network, p, item);
    if (p.layer >= 0) network.layers[p.layer].connections += p.size;
  }
  if (network.items == 0) return;
  const int64_t blocks = std::min(network.items, resident);
  network.partial_sums = scratch;
  network.partial_counts = scratch + network.layer_count * blocks;
  launch(connection_update_kernel<N>, blocks, true, stream, network);
}

}  // namespace

void launch_connection_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  const std::vector<Part> parts = divide(params);
  const auto is_small = [](const Part& part) {
    return part.layers.size() <= SmallNetwork::kLayers && part.parameters.size() <= SmallNetwork::kParameters;
  };
  // The parts share scratch memory, because their launches follow each other. It is allocated before
  // the first one, so that a step happens as a whole or not at all.
  const int64_t resident = std::max(resident_blocks(connection_update_kernel<SmallNetwork>),
                                    resident_blocks(connection_update_kernel<LargeNetwork>));
  int64_t floats = 0;
  for (const Part& part : parts) floats = std::max(floats, scratch_floats(part, resident));
  Scratch scratch(stream, Scratch::bytes_of<float>(floats));
  float* shared = scratch.array<float>(floats);
  for (const Part& part : parts) {
    is_small(part) ? launch_part<SmallNetwork>(params, part, shared, stream)
                   : launch_part<LargeNetwork>(params, part, shared, stream);
  }
}

}  // namespace npc::cuda
