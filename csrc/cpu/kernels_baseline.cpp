#define NPC_ISA baseline
#include "kernels_impl.h"

namespace npc::cpu {

const Kernels& baseline_kernels() {
  static constexpr Kernels kernels = baseline::table("baseline");
  return kernels;
}

}  // namespace npc::cpu
