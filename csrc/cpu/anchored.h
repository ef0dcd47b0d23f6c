// SGD's step with anchors (EWC, MAS, SSL) and path integrals (SI): the loops over memory, compiled
// once per instruction set (kernels.cpp).
//
// descend_anchored() reads and writes what descend() does. Besides, it reads stiffness and anchor,
// and reads and writes the path integral.
#pragma once

#include "update.h"

namespace npc::cpu::NPC_ISA {

enum class Pull { none, is_explicit, implicit };

template <bool has_momentum, Pull kind, bool has_path, class T>
static void descend_anchored_with(const Elements& elements) {
  const ParameterParams& p = elements.parameter;
  const int64_t begin = elements.begin, end = elements.end;
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const Weights<T> weights(p);
  const R* stiffness = static_cast<const R*>(p.stiffness);
  const R* anchor = static_cast<const R*>(p.anchor);
  R* path = static_cast<R*>(p.path);
  const Step<T> step(elements);
  const R lr = largest_rate<R>(p);
  const double pull = anchor_pull(p.strength, p.momentum_factor, p.implicit);
  const Vector<R> explicit_pull = broadcast<R>(static_cast<R>(pull));
  const Vector<R> compliance = broadcast<R>(static_cast<R>(1 / (lr * pull)));
  const bool nesterov = p.nesterov;
  constexpr bool has_anchor = kind != Pull::none, implicit = kind == Pull::implicit;
  const auto move = [&](int64_t at, auto read, auto write) {
    const Vector<R> value = read(weights.value + at);
    const Vector<R> loss_gradient = read(weights.gradient + at) * step.gradient_factor;
    Vector<R> d = loss_gradient + step.weight_decay * value, stiff = {}, target = {};
    if constexpr (has_anchor) {
      stiff = read(stiffness + at), target = read(anchor + at);
      if (!implicit) d += anchor_gradient<Vector<R>>(value, target, stiff, explicit_pull);
    }
    if constexpr (has_momentum) {
      const Vector<R> velocity = step.momentum * read(weights.momentum + at) + d;
      write(weights.momentum + at, velocity);
      d = nesterov ? d + step.momentum * velocity : velocity;
    }
    Vector<R> result = value - lr * d;
    if constexpr (has_anchor) {
      if (implicit) result = towards_anchor<Vector<R>>(result, target, stiff, compliance);
    }
    write(weights.value + at, result);
    // The movement is that of the value as it is stored, rounded to its type.
    if constexpr (has_path) write(path + at, read(path + at) - loss_gradient * (read(weights.value + at) - value));
  };
  int64_t at = begin;
  const auto read = [](const auto* from) { return load(from); };
  const auto write = [](auto* to, Vector<R> vector) { store(to, vector); };
  for (; at + 4 * L <= end; at += 4 * L) {
    for (int k = 0; k < 4; ++k) move(at + k * L, read, write);
  }
  for (; at + L <= end; at += L) move(at, read, write);
  if (at == end) return;
  const int64_t rest = end - at;
  const auto read_rest = [rest](const auto* from) { return load_partial(from, rest); };
  const auto write_rest = [rest](auto* to, Vector<R> vector) { store_partial(to, vector, rest); };
  move(at, read_rest, write_rest);
}

template <class T>
static void descend_anchored(const Elements& elements) {
  const ParameterParams& p = elements.parameter;
  if (p.stiffness == nullptr && p.path == nullptr) return descend<T>(elements, nullptr);
  with_flag(p.momentum != nullptr, [&](auto has_momentum) {
    with_flag(p.path != nullptr, [&](auto has_path) {
      constexpr bool momentum = decltype(has_momentum)::value, path = decltype(has_path)::value;
      if (p.stiffness == nullptr) descend_anchored_with<momentum, Pull::none, path, T>(elements);
      else if (p.implicit) descend_anchored_with<momentum, Pull::implicit, path, T>(elements);
      else descend_anchored_with<momentum, Pull::is_explicit, path, T>(elements);
    });
  });
}

}  // namespace npc::cpu::NPC_ISA
