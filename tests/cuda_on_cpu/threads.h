// The threads of a launch, and the barriers at which they meet.
//
// With CUDA_ON_CPU_REAL_THREADS, each is a thread of the process, for the thread sanitizer. Otherwise
// all of them are fibers of the thread that launches: they take turns and switch at barriers. This is
// several times as fast, because barriers do not need the scheduler of the operating system.
#pragma once

#if defined(CUDA_ON_CPU_REAL_THREADS)
#include <barrier>
#include <thread>
#else
#include <ucontext.h>

#include <functional>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#include <cstddef>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Block;
inline thread_local Block* block;

#if defined(CUDA_ON_CPU_REAL_THREADS)

using Barrier = std::barrier<>;

// Calls body(0) to body(count - 1), each in a separate thread, and returns when all are done.
template <class Body>
void run_threads(int count, const Body& body) {
  std::vector<std::thread> running;
  for (int index = 0; index < count; ++index) running.emplace_back([&body, index] { body(index); });
  for (std::thread& thread : running) thread.join();
}

#else

// A kernel's arguments take up to 32 KiB, several times, and more under the address sanitizer.
constexpr std::size_t kStackBytes = 1024 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  bool finished;
};

// Of the thread that launches.
inline thread_local std::vector<std::unique_ptr<Fiber> > fibers;
inline thread_local ucontext_t scheduler;
inline thread_local int current;
inline thread_local const std::function<void(int)>* current_body;

// The address sanitizer must know which stack is in use. These tell it before and after a switch.
inline thread_local const void* scheduler_stack;
inline thread_local std::size_t scheduler_stack_bytes;
inline void before_switch([[maybe_unused]] void** kept, [[maybe_unused]] const void* stack,
                          [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(kept, stack, bytes);
#endif
}
inline void after_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** from,
                         [[maybe_unused]] std::size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, from, bytes);
#endif
}

// Lets the other fibers run.
inline void yield() {
  const dim3 thread = threadIdx, index = blockIdx;
  Block* const mine = block;
  void* kept = nullptr;
  before_switch(&kept, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fibers[current]->context, &scheduler);
  after_switch(kept, &scheduler_stack, &scheduler_stack_bytes);
  threadIdx = thread;
  blockIdx = index;
  block = mine;
}

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}

  void arrive_and_wait() {
    const long long phase = phase_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++phase_;
    }
    while (phase_ == phase) yield();
  }

 private:
  int count_, arrived_ = 0;
  long long phase_ = 0;
};

inline void run_fiber() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*current_body)(current);
  fibers[current]->finished = true;
  before_switch(nullptr, scheduler_stack, scheduler_stack_bytes);
}

// Calls body(0) to body(count - 1), each in a separate fiber, and returns when all are done.
inline void run_threads(int count, const std::function<void(int)>& body) {
  while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  current_body = &body;
  for (int index = 0; index < count; ++index) {
    Fiber& fiber = *fibers[index];
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (int left = count; left > 0;) {
    for (current = 0; current < count; ++current) {
      Fiber& fiber = *fibers[current];
      if (fiber.finished) continue;
      void* kept = nullptr;
      before_switch(&kept, fiber.stack.get(), kStackBytes);
      swapcontext(&scheduler, &fiber.context);
      after_switch(kept, nullptr, nullptr);
      if (fiber.finished) --left;
    }
  }
}

#endif

}  // namespace cuda_on_cpu
