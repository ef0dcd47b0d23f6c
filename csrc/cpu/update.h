// Eqs. 3, 4, 7 and SGD's step: the loops over memory, compiled once per instruction set
// (kernels.cpp). update.cpp divides the work. adam.h, anchored.h and connections.h have the loops
// of the other steps.
//
// descend() reads value, gradient and momentum once and writes value and momentum once. It does not
// touch frozen rows, unless rows are so short that every element has a rate: then it writes frozen
// elements back as they were. Rows that this step freezes lose their first moment.
#pragma once

#include <type_traits>

#include "../rules.h"
#include "kernels.h"
#include "simd.h"

namespace npc::cpu::NPC_ISA {

// ------------------------------------------------------------------------------------------ importance to plasticity

static void plasticity(const LayerParams& layer, float* average, const float* measured, float* out, int64_t neurons,
                       float total, float active) {
  const auto alpha = static_cast<float>(layer.alpha), beta = static_cast<float>(layer.beta);
  const auto delta = static_cast<float>(layer.delta), one_minus_delta = static_cast<float>(1 - layer.delta);
  if (measured != nullptr && total > 0 && total <= __FLT_MAX__) {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = average[i];
      const float moved =
          moving_average(average[i], normalized_importance(measured[i], total, active), delta, one_minus_delta);
      average[i] = layer.active_only && received_no_gradient(measured[i]) ? average[i] : moved;
    }
  } else {
    for (int64_t i = 0; i < neurons; ++i) out[i] = average[i];
  }
  // `out` holds C before the step. Each loop does one thing, so that the compiler can vectorize it.
  if (layer.error_function) {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = plasticity_after(out[i], beta, plasticity_erf(average[i], alpha, beta));
    }
  } else {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = plasticity_after(out[i], beta, plasticity_sigmoid(average[i], alpha, beta));
    }
  }
  if (!layer.active_only || measured == nullptr) return;
  for (int64_t i = 0; i < neurons; ++i) {
    if (received_no_gradient(measured[i])) out[i] = 0;
  }
}

// ------------------------------------------------------------------------------------------------- rates of elements

constexpr int64_t kTile = 256;  // elements that get a rate each at a time

// Stands in place of the rate of an element that stays as it is. kClears: only its first moment
// changes, to 0.
constexpr float kStays = -2.0f;

// What happens to an element, given its neuron's plasticity: its rate, kStays or kClears.
template <class R>
static inline R rate_of(float plasticity, R lr) {
  if (plasticity <= 0) return R(plasticity == 0 ? kStays : kClears);
  return plasticity * lr;
}

template <class R>
static inline R largest_rate(const ParameterParams& p) {
  return static_cast<R>(p.lr_address == nullptr ? p.lr : *p.lr_address);
}

// Goes through elements [begin, end) run by run: calls on_run(at, count, rate) for runs that move
// and clear(at, count) for runs that lose their first moment. Where runs are shorter than
// `short_run`, it calls on_tile(at, count, rates) instead, for tiles of at most kTile elements with
// a rate_of() each. A vector's worth of kStays follows the last rate.
template <class R, class OnRun, class Clear, class OnTile>
static inline void for_each_rate(const ParameterParams& p, const float* plasticity, R lr, int64_t short_run,
                                 int64_t begin, int64_t end, const OnRun& on_run, const Clear& clear,
                                 const OnTile& on_tile) {
  if (plasticity == nullptr) {
    on_run(begin, end - begin, lr);
    return;
  }
  const int64_t runs_per_group = p.outer * p.middle;
  // The neuron of the run that holds element `begin`, advanced run by run.
  int64_t run = begin / p.run;
  int64_t row = run % p.middle, group_base = run / runs_per_group * p.middle;
  int64_t left_in_group = runs_per_group - run % runs_per_group;
  const auto next_run = [&] {
    if (++row == p.middle) row = 0;
    if (--left_in_group == 0) {
      left_in_group = runs_per_group;
      group_base += p.middle;
    }
  };
  int64_t left_in_run = p.run - begin % p.run;
  if (p.run >= short_run) {
    // Neighbours with the same rate count as one run. Most have the same while little is important.
    const auto rate = [&] { return rate_of<R>(plasticity[group_base + row], lr); };
    for (int64_t at = begin; at < end;) {
      const R common = rate();
      int64_t to = at;
      do {
        to = left_in_run < end - to ? to + left_in_run : end;
        left_in_run = p.run;
        if (to < end) next_run();
      } while (to < end && rate() == common);
      if (common >= 0) on_run(at, to - at, common);
      if (common == R(kClears)) clear(at, to - at);
      at = to;
    }
    return;
  }
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    R rates[kTile + kLanes<R>];
    for (int64_t i = 0; i < count;) {
      const R rate = rate_of<R>(plasticity[group_base + row], lr);
      const int64_t length = left_in_run < count - i ? left_in_run : count - i;
      for (int64_t k = 0; k < length; ++k) rates[i + k] = rate;
      i += length;
      left_in_run -= length;
      if (left_in_run == 0) {
        left_in_run = p.run;
        next_run();
      }
    }
    for (int k = 0; k < kLanes<R>; ++k) rates[count + k] = R(kStays);
    on_tile(at, count, rates);
  }
}

// ------------------------------------------------------------------------------------------- how elements are written

// The mask's lanes from `result`, the others from `old`.
template <class R>
static inline Vector<R> blend(Mask<R> mask, Vector<R> result, Vector<R> old) {
  return (Vector<R>)((Mask<R>)keep<R>(mask, result) | (Mask<R>)keep<R>(~mask, old));
}

template <class T>
static inline void set_to_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

// How values are rounded to their type: to nearest, or stochastically. `i` counts the elements of a
// tile.
struct ToNearest {
  template <class T>
  void operator()(T* to, Vector<Real<T>> value, int64_t) const {
    store(to, value);
  }
};
struct Stochastically {
  uint32_t key;
  uint32_t first;  // the index of the tile's first element

  Stochastically(const ParameterParams& p, int64_t first_)
      : key(rounding_key(p.seed, *p.steps, static_cast<uint32_t>(first_ >> 32))),
        first(static_cast<uint32_t>(first_)) {}

  void operator()(bfloat_bits* to, Vector<float> value, int64_t i) const {
    Dwords index;
    for (int lane = 0; lane < kHalfLanes; ++lane) index[lane] = static_cast<uint32_t>(lane);
    index += first + static_cast<uint32_t>(i);
    write(to, narrow_bfloat_stochastically(value, random_bits<Dwords>(key, index)));
  }
};

// Writes the first `count` lanes.
template <class Put, class T>
static inline void put_some(const Put& put, T* to, Vector<Real<T>> value, int64_t i, int64_t count) {
  if (count >= kLanes<Real<T>>) {
    put(to, value, i);
    return;
  }
  T buffer[kLanes<Real<T>>];
  put(buffer, value, i);
  for (int64_t k = 0; k < count; ++k) to[k] = buffer[k];
}

// --------------------------------------------------------------------------------------------------------------- SGD

constexpr int64_t kShortRun = 32;  // in shorter runs every element gets a rate; longer runs get a loop each

// The arrays of a parameter.
template <class T>
struct Weights {
  T* value;
  const T* gradient;
  T* momentum;  // or null

  explicit Weights(const ParameterParams& p)
      : value(static_cast<T*>(p.value)),
        gradient(static_cast<const T*>(p.gradient)),
        momentum(static_cast<T*>(p.momentum)) {}

  Weights from(int64_t at) const {
    Weights result = *this;
    result.value += at, result.gradient += at;
    if (momentum != nullptr) result.momentum += at;
    return result;
  }
};

template <class T>
struct Step {
  using R = Real<T>;
  R gradient_factor;  // 1 / grad_scale, negative to maximize
  R weight_decay, momentum;

  Step(const ParameterParams& p, double factor)
      : gradient_factor(static_cast<R>(factor)),
        weight_decay(static_cast<R>(p.weight_decay)),
        momentum(static_cast<R>(p.momentum_factor)) {}
};

// What a parameter asks for, known at compile time so that a plain step computes nothing else.
enum class Momentum { none, classic, nesterov };
template <Momentum momentum_, bool scaled_or_decayed>
struct Options {
  static constexpr Momentum momentum = momentum_;
  static constexpr bool has_momentum = momentum_ != Momentum::none;
  static constexpr bool plain_gradient = !scaled_or_decayed;  // no weight decay, gradient factor 1
};

template <class O, class T>
static inline Vector<Real<T>> moved(const Step<T>& step, Vector<Real<T>> value, Vector<Real<T>> gradient,
                                    Vector<Real<T>> rate, Vector<Real<T>>& velocity) {
  Vector<Real<T>> d = gradient;
  if constexpr (!O::plain_gradient) d = gradient * step.gradient_factor + step.weight_decay * value;
  if constexpr (!O::has_momentum) {
    return value - rate * d;
  } else {
    velocity = step.momentum * velocity + d;
    return value - rate * (O::momentum == Momentum::nesterov ? d + step.momentum * velocity : velocity);
  }
}

// `count` elements that share one rate. This thread owns `room` elements from the first on. If the
// room holds another vector, the last vector goes beyond the run and writes the elements there back
// as they were.
template <class O, class T>
static inline void descend_run(const Step<T>& step, const Weights<T>& weights, int64_t count, int64_t room,
                               Real<T> rate) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const auto [value, gradient, momentum] = weights;
  const Vector<R> rates = broadcast<R>(rate);
  Vector<R> velocity = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    for (int k = 0; k < 4; ++k) {
      const int64_t at = i + k * L;
      if constexpr (O::has_momentum) velocity = load(momentum + at);
      store(value + at, moved<O, T>(step, load(value + at), load(gradient + at), rates, velocity));
      if constexpr (O::has_momentum) store(momentum + at, velocity);
    }
  }
  for (; i + L <= count; i += L) {
    if constexpr (O::has_momentum) velocity = load(momentum + i);
    store(value + i, moved<O, T>(step, load(value + i), load(gradient + i), rates, velocity));
    if constexpr (O::has_momentum) store(momentum + i, velocity);
  }
  if (i == count) return;
  const int64_t rest = count - i;
  if (i + L <= room) {
    const Mask<R> in_run = first_lanes<R>(static_cast<int>(rest));
    const Vector<R> old = load(value + i);
    Vector<R> old_velocity = {};
    if constexpr (O::has_momentum) velocity = old_velocity = load(momentum + i);
    store(value + i, blend<R>(in_run, moved<O, T>(step, old, load(gradient + i), rates, velocity), old));
    if constexpr (O::has_momentum) store(momentum + i, blend<R>(in_run, velocity, old_velocity));
    return;
  }
  if constexpr (O::has_momentum) velocity = load_partial(momentum + i, rest);
  const Vector<R> result =
      moved<O, T>(step, load_partial(value + i, rest), load_partial(gradient + i, rest), rates, velocity);
  store_partial(value + i, result, rest);
  if constexpr (O::has_momentum) store_partial(momentum + i, velocity, rest);
}

// `count` elements with a rate_of() each.
template <class O, class T, class Put>
static void descend_elements(const Step<T>& step, const Weights<T>& weights, int64_t count, const Real<T>* rates,
                             const Put& put) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const auto [value, gradient, momentum] = weights;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t rest = count - i;
    const bool whole = rest >= L;
    const Vector<R> old = whole ? load(value + i) : load_partial(value + i, rest);
    const Vector<R> d = whole ? load(gradient + i) : load_partial(gradient + i, rest);
    const Vector<R> rate = load(rates + i);
    const Mask<R> stays = rate < R(0);
    Vector<R> velocity = {}, old_velocity = {};
    if constexpr (O::has_momentum) {
      old_velocity = velocity = whole ? load(momentum + i) : load_partial(momentum + i, rest);
    }
    Vector<R> result = moved<O, T>(step, old, d, rate, velocity);
    put_some(put, value + i, blend<R>(~stays, result, old), i, rest);
    if constexpr (O::has_momentum) {
      velocity = keep<R>(rate != R(kClears), blend<R>(~stays, velocity, old_velocity));
      if (whole) store(momentum + i, velocity);
      else store_partial(momentum + i, velocity, rest);
    }
  }
}

template <class O, class T>
static void descend_to_nearest(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                               int64_t end) {
  using R = Real<T>;
  const Weights<T> weights(p);
  const Step<T> step(p, gradient_factor);
  const auto on_run = [&](int64_t at, int64_t count, R rate) {
    descend_run<O, T>(step, weights.from(at), count, end - at, rate);
  };
  const auto clear = [&](int64_t at, int64_t count) {
    if constexpr (O::has_momentum) set_to_zero(weights.momentum + at, count);
  };
  const auto on_tile = [&](int64_t at, int64_t count, const R* rates) {
    descend_elements<O, T>(step, weights.from(at), count, rates, ToNearest{});
  };
  for_each_rate(p, plasticity, largest_rate<R>(p), kShortRun, begin, end, on_run, clear, on_tile);
}

// The same with stochastic rounding, tile by tile.
template <class O>
static void descend_stochastically(const ParameterParams& p, const float* plasticity, double gradient_factor,
                                   int64_t begin, int64_t end) {
  const Weights<bfloat_bits> weights(p);
  const Step<bfloat_bits> step(p, gradient_factor);
  const auto on_tile = [&](int64_t at, int64_t count, const float* rates) {
    descend_elements<O, bfloat_bits>(step, weights.from(at), count, rates, Stochastically(p, at));
  };
  const auto on_run = [&](int64_t at, int64_t count, float rate) {
    float rates[kTile + kLanes<float>];
    for (float& of_element : rates) of_element = rate;
    for (int64_t i = 0; i < count; i += kTile) on_tile(at + i, count - i < kTile ? count - i : kTile, rates);
  };
  const auto clear = [&](int64_t at, int64_t count) {
    if constexpr (O::has_momentum) set_to_zero(weights.momentum + at, count);
  };
  for_each_rate(p, plasticity, largest_rate<float>(p), kTile, begin, end, on_run, clear, on_tile);
}

template <class O, class T>
static void descend_rounded(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                            int64_t end) {
  if constexpr (std::is_same_v<T, bfloat_bits>) {
    if (p.stochastic_rounding) {
      descend_stochastically<O>(p, plasticity, gradient_factor, begin, end);
      return;
    }
  }
  descend_to_nearest<O, T>(p, plasticity, gradient_factor, begin, end);
}

template <class T, Momentum momentum>
static void descend_with_momentum(const ParameterParams& p, const float* plasticity, double gradient_factor,
                                  int64_t begin, int64_t end) {
  if (p.weight_decay == 0 && gradient_factor == 1) {
    descend_rounded<Options<momentum, false>, T>(p, plasticity, gradient_factor, begin, end);
  } else {
    descend_rounded<Options<momentum, true>, T>(p, plasticity, gradient_factor, begin, end);
  }
}

template <class T>
static void descend(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                    int64_t end) {
  if (p.momentum == nullptr) {
    descend_with_momentum<T, Momentum::none>(p, plasticity, gradient_factor, begin, end);
  } else if (p.nesterov) {
    descend_with_momentum<T, Momentum::nesterov>(p, plasticity, gradient_factor, begin, end);
  } else {
    descend_with_momentum<T, Momentum::classic>(p, plasticity, gradient_factor, begin, end);
  }
}

}  // namespace npc::cpu::NPC_ISA
