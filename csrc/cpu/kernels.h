// The inner loops, one table of them per instruction set. A loop works on one thread's share and nothing else.
#pragma once

#include "../api.h"

namespace npc::cpu {

struct ConnectionTotal {
  double sum;
  int64_t active;
};

struct Kernels {
  const char* isa;

  // Eq. 2 for neurons [neuron_begin, neuron_end) over samples [batch_begin, batch_end); out[i] is overwritten, with i
  // counted from 0 for the whole layer. It is -0.0 where those samples gave the neuron no gradient.
  void (*importance[kDTypes])(const ImportanceParams& params, int64_t batch_begin, int64_t batch_end,
                              int64_t neuron_begin, int64_t neuron_end, void* out);

  // Eqs. 3, 4 and 7: out[i] is what happens to neuron i (kClears in rules.h). `average` moves by `measured` unless that
  // is null (not measured) or its total does not count (zero, not finite); `active`: how many neurons the mean is over.
  void (*plasticity)(const LayerParams& layer, float* average, const float* measured, float* out, int64_t neurons,
                     float total, float active);

  // The weight update of elements [begin, end) of a parameter; `plasticity` belongs to its layer, null for plain rates.
  void (*descend[kDTypes])(const ParameterParams& parameter, const float* plasticity, double gradient_factor,
                           int64_t begin, int64_t end);

  // The same with Adam's step.
  void (*descend_adam[kDTypes])(const ParameterParams& parameter, const float* plasticity, double gradient_factor,
                                int64_t begin, int64_t end);

  // The same as descend with an anchor and a path integral, at the plain rate.
  void (*descend_anchored[kDTypes])(const ParameterParams& parameter, double gradient_factor, int64_t begin,
                                    int64_t end);

  // CPC: the sum over |value * gradient| and the number of elements with a gradient that is not zero; then eqs. 3, 4, 7
  // and the weight update from that sum over the whole layer. A total that does not count (zero, not finite) leaves C
  // alone.
  ConnectionTotal (*measure_connections[kDTypes])(const ParameterParams& parameter, int64_t begin, int64_t end);
  void (*descend_connections[kDTypes])(const ParameterParams& parameter, const LayerParams& layer, float total,
                                       float connections, double gradient_factor, int64_t begin, int64_t end);
};

const Kernels& baseline_kernels();
#if defined(NPC_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

const Kernels& kernels();  // of the instruction set in use

}  // namespace npc::cpu
