// What the kernels take: plain structs of pointers, sizes and strides, and the functions that launch them.
// Nothing here knows of Python or torch. Sizes and strides count elements and are 64 bits wide.
#pragma once

#include <cstdint>
#include <string>

namespace npc {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };
constexpr int kDTypes = 4;
constexpr int kMaxPositionDims = 8;

// a_i = sum over b of |sum over p of n_bip * dL/dn_bip|                                          (eq. 2)
// and -0.0 where dL/dn_bip is 0 for all b and p.
struct ImportanceParams {
  const void* activation;  // n      [batch, neurons, positions...], any strides
  const void* gradient;    // dL/dn  the same shape, any strides
  void* out;               // a      [neurons], contiguous; float64 if the input is, else float32
  void* gradient_in;       // ReLU's gradient, in the memory order of activation, or null; CUDA only
  DType dtype;
  int64_t batch, neurons;
  int position_dims;  // dimensions of p that no common stride merges; 0 means a single position
  int64_t position_size[kMaxPositionDims];
  int64_t activation_batch_stride, activation_neuron_stride, activation_position_stride[kMaxPositionDims];
  int64_t gradient_batch_stride, gradient_neuron_stride, gradient_position_stride[kMaxPositionDims];
};

// One layer's importance and the constants of eqs. 3, 4 and 7.
struct LayerParams {
  float* importance;      // C  [neurons], read and written; null for CPC, whose parameters have their own
  const float* measured;  // a  [neurons], or null: not measured in this step, C stays; -0.0: received no gradient
  int64_t* nonfinite_steps;       // counts the steps whose measured importance was not finite and did not enter C
  int64_t neurons;
  double alpha, beta, delta;  // alpha in units of the learning rate
  bool error_function;  // eq. 7 for the error function instead of sigmoid and tanh
  bool active_only;     // neurons that received no gradient take no part: neither eq. 3's mean nor any change
};

// One parameter. Its memory is `outer` x `middle` x `run` elements per group of neurons, and the elements of one run
// belong to one neuron: run r is part of neuron (r / (outer * middle)) * middle + r % middle. Linear and convolution
// weights have outer = 1, middle = neurons; a transposed convolution's (in, out / groups, k...) has
// outer = in / groups, middle = out / groups. Where a process holds only some rows of a parameter, the neurons are those
// from `first_neuron` on; there is one group then.
struct ParameterParams {
  void* value;           // [size], read and written
  const void* gradient;  // [size], in the memory order of value
  void* momentum;        // [size], in the memory order of value, or null
  DType dtype;
  int64_t size, outer, middle, run;
  int64_t layer;         // whose neurons scale the rate, or -1: the plain rate lr
  int64_t first_neuron;  // of the layer, to which the first row belongs
  double lr, momentum_factor, weight_decay;
  const float* lr_address;  // takes the place of lr, so that a CUDA graph's replays see it change; or null
  bool nesterov, maximize;

  // For launch_anchored_update: the penalty strength * stiffness * (value - anchor)^2 of EWC, MAS and SI, or null both,
  // and SI's path integral, from which gradient * movement is taken, or null. All [size], in the memory order of value,
  // float64 if the value is, else float32. An implicit pull is a proximal step after the loss's, else it is a gradient.
  const void* stiffness;
  const void* anchor;
  void* path;
  double strength;
  bool implicit;

  // For launch_connection_update: C of every element [size], in the memory order of value.
  float* importance;

  // For launch_adam_update: the moving averages of the gradient and of its square, and their constants. Both [size], in
  // the memory order of value, float64 if the value is, else float32.
  void* first_moment;
  void* second_moment;
  double first_decay, second_decay, epsilon;

  // How many steps the parameter has taken [1], raised by one; Adam needs it, stochastic rounding too, else null.
  float* steps;
  // Values are rounded to bfloat16 stochastically, with bits drawn from `seed`, the number of steps and the element's
  // index. For launch_update and launch_adam_update.
  bool stochastic_rounding;
  uint32_t seed;
};

// Eqs. 3, 4, 7 and the weight update of every layer of a network. A neuron that was not frozen before this step and is
// after it (C >= beta) loses its first moment (momentum). From then on neither its weights nor its moments change.
struct UpdateParams {
  const LayerParams* layers;
  int64_t layer_count;
  const ParameterParams* parameters;
  int64_t parameter_count;
  const float* grad_scale;  // every gradient is divided by it, or null
  const float* found_inf;   // non-zero: nothing is changed at all, or null
};

namespace cpu {

// Instruction sets compiled in, best last, as far as this processor can run them; and the one in use.
int isa_count();
const char* isa_name(int index);
bool isa_runs_here(int index);
const char* isa_in_use();
bool use_isa(const char* name);  // false if it is unknown or cannot run here

// `threads` is an upper bound; small work stays on the calling thread.
void launch_importance(const ImportanceParams& params, int threads);
void launch_update(const UpdateParams& params, int threads);

// Everything in one call: importance of layer l from inputs[l] straight into its moving average, then the update.
// layers[l].measured and inputs[l].out are ignored: the sums live in scratch.
void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, int threads);

// The weight update alone, with anchors and path integrals. The parameters belong to no layer.
void launch_anchored_update(const UpdateParams& params, int threads);

// launch_update with Adam's step, decoupled weight decay included: w <- w - s_i lr (m' / (sqrt(v') + epsilon) + decay w),
// with s_i of eq. 7 in rules.h. The moments of frozen neurons stay as they are, too, once the first was cleared.
void launch_adam_update(const UpdateParams& params, int threads);

// CPC: c = |value * gradient| of every element in place of eq. 2, then eqs. 3, 4, 7 and the weight update, an importance
// and a rate to each element. `neurons`, `importance` and `measured` of the layers are ignored.
void launch_connection_update(const UpdateParams& params, int threads);

}  // namespace cpu

#if defined(NPC_CUDA)
namespace cuda {

struct Stream {
  int device;
  void* handle;  // a cudaStream_t; null is the default stream
};

// Errors of the CUDA runtime are thrown as std::runtime_error. Inputs are float32, float16 or bfloat16.
void launch_importance(const ImportanceParams& params, const Stream& stream);
void launch_update(const UpdateParams& params, const Stream& stream);
void launch_network_step(const ImportanceParams* inputs, const UpdateParams& params, const Stream& stream);
void launch_anchored_update(const UpdateParams& params, const Stream& stream);
void launch_adam_update(const UpdateParams& params, const Stream& stream);
void launch_connection_update(const UpdateParams& params, const Stream& stream);

// How much scratch memory is kept on a device, for all streams and captured graphs (workspace.h).
int64_t workspace_bytes(int device);

// CUDA versions as in 12040 for 12.4: of the runtime that is linked in, the newest that the driver supports (0 without
// a driver), and the oldest that it must support; and the name of that driver, "" where it is not known.
struct Versions {
  int runtime, driver, needed_driver;
  const char* needed_driver_name;
};
Versions versions();

// Why the kernels, compiled for `archs` (as in "80 90+PTX"), do not run on a device: an empty sentence if they do.
// `needs_other_code`: they would if they were compiled for it. Never throws the CUDA runtime's errors.
struct Obstacle {
  std::string sentence;
  bool needs_other_code;
};
Obstacle why_not_on(int device, const std::string& archs);

}  // namespace cuda
#endif
}  // namespace npc
