// Eq. 2 in one launch, alone or on the way through the backward pass of ReLU; importance.h says how.

#include "importance.h"
#include "workspace.h"

#include <algorithm>

namespace npc::cuda {
namespace {

constexpr int kPackBytes = 16;
constexpr int64_t kFewTiles = 8;       // fewer leave too much to the last blocks; narrower tiles avoid that
constexpr int kLineLanes = 8;          // 16 bytes for each of so many threads fill a line of the cache
constexpr int64_t kPacksPerLane = 4;   // a chunk of positions gives every thread at least so much to do

template <Layout layout, bool kRelu, class P, class T>
__global__ void __launch_bounds__(kThreads, 2) importance_kernel(const __grid_constant__ ImportanceWork work) {
  importance_block<layout, kRelu, P, T>(work, blockIdx.x, shared_memory<ImportanceShared>());
}

// `value`, but at least 1 and at most `most` if that is more.
int64_t at_most(int64_t most, int64_t value) { return std::max<int64_t>(1, std::min(value, most)); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of two that is at least `value`, up to `most`.
int power_of_two(int64_t value, int most) {
  int power = 1;
  while (power < value && power < most) power *= 2;
  return power;
}

int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

// Whether every pack that begins at a multiple of its size along the dense dimension lies on a multiple of 16 bytes.
// `along` is that dimension's size, `others` are the strides of all others.
bool may_pack(const ImportanceParams& p, int64_t along, std::initializer_list<int64_t> others) {
  const int64_t size = kPackBytes / element_bytes(p.dtype);
  if (along % size != 0 || !aligned(p.activation) || !aligned(p.gradient) || !aligned(p.gradient_in)) return false;
  return std::all_of(others.begin(), others.end(), [&](int64_t stride) { return stride % size == 0; });
}

bool has_columns(const ImportanceParams& p) {
  if (p.activation_neuron_stride != 1 || p.gradient_neuron_stride != 1) return false;
  if (p.neurons == 1 && p.position_dims == 1) return false;  // a tensor of one channel is contiguous, too
  return true;
}

// Cuts positions into chunks and items into slices, given about how many. A block works on `at_once` items at a time;
// chunks begin at multiples of `unit`.
void divide_items(ImportanceWork& w, int64_t at_once, int64_t unit, int64_t blocks) {
  w.chunk = std::max<int64_t>(ceil_div(ceil_div(w.positions, w.chunks), unit) * unit, 1);
  w.chunks = std::max<int64_t>(ceil_div(w.positions, w.chunk), 1);
  const int64_t items = w.params.batch * w.chunks;
  w.slice = std::max<int64_t>(ceil_div(items, at_most(ceil_div(items, at_once), ceil_div(blocks, w.tiles))), 1);
  w.slices = std::max<int64_t>(ceil_div(items, w.slice), 1);
}

void divide_rows(ImportanceWork& w, int64_t blocks) {
  const ImportanceParams& p = w.params;
  const bool dense = p.position_dims == 1 && p.activation_position_stride[0] == 1 && p.gradient_position_stride[0] == 1;
  w.packed = dense && may_pack(p, w.positions,
                               {p.batch > 1 ? p.activation_batch_stride : 0, p.batch > 1 ? p.gradient_batch_stride : 0,
                                p.neurons > 1 ? p.activation_neuron_stride : 0,
                                p.neurons > 1 ? p.gradient_neuron_stride : 0});
  const int64_t size = w.packed ? kPackBytes / element_bytes(p.dtype) : 1;
  w.lanes = power_of_two(ceil_div(w.positions, size), kWarp);
  const int groups = kThreads / w.lanes;
  w.tile = power_of_two(p.neurons, groups);
  w.tiles = ceil_div(p.neurons, w.tile);
  const int64_t rows = p.batch * p.neurons, wanted = blocks * groups;
  if (rows < wanted) {
    w.chunks = at_most(ceil_div(wanted, std::max<int64_t>(rows, 1)), w.positions / (w.lanes * size * kPacksPerLane));
  }
  divide_items(w, groups / w.tile, size, blocks);
}

void divide_columns(ImportanceWork& w, int64_t blocks) {
  const ImportanceParams& p = w.params;
  bool packed = may_pack(p, p.neurons, {p.batch > 1 ? p.activation_batch_stride : 0,
                                        p.batch > 1 ? p.gradient_batch_stride : 0});
  for (int dim = 0; dim < p.position_dims; ++dim) {
    packed = packed && may_pack(p, p.neurons, {p.activation_position_stride[dim], p.gradient_position_stride[dim]});
  }
  w.packed = packed;
  const int size = packed ? kPackBytes / element_bytes(p.dtype) : 1;
  w.lanes = power_of_two(ceil_div(p.neurons, size), std::min(kWarp, kThreads / size));  // a tile is at most a block
  w.team = w.positions > 1 && p.batch * p.neurons / size < blocks * kThreads ? 0 : 1;  // 0: all groups, see below
  const auto tiles = [&] { return ceil_div(p.neurons, w.lanes * size); };
  while (w.lanes > kLineLanes && (tiles() < kFewTiles || (w.team == 0 && tiles() * p.batch < blocks))) w.lanes /= 2;
  const int groups = kThreads / w.lanes;
  w.tile = w.lanes * size;
  w.tiles = tiles();
  if (w.team == 0) {
    w.team = groups;
    if (w.tiles * p.batch < blocks) {
      w.chunks = at_most(ceil_div(blocks, std::max<int64_t>(w.tiles * p.batch, 1)),
                         w.positions / (groups * kPacksPerLane));
    }
  }
  divide_items(w, groups / w.team, 1, blocks);
}

template <Layout layout, bool kRelu, class T>
void launch_layout(const ImportanceWork& work, const Stream& stream) {
  const auto kernel = work.packed ? importance_kernel<layout, kRelu, Pack<T>, T>
                                  : importance_kernel<layout, kRelu, Single<T>, T>;
  launch(kernel, work.blocks(), false, stream, work);
}

template <bool kRelu, class T>
void launch_typed(const ImportanceWork& work, const Stream& stream) {
  work.layout == Layout::rows ? launch_layout<Layout::rows, kRelu, T>(work, stream)
                              : launch_layout<Layout::columns, kRelu, T>(work, stream);
}

template <bool kRelu>
void launch_kernel(const ImportanceWork& work, const Stream& stream) {
  switch (work.params.dtype) {
    case DType::float32: return launch_typed<kRelu, float>(work, stream);
    case DType::float16: return launch_typed<kRelu, __half>(work, stream);
    case DType::bfloat16: return launch_typed<kRelu, __nv_bfloat16>(work, stream);
    default: throw std::invalid_argument("importance: the CUDA kernels take float32, float16 and bfloat16");
  }
}

}  // namespace

ImportanceWork divide_importance(const ImportanceParams& params, int64_t blocks) {
  ImportanceWork w{};
  w.params = params;
  w.positions = 1;
  for (int dim = 0; dim < params.position_dims; ++dim) w.positions *= params.position_size[dim];
  w.chunks = w.team = 1;
  w.layout = has_columns(params) ? Layout::columns : Layout::rows;
  w.layout == Layout::columns ? divide_columns(w, blocks) : divide_rows(w, blocks);
  return w;
}

void launch_importance(const ImportanceParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  ImportanceWork work = divide_importance(params, int64_t{kBlocksPerProcessor} * processors());
  if (const int64_t sums = work.partial_sums(); sums > 0) {
    Scratch scratch(stream, Scratch::bytes_of<float>(sums));
    work.arrived = scratch.counters(work.tiles);
    work.partial = scratch.array<float>(sums);
  }
  params.gradient_in == nullptr ? launch_kernel<false>(work, stream) : launch_kernel<true>(work, stream);
}

}  // namespace npc::cuda
