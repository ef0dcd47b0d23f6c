// Eq. 2 on the device: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|, each tensor read
// once.
//
// The neurons are divided into tiles. Where there are too few tiles to keep the device busy,
// several blocks share a tile: each leaves its sums in scratch memory, and the last one to arrive
// adds them up in a fixed order. A block's threads form groups of `lanes` neighbours, which read
// along the contiguous dimension:
//
//   rows      (B, N, P) contiguous. A group sums the positions of one neuron in one sample: the
//             neuron's row. The sum over the group takes a few shuffles. If P is odd, rows begin
//             and end inside packs of 16 bytes. The groups of both rows then read the pack, and
//             each ignores the elements of the other row.
//   columns   (B, N), channels-last, sequences. Each thread of a group has one neuron, or a 16-byte
//             pack of them. It sums all positions of a sample (`team` = 1). Or the groups of a
//             block share the positions of a sample (`team` = all of them) and add them up in
//             shared memory before the absolute value.
//
// A block goes through items, which are samples. Where there are too few, a sample's positions are
// cut into `chunks`, and each group has a single chunk as its item. Then scratch memory holds
// signed sums, and the last block takes the absolute values.
//
// A thread reads a sequence of slots (class Slots): pack by pack through an item, and on into the
// next item. It loads kBatch slots of n and of dL/dn, 8 x 16 bytes, before it uses the first, even
// if they belong to several items.
//
// A neuron that received no gradient has the importance -0.0; all other zeros are +0.0. Each thread
// combines the bits of all its gradients (struct Received), which takes at most one instruction for
// 4 bytes, and the block marks its sums in the end. Sums of marked sums begin at -0.0, which keeps
// the two apart.
//
// Traffic: 2 * B * N * P * sizeof(T) bytes read and N floats written. ReLU's backward pass writes
// another B * N * P * sizeof(T) bytes, as it does without importance. Packs that two rows share are
// read from memory once and from the cache twice.
#pragma once

#include "../api.h"
#include "../rules.h"
#include "device.h"

namespace npc::cuda {

constexpr int kBatch = 4;  // slots loaded together

enum class Layout : int8_t { rows, columns };

// How eq. 2 of one layer is divided among blocks. Blocks are numbered slice * tiles + tile, so that
// blocks that run at the same time read neighbouring memory.
struct ImportanceWork {
  ImportanceParams params;
  Layout layout;
  bool packed;  // 16-byte accesses are allowed
  int lanes;    // threads in a group, a power of two up to 32
  int tile;     // neurons in a tile, a power of two
  int team;     // columns: how many groups share a sample's positions
  int rows;     // items that a block works on at a time
  int step;     // positions from one slot of an item to the next
  int slots;    // slots in an item
  int chunk;    // the most positions in an item; in rows a multiple of a pack
  int slice;    // how many of the batch * chunks items each block has; `rows` if chunks > 1
  int tiles;
  int slices;              // blocks for each tile
  int64_t positions;       // positions in a sample
  int64_t chunks;          // items in a sample
  int64_t step_n, step_g;  // packs from one slot of an item to the next; 0 without packs
  int64_t next_n, next_g;  // packs, or elements, from an item's last slot to the first slot of the thread's next item
  float* partial;          // scratch memory: sums [slices][neurons], or [batch * chunks][neurons] if chunks > 1
  unsigned* arrived;       // [tiles], all zero

  __host__ __device__ int64_t items() const { return params.batch * chunks; }
  int64_t blocks() const { return int64_t{tiles} * slices; }
  __host__ __device__ int64_t partial_sums() const {
    if (slices == 1 && chunks == 1) return 0;
    return (chunks > 1 ? items() : slices) * params.neurons;
  }
};

// Divides the work for the current device. The division is the same with and without ReLU's
// backward pass, and for a separate launch and inside a network's step, so the sums have the same
// bits.
ImportanceWork divide_importance(const ImportanceParams& params);

struct ImportanceShared {
  float sums[kThreads * 8];  // [groups][tile] for the widest pack
  int tile, slice;           // the block's; not in registers, which packs need
  bool last;
};

// The places of a pack of n and the same pack of dL/dn.
template <class T>
struct Slot {
  const T *n, *g;
  int at;       // the first position, counted from the item's first
  bool wanted;  // false: there is nothing to read
  bool last;    // of its item; the same in all threads of a block
};

// The slots of one thread: packs that are `step` positions apart in an item, then those of the item
// that comes `rows` later, as long as the block's slice has items. All threads of a block go from
// slot to slot in the same way.
template <Layout layout, class P>
class Slots {
  using T = typename P::T;
  static constexpr bool kPacked = P::size > 1;  // positions have one stride, which is 1 in rows

 public:
  // row: which of the `rows` items that the block works on at a time. used: whether the thread has
  // a neuron. first: the thread's first position in an item. length: the positions in a sample.
  // n, g: the offsets of the neuron's position 0 in sample 0.
  __device__ __forceinline__ Slots(const ImportanceWork& w, int slice, int row, bool used, int first, int64_t length,
                                   int64_t n, int64_t g)
      : work_(w), row_(used ? row : kNoRow), first_(first), at_(first) {
    const ImportanceParams& p = w.params;
    const int64_t block_item = int64_t{slice} * w.slice;
    left_ = static_cast<int>(least(w.slice, w.items() - block_item));
    int64_t sample = block_item + row;
    if (w.chunks > 1) {
      sample = (block_item + row) / w.chunks;
      from_ = (block_item + row - sample * w.chunks) * w.chunk;
    }
    end_ = static_cast<int>(least(w.chunk, length - from_));
    n_ = static_cast<const T*>(p.activation) + n + sample * p.activation_batch_stride;
    g_ = static_cast<const T*>(p.gradient) + g + sample * p.gradient_batch_stride;
    if constexpr (kPacked) {
      n_ += (from_ + first) * (layout == Layout::rows ? 1 : p.activation_position_stride[0]);
      g_ += (from_ + first) * (layout == Layout::rows ? 1 : p.gradient_position_stride[0]);
    }
  }

  // The same for all threads of a block, which meet at barriers.
  __device__ __forceinline__ bool more() const { return left_ > 0; }

  // Whether the thread's items begin where their samples begin, and where an item's positions end.
  __device__ __forceinline__ bool at_begin() const { return from_ == 0; }
  __device__ __forceinline__ int end() const { return end_; }

  // After the last slot, returns slots that are not wanted.
  __device__ __forceinline__ Slot<T> next() {
    Slot<T> slot{n_, g_, at_, row_ < left_ && at_ < end_, ++index_ == work_.slots};
    if constexpr (!kPacked) add_position(slot);
    at_ = slot.last ? first_ : at_ + work_.step;
    advance(n_, slot.last ? work_.next_n : work_.step_n);
    advance(g_, slot.last ? work_.next_g : work_.step_g);
    left_ -= slot.last ? work_.rows : 0;
    index_ = slot.last ? 0 : index_;
    return slot;
  }

 private:
  static constexpr int kNoRow = 1 << 30;  // more items than a block has

  static __device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  static __device__ __forceinline__ void advance(const T*& from, int64_t accesses) {
    from += kPacked ? P::size * int64_t{static_cast<int>(accesses)} : accesses;
  }

  // For positions of several dimensions that no common stride merges.
  __device__ __forceinline__ void add_position(Slot<T>& slot) const {
    const ImportanceParams& p = work_.params;
    int64_t rest = from_ + at_;
#pragma unroll 1
    for (int dim = p.position_dims - 1; dim >= 0; --dim) {
      const int64_t outer = dim == 0 ? 0 : rest / p.position_size[dim], index = rest - outer * p.position_size[dim];
      slot.n += index * p.activation_position_stride[dim];
      slot.g += index * p.gradient_position_stride[dim];
      rest = outer;
    }
  }

  const ImportanceWork& work_;
  const int row_, first_;
  int end_;
  int64_t from_ = 0;      // the item's first position in its sample
  const T *n_, *g_;       // the next slot, or, without packs, its sample
  int left_, index_ = 0;  // items that the block still has; the next slot's index in its item
  int at_;                // the next slot's position
};

// Loads the next slots. Slots that are not wanted become zeros.
template <Layout layout, class P>
__device__ __forceinline__ void load_batch(Slots<layout, P>& slots, P (&n)[kBatch], P (&g)[kBatch]) {
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const auto slot = slots.next();
    n[k] = g[k] = {};
    load_if(slot.wanted, slot.n, n[k]);
    load_if(slot.wanted, slot.g, g[k]);
  }
}

// ReLU's gradient of a pack: dL/dn where n > 0, else 0.
template <class P>
__device__ __forceinline__ P relu_gradient(const P& n, const P& g) {
  P out = g;
  if constexpr (P::size > 1 && sizeof(typename P::T) == 2) {
    uint32_t words[2][sizeof(P) / 4];
    memcpy(words[0], &n, sizeof(P));
    memcpy(words[1], &g, sizeof(P));
    for (size_t word = 0; word < sizeof(P) / 4; ++word) {
      words[1][word] &= ~at_most_zero<typename P::T>(words[0][word]);
    }
    memcpy(&out, words[1], sizeof(P));
  } else {
    for (int k = 0; k < P::size; ++k) {
      if (to_float(n.at[k]) <= 0.0f) from_float(0.0f, out.at[k]);
    }
  }
  return out;
}

// Stores ReLU's gradient of a pack. It has the memory order of n, which was loaded from `from`.
template <class P>
__device__ __forceinline__ void store_relu(const ImportanceParams& p, const typename P::T* from, const P& n,
                                           const P& g) {
  using T = typename P::T;
  store(static_cast<T*>(p.gradient_in) + (from - static_cast<const T*>(p.activation)), relu_gradient(n, g));
}

// Sets all elements of two packs to 0 but those in [begin, end).
template <class P>
__device__ __forceinline__ void keep(P& n, P& g, int begin, int end) {
  for (int k = 0; k < P::size; ++k) {
    if (k >= begin && k < end) continue;
    from_float(0.0f, n.at[k]);
    from_float(0.0f, g.at[k]);
  }
}

// Remembers whether a number other than zero was seen: at each place of a pack if `kApart`, else
// anywhere.
template <class P, bool kApart>
struct Received {
  static constexpr int kWords = (sizeof(P) + 3) / 4, kNumbers = sizeof(typename P::T) == 4 ? 1 : 2;  // in a word
  // All bits of a word but the signs, which zeros have, too.
  static constexpr uint32_t kNoSign = kNumbers == 1 ? 0x7fffffffu : 0x7fff7fffu;
  uint32_t bits[kApart ? kWords : 1] = {};

  __device__ __forceinline__ void add(const P& g) {
    uint32_t words[kWords] = {};
    memcpy(words, &g, sizeof(P));
    for (int word = 0; word < kWords; ++word) bits[kApart ? word : 0] |= words[word];
  }

  __device__ __forceinline__ bool at(int i) const {
    static_assert(kApart);
    const uint32_t of_number = kNumbers == 1 ? kNoSign : 0x7fffu << 16 * (i % kNumbers);
    return (bits[i / kNumbers] & of_number) != 0;
  }

  __device__ __forceinline__ bool anywhere() const {
    static_assert(!kApart);
    return (bits[0] & kNoSign) != 0;
  }
};

// Makes a sum of zero -0.0 (kNoGradient) if no gradient was received, else +0.0. Infinities and NaN
// are kept.
__device__ __forceinline__ float marked(float sum, bool received) { return received ? sum + 0.0f : -fabsf(sum); }

// The absolute value of a marked sum; a zero keeps its sign.
__device__ __forceinline__ float magnitude(float sum) { return sum == 0.0f ? sum : fabsf(sum); }

// What an item's sum adds to the total of a group's items.
__device__ __forceinline__ float share(const ImportanceWork& w, float sum) { return w.chunks > 1 ? sum : fabsf(sum); }

// The sum of what `rows` rows of groups left in shared memory for one of the tile's neurons.
__device__ __forceinline__ float sum_over_rows(const ImportanceShared& shared, int rows, int tile, int column) {
  float sum = kNoGradient;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) sum += shared.sums[row * tile + column];
  return sum;
}

// Calls use(slot, n, dL/dn) for each of a thread's slots in turn. A whole batch is loaded before
// its first slot is used.
template <Layout layout, class P, class Use>
__device__ __forceinline__ void for_each_slot(Slots<layout, P> slots, const Use& use) {
  Slots<layout, P> loaded = slots;  // a batch ahead
  while (loaded.more()) {
    P n[kBatch], g[kBatch];
    load_batch(loaded, n, g);
    if (!slots.more()) break;  // never taken, but the branch keeps the first use after the last load
#pragma unroll
    for (int k = 0; k < kBatch; ++k) use(slots.next(), n[k], g[k]);
  }
}

// Leaves in shared memory, for each row of groups and each neuron of the tile, the total of the
// row's items.
template <bool kRelu, class P>
__device__ __forceinline__ void rows_block(const ImportanceWork& w, int64_t first, int slice,
                                           ImportanceShared& shared) {
  const ImportanceParams& p = w.params;
  const int lane = thread() % w.lanes, group = thread() / w.lanes;
  const int64_t neuron = first + group % w.tile;
  // Positions are counted from the start of the pack in which the row begins: `before` elements
  // before the row.
  const int64_t row_n = neuron * p.activation_neuron_stride, row_g = neuron * p.gradient_neuron_stride;
  const int before = static_cast<int>(row_n & (P::size - 1));
  const Slots<Layout::rows, P> slots(w, slice, group / w.tile, neuron < p.neurons, lane * P::size, w.positions + before,
                                     row_n - before, row_g - before);
  const int begin = slots.at_begin() ? before : 0, end = slots.end();
  float sum = 0.0f, total = 0.0f;
  Received<P, false> received;
  for_each_slot(slots, [&](const Slot<typename P::T>& slot, P& n, P& g) {
    if constexpr (kRelu) {  // a pack that two rows share is written once
      if (slot.wanted && slot.at >= begin) store_relu(p, slot.n, n, g);
    }
    if constexpr (P::size > 1) {
      if (slot.wanted && (slot.at < begin || slot.at + P::size > end)) keep(n, g, begin - slot.at, end - slot.at);
    }
    const auto a = floats_of(n), b = floats_of(g);
    float of_pack = a.at[0] * b.at[0];
    for (int i = 1; i < P::size; ++i) of_pack = fmaf(a.at[i], b.at[i], of_pack);
    sum += of_pack;
    received.add(g);
    if (slot.last) {
      total += share(w, sum_over_lanes(sum, w.lanes));
      sum = 0.0f;
    }
  });
  const float lanes_that_received = sum_over_lanes(received.anywhere() ? 1.0f : 0.0f, w.lanes);
  if (lane == 0) shared.sums[group] = marked(total, lanes_that_received > 0.0f);
}

// The same where neurons are contiguous.
template <bool kRelu, class P>
__device__ __forceinline__ void columns_block(const ImportanceWork& w, int64_t first, int slice,
                                              ImportanceShared& shared) {
  const ImportanceParams& p = w.params;
  const int column = thread() % w.lanes * P::size, group = thread() / w.lanes;
  const int64_t neuron = first + column;
  const Slots<Layout::columns, P> slots(w, slice, group / w.team, neuron < p.neurons, group % w.team, w.positions,
                                        neuron, neuron);
  float sums[P::size];  // of the thread's neurons, over an item
  // Over all items. Where groups share a sample, totals[0] belongs to the tile's neuron number thread().
  float totals[P::size];
  Received<P, true> received;
  for (int i = 0; i < P::size; ++i) sums[i] = totals[i] = 0.0f;
  const auto leave = [&](const float (&values)[P::size]) {
    for (int i = 0; i < P::size; ++i) shared.sums[group * w.tile + column + i] = values[i];
  };
  for_each_slot(slots, [&](const Slot<typename P::T>& slot, const P& n, const P& g) {
    const auto a = floats_of(n), b = floats_of(g);
    for (int i = 0; i < P::size; ++i) sums[i] = fmaf(a.at[i], b.at[i], sums[i]);
    received.add(g);
    if constexpr (kRelu) {
      if (slot.wanted) store_relu(p, slot.n, n, g);
    }
    if (!slot.last) return;
    if (w.team == 1) {
      for (int i = 0; i < P::size; ++i) totals[i] += fabsf(sums[i]);
    } else {
      leave(sums);
      __syncthreads();
      if (thread() < w.tile) totals[0] += share(w, sum_over_rows(shared, w.team, w.tile, thread()));
      __syncthreads();
    }
    for (int i = 0; i < P::size; ++i) sums[i] = 0.0f;
  });
  if (w.team == 1) {
    for (int i = 0; i < P::size; ++i) totals[i] = marked(totals[i], received.at(i));
    return leave(totals);
  }
  for (int i = 0; i < P::size; ++i) sums[i] = received.at(i) ? 1.0f : 0.0f;
  leave(sums);
  __syncthreads();
  if (thread() < w.tile) {  // each thread reads and writes its own column
    const bool any = sum_over_rows(shared, w.team, w.tile, thread()) > 0.0f;
    shared.sums[thread()] = marked(totals[0], any);
  }
}

// Writes the block's sums, shared.sums[rows][tile]: to the result if no other block works on the
// tile, else to scratch memory.
__device__ __forceinline__ void leave_sums(const ImportanceWork& w, const ImportanceShared& shared) {
  __syncthreads();
  const int column = thread() % w.tile, row = thread() / w.tile;
  const int64_t neuron = int64_t{shared.tile} * w.tile + column, neurons = w.params.neurons;
  const int64_t item = int64_t{shared.slice} * w.slice + row;
  if (neuron >= neurons) return;
  if (w.chunks > 1) {
    if (row < w.rows && item < w.items()) w.partial[item * neurons + neuron] = shared.sums[thread()];
  } else if (row == 0) {
    const float sum = sum_over_rows(shared, w.rows, w.tile, column);
    if (w.slices == 1) static_cast<float*>(w.params.out)[neuron] = sum;
    else w.partial[int64_t{shared.slice} * neurons + neuron] = sum;
  }
}

// The sum of `count` numbers that are `stride` apart. 8 loads are in flight together.
__device__ __forceinline__ float add_up(const float* from, int64_t count, int64_t stride) {
  constexpr int together = 8;
  float sum = kNoGradient;
  for (int64_t at = 0; at < count; at += together) {
    float values[together];
#pragma unroll
    for (int k = 0; k < together; ++k) values[k] = at + k < count ? from[(at + k) * stride] : kNoGradient;
#pragma unroll
    for (int k = 0; k < together; ++k) sum += values[k];
  }
  return sum;
}

// The last block of a tile adds up what all blocks left, neuron by neuron, always in the same
// order.
__device__ inline void finish_tile(const ImportanceWork& w, ImportanceShared& shared) {
  const int column = thread() % w.tile, row = thread() / w.tile, rows = kThreads / w.tile;
  const int64_t neuron = int64_t{shared.tile} * w.tile + column, neurons = w.params.neurons;
  const float* partial = w.partial + neuron;
  float sum = kNoGradient;
  int shares = 1;  // threads that share a sample's chunks, where there are fewer samples than threads
  if (w.chunks > 1) {
    while (2 * shares * w.params.batch <= rows) shares *= 2;
    for (int64_t sample = row / shares; sample < w.params.batch; sample += rows / shares) {
      const int64_t chunk = row % shares, of_sample = sample * w.chunks;
      if (neuron >= neurons) break;
      const float signed_sum =
          add_up(partial + (of_sample + chunk) * neurons, (w.chunks - chunk + shares - 1) / shares, shares * neurons);
      sum = shares > 1 ? signed_sum : sum + magnitude(signed_sum);
    }
  } else if (neuron < neurons) {
    sum = add_up(partial + row * neurons, (w.slices - row + rows - 1) / rows, rows * neurons);
  }
  shared.sums[thread()] = sum;
  __syncthreads();
  if (row == 0 && neuron < neurons) {
    float total = kNoGradient;
    for (int other = 0; other < rows && (w.chunks > 1 || other < w.slices); other += shares) {
      float of_sample = kNoGradient;
      for (int part = 0; part < shares; ++part) of_sample += shared.sums[(other + part) * w.tile + column];
      total += magnitude(of_sample);
    }
    static_cast<float*>(w.params.out)[neuron] = total;
  }
  __syncthreads();
}

// One block's part of eq. 2 for one layer.
template <Layout layout, bool kRelu, class P>
__device__ __forceinline__ void importance_block(const ImportanceWork& w, int64_t block, ImportanceShared& shared) {
  const int slice = static_cast<int>(block) / w.tiles, tile = static_cast<int>(block) % w.tiles;
  const int64_t first = int64_t{tile} * w.tile;
  if (thread() == 0) shared.tile = tile, shared.slice = slice;
  if constexpr (layout == Layout::rows) rows_block<kRelu, P>(w, first, slice, shared);
  else columns_block<kRelu, P>(w, first, slice, shared);
  leave_sums(w, shared);
  if (w.partial_sums() == 0) return;
  if (arrives_last(w.arrived + shared.tile, static_cast<unsigned>(w.slices), shared.last)) finish_tile(w, shared);
}

}  // namespace npc::cuda
