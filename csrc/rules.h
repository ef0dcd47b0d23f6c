// The equations of neuron-level plasticity control, written once for CPU and CUDA.
// Paik, Oh, Kwak, Kim: "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity Control",
// AAAI 2020.
//
// Every translation unit gets its own copy (internal linkage): the CPU kernels are compiled once
// per instruction set, and the linker must not merge a copy made for a newer processor into code
// that an older one runs.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define NPC_RULE static __host__ __device__ __forceinline__
#else
#define NPC_RULE static inline __attribute__((always_inline))
#endif

namespace npc {

// Measured importance of a neuron whose dL/dn is 0 everywhere. It is the identity of addition, so a
// sum is kNoGradient only if all of its terms are.
constexpr float kNoGradient = -0.0f;

template <class R>
NPC_RULE bool received_no_gradient(R measured) {
  return measured == 0 && signbit(measured);
}

// A neuron's plasticity says what a step does with it. Above 0, it is the share of the learning
// rate at which its weights move, 1 at most. At 0, weights and moments stay as they are. At
// kClears, weights stay and the first moment becomes 0, because this step freezes the neuron.
constexpr float kClears = -1.0f;

// Eq. 7's value for a neuron after its C was moved from `before`; frozen means that C >= beta.
NPC_RULE float plasticity_after(float before, float beta, float plasticity) {
  return plasticity == 0.0f && before < beta ? kClears : plasticity;
}

// Eq. 3: c_i / mean of c, with the mean taken over `neurons` neurons whose importance sums to
// `total`. The division comes first: a_i / total is at most 1, so no finite total can overflow.
NPC_RULE float normalized_importance(float measured, float total, float neurons) { return measured / total * neurons; }

// Eq. 4: C_i <- delta C_i + (1 - delta) c_i.
NPC_RULE float moving_average(float average, float normalized, float delta, float one_minus_delta) {
  return delta * average + one_minus_delta * normalized;
}

// min(1, alpha sqrt(max(surplus, 0))), which is 1 where the surplus is infinite (C = 0).
NPC_RULE float share_of_rate(float surplus, float alpha) {
  const float share = alpha * sqrtf(surplus > 0.0f ? surplus : 0.0f);
  return share < 1.0f ? share : 1.0f;
}

// Eq. 7 as a share of the learning rate: min(1, alpha sqrt(max(beta / C - 1, 0))). A neuron's rate
// is lr times that.
NPC_RULE float plasticity_sigmoid(float average, float alpha, float beta) {
  return share_of_rate(beta / average - 1.0f, alpha);
}

// The same for the error function: min(1, alpha sqrt(max(ln(beta / C), 0))).
NPC_RULE float plasticity_erf(float average, float alpha, float beta) {
  return share_of_rate(logf(beta / average), alpha);
}

// 1 - decay^steps: the factor by which a moving average that began at 0 is too small after so many
// steps. It takes the logarithm of decay, which avoids cancellation.
template <class R>
NPC_RULE R bias_correction(R log_decay, R steps) {
  return -expm1(log_decay * steps);
}

// The direction of Adam's step, m' / (sqrt(v') + epsilon), from the moments before their bias
// correction.
template <class R, class Scalar>
NPC_RULE R adam_direction(R first_moment, R root_of_second, Scalar per_first_bias, Scalar per_root_of_second_bias,
                          Scalar epsilon) {
  return first_moment * per_first_bias / (root_of_second * per_root_of_second_bias + epsilon);
}

// 32 bits that look random, from a key and an index (C. Wellons' lowbias32). U: uint32_t, or a
// vector of them.
template <class U>
NPC_RULE U random_bits(uint32_t key, U index) {
  U x = index ^ key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The key of a parameter's elements in one step. `block` is the element's index divided by 2^32.
NPC_RULE uint32_t rounding_key(uint32_t seed, float steps, uint32_t block) {
  const uint32_t of_step = random_bits<uint32_t>(0x9e3779b9u, static_cast<uint32_t>(steps));
  return random_bits<uint32_t>(of_step, random_bits<uint32_t>(0x85ebca6bu, seed) + block);
}

// EWC, MAS, SI and SSL add the penalty strength * stiffness * (value - anchor)^2 to the loss. Its
// gradient is pull * stiffness * distance. An explicit pull goes through the momentum buffer. An
// implicit one does not, so it gets the factor 1 / (1 - momentum) that the buffer would give it. It
// is kept finite, so that lr = 0 means no step.
NPC_RULE double anchor_pull(double strength, double momentum, bool implicit) {
  if (!implicit) return 2 * strength;
  const double pull = 2 * strength / (1 - momentum);
  return pull < double{FLT_MAX} ? pull : double{FLT_MAX};
}

// Explicit: the penalty's gradient, to be added to the loss's.
template <class R>
NPC_RULE R anchor_gradient(R value, R anchor, R stiffness, R pull) {
  return pull * stiffness * (value - anchor);
}

// Implicit: the penalty's proximal step from the value that the loss's step has reached,
//   (value + c * anchor) / (1 + c)  with  c = lr * pull * stiffness
// `compliance` is 1 / (lr * pull); 0 and infinity are allowed. An element without a positive
// stiffness has no anchor.
template <class R>
NPC_RULE R towards_anchor(R value, R anchor, R stiffness, R compliance) {
  const R moved = value + stiffness / (stiffness + compliance) * (anchor - value);
  return stiffness <= R{} ? value : moved;
}

}  // namespace npc
