// Chooses the instruction set of the kernels: the best that this processor runs, or the one that
// NPC_EXT_ISA names.

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace npc::cpu {
namespace {

struct Entry {
  const Kernels* kernels;
  bool runs_here;
};

const Entry* entries() {
  static const Entry table[] = {
      {&baseline::kernels(), true},
#if defined(NPC_X86)
      {&avx2::kernels(),
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {&avx512::kernels(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
  };
  return table;
}

const Kernels* find(const char* name) {
  for (int index = 0; index < isa_count(); ++index) {
    if (std::strcmp(isa_name(index), name) == 0 && isa_runs_here(index)) return entries()[index].kernels;
  }
  return nullptr;
}

const Kernels* preferred() {
  if (const char* wanted = std::getenv("NPC_EXT_ISA")) {
    if (const Kernels* found = find(wanted)) return found;
  }
  int best = 0;
  for (int index = 0; index < isa_count(); ++index) {
    if (isa_runs_here(index)) best = index;
  }
  return entries()[best].kernels;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{preferred()};
  return kernels;
}

}  // namespace

int isa_count() {
#if defined(NPC_X86)
  return 3;
#else
  return 1;
#endif
}

const char* isa_name(int index) { return entries()[index].kernels->isa; }

bool isa_runs_here(int index) { return entries()[index].runs_here; }

const char* isa_in_use() { return kernels().isa; }

bool use_isa(const char* name) {
  const Kernels* found = find(name);
  if (found == nullptr) return false;
  current().store(found, std::memory_order_relaxed);
  return true;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace npc::cpu
