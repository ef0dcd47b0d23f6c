#define NPC_ISA avx512
#include "kernels_impl.h"

namespace npc::cpu {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = avx512::table("avx512");
  return kernels;
}

}  // namespace npc::cpu
