// Eq. 2 on the CPU: threads divide the neurons among them, or, where neurons are few or lie side by side, the samples,
// whose partial sums are then added in a fixed order.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace npc::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // less does not repay waking a thread

int64_t elements(const ImportanceParams& params) {
  int64_t count = params.batch * params.neurons;
  for (int dim = 0; dim < params.position_dims; ++dim) count *= params.position_size[dim];
  return count;
}

// Whether neurons lie side by side, so that dividing them among threads would tear rows of memory apart.
bool neurons_are_innermost(const ImportanceParams& params) {
  return params.activation_neuron_stride == 1 && params.gradient_neuron_stride == 1;
}

int64_t share(int64_t total, int index, int shares) { return total * index / shares; }

template <class Real>
void by_samples(const ImportanceParams& params, int shares) {
  std::vector<Real> partial(static_cast<size_t>(shares) * params.neurons);
  const auto kernel = kernels().importance[static_cast<int>(params.dtype)];
  parallel(shares, [&](int index) {
    kernel(params, share(params.batch, index, shares), share(params.batch, index + 1, shares), 0, params.neurons,
           partial.data() + index * params.neurons);
  });
  Real* out = static_cast<Real*>(params.out);
  std::copy_n(partial.data(), params.neurons, out);
  for (int index = 1; index < shares; ++index) {
    for (int64_t i = 0; i < params.neurons; ++i) out[i] += partial[index * params.neurons + i];
  }
}

}  // namespace

void launch_importance(const ImportanceParams& params, int threads) {
  const auto kernel = kernels().importance[static_cast<int>(params.dtype)];
  const int64_t useful = std::max<int64_t>(1, elements(params) / kElementsPerThread);
  const int shares = static_cast<int>(std::min<int64_t>(threads, useful));
  if (shares == 1) {
    kernel(params, 0, params.batch, 0, params.neurons, params.out);
  } else if (params.neurons >= shares && (!neurons_are_innermost(params) || params.batch < shares)) {
    parallel(shares, [&](int index) {
      kernel(params, 0, params.batch, share(params.neurons, index, shares), share(params.neurons, index + 1, shares),
             params.out);
    });
  } else if (params.dtype == DType::float64) {
    by_samples<double>(params, static_cast<int>(std::min<int64_t>(shares, params.batch)));
  } else {
    by_samples<float>(params, static_cast<int>(std::min<int64_t>(shares, params.batch)));
  }
}

}  // namespace npc::cpu
