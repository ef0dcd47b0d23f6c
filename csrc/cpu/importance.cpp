// Eq. 2 on the CPU: divides the work among threads. The loops are in importance.h.
//
// Threads divide the samples, so that each streams through its own part of memory, and their
// partial sums are added in a fixed order. Where samples are few, they divide the neurons.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace npc::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // fewer do not repay waking a thread
constexpr int64_t kSamplesPerThread = 4;       // fewer do not repay a thread's partial sums

int64_t elements(const ImportanceParams& params) {
  int64_t count = params.batch * params.neurons;
  for (int dim = 0; dim < params.position_dims; ++dim) count *= params.position_size[dim];
  return count;
}

int64_t share(int64_t total, int index, int shares) { return total * index / shares; }

template <class Real>
void by_samples(const ImportanceParams& params, int shares) {
  std::vector<Real> partial(static_cast<size_t>(shares) * params.neurons);
  const auto kernel = kernels().importance[static_cast<int>(params.dtype)];
  parallel(shares, [&](int index) {
    kernel(params, {share(params.batch, index, shares), share(params.batch, index + 1, shares), 0, params.neurons},
           partial.data() + index * params.neurons);
  });
  Real* out = static_cast<Real*>(params.out);
  std::copy_n(partial.data(), params.neurons, out);
  for (int index = 1; index < shares; ++index) {
    for (int64_t i = 0; i < params.neurons; ++i) out[i] += partial[index * params.neurons + i];
  }
}

}  // namespace

void launch_importance(const ImportanceParams& params, Threads threads) {
  const auto kernel = kernels().importance[static_cast<int>(params.dtype)];
  const int64_t useful = std::max<int64_t>(1, elements(params) / kElementsPerThread);
  const int shares = static_cast<int>(std::min<int64_t>(threads.count, useful));
  if (shares == 1) {
    kernel(params, {0, params.batch, 0, params.neurons}, params.out);
  } else if (params.batch < kSamplesPerThread * shares && params.neurons >= shares) {
    parallel(shares, [&](int index) {
      kernel(params, {0, params.batch, share(params.neurons, index, shares), share(params.neurons, index + 1, shares)},
             params.out);
    });
  } else if (params.dtype == DType::float64) {
    by_samples<double>(params, static_cast<int>(std::min<int64_t>(shares, params.batch)));
  } else {
    by_samples<float>(params, static_cast<int>(std::min<int64_t>(shares, params.batch)));
  }
}

}  // namespace npc::cpu
