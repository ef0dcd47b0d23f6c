// For all weight updates: the elements of parameters, in the items that blocks work on, and how one
// element moves.
#pragma once

#include <algorithm>

#include "../api.h"
#include "../rules.h"
#include "device.h"

namespace npc::cuda {

constexpr int kItem = 16384;               // the most elements of an item
constexpr int64_t kMostArguments = 32764;  // bytes of a kernel's arguments, since CUDA 12.1

// A parameter's elements. Items are numbered through all parameters of a launch.
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
  return {from.value,
          from.gradient,
          from.momentum,
          from.lr_address,
          from.steps,
          from.size,
          0,
          0,
          static_cast<float>(from.lr),
          static_cast<float>(from.momentum_factor),
          static_cast<float>(from.weight_decay),
          from.maximize ? -1.0f : 1.0f,
          from.seed,
          from.dtype,
          from.nesterov,
          from.stochastic_rounding,
          on_16_bytes(from.value) && on_16_bytes(from.gradient) && on_16_bytes(from.momentum)};
}

// The number of a parameter's items. A parameter without elements has one, which counts its steps.
__host__ __device__ inline int64_t items_of(const Elements& p) {
  const int64_t items = (p.size + p.item_size - 1) / p.item_size;
  return items > 0 ? items : 1;
}

// The number of elements of an item in a network that `blocks` blocks work on at a time. Small
// networks get small items, so that the whole device works on them at once.
inline int64_t item_size(int64_t all_elements, int64_t blocks) {
  constexpr int64_t unit = kThreads * 4;
  return std::clamp<int64_t>((all_elements + blocks * unit - 1) / (blocks * unit) * unit, unit, kItem);
}

// Adds a parameter to the network of a launch, in items of `item` elements.
template <class N, class P>
void add_parameter(N& network, P parameter, int64_t item) {
  parameter.first_item = network.items;
  parameter.item_size = static_cast<int>(item);
  network.items += (parameter.size + item - 1) / item;
  network.parameters[network.parameter_count++] = parameter;
}

// The parameter that an item belongs to.
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

// Whether gradients overflowed, so that the step changes nothing.
template <class N>
__device__ __forceinline__ bool overflowed(const N& network) {
  return network.found_inf != nullptr && *network.found_inf != 0.0f;
}

// What all elements of a parameter have in common.
struct Step {
  float lr, factor, weight_decay, momentum;
  bool nesterov;
};

__device__ __forceinline__ Step step_of(const Elements& p, const float* grad_scale) {
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  return {p.lr_address == nullptr ? p.lr : *p.lr_address, p.sign / scale, p.weight_decay, p.momentum_factor,
          p.nesterov};
}

// What a kernel is compiled for: the type of the parameters, and what they may have. This decides
// how many registers are left for packs in flight.
template <class T_, bool kMomentum_, bool kRandom_>
struct Kind {
  using T = T_;
  static constexpr bool kMomentum = kMomentum_;
  static constexpr bool kRandom = kRandom_;  // stochastic rounding
};

// Rounds the values of an item to their type.
template <class Kind>
class Rounding {
  using T = typename Kind::T;

 public:
  __device__ __forceinline__ Rounding(const Elements& p, int64_t begin) {
    if constexpr (Kind::kRandom) {
      stochastic_ = p.stochastic_rounding;
      index_ = static_cast<uint32_t>(begin);
      if (stochastic_) key_ = rounding_key(p.seed, *p.steps, static_cast<uint32_t>(begin >> 32));
    }
  }

  // `at`: the element's index in the item.
  __device__ __forceinline__ T operator()(float value, int at) const {
    T result;
    if constexpr (Kind::kRandom) {
      if (stochastic_) {
        from_float_stochastically(value, random_bits<uint32_t>(key_, index_ + static_cast<uint32_t>(at)), result);
        return result;
      }
    }
    from_float(value, result);
    return result;
  }

 private:
  bool stochastic_ = false;
  uint32_t key_ = 0, index_ = 0;
};

// The value after a step along d: the gradient and all that was added to it.
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

// The plasticity of elements of no layer.
struct Everywhere {
  struct Found {
    bool any;
  };
  template <int size>
  __device__ __forceinline__ Found find(int) const {
    return {true};
  }
  template <int size>
  __device__ __forceinline__ void expand(Found, int, float (&plasticity)[size]) const {
    for (float& of_element : plasticity) of_element = 1.0f;
  }
};

// An array from an item's first element on; null if the parameter has no such array.
template <class T>
__device__ __forceinline__ T* from(T* array, int64_t begin) {
  return array == nullptr ? nullptr : array + begin;
}

// A pack of each array that all visitors have.
template <class P>
struct WeightPacks {
  P value, gradient, momentum;
};

// The base of all visitors: an item's arrays. kMomentum: whether there may be a momentum.
template <class T_, bool kMomentum>
struct Weights {
  using T = T_;
  template <class P>
  using Packs = WeightPacks<P>;

  T* value;
  const T* gradient;
  T* momentum;  // or null

  __device__ __forceinline__ Weights(const Elements& p, int64_t begin)
      : value(static_cast<T*>(p.value) + begin),
        gradient(static_cast<const T*>(p.gradient) + begin),
        momentum(from(static_cast<T*>(p.momentum), begin)) {}

  __device__ __forceinline__ bool has_momentum() const { return kMomentum && momentum != nullptr; }

  template <class P>
  __device__ __forceinline__ void load(bool wanted, int at, WeightPacks<P>& packs) const {
    load_if(wanted, value + at, packs.value);
    load_if(wanted, gradient + at, packs.gradient);
    if constexpr (kMomentum) load_if(wanted && has_momentum(), momentum + at, packs.momentum);
  }

  __device__ __forceinline__ void prefetch(int at) const {
    ::npc::cuda::prefetch(value + at);
    ::npc::cuda::prefetch(gradient + at);
    if (has_momentum()) ::npc::cuda::prefetch(momentum + at);
  }

  template <class P>
  __device__ __forceinline__ void write(int at, const WeightPacks<P>& packs) const {
    store(value + at, packs.value);
    if constexpr (kMomentum) {
      if (has_momentum()) store(momentum + at, packs.momentum);
    }
  }
};

// A visitor v of type V derives from Weights, which has all of this but kPacks and use(). It holds
// an item's arrays and moves its elements:
//
//   V::T, V::kPacks                    the parameter's type; how many packs of each array are in flight at a time
//   V::Packs<P>                        a pack P of each array
//   v.load(wanted, at, packs)          loads the packs that begin at element `at` of the item, if they are wanted
//   v.prefetch(at)                     starts to bring these packs into the L2 cache
//   v.use(at, packs, plasticity)       moves the elements of the packs and stores them

// Moves all whole packs of an item. A pack whose elements all have a plasticity of 0 is neither
// read nor written: plasticity.find() tells which these are, and plasticity.expand() gives every
// element of the others its own.
template <class V, class Plasticity>
__device__ __forceinline__ void use_packs(V& visitor, int count, const Plasticity& plasticity) {
  using P = Pack<typename V::T>;
  constexpr int stride = kThreads * P::size;
  for (int first = thread() * P::size; first < count; first += V::kPacks * stride) {
    typename V::template Packs<P> packs[V::kPacks] = {};
    decltype(plasticity.template find<P::size>(0)) found[V::kPacks] = {};
#pragma unroll
    for (int pack = 0; pack < V::kPacks; ++pack) {
      const int at = first + pack * stride;
      if (at < count) found[pack] = plasticity.template find<P::size>(at);
    }
#pragma unroll
    for (int pack = 0; pack < V::kPacks; ++pack) visitor.load(found[pack].any, first + pack * stride, packs[pack]);
#pragma unroll
    for (int pack = 0; pack < V::kPacks; ++pack) {
      if (!found[pack].any) continue;
      float of_elements[P::size];
      plasticity.expand(found[pack], first + pack * stride, of_elements);
      visitor.use(first + pack * stride, packs[pack], of_elements);
    }
  }
}

// Moves the elements from `from` on, one at a time: the end of an item, which fills no pack, and
// parameters that do not lie on a multiple of 16 bytes.
template <class V, class Plasticity>
__device__ __forceinline__ void use_singles(V& visitor, int from, int count, const Plasticity& plasticity) {
  for (int at = from + thread(); at < count; at += kThreads) {
    const auto found = plasticity.template find<1>(at);
    if (!found.any) continue;
    float of_element[1];
    plasticity.expand(found, at, of_element);
    typename V::template Packs<Single<typename V::T>> packs = {};
    visitor.load(true, at, packs);
    visitor.use(at, packs, of_element);
  }
}

// The number of elements that are moved in packs: none if the parameter does not allow it.
template <class V>
__device__ __forceinline__ int in_packs(const Elements& p, int count) {
  constexpr int size = Pack<typename V::T>::size;
  return p.packed ? count / size * size : 0;
}

template <class V, class Plasticity>
__device__ __forceinline__ void use_elements(const Elements& p, V& visitor, int count, const Plasticity& plasticity) {
  const int packed = in_packs<V>(p, count);
  use_packs(visitor, packed, plasticity);
  use_singles(visitor, packed, count, plasticity);
}

// Starts to bring the first packs of an item into the L2 cache, as far as wants(at) is true of
// their first element.
template <class V, class Wants>
__device__ __forceinline__ void prefetch_elements(const Elements& p, const V& visitor, int count, const Wants& wants) {
  constexpr int size = Pack<typename V::T>::size;
  const int packed = in_packs<V>(p, count);
  for (int pack = 0; pack < V::kPacks; ++pack) {
    const int at = (thread() + pack * kThreads) * size;
    if (at < packed && wants(at)) visitor.prefetch(at);
  }
}

}  // namespace npc::cuda
