// Runs a body on several threads of the OpenMP runtime that torch has already loaded.
#pragma once

namespace npc::cpu {

// Calls body(context, index) for every index in [0, tasks), each once, on up to `tasks` threads, and waits.
// Which index runs where does not influence results: bodies write disjoint memory.
void run_parallel(int tasks, void (*body)(void* context, int index), void* context);

template <class Body>
void parallel(int tasks, Body&& body) {
  if (tasks <= 1) {
    body(0);
    return;
  }
  run_parallel(tasks, [](void* context, int index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace npc::cpu
