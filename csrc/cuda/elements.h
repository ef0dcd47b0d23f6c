// The elements of parameters, in items that blocks work on, and how one element moves: what all weight updates share.
#pragma once

#include <algorithm>

#include "../api.h"
#include "../rules.h"
#include "device.h"

namespace npc::cuda {

constexpr int kItem = 16384;  // elements at most
constexpr int64_t kMostArguments = 32764;  // bytes that a kernel's arguments may take, since CUDA 12.1

// A parameter's elements. Items are counted through all parameters of a launch.
struct Elements {
  void* value;
  const void* gradient;
  void* momentum;
  const float* lr_address;
  float* steps;  // or null
  int64_t size, first_item;
  int item_size;  // elements
  float lr, momentum_factor, weight_decay, sign;
  uint32_t seed;
  DType dtype;
  bool nesterov, stochastic_rounding, packed;  // packed: 16-byte accesses are allowed
};

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline Elements elements(const ParameterParams& from) {
  return {from.value, from.gradient, from.momentum, from.lr_address, from.steps, from.size, 0, 0,
          static_cast<float>(from.lr), static_cast<float>(from.momentum_factor),
          static_cast<float>(from.weight_decay), from.maximize ? -1.0f : 1.0f, from.seed, from.dtype, from.nesterov,
          from.stochastic_rounding,
          on_16_bytes(from.value) && on_16_bytes(from.gradient) && on_16_bytes(from.momentum)};
}

// How many items a parameter has; one without elements is there to count its steps.
__host__ __device__ inline int64_t items_of(const Elements& p) {
  const int64_t items = (p.size + p.item_size - 1) / p.item_size;
  return items > 0 ? items : 1;
}

// Small networks are cut smaller, so that all of the device works on them: the elements of an item, a multiple of `unit`.
inline int64_t item_size(int64_t all_elements, int64_t blocks, int64_t unit) {
  return std::clamp<int64_t>(all_elements / blocks / unit * unit, unit, kItem);
}

template <class N>
__device__ __forceinline__ const auto& parameter_of(const N& network, int64_t item) {
  int first = 0, last = network.parameter_count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (network.parameters[middle].first_item <= item) first = middle;
    else last = middle - 1;
  }
  return network.parameters[first];
}

// The elements [begin, end) of an item.
struct Interval {
  int64_t begin, end;
};

__device__ __forceinline__ Interval elements_of(const Elements& p, int64_t item) {
  const int64_t begin = (item - p.first_item) * p.item_size;
  return {begin, begin + p.item_size < p.size ? begin + p.item_size : p.size};
}

// Whether the whole step is to be left out because gradients overflowed.
template <class N>
__device__ __forceinline__ bool overflowed(const N& network) {
  return network.found_inf != nullptr && *network.found_inf != 0.0f;
}

// What every element of a parameter has in common.
struct Step {
  float lr, factor, weight_decay, momentum;
  bool nesterov;
};

__device__ __forceinline__ Step step_of(const Elements& p, const float* grad_scale) {
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  return {p.lr_address == nullptr ? p.lr : *p.lr_address, p.sign / scale, p.weight_decay, p.momentum_factor,
          p.nesterov};
}

// How the values of an item are rounded to their type.
struct Rounding {
  bool at_random;
  uint32_t key;
};

__device__ __forceinline__ Rounding rounding_of(const Elements& p, int64_t begin) {
  if (!p.stochastic_rounding) return {false, 0};
  return {true, rounding_key(p.seed, *p.steps, static_cast<uint32_t>(begin >> 32))};
}

template <class T>
__device__ __forceinline__ void round_value(float value, const Rounding&, int64_t, T& out) {
  from_float(value, out);
}
__device__ __forceinline__ void round_value(float value, const Rounding& rounding, int64_t index, __nv_bfloat16& out) {
  if (!rounding.at_random) return from_float(value, out);
  from_float_at_random(value, random_bits<uint32_t>(rounding.key, static_cast<uint32_t>(index)), out);
}

// The value after a step along d, the gradient with everything that was added to it.
__device__ __forceinline__ float moved_along(const Step& step, float value, float d, float rate, bool has_momentum,
                                             float& velocity) {
  if (!has_momentum) return value - rate * d;
  velocity = step.momentum * velocity + d;
  return value - rate * (step.nesterov ? d + step.momentum * velocity : velocity);
}

__device__ __forceinline__ float moved(const Step& step, float value, float gradient, float rate, bool has_momentum,
                                       float& velocity) {
  float d = gradient * step.factor;
  if (step.weight_decay != 0.0f) d += step.weight_decay * value;
  return moved_along(step, value, d, rate, has_momentum, velocity);
}

// As many floats as a pack has numbers, read and written with as wide accesses as the pack.
template <class P>
struct alignas(P::size == 1 ? 4 : 16) Floats {
  float at[P::size];
};

// Calls move(pack, at) for every pack of an item's elements, as wide as the parameter allows; `pack` says by its type
// how wide: Pack<T> or Single<T>.
template <class T, class Move>
__device__ __forceinline__ void for_each_pack(const Elements& p, const Interval& item, const Move& move) {
  constexpr int size = Pack<T>::size;
  const int64_t packs = p.packed ? (item.end - item.begin) / size : 0;
#pragma unroll 2
  for (int64_t pack = thread(); pack < packs; pack += kThreads) move(Pack<T>{}, item.begin + pack * size);
  for (int64_t at = item.begin + packs * size + thread(); at < item.end; at += kThreads) move(Single<T>{}, at);
}

}  // namespace npc::cuda
