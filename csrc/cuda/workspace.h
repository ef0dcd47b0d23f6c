// Scratch memory of the launches. It belongs to this module and not to torch, so a launch inside a
// CUDA graph takes no memory from the graph's pool and adds no node to the graph.
//
// Launches on one stream follow each other, so they share a workspace. An operation may launch
// several kernels, which hand on scratch memory, so another host thread waits until all of them are
// launched before it uses the stream's workspace. A captured graph may be replayed on any stream at
// any time, so each capture has separate workspaces. No workspace is ever freed, because a launch in
// flight or a replay may still use it. So the module keeps
//
//   kFirstBytes (4 MiB) for each stream; if that is too little, another one at least twice as large;
//   kFirstCaptureBytes (1 MiB) for each captured graph and each stream that it was captured on.
#pragma once

#include <mutex>

#include "../api.h"
#include "launch.h"
#include "runtime.h"

namespace npc::cuda {

constexpr int64_t kZeroedBytes = 256 * 1024;  // at the start of a workspace; zero before and after every launch

struct Workspace {
  void* data;
  int64_t bytes;
  std::unique_lock<std::mutex> turn;  // while it is held, no other host thread gets this workspace
};

// The workspace of a stream of the current device, or of its capture, with at least `bytes` bytes.
// Thread safe.
Workspace workspace_of(const Stream& stream, int64_t bytes);

// Divides the scratch memory of one operation, whose launches follow each other, into arrays and
// into counters. Counters are zero between launches. It lives until the operation's last launch, and
// an operation has only one.
class Scratch {
 public:
  // bytes: the sum of bytes_of() over all arrays.
  Scratch(const Stream& stream, int64_t bytes) : workspace_(workspace_of(stream, kZeroedBytes + bytes)) {}

  // The bytes that an array takes. Every array begins at a multiple of 16.
  template <class T>
  static int64_t bytes_of(int64_t count) {
    return (count * int64_t{sizeof(T)} + 15) / 16 * 16;
  }

  template <class T>
  T* array(int64_t count) {
    char* first = static_cast<char*>(workspace_.data) + kZeroedBytes + used_;
    used_ += bytes_of<T>(count);
    if (kZeroedBytes + used_ > workspace_.bytes) throw std::logic_error("npc_ext: more scratch is used than asked for");
    return reinterpret_cast<T*>(first);
  }

  unsigned* counters(int64_t count) {
    unsigned* first = static_cast<unsigned*>(workspace_.data) + counters_;
    counters_ += count;
    if (counters_ > kZeroedBytes / int64_t{sizeof(unsigned)}) {
      throw std::length_error("npc_ext: a launch needs more counters than there are");
    }
    return first;
  }

 private:
  Workspace workspace_;
  int64_t used_ = 0, counters_ = 0;
};

}  // namespace npc::cuda
