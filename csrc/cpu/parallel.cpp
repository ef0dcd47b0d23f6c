// Looks the OpenMP functions up at the first parallel call, in the runtime that libtorch_cpu
// depends on. No runtime is linked: a second one would double the threads, which would compete for
// the cores. Without torch in the process, or where its runtime lacks GNU's entry point, everything
// runs on the calling thread.

#include "parallel.h"

#include <dlfcn.h>

namespace npc::cpu {
namespace {

struct Runtime {
  // GOMP_parallel, which GNU's and LLVM's runtimes have.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_index)() = nullptr;
  int (*team_size)() = nullptr;

  Runtime() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    // dlsym on a library also searches its dependencies, so this is torch's runtime even if others
    // are loaded.
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(torch, "GOMP_parallel"));
    thread_index = reinterpret_cast<decltype(thread_index)>(dlsym(torch, "omp_get_thread_num"));
    team_size = reinterpret_cast<decltype(team_size)>(dlsym(torch, "omp_get_num_threads"));
    dlclose(torch);  // torch itself keeps it loaded
  }
};

struct Job {
  const Runtime* runtime;
  void (*body)(void*, int);
  void* context;
  int tasks;
};

void run_share(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int team = job.runtime->team_size();  // may be smaller than requested
  for (int index = job.runtime->thread_index(); index < job.tasks; index += team) job.body(job.context, index);
}

}  // namespace

void run_parallel(int tasks, void (*body)(void*, int), void* context) {
  static const Runtime runtime;
  if (runtime.parallel == nullptr || runtime.thread_index == nullptr || runtime.team_size == nullptr) {
    for (int index = 0; index < tasks; ++index) body(context, index);
    return;
  }
  Job job{&runtime, body, context, tasks};
  runtime.parallel(run_share, &job, static_cast<unsigned>(tasks), 0);
}

}  // namespace npc::cpu
