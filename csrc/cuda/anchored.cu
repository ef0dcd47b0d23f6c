// The weight update with anchors (EWC, MAS, SSL) and path integrals (SI), for all parameters of a
// network in one launch.
//
//   d     = dL/dw + weight decay * w                      (+ 2 strength * stiffness * (w - anchor), if explicit)
//   w    <- w - lr * d                                    (or with momentum, as in SGD)
//   w    <- (w + c * anchor) / (1 + c)                    (if implicit, with c = lr * pull * stiffness)
//   path <- path - dL/dw * (the movement of w)
//
// A block works on one item of at most kItem elements of one parameter, and a thread on packs of 16
// bytes. If no parameter has an anchor or a path, as in the first task of EWC, the step is SGD's,
// and SGD's kernel is launched.
//
// Traffic for float32: 12 bytes an element as in SGD, and 8 more each with an anchor, a path and
// momentum.

#include "network.h"

namespace npc::cuda {
namespace {

struct AnchoredParameter : Elements {
  const float* stiffness;
  const float* anchor;
  float* path;
  float pull;  // see anchor_pull()
  bool implicit;
};

// By value in the kernel's arguments.
template <int kParameters_>
struct AnchoredNetwork {
  static constexpr int kParameters = kParameters_, kLayers = 0;
  const float* grad_scale;
  const float* found_inf;
  int64_t items;
  int parameter_count;
  AnchoredParameter parameters[kParameters];
};
using SmallNetwork = AnchoredNetwork<24>;
using LargeNetwork = AnchoredNetwork<256>;
static_assert(sizeof(LargeNetwork) <= kMostArguments);

// A visitor (elements.h).
template <class Kind>
struct Anchored : Weights<typename Kind::T, true> {
  using Base = Weights<typename Kind::T, true>;
  static constexpr int kPacks = 2;

  template <class P>
  struct Packs : WeightPacks<P> {
    Floats<P> stiffness, anchor, path;
  };

  const float* stiffness;
  const float* anchor;
  float* path;
  float pull, compliance;
  bool implicit;
  Step step;

  __device__ __forceinline__ Anchored(const AnchoredParameter& p, int64_t begin, const float* grad_scale)
      : Base(p, begin),
        stiffness(from(p.stiffness, begin)),
        anchor(from(p.anchor, begin)),
        path(from(p.path, begin)),
        pull(p.pull),
        implicit(p.implicit),
        step(step_of(p, grad_scale)) {
    compliance = 1.0f / (step.lr * pull);
  }

  template <class P>
  __device__ __forceinline__ void load(bool wanted, int at, Packs<P>& packs) const {
    Base::load(wanted, at, packs);
    load_if(wanted && stiffness != nullptr, stiffness + at, packs.stiffness);
    load_if(wanted && stiffness != nullptr, anchor + at, packs.anchor);
    load_if(wanted && path != nullptr, path + at, packs.path);
  }

  template <class P>
  __device__ __forceinline__ void use(int at, Packs<P>& packs, const float (&)[P::size]) const {
#pragma unroll
    for (int k = 0; k < P::size; ++k) {
      const float before = to_float(packs.value.at[k]), loss_gradient = to_float(packs.gradient.at[k]) * step.factor;
      float d = loss_gradient, velocity = to_float(packs.momentum.at[k]);
      if (step.weight_decay != 0.0f) d += step.weight_decay * before;
      const float anchor_k = packs.anchor.at[k], stiffness_k = packs.stiffness.at[k];
      if (stiffness != nullptr && !implicit) d += anchor_gradient<float>(before, anchor_k, stiffness_k, pull);
      float after = moved_along(step, before, d, step.lr, this->has_momentum(), velocity);
      if (stiffness != nullptr && implicit) after = towards_anchor<float>(after, anchor_k, stiffness_k, compliance);
      from_float(after, packs.value.at[k]);
      from_float(velocity, packs.momentum.at[k]);
      packs.path.at[k] -= loss_gradient * (to_float(packs.value.at[k]) - before);
    }
    this->write(at, packs);
    if (path != nullptr) store(path + at, packs.path);
  }
};

template <class T, class N>
__global__ void __launch_bounds__(kThreads, 2) anchored_update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  const AnchoredParameter& p = parameter_of(network, blockIdx.x);
  const Interval item = elements_of(p, blockIdx.x);
  Anchored<Kind<T, true, false>> visitor(p, item.begin, network.grad_scale);
  use_elements(p, visitor, static_cast<int>(item.end - item.begin), Everywhere{});
}

template <class N>
void launch_parameters(const UpdateParams& params, const Part& part, int64_t item, const Stream& stream) {
  N network{};
  network.grad_scale = params.grad_scale;
  network.found_inf = params.found_inf;
  for (const int64_t index : part.parameters) {
    const ParameterParams& from = params.parameters[index];
    const double pull = anchor_pull(from.strength, from.momentum_factor, from.implicit);
    AnchoredParameter p{elements(from),
                        static_cast<const float*>(from.stiffness),
                        static_cast<const float*>(from.anchor),
                        static_cast<float*>(from.path),
                        static_cast<float>(pull),
                        from.implicit};
    p.packed = p.packed && on_16_bytes(p.stiffness) && on_16_bytes(p.anchor) && on_16_bytes(p.path);
    add_parameter(network, p, item);
  }
  if (network.items == 0) return;
  with_type(part.dtype, [&](auto number) {
    launch(anchored_update_kernel<decltype(number), N>, network.items, false, stream, network);
  });
}

}  // namespace

void launch_anchored_update(const UpdateParams& params, const Stream& stream) {
  const ParameterParams* end = params.parameters + params.parameter_count;
  const bool plain = std::all_of(params.parameters, end,
                                 [](const ParameterParams& p) { return p.stiffness == nullptr && p.path == nullptr; });
  if (plain) return launch_update(params, stream);  // the same step, with more loads in flight
  const OnDevice guard(stream.device);
  int64_t size = 0;
  for (const ParameterParams* p = params.parameters; p != end; ++p) size += p->size;
  const int64_t item = item_size(size, resident_blocks(anchored_update_kernel<float, LargeNetwork>));
  for (const Part& part : divide_network<LargeNetwork>(params, true)) {
    fits<SmallNetwork>(part) ? launch_parameters<SmallNetwork>(params, part, item, stream)
                             : launch_parameters<LargeNetwork>(params, part, item, stream);
  }
}

}  // namespace npc::cuda
