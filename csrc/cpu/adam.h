// Adam's step: the loops over memory, compiled once per instruction set (kernels.cpp). update.h
// says which rows they touch.
//
// descend_adam() reads value, gradient and both moments once, and writes value and moments once.
#pragma once

#include <cmath>

#include "update.h"

namespace npc::cpu::NPC_ISA {

template <class T>
struct AdamStep {
  using R = Real<T>;
  R gradient_factor, weight_decay, one_minus_first_decay, second_decay, one_minus_second_decay;
  R per_first_bias, per_root_of_second_bias, epsilon;

  AdamStep(const ParameterParams& p, double factor)
      : gradient_factor(static_cast<R>(factor)),
        weight_decay(static_cast<R>(p.weight_decay)),
        one_minus_first_decay(static_cast<R>(1 - p.first_decay)),
        second_decay(static_cast<R>(p.second_decay)),
        one_minus_second_decay(static_cast<R>(1 - p.second_decay)),
        per_first_bias(static_cast<R>(1 / bias(p.first_decay, p))),
        per_root_of_second_bias(static_cast<R>(1 / std::sqrt(bias(p.second_decay, p)))),
        epsilon(static_cast<R>(p.epsilon)) {}

  static double bias(double decay, const ParameterParams& p) {
    return bias_correction<double>(std::log(decay), double{*p.steps} + 1);
  }
};

template <class T>
static inline Vector<Real<T>> adam_moved(const AdamStep<T>& step, Vector<Real<T>> value, Vector<Real<T>> gradient,
                                         Vector<Real<T>> rate, Vector<Real<T>>& first, Vector<Real<T>>& second) {
  using R = Real<T>;
  const Vector<R> d = gradient * step.gradient_factor;
  first += step.one_minus_first_decay * (d - first);
  second = step.second_decay * second + step.one_minus_second_decay * d * d;
  const Vector<R> direction = adam_direction<Vector<R>, R>(first, square_root<R>(second), step.per_first_bias,
                                                           step.per_root_of_second_bias, step.epsilon);
  return value - rate * (direction + step.weight_decay * value);
}

// `count` elements; rate_at(i) returns the rate_of() of the vector of elements from i on.
template <class T, class RateAt, class Put>
static inline void adam_elements(const AdamStep<T>& step, T* value, const T* gradient, Real<T>* first, Real<T>* second,
                                 int64_t count, const RateAt& rate_at, const Put& put) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const auto move = [&](int64_t i, auto read, int64_t rest) {
    const Vector<R> rate = rate_at(i), old = read(value + i), old_first = read(first + i),
                    old_second = read(second + i);
    const Mask<R> moves = rate >= R(0);
    Vector<R> new_first = old_first, new_second = old_second;
    const Vector<R> result = adam_moved<T>(step, old, read(gradient + i), rate, new_first, new_second);
    put_some(put, value + i, blend<R>(moves, result, old), i, rest);
    new_first = keep<R>(rate != R(kClears), blend<R>(moves, new_first, old_first));
    put_some(ToNearest{}, first + i, new_first, i, rest);
    put_some(ToNearest{}, second + i, blend<R>(moves, new_second, old_second), i, rest);
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) move(i, [](const auto* from) { return load(from); }, L);
  if (i < count) move(i, [&](const auto* from) { return load_partial(from, count - i); }, count - i);
}

template <class T, class PutFrom>
static inline void descend_adam_with(const Elements& elements, const float* plasticity, const PutFrom& put_from) {
  const ParameterParams& p = elements.parameter;
  using R = Real<T>;
  T* value = static_cast<T*>(p.value);
  const T* gradient = static_cast<const T*>(p.gradient);
  R* first = static_cast<R*>(p.first_moment);
  R* second = static_cast<R*>(p.second_moment);
  const AdamStep<T> step(p, elements.gradient_factor);
  const auto move = [&](int64_t at, int64_t count, const auto& rate_at) {
    adam_elements<T>(step, value + at, gradient + at, first + at, second + at, count, rate_at, put_from(at));
  };
  const auto on_run = [&](int64_t at, int64_t count, R rate) {
    const Vector<R> rates = broadcast<R>(rate);
    move(at, count, [&](int64_t) { return rates; });
  };
  const auto on_tile = [&](int64_t at, int64_t count, const R* rates) {
    move(at, count, [&](int64_t i) { return load(rates + i); });
  };
  const auto clear = [&](int64_t at, int64_t count) { set_to_zero(first + at, count); };
  for_each_rate<R>(elements, plasticity, kTile, on_run, clear, on_tile);
}

template <class T>
static void descend_adam(const Elements& elements, const float* plasticity) {
  with_rounding<T>(elements.parameter,
                   [&](const auto& put_from) { descend_adam_with<T>(elements, plasticity, put_from); });
}

}  // namespace npc::cpu::NPC_ISA
