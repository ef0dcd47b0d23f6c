// The table of the inner loops for one instruction set. npc_ext's build compiles this file once for
// each, with NPC_ISA as its name and the compiler's flags for it.

#if !defined(NPC_ISA)
#define NPC_ISA baseline
#endif

#include "kernels.h"

#include "adam.h"
#include "anchored.h"
#include "connections.h"
#include "importance.h"
#include "update.h"

#define NPC_STRING_OF(name) #name
#define NPC_STRING(name) NPC_STRING_OF(name)
#define NPC_OF_ALL_DTYPES(loop) {loop<float>, loop<double>, loop<half_bits>, loop<bfloat_bits>}

namespace npc::cpu::NPC_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {
      NPC_STRING(NPC_ISA),
      NPC_OF_ALL_DTYPES(importance),
      plasticity,
      NPC_OF_ALL_DTYPES(descend),
      NPC_OF_ALL_DTYPES(descend_adam),
      NPC_OF_ALL_DTYPES(descend_anchored),
      NPC_OF_ALL_DTYPES(measure_connections),
      NPC_OF_ALL_DTYPES(descend_connections),
  };
  return table;
}

}  // namespace npc::cpu::NPC_ISA
