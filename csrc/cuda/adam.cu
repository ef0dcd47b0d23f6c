// Eqs. 3, 4, 7 and Adam's step of a whole network in one launch. update.h says how blocks share the
// work.
//
//   m  <- m + (1 - first decay) (dL/dw - m)          v <- second decay * v + (1 - second decay) (dL/dw)^2
//   w  <- w - s_i lr (m' / (sqrt(v') + epsilon) + weight decay * w),     s_i of eq. 7
//
// where m' and v' are m and v after bias correction. Rows of frozen neurons (s_i = 0) and their
// moments are neither read nor written. The step that freezes a row sets its m to 0.
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

// A visitor (elements.h).
template <class Kind>
struct Adam : Weights<typename Kind::T, false> {
  using Base = Weights<typename Kind::T, false>;
  static constexpr int kPacks = sizeof(typename Kind::T) == sizeof(float) ? 2 : 1;
  static constexpr int kBlocks = 3;

  template <class P>
  struct Packs : WeightPacks<P> {
    Floats<P> first_moment, second_moment;
  };

  float* first_moment;
  float* second_moment;
  const AdamParameter& constants;
  float lr, factor, per_first_bias, per_root_of_second_bias;
  Rounding<Kind> rounding;

  __device__ __forceinline__ Adam(const AdamParameter& p, int64_t begin, const float* grad_scale)
      : Base(p, begin),
        first_moment(p.first_moment + begin),
        second_moment(p.second_moment + begin),
        constants(p),
        rounding(p, begin) {
    const Step plain = step_of(p, grad_scale);
    const float steps = p.steps == nullptr ? 1.0f : *p.steps + 1.0f;  // null: no elements
    lr = plain.lr;
    factor = plain.factor;
    per_first_bias = 1.0f / bias_correction(p.log_first_decay, steps);
    per_root_of_second_bias = 1.0f / sqrtf(bias_correction(p.log_second_decay, steps));
  }

  template <class P>
  __device__ __forceinline__ void load(bool wanted, int at, Packs<P>& packs) const {
    Base::load(wanted, at, packs);
    load_if(wanted, first_moment + at, packs.first_moment);
    load_if(wanted, second_moment + at, packs.second_moment);
  }

  __device__ __forceinline__ void prefetch(int at) const {
    Base::prefetch(at);
    ::npc::cuda::prefetch(first_moment + at);
    ::npc::cuda::prefetch(second_moment + at);
  }

  template <class P>
  __device__ __forceinline__ void use(int at, Packs<P>& packs, const float (&plasticity)[P::size]) const {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float before = to_float(packs.value.at[k]), d = to_float(packs.gradient.at[k]) * factor;
      float& first = packs.first_moment.at[k];
      float& second = packs.second_moment.at[k];
      const float new_first = first + constants.one_minus_first_decay * (d - first);
      const float new_second = constants.second_decay * second + constants.one_minus_second_decay * d * d;
      const float direction =
          adam_direction(new_first, sqrtf(new_second), per_first_bias, per_root_of_second_bias, constants.epsilon);
      const float after = before - plasticity[k] * lr * (direction + constants.weight_decay * before);
      if (plasticity[k] > 0.0f) {
        packs.value.at[k] = rounding(after, at + k);
        second = new_second;
      }
      if (plasticity[k] != 0.0f) first = plasticity[k] > 0.0f ? new_first : 0.0f;
    }
    this->write(at, packs);
    store(first_moment + at, packs.first_moment);
    store(second_moment + at, packs.second_moment);
  }
};

template <class Kind, class N>
__global__ void __launch_bounds__(kThreads, Adam<Kind>::kBlocks) adam_update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  update_item<Adam, Kind>(network, blockIdx.x, shared_memory<UpdateShared>());
}

struct AdamKernels {
  static constexpr bool kMomentum = false;
  template <class Kind, class N>
  static Kernel<N> get() {
    return adam_update_kernel<Kind, N>;
  }
};

}  // namespace

void launch_adam_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  launch_parts<AdamKernels, SmallNetwork, LargeNetwork>(params, stream);
}

}  // namespace npc::cuda
