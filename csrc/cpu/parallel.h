// Runs a function on several threads of the OpenMP runtime that torch has loaded.
#pragma once

namespace npc::cpu {

// Calls body(context, index) once for every index in [0, tasks), on up to `tasks` threads, and
// waits. Results do not depend on which thread runs which index: bodies write disjoint memory.
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
