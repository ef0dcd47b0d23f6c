// The weight update with anchors (EWC, MAS, SSL) and path integrals (SI), for all parameters of a network in one launch.
//
//   d     = dL/dw + weight decay * w                      (+ 2 strength * stiffness * (w - anchor), if explicit)
//   w    <- w - lr * d                                    (or with momentum, as in SGD)
//   w    <- (w + c * anchor) / (1 + c)                    (if implicit, with c = lr * pull * stiffness)
//   path <- path - dL/dw * (the movement of w)
//
// A block works on one item of at most kItem elements of one parameter, a thread on packs of 16 bytes.
// Traffic for float32: 12 bytes an element as for SGD, 8 more with an anchor, 8 more with a path, 8 with momentum.

#include <vector>

#include "elements.h"

namespace npc::cuda {
namespace {

struct AnchoredParameter : Elements {
  const float* stiffness;
  const float* anchor;
  float* path;
  float pull;  // as in anchor_pull()
  bool implicit;
};

// By value in the kernel's arguments.
template <int kParameters_>
struct AnchoredNetwork {
  static constexpr int kParameters = kParameters_;
  const float* grad_scale;
  const float* found_inf;
  int64_t items;
  int parameter_count;
  AnchoredParameter parameters[kParameters];
};
using SmallNetwork = AnchoredNetwork<24>;
using LargeNetwork = AnchoredNetwork<256>;
static_assert(sizeof(LargeNetwork) <= kMostArguments);

template <class P, class T>
__device__ __forceinline__ void move(const AnchoredParameter& p, const Step& step, int64_t at) {
  using F = Floats<P>;
  T* value = static_cast<T*>(p.value) + at;
  P values = load<P>(value);
  const P gradients = load<P>(static_cast<const T*>(p.gradient) + at);
  const bool has_momentum = p.momentum != nullptr, has_anchor = p.stiffness != nullptr, has_path = p.path != nullptr;
  P velocities = {};
  F stiffness = {}, anchor = {}, path = {};
  if (has_momentum) velocities = load<P>(static_cast<T*>(p.momentum) + at);
  if (has_anchor) {
    stiffness = load<F>(p.stiffness + at);
    anchor = load<F>(p.anchor + at);
  }
  if (has_path) path = load<F>(p.path + at);
  const float compliance = 1.0f / (step.lr * p.pull);
  for (int k = 0; k < P::size; ++k) {
    const float before = to_float(values.at[k]), loss_gradient = to_float(gradients.at[k]) * step.factor;
    float d = loss_gradient, velocity = to_float(velocities.at[k]);
    if (step.weight_decay != 0.0f) d += step.weight_decay * before;
    if (has_anchor && !p.implicit) d += anchor_gradient<float>(before, anchor.at[k], stiffness.at[k], p.pull);
    float after = moved_along(step, before, d, step.lr, has_momentum, velocity);
    if (has_anchor && p.implicit) after = towards_anchor<float>(after, anchor.at[k], stiffness.at[k], compliance);
    from_float(after, values.at[k]);
    from_float(velocity, velocities.at[k]);
    path.at[k] -= loss_gradient * (to_float(values.at[k]) - before);
  }
  store(value, values);
  if (has_momentum) store(static_cast<T*>(p.momentum) + at, velocities);
  if (has_path) store(p.path + at, path);
}

template <class T>
__device__ __forceinline__ void move_item(const AnchoredParameter& p, const Step& step, const Interval& item) {
  for_each_pack<T>(p, item, [&](auto pack, int64_t at) { move<decltype(pack), T>(p, step, at); });
}

template <class N>
__global__ void __launch_bounds__(kThreads, 2) anchored_update_kernel(const __grid_constant__ N network) {
  if (overflowed(network)) return;
  const AnchoredParameter& p = parameter_of(network, blockIdx.x);
  const Interval item = elements_of(p, blockIdx.x);
  const Step step = step_of(p, network.grad_scale);
  switch (p.dtype) {
    case DType::float32: move_item<float>(p, step, item); break;
    case DType::float16: move_item<__half>(p, step, item); break;
    default: move_item<__nv_bfloat16>(p, step, item); break;
  }
}

template <class N>
void launch_parameters(const UpdateParams& params, const ParameterParams* const* from, int count, int64_t item,
                       const Stream& stream) {
  N network{};
  network.grad_scale = params.grad_scale;
  network.found_inf = params.found_inf;
  for (int i = 0; i < count; ++i) {
    const double pull = anchor_pull(from[i]->strength, from[i]->momentum_factor, from[i]->implicit);
    AnchoredParameter p{elements(*from[i]), static_cast<const float*>(from[i]->stiffness),
                        static_cast<const float*>(from[i]->anchor), static_cast<float*>(from[i]->path),
                        static_cast<float>(pull), from[i]->implicit};
    p.packed = p.packed && on_16_bytes(p.stiffness) && on_16_bytes(p.anchor) && on_16_bytes(p.path);
    p.first_item = network.items;
    p.item_size = static_cast<int>(item);
    network.items += (p.size + item - 1) / item;
    network.parameters[network.parameter_count++] = p;
  }
  launch(anchored_update_kernel<N>, network.items, false, stream, network);
}

}  // namespace

void launch_anchored_update(const UpdateParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  std::vector<const ParameterParams*> parameters;
  int64_t size = 0;
  for (int64_t i = 0; i < params.parameter_count; ++i) {
    if (params.parameters[i].size == 0) continue;
    parameters.push_back(&params.parameters[i]);
    size += params.parameters[i].size;
  }
  const int64_t item = item_size(size, int64_t{kBlocksPerProcessor} * processors(), kThreads * 4);
  const int count = static_cast<int>(parameters.size());
  for (int first = 0; first < count; first += LargeNetwork::kParameters) {
    const int part = std::min(count - first, LargeNetwork::kParameters);
    const auto launch_part =
        part <= SmallNetwork::kParameters ? launch_parameters<SmallNetwork> : launch_parameters<LargeNetwork>;
    launch_part(params, &parameters[first], part, item, stream);
  }
}

}  // namespace npc::cuda
