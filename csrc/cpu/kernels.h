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
  // counted from 0 for the whole layer.
  void (*importance[kDTypes])(const ImportanceParams& params, int64_t batch_begin, int64_t batch_end,
                              int64_t neuron_begin, int64_t neuron_end, void* out);

  // Eqs. 3 and 4 in place: average[i] from measured[i].
  void (*average)(float* average, const float* measured, int64_t neurons, float total, float active, float delta,
                  float one_minus_delta);

  // Eq. 7 without its minimum.
  void (*plasticity)(const float* average, float* out, int64_t neurons, float alpha, float beta, bool error_function);

  // The weight update of elements [begin, end) of a parameter; `plasticity` belongs to its layer, null for plain rates.
  void (*descend[kDTypes])(const ParameterParams& parameter, const float* plasticity, double gradient_factor,
                           int64_t begin, int64_t end);

  // The same with Adam's step; rates are shares of lr, 1 at most.
  void (*descend_adam[kDTypes])(const ParameterParams& parameter, const float* plasticity, double gradient_factor,
                                int64_t begin, int64_t end);

  // The same as descend with an anchor and a path integral, at the plain rate.
  void (*descend_anchored[kDTypes])(const ParameterParams& parameter, double gradient_factor, int64_t begin,
                                    int64_t end);

  // CPC: the sum over |value * gradient| and the number of elements where it is not zero; then eqs. 3, 4, 7 and the
  // weight update from that sum over the whole layer. A total that does not count (zero, not finite) leaves C alone.
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
