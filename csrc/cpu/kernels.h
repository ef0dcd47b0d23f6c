// The inner loops: one table of them for each instruction set. A loop works on one thread's share
// and nothing else.
#pragma once

#include "../api.h"

namespace npc::cpu {

// The samples and the neurons of one thread.
struct Share {
  int64_t batch_begin, batch_end, neuron_begin, neuron_end;
};

// Elements [begin, end) of a parameter, and what their gradients are multiplied by.
struct Elements {
  const ParameterParams& parameter;
  double gradient_factor;  // 1 / grad_scale, negative to maximize
  int64_t begin, end;
};

struct ConnectionTotal {
  double sum = 0;
  int64_t active = 0;

  void operator+=(const ConnectionTotal& other) {
    sum += other.sum;
    active += other.active;
  }
};

struct Kernels {
  const char* isa;

  // Eq. 2 of a share's neurons over its samples. Overwrites out[i], with i counted from the layer's
  // first neuron; -0.0 means that those samples gave the neuron no gradient.
  void (*importance[kDTypes])(const ImportanceParams& params, const Share& share, void* out);

  // Eqs. 3, 4 and 7. out[i] is the plasticity of neuron i (rules.h). `average` moves by `measured`,
  // unless that is null (not measured) or its total is zero or not finite. `active` is the number
  // of neurons that the mean is over.
  void (*plasticity)(const LayerParams& layer, float* average, const float* measured, float* out, int64_t neurons,
                     float total, float active);

  // The weight update. `plasticity` is that of the parameter's neurons, or null for plain rates.
  void (*descend[kDTypes])(const Elements& elements, const float* plasticity);

  // The same with Adam's step.
  void (*descend_adam[kDTypes])(const Elements& elements, const float* plasticity);

  // The same as descend with an anchor and a path integral, at the plain rate.
  void (*descend_anchored[kDTypes])(const Elements& elements);

  // CPC. The first returns the sum over |value * gradient| and the number of elements whose
  // gradient is not zero. The second applies eqs. 3, 4, 7 and the weight update, given that sum
  // over the whole layer. A total that is zero or not finite leaves C as it is.
  ConnectionTotal (*measure_connections[kDTypes])(const Elements& elements);
  void (*descend_connections[kDTypes])(const Elements& elements, const LayerParams& layer, float total,
                                       float connections);
};

namespace baseline {
const Kernels& kernels();
}
#if defined(NPC_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

const Kernels& kernels();  // of the instruction set in use

}  // namespace npc::cpu
