// CPC, with an importance and a rate to every connection: the loops over memory, compiled once per
// instruction set (kernels.cpp).
//
// measure_connections() reads value and gradient. descend_connections() reads and writes what
// descend() does, and besides it reads and writes every element's importance.
#pragma once

#include "update.h"

namespace npc::cpu::NPC_ISA {

// |value * gradient|, and kNoGradient where the gradient is zero.
template <class R>
static inline Vector<R> connection_importance(Vector<R> value, Vector<R> gradient) {
  return (Vector<R>)((Mask<R>)absolute<R>(value * gradient) |
                     (Mask<R>)keep<R>(gradient == R(0), broadcast_bits<R>(R(kNoGradient))));
}

// Writes the importance of `count` elements, at most kTile, to out. The lanes that fill its last
// vector get kNoGradient.
template <class T>
static inline void connection_importance(const T* value, const T* gradient, int64_t count, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, connection_importance<R>(load(value + i), load(gradient + i)));
  if (i == count) return;
  store(out + i, connection_importance<R>(load_partial(value + i, count - i), load_partial(gradient + i, count - i)));
}

template <class T>
static ConnectionTotal measure_connections(const Elements& elements) {
  const ParameterParams& p = elements.parameter;
  const int64_t begin = elements.begin, end = elements.end;
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  R importance[kTile + L];
  ConnectionTotal total = {0, 0};
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    connection_importance(static_cast<const T*>(p.value) + at, static_cast<const T*>(p.gradient) + at, count,
                          importance);
    Vector<R> sum = {};
    Mask<R> inactive = {};  // each lane counts down
    int64_t i = 0;
    for (; i < count; i += L) {
      const Vector<R> lanes = load(importance + i);
      sum += lanes;
      inactive += (Mask<R>)lanes == (Mask<R>)broadcast_bits<R>(R(kNoGradient));
    }
    int64_t zeros = 0;
    for (int lane = 0; lane < L; ++lane) zeros -= inactive[lane];
    total.sum += sum_lanes<R>(sum);
    total.active += i - zeros;
  }
  return total;
}

template <class O, class T>
static void descend_connections_with(const Elements& elements, const LayerParams& layer, float total,
                                     float connections) {
  const ParameterParams& p = elements.parameter;
  const int64_t begin = elements.begin, end = elements.end;
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const Weights<T> weights(p);
  const Step<T> step(elements);
  const R lr = largest_rate<R>(p);
  R measured[kTile + L], rates[kTile + L];
  float as_float[kTile], share[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    connection_importance(weights.value + at, weights.gradient + at, count, measured);
    for (int64_t i = 0; i < count; ++i) as_float[i] = static_cast<float>(measured[i]);
    plasticity(layer, p.importance + at, as_float, share, count, total, connections);
    for (int64_t i = 0; i < count; ++i) rates[i] = rate_of<R>(share[i], lr);
    for (int k = 0; k < L; ++k) rates[count + k] = R(kStays);
    descend_elements<O, T>(step, weights.from(at), count, rates, ToNearest{});
  }
}

template <class T>
static void descend_connections(const Elements& elements, const LayerParams& layer, float total, float connections) {
  with_momentum(elements.parameter, [&](auto momentum) {
    descend_connections_with<Options<decltype(momentum)::value, true>, T>(elements, layer, total, connections);
  });
}

}  // namespace npc::cpu::NPC_ISA
