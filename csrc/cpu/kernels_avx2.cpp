#define NPC_ISA avx2
#include "kernels_impl.h"

namespace npc::cpu {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = avx2::table("avx2");
  return kernels;
}

}  // namespace npc::cpu
