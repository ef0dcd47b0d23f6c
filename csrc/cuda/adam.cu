// Eqs. 3, 4, 7 and Adam's step of a whole network in one launch; update.h says how its blocks share the work.
//
//   m  <- m + (1 - first decay) (dL/dw - m)          v <- second decay * v + (1 - second decay) (dL/dw)^2
//   w  <- w - s_i lr (m' / (sqrt(v') + epsilon) + weight decay * w),     s_i of eq. 7
//
// with m' and v' freed of their bias. Rows of frozen neurons (s_i = 0) are neither read nor written, moments included;
// in the step that freezes them, m is set to 0.
// Traffic for float32: 28 bytes an element (w, m and v read and written, dL/dw read).

#include "network.h"

namespace npc::cuda {
namespace {

struct AdamParameter : Parameter {
  float* first_moment;
  float* second_moment;
  float log_first_decay, log_second_decay, one_minus_first_decay, second_decay, one_minus_second_decay, epsilon;
};

void fill(AdamParameter& parameter, const ParameterParams& from) {
  fill(static_cast<Parameter&>(parameter), from);
  parameter.first_moment = static_cast<float*>(from.first_moment);
  parameter.second_moment = static_cast<float*>(from.second_moment);
  parameter.packed &= on_16_bytes(from.first_moment) && on_16_bytes(from.second_moment);
  parameter.log_first_decay = static_cast<float>(std::log(from.first_decay));
  parameter.log_second_decay = static_cast<float>(std::log(from.second_decay));
  parameter.one_minus_first_decay = static_cast<float>(1 - from.first_decay);
  parameter.second_decay = static_cast<float>(from.second_decay);
  parameter.one_minus_second_decay = static_cast<float>(1 - from.second_decay);
  parameter.epsilon = static_cast<float>(from.epsilon);
}

using SmallNetwork = Network<24, 12, AdamParameter>;
using LargeNetwork = Network<160, 60, AdamParameter>;

// What every element of a parameter has in common.
struct AdamStep {
  float lr, factor, weight_decay, one_minus_first_decay, second_decay, one_minus_second_decay;
  float per_first_bias, per_root_of_second_bias, epsilon;
};

__device__ __forceinline__ AdamStep step_of(const AdamParameter& p, const float* grad_scale) {
  const Step plain = step_of(static_cast<const Elements&>(p), grad_scale);
  const float steps = *p.steps + 1.0f;
  return {plain.lr,
          plain.factor,
          p.weight_decay,
          p.one_minus_first_decay,
          p.second_decay,
          p.one_minus_second_decay,
          1.0f / bias_correction(p.log_first_decay, steps),
          1.0f / sqrtf(bias_correction(p.log_second_decay, steps)),
          p.epsilon};
}

// Moves the numbers of one pack, all of one neuron.
template <class P, class T>
__device__ __forceinline__ void move(const AdamParameter& p, const AdamStep& step, const Rounding& rounding, int64_t at,
                                     float rate) {
  using F = Floats<P>;
  T* value = static_cast<T*>(p.value) + at;
  P values = load<P>(value);
  const P gradients = load<P>(static_cast<const T*>(p.gradient) + at);
  F first = load<F>(p.first_moment + at), second = load<F>(p.second_moment + at);
  for (int k = 0; k < P::size; ++k) {
    const float before = to_float(values.at[k]), d = to_float(gradients.at[k]) * step.factor;
    first.at[k] += step.one_minus_first_decay * (d - first.at[k]);
    second.at[k] = step.second_decay * second.at[k] + step.one_minus_second_decay * d * d;
    const float direction = adam_direction(first.at[k], sqrtf(second.at[k]), step.per_first_bias,
                                           step.per_root_of_second_bias, step.epsilon);
    const float result = before - rate * (direction + step.weight_decay * before);
    round_value(result, rounding, at + k, values.at[k]);
  }
  store(value, values);
  store(p.first_moment + at, first);
  store(p.second_moment + at, second);
}

template <class P, class T>
__device__ __forceinline__ void clear_first_moment(const AdamParameter& p, int64_t at) {
  store(p.first_moment + at, Floats<P>{});
}

template <class N>
__global__ void __launch_bounds__(kThreads, 2) adam_update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  update_item(network, blockIdx.x, shared_memory<UpdateShared>());
}

}  // namespace

void launch_adam_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  launch_parts<SmallNetwork, LargeNetwork>(params, stream, [&](const auto& network) {
    launch(adam_update_kernel<std::decay_t<decltype(network)>>, network.items, false, stream, network);
  });
}

}  // namespace npc::cuda
