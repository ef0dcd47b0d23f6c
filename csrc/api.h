// The interface of the kernels: plain structs of pointers, sizes and strides, and the functions
// that launch them. Nothing here depends on Python or torch. Sizes and strides count elements and
// are 64 bits wide.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace npc {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
constexpr int kDTypes = 4;
constexpr int kMaxPositionDims = 8;

// Eq. 2, where a_i is -0.0 if dL/dn_bip is 0 for all b and p:
//   a_i = sum over b of |sum over p of n_bip * dL/dn_bip|
struct ImportanceParams {
  const void* activation;  // n      [batch, neurons, positions...], any strides
  const void* gradient;    // dL/dn  the same shape, any strides
  void* out;               // a      [neurons], contiguous; float64 if the input is, else float32
  void* gradient_in;       // null, or ReLU's gradient in the memory order of activation; CUDA only
  DType dtype;
  int64_t batch, neurons;
  int position_dims;  // the dimensions of p that no common stride merges; 0: a single position
  int64_t position_size[kMaxPositionDims];
  int64_t activation_batch_stride, activation_neuron_stride, activation_position_stride[kMaxPositionDims];
  int64_t gradient_batch_stride, gradient_neuron_stride, gradient_position_stride[kMaxPositionDims];
};

// One layer's importance and the constants of eqs. 3, 4 and 7.
struct LayerParams {
  float* importance;         // C  [neurons], read and written; null in CPC, where parameters have an importance
  const float* measured;     // a  [neurons], -0.0: received no gradient; null: not measured in this step, so C stays
  int64_t* nonfinite_steps;  // counts the steps in which measured importance was not finite and did not enter C
  int64_t neurons;
  double alpha, beta, delta;  // alpha is relative to the learning rate
  bool error_function;        // eq. 7 for the error function instead of sigmoid and tanh
  bool active_only;           // neurons that received no gradient do not change and do not count in eq. 3's mean
};

// One parameter. Its memory is `outer` x `middle` x `run` elements per group of neurons. All
// elements of a run r belong to the same neuron:
//   (r / (outer * middle)) * middle + r % middle
// Linear and convolution weights have outer = 1 and middle = neurons. A transposed convolution's
// (in, out / groups, k...) has outer = in / groups and middle = out / groups. Where a process holds
// only some rows of a parameter, there is one group, and its neurons are those from `first_neuron`
// on.
struct ParameterParams {
  void* value;           // [size], read and written
  const void* gradient;  // [size], in the memory order of value
  void* momentum;        // [size], in the memory order of value, or null
  DType dtype;
  int64_t size, outer, middle, run;
  int64_t layer;         // the layer whose neurons scale the rate; -1: none, the rate is lr
  int64_t first_neuron;  // the neuron of the layer that the first row belongs to
  double lr, momentum_factor, weight_decay;
  const float* lr_address;  // null, or read in place of lr, so that replays of a CUDA graph see the rate change
  bool nesterov, maximize;

  // For launch_anchored_update: the penalty of EWC, MAS, SI and SSL,
  //   strength * stiffness * (value - anchor)^2
  // with stiffness and anchor both null if there is none; and SI's path integral, which every step
  // lowers by gradient * movement, or null. All are [size], in the memory order of value, float64
  // if the value is, else float32. An implicit pull is a proximal step after the step along the
  // loss's gradient; an explicit one is added to that gradient.
  const void* stiffness;
  const void* anchor;
  void* path;
  double strength;
  bool implicit;

  // For launch_connection_update: C of every element [size], in the memory order of value; null
  // outside layers.
  float* importance;

  // For launch_adam_update: the moving averages of the gradient and of its square, and their
  // constants. Both are [size], in the memory order of value, float64 if the value is, else
  // float32.
  void* first_moment;
  void* second_moment;
  double first_decay, second_decay, epsilon;

  // The number of steps that the parameter has taken [1], raised by one; null unless Adam or
  // stochastic rounding needs it.
  float* steps;

  // For launch_update and launch_adam_update: values are rounded to bfloat16 stochastically. The
  // random bits depend on `seed`, the number of steps and the element's index.
  bool stochastic_rounding;
  uint32_t seed;
};

// Eqs. 3, 4, 7 and the weight update of every layer of a network. A neuron that this step freezes
// (C >= beta after it, not before) loses its first moment (momentum). From then on neither its
// weights nor its moments change.
struct UpdateParams {
  const LayerParams* layers;
  int64_t layer_count;
  const ParameterParams* parameters;
  int64_t parameter_count;
  const float* grad_scale;  // null, or what every gradient is divided by
  const float* found_inf;   // null, or where a number other than zero means that nothing changes
};

namespace cpu {

std::vector<std::string> isas();  // the instruction sets compiled in that this processor runs, best last
const char* isa_in_use();
bool use_isa(const std::string& name);  // false if it is unknown or cannot run here

// An upper bound; small work stays on the calling thread.
struct Threads {
  int count;
};

void launch_importance(const ImportanceParams& params, Threads threads);
void launch_update(const UpdateParams& params, Threads threads);

// Everything in one call: the importance of layer l, from inputs[l], enters its moving average,
// then the weights move. layers[l].measured and inputs[l].out are ignored: the sums are in scratch
// memory.
void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, Threads threads);

// The weight update alone, with anchors and path integrals, of parameters that belong to no layer.
void launch_anchored_update(const UpdateParams& params, Threads threads);

// launch_update with Adam's step and decoupled weight decay, where s_i is that of eq. 7 (rules.h):
//   w <- w - s_i lr (m' / (sqrt(v') + epsilon) + decay w)
void launch_adam_update(const UpdateParams& params, Threads threads);

// CPC: c = |value * gradient| of every element in place of eq. 2, then eqs. 3, 4, 7 and the weight
// update, with an importance and a rate for each element. `neurons`, `importance` and `measured` of
// the layers are ignored.
void launch_connection_update(const UpdateParams& params, Threads threads);

}  // namespace cpu

#if defined(NPC_CUDA)
namespace cuda {

struct Stream {
  int device;
  void* handle;  // a cudaStream_t; null is the default stream
};

// Errors of the CUDA runtime are thrown as std::runtime_error. Inputs are float32, float16 or
// bfloat16.
void launch_importance(const ImportanceParams& params, const Stream& stream);
void launch_update(const UpdateParams& params, const Stream& stream);
void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, const Stream& stream);
void launch_anchored_update(const UpdateParams& params, const Stream& stream);
void launch_adam_update(const UpdateParams& params, const Stream& stream);
void launch_connection_update(const UpdateParams& params, const Stream& stream);

// The bytes of scratch memory that are kept on a device, for all streams and captured graphs
// (workspace.h).
int64_t workspace_bytes(int device);

// CUDA versions, as in 12040 for 12.4: of the runtime that is linked in, the newest that the driver
// supports (0 without a driver), and the oldest that the driver must support; and the name of that
// driver, "" where it is not known.
struct Versions {
  int runtime, driver, needed_driver;
  const char* needed_driver_name;
};
Versions versions();

// Why the kernels, compiled for `archs` (as in "80 90+PTX"), do not run on a device; the sentence
// is empty if they do. needs_other_code: they would run if they were compiled for the device. Never
// throws the CUDA runtime's errors.
struct Obstacle {
  std::string sentence;
  bool needs_other_code;
};
Obstacle why_not_on(int device, const std::string& archs);

}  // namespace cuda
#endif
}  // namespace npc
