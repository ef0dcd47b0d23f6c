// Chooses the instruction set of the kernels: the best that this processor runs, or the one that
// NPC_EXT_ISA names.

#include <atomic>
#include <cstdlib>

#include "kernels.h"

namespace npc::cpu {
namespace {

// The tables that this processor runs, best last.
const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> run_here = {&baseline::kernels()};
#if defined(NPC_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      run_here.push_back(&avx2::kernels());
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      run_here.push_back(&avx512::kernels());
    }
#endif
    return run_here;
  }();
  return tables;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* kernels : all_kernels()) {
    if (kernels->isa == name) return kernels;
  }
  return nullptr;
}

const Kernels* preferred() {
  const char* wanted = std::getenv("NPC_EXT_ISA");
  const Kernels* found = wanted == nullptr ? nullptr : find(wanted);
  return found == nullptr ? all_kernels().back() : found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{preferred()};
  return kernels;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->isa);
  return names;
}

const char* isa_in_use() { return kernels().isa; }

bool use_isa(const std::string& name) {
  const Kernels* found = find(name);
  if (found == nullptr) return false;
  current().store(found, std::memory_order_relaxed);
  return true;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace npc::cpu
