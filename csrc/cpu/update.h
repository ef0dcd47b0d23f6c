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

// Goes through a parameter's elements run by run: calls on_run(at, count, rate) for runs that move
// and clear(at, count) for runs that lose their first moment. Where runs are shorter than
// `short_run`, it calls on_tile(at, count, rates) instead, for tiles of at most kTile elements with
// a rate_of() each. A vector's worth of kStays follows the last rate.
template <class R, class OnRun, class Clear, class OnTile>
static inline void for_each_rate(const Elements& elements, const float* plasticity, int64_t short_run,
                                 const OnRun& on_run, const Clear& clear, const OnTile& on_tile) {
  const ParameterParams& p = elements.parameter;
  const int64_t begin = elements.begin, end = elements.end;
  const R lr = largest_rate<R>(p);
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

// Calls use(put_from). put_from(at) says how the values of the tile that begins at an element are
// rounded.
template <class T, class Use>
static inline void with_rounding(const ParameterParams& p, const Use& use) {
  if constexpr (std::is_same_v<T, bfloat_bits>) {
    if (p.stochastic_rounding) return use([&](int64_t at) { return Stochastically(p, at); });
  }
  use([](int64_t) { return ToNearest{}; });
}

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
  R gradient_factor, weight_decay, momentum;

  explicit Step(const Elements& elements)
      : gradient_factor(static_cast<R>(elements.gradient_factor)),
        weight_decay(static_cast<R>(elements.parameter.weight_decay)),
        momentum(static_cast<R>(elements.parameter.momentum_factor)) {}
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
  const Vector<R> rates = broadcast<R>(rate);
  T* value = weights.value;
  const T* gradient = weights.gradient;
  T* momentum = weights.momentum;
  Vector<R> velocity = {};
  const auto move = [&](int64_t at) {
    if constexpr (O::has_momentum) velocity = load(momentum + at);
    store(value + at, moved<O, T>(step, load(value + at), load(gradient + at), rates, velocity));
    if constexpr (O::has_momentum) store(momentum + at, velocity);
  };
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    for (int k = 0; k < 4; ++k) move(i + k * L);
  }
  for (; i + L <= count; i += L) move(i);
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

template <class O, class T, class PutFrom>
static void descend_with(const Elements& elements, const float* plasticity, const PutFrom& put_from) {
  using R = Real<T>;
  constexpr bool to_nearest = std::is_same_v<decltype(put_from(0)), ToNearest>;
  const Weights<T> weights(elements.parameter);
  const Step<T> step(elements);
  const auto on_tile = [&](int64_t at, int64_t count, const R* rates) {
    descend_elements<O, T>(step, weights.from(at), count, rates, put_from(at));
  };
  const auto on_run = [&](int64_t at, int64_t count, R rate) {
    if constexpr (to_nearest) {
      descend_run<O, T>(step, weights.from(at), count, elements.end - at, rate);
    } else {
      R rates[kTile + kLanes<R>];
      for (R& of_element : rates) of_element = rate;
      for (int64_t i = 0; i < count; i += kTile) on_tile(at + i, count - i < kTile ? count - i : kTile, rates);
    }
  };
  const auto clear = [&](int64_t at, int64_t count) {
    if constexpr (O::has_momentum) set_to_zero(weights.momentum + at, count);
  };
  for_each_rate<R>(elements, plasticity, to_nearest ? kShortRun : kTile, on_run, clear, on_tile);
}

// Calls use() with a flag, or with a parameter's momentum, as a type that has it as its value.
template <class Use>
static inline void with_flag(bool flag, const Use& use) {
  if (flag) use(std::true_type{});
  else use(std::false_type{});
}
template <class Use>
static inline void with_momentum(const ParameterParams& p, const Use& use) {
  if (p.momentum == nullptr) use(std::integral_constant<Momentum, Momentum::none>{});
  else if (p.nesterov) use(std::integral_constant<Momentum, Momentum::nesterov>{});
  else use(std::integral_constant<Momentum, Momentum::classic>{});
}

template <class T>
static void descend(const Elements& elements, const float* plasticity) {
  const ParameterParams& p = elements.parameter;
  with_momentum(p, [&](auto momentum) {
    with_flag(p.weight_decay != 0 || elements.gradient_factor != 1, [&](auto scaled_or_decayed) {
      using O = Options<decltype(momentum)::value, decltype(scaled_or_decayed)::value>;
      with_rounding<T>(p, [&](const auto& put_from) { descend_with<O, T>(elements, plasticity, put_from); });
    });
  });
}

}  // namespace npc::cpu::NPC_ISA
