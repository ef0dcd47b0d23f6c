// Eq. 2 in one launch, alone or together with the backward pass of ReLU. importance.h says how.

#include "importance.h"
#include "workspace.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <optional>

namespace npc::cuda {
namespace {

constexpr int kBlocks = 3;            // at least, on a multiprocessor: 96 KiB in flight, with 80 registers a thread
constexpr int64_t kWaves = 4;         // blocks for each that runs at a time; with more, the last ones are shorter
constexpr int64_t kTileBytes = 1024;  // that a tile reads from one place at least, if there are enough neurons
constexpr int kLineLanes = 8;         // threads whose 16 bytes each fill a cache line
constexpr int64_t kMost = int64_t{1} << 29;  // positions in an item, and items of a block, which are counted in 32 bits

template <Layout layout, bool kRelu, class P>
__global__ void __launch_bounds__(kThreads, kBlocks) importance_kernel(const __grid_constant__ ImportanceWork work) {
  importance_block<layout, kRelu, P>(work, blockIdx.x, shared_memory<ImportanceShared>());
}

using Kernel = void (*)(ImportanceWork);

template <bool kRelu, class P>
Kernel kernel_of_access(const ImportanceWork& work) {
  return work.layout == Layout::rows ? importance_kernel<Layout::rows, kRelu, P>
                                     : importance_kernel<Layout::columns, kRelu, P>;
}

template <bool kRelu>
Kernel kernel_of(const ImportanceWork& work) {
  if (work.params.dtype == DType::float64) {
    throw std::invalid_argument("importance: the CUDA kernels take float32, float16 and bfloat16");
  }
  return with_type(work.params.dtype, [&](auto number) {
    using T = decltype(number);
    return work.packed ? kernel_of_access<kRelu, Pack<T>>(work) : kernel_of_access<kRelu, Single<T>>(work);
  });
}

// `value`, limited to at most `most` and then to at least 1.
int64_t at_most(int64_t most, int64_t value) { return std::max<int64_t>(1, std::min(value, most)); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least `value`, limited to `most`.
int power_of_two(int64_t value, int most) {
  int power = 1;
  while (power < value && power < most) power *= 2;
  return power;
}

int pack_size(const ImportanceParams& p) { return kPackBytes / (p.dtype == DType::float32 ? 4 : 2); }

// The numbers that one access moves.
int access_size(const ImportanceWork& w) { return w.packed ? pack_size(w.params) : 1; }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

// Whether packs may be read in contiguous ranges of elements: whether a pack that begins at a
// multiple of its size in a range is at a multiple of 16 bytes. along: the size of a range. others:
// the strides from range to range.
bool may_pack(const ImportanceParams& p, int64_t along, std::initializer_list<int64_t> others) {
  const int64_t size = pack_size(p);
  if (along % size != 0 || !aligned(p.activation) || !aligned(p.gradient) || !aligned(p.gradient_in)) return false;
  return std::all_of(others.begin(), others.end(), [&](int64_t stride) { return stride % size == 0; });
}

// The strides from sample to sample; 0 for a single sample.
int64_t activation_batch_stride(const ImportanceParams& p) { return p.batch > 1 ? p.activation_batch_stride : 0; }
int64_t gradient_batch_stride(const ImportanceParams& p) { return p.batch > 1 ? p.gradient_batch_stride : 0; }

bool may_pack_columns(const ImportanceParams& p) {
  const auto stride_of = [&](const int64_t* strides) { return p.position_dims == 1 ? strides[0] : 0; };
  return p.position_dims <= 1 &&
         may_pack(p, p.neurons,
                  {activation_batch_stride(p), gradient_batch_stride(p), stride_of(p.activation_position_stride),
                   stride_of(p.gradient_position_stride)});
}

// A range is one row, or all rows of a sample where these are contiguous in both tensors.
bool may_pack_rows(const ImportanceParams& p, int64_t positions) {
  if (p.position_dims != 1 || p.activation_position_stride[0] != 1 || p.gradient_position_stride[0] != 1) return false;
  const int64_t n = p.neurons > 1 ? p.activation_neuron_stride : positions;
  const int64_t g = p.neurons > 1 ? p.gradient_neuron_stride : positions;
  const int64_t of_batch_n = activation_batch_stride(p), of_batch_g = gradient_batch_stride(p);
  return may_pack(p, positions, {of_batch_n, of_batch_g, n, g}) ||
         (n == positions && g == positions && may_pack(p, positions * p.neurons, {of_batch_n, of_batch_g}));
}

bool has_columns(const ImportanceParams& p) {
  if (p.activation_neuron_stride != 1 || p.gradient_neuron_stride != 1) return false;
  if (p.neurons == 1 && p.position_dims == 1) return false;  // the positions of one channel are a row
  return true;
}

// The number of blocks to divide the work among: as many as run at a time, or more while each has a
// batch of slots to read.
int64_t blocks_for(const ImportanceWork& w) {
  const int64_t resident = resident_blocks(kernel_of<false>(w));
  const int64_t elements = w.params.batch * w.params.neurons * w.positions;
  return std::clamp(elements / (int64_t{kThreads} * kBatch * access_size(w)), resident, kWaves * resident);
}

// `passes`, or a few more so that the batches of each thread are full.
int64_t whole_batches(const ImportanceWork& w, int64_t passes) {
  const int unit = kBatch / std::gcd(kBatch, w.slots);
  return passes > unit ? ceil_div(passes, unit) * unit : passes;
}

// `chunks` of a sample's slots, or more chunks of whole batches if this leaves fewer places in
// batches empty.
int64_t whole_chunks(int64_t slots, int64_t chunks) {
  const auto batches = [&](int64_t count) { return count * ceil_div(ceil_div(slots, count), kBatch); };
  const int64_t whole = ceil_div(slots, chunks) / kBatch * kBatch;
  if (chunks == 1 || whole == 0) return chunks;
  const int64_t more = ceil_div(slots, whole);
  return batches(more) < batches(chunks) ? more : chunks;
}

// Cuts `length` positions into about `chunks` chunks, which begin at multiples of `unit`, and the
// items into slices.
void divide_items(ImportanceWork& w, int64_t length, int64_t chunks, int64_t unit, int64_t blocks) {
  chunks = std::max(whole_chunks(ceil_div(length, w.step), chunks), ceil_div(length, kMost));
  w.chunk = static_cast<int>(std::max<int64_t>(ceil_div(ceil_div(length, chunks), unit) * unit, unit));
  w.chunks = std::max<int64_t>(ceil_div(length, w.chunk), 1);
  w.slots = static_cast<int>(ceil_div(w.chunk, w.step));
  const int64_t passes = std::max<int64_t>(ceil_div(w.items(), w.rows), 1);  // if one block did them all
  const int64_t slices = std::max(ceil_div(blocks, std::max(w.tiles, 1)), ceil_div(w.items(), kMost));
  w.slice = static_cast<int>(w.rows * (w.chunks > 1 ? 1 : whole_batches(w, ceil_div(passes, at_most(passes, slices)))));
  w.slices = static_cast<int>(std::max<int64_t>(ceil_div(w.items(), w.slice), 1));
  const int size = access_size(w);
  if (w.packed && w.positions > 1) {
    w.step_n = w.step * w.params.activation_position_stride[0] / size;
    w.step_g = w.step * w.params.gradient_position_stride[0] / size;
  }
  w.next_n = w.rows * activation_batch_stride(w.params) / size - (w.slots - 1) * w.step_n;
  w.next_g = w.rows * gradient_batch_stride(w.params) / size - (w.slots - 1) * w.step_g;
}

// The number of chunks to cut a sample into, so that `parts` pieces of work become `wanted`. It is
// 1 if `parts` is already more than half of that, because chunks have to be added up. A chunk has
// at least `least` positions.
int64_t chunks_for(const ImportanceWork& w, int64_t parts, int64_t wanted, int64_t least) {
  return 2 * parts <= wanted ? at_most(w.positions / least, wanted / std::max<int64_t>(parts, 1)) : 1;
}

// The number of lanes for a row of `packs` packs: many, unless fewer lanes leave clearly fewer of
// them idle at its end.
int lanes_for(int64_t packs) {
  const auto slots = [&](int lanes) { return ceil_div(packs, lanes) * lanes; };
  int best = power_of_two(packs, kWarp);
  for (int lanes = best / 2; lanes >= kLineLanes; lanes /= 2) {
    if (16 * slots(lanes) < 15 * slots(best)) best = lanes;
  }
  return best;
}

void divide_rows(ImportanceWork& w) {
  const ImportanceParams& p = w.params;
  w.packed = w.packed && may_pack_rows(p, w.positions);
  const int size = access_size(w);
  const int64_t blocks = blocks_for(w);
  // From the start of the pack in which a row begins.
  const int64_t length = w.positions + size - std::gcd<int64_t>(w.positions, size);
  w.lanes = lanes_for(ceil_div(length, size));
  w.step = w.lanes * size;
  const int groups = kThreads / w.lanes;
  w.tile = power_of_two(std::min(p.neurons, ceil_div(kTileBytes * size, w.positions * kPackBytes)), groups);
  w.tiles = static_cast<int>(ceil_div(p.neurons, w.tile));
  w.rows = groups / w.tile;
  const int64_t chunks = chunks_for(w, p.batch * w.tiles * w.tile, blocks * groups, int64_t{kBatch} * w.step);
  divide_items(w, length, chunks, size, blocks);
}

void divide_columns(ImportanceWork& w) {
  const ImportanceParams& p = w.params;
  w.packed = w.packed && may_pack_columns(p);
  const int size = access_size(w);
  const int64_t blocks = blocks_for(w);
  w.lanes = power_of_two(ceil_div(p.neurons, size), std::min(kWarp, kThreads / size));  // a tile is at most a block
  const bool together = w.positions > 1 && p.batch * p.neurons / size < blocks * kThreads;
  const auto tiles = [&] { return ceil_div(p.neurons, w.lanes * size); };
  // Narrower tiles are more in number, which leaves less work to the last blocks: at least as many
  // tiles as lanes.
  while (w.lanes > kLineLanes && (tiles() < w.lanes || (together && tiles() * p.batch < blocks))) w.lanes /= 2;
  const int groups = kThreads / w.lanes;
  w.tile = w.lanes * size;
  w.tiles = static_cast<int>(tiles());
  w.team = w.step = together ? groups : 1;
  w.rows = groups / w.team;
  const int64_t chunks = together ? chunks_for(w, p.batch * w.tiles, blocks, int64_t{kBatch} * groups) : 1;
  divide_items(w, w.positions, chunks, 1, blocks);
}

ImportanceWork divide(const ImportanceParams& params, bool packed) {
  ImportanceWork w{};
  w.params = params;
  w.packed = packed;
  w.positions = 1;
  for (int dim = 0; dim < params.position_dims; ++dim) w.positions *= params.position_size[dim];
  if (w.positions == 0) {  // the same as without samples
    w.params.batch = w.params.position_dims = 0;
    w.positions = 1;
  }
  w.chunks = w.team = 1;
  w.layout = has_columns(w.params) ? Layout::columns : Layout::rows;
  w.layout == Layout::columns ? divide_columns(w) : divide_rows(w);
  return w;
}

}  // namespace

ImportanceWork divide_importance(const ImportanceParams& params) {
  const ImportanceWork w = divide(params, true);
  const int64_t distances[] = {w.step_n, w.step_g, w.next_n, w.next_g};  // counted in 32 bits with packs
  const bool near = std::all_of(std::begin(distances), std::end(distances),
                                [](int64_t distance) { return distance == static_cast<int>(distance); });
  return near || !w.packed ? w : divide(params, false);
}

void launch_importance(const ImportanceParams& params, const Stream& stream) {
  const OnDevice guard(stream.device);
  ImportanceWork work = divide_importance(params);
  std::optional<Scratch> scratch;
  if (const int64_t sums = work.partial_sums(); sums > 0) {
    scratch.emplace(stream, Scratch::bytes_of<float>(sums));
    work.arrived = scratch->counters(work.tiles);
    work.partial = scratch->array<float>(sums);
  }
  launch(params.gradient_in == nullptr ? kernel_of<false>(work) : kernel_of<true>(work), work.blocks(), false, stream,
         work);
}

}  // namespace npc::cuda
