// Eq. 2 on the device: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|, each tensor read once.
//
// The neurons are divided into tiles. Several blocks share a tile where there are too few tiles to keep the device
// busy; each leaves its sums in scratch, and the last to arrive adds them up in a fixed order. A block's threads form
// groups of `lanes` neighbours that read along the dimension without gaps:
//
//   rows      (B, N, P) contiguous: a group sums the positions of one neuron of one sample, and then moves on to
//             another sample. The sum over the group is a few shuffles.
//   columns   (B, N), channels-last, sequences: each thread of a group has neurons of its own, one or one 16-byte pack
//             of them, and sums the positions of one sample (`team` = 1), or the block's groups share a sample's
//             positions (`team` = all) and add them up in shared memory before the absolute value.
//
// Where there are too few samples, too, a sample's positions are cut into `chunks`; then scratch holds sums with their
// sign, and the absolute value is taken by the last block.
//
// On the way each thread notes whether it saw a gradient that is not zero, by an "or" of their bits, in one register for
// each neuron. Sums without such a gradient are -0.0, all other zeros +0.0. Adding up keeps the two apart, if sums of
// sums begin at -0.0.
//
// Traffic: (2 * B * N * P) * sizeof(T) read, N floats written; with ReLU's backward pass B * N * P * sizeof(T) more
// written, which that pass writes anyway.
#pragma once

#include "../api.h"
#include "../rules.h"
#include "device.h"

namespace npc::cuda {

enum class Layout : int32_t { rows, columns };

// How eq. 2 of one layer is divided among blocks. Blocks are numbered tile * slices + slice.
struct ImportanceWork {
  ImportanceParams params;
  Layout layout;
  bool packed;           // 16-byte accesses are allowed
  int lanes;             // threads of a group, a power of two up to 32
  int tile;              // neurons of a tile, a power of two
  int team;              // columns: how many groups share a sample's positions
  int64_t positions;
  int64_t chunks, chunk; // parts of a sample's positions, and how many positions each has
  int64_t tiles;
  int64_t slices, slice; // blocks of a tile, and how many of the batch * chunks items each has
  float* partial;        // scratch: sums of [slices][neurons], or of [batch * chunks][neurons] if chunks > 1
  unsigned* arrived;     // [tiles], zero

  int64_t blocks() const { return tiles * slices; }
  __host__ __device__ int64_t partial_sums() const {
    if (slices == 1 && chunks == 1) return 0;
    return (chunks > 1 ? params.batch * chunks : slices) * params.neurons;
  }
};

// Divides the work for a device that runs `blocks` blocks at a time.
ImportanceWork divide_importance(const ImportanceParams& params, int64_t blocks);

struct ImportanceShared {
  float sums[kThreads * 8];  // [groups][tile] for the widest pack
  bool last;
};

// Calls visit(where n lies, where dL/dn lies) for positions from, from + step, ... below `to`, counted from position 0.
template <class Visit>
__device__ __forceinline__ void for_positions(const ImportanceParams& p, int64_t from, int64_t to, int64_t step,
                                              const Visit& visit) {
  if (p.position_dims <= 1) {  // one stride for all positions, as in most layouts, or a single position
    const int64_t n = p.activation_position_stride[0], g = p.gradient_position_stride[0];
#pragma unroll 2
    for (int64_t at = from; at < to; at += step) visit(at * n, at * g);
    return;
  }
#pragma unroll 1
  for (int64_t at = from; at < to; at += step) {
    int64_t n = 0, g = 0, rest = at;
#pragma unroll 1
    for (int dim = p.position_dims - 1; dim >= 0; --dim) {
      const int64_t index = rest % p.position_size[dim];
      rest /= p.position_size[dim];
      n += index * p.activation_position_stride[dim];
      g += index * p.gradient_position_stride[dim];
    }
    visit(n, g);
  }
}

// The positions of one sample, or a chunk of them, that a block's item stands for.
struct Item {
  int64_t sample, from, to;
};

__device__ __forceinline__ Item item_of(const ImportanceWork& w, int64_t item) {
  if (w.chunks == 1) return {item, 0, w.positions};  // a division takes longer than a short row
  const int64_t sample = item / w.chunks, from = (item - sample * w.chunks) * w.chunk;
  return {sample, from, from + w.chunk < w.positions ? from + w.chunk : w.positions};
}

// The end of a slice's items.
__device__ __forceinline__ int64_t end_of(const ImportanceWork& w, int64_t slice) {
  const int64_t items = w.params.batch * w.chunks, end = (slice + 1) * w.slice;
  return end < items ? end : items;
}

// Whether one of the gradients was not zero whose bits were put together; a zero may have a sign.
__device__ __forceinline__ bool any_gradient(unsigned bits) { return bits << 1 != 0; }

// A sum of products; a zero gets the sign that tells whether there was a gradient.
__device__ __forceinline__ float marked(float sum, bool any) {
  return sum == 0.0f ? (any ? 0.0f : kNoGradient) : sum;
}

// The absolute value of a sum that is marked, with its mark.
__device__ __forceinline__ float magnitude(float marked) { return marked == 0.0f ? marked : fabsf(marked); }

// Adds n * dL/dn of one pack to `sums` and the bits of dL/dn to `bits`, of one neuron or as many as the pack has numbers.
// Writes ReLU's gradient where `kRelu`: dL/dn where n > 0, else 0.
template <bool kRelu, class P, class T, int kNeurons>
__device__ __forceinline__ void take(const ImportanceParams& p, int64_t place_n, int64_t place_g,
                                     float (&sums)[P::size], unsigned (&bits)[kNeurons]) {
  static_assert(kNeurons == 1 || kNeurons == P::size);
  const P n = load<P>(static_cast<const T*>(p.activation) + place_n);
  const P g = load<P>(static_cast<const T*>(p.gradient) + place_g);
  for (int k = 0; k < P::size; ++k) {
    const float gradient = to_float(g.at[k]);
    sums[k] += to_float(n.at[k]) * gradient;
    bits[k % kNeurons] |= __float_as_uint(gradient);
  }
  if constexpr (kRelu) {
    P out;
    for (int k = 0; k < P::size; ++k) {
      out.at[k] = g.at[k];
      if (to_float(n.at[k]) <= 0.0f) from_float(0.0f, out.at[k]);
    }
    store(static_cast<T*>(p.gradient_in) + place_n, out);
  }
}

// The last block of a tile adds up what all of them left, neuron by neuron in the same order each time.
__device__ inline void finish_tile(const ImportanceWork& w, int64_t first, ImportanceShared& shared) {
  const int column = thread() % w.tile, row = thread() / w.tile, rows = kThreads / w.tile;
  const int64_t neuron = first + column, neurons = w.params.neurons;
  const int64_t samples = w.chunks > 1 ? w.params.batch : w.slices;
  float sum = kNoGradient;
  if (neuron < neurons) {
    for (int64_t sample = row; sample < samples; sample += rows) {
      const float* partial = w.partial + sample * w.chunks * neurons + neuron;
      float signed_sum = kNoGradient;
      for (int64_t chunk = 0; chunk < w.chunks; ++chunk) signed_sum += partial[chunk * neurons];
      sum += magnitude(signed_sum);
    }
  }
  shared.sums[thread()] = sum;
  __syncthreads();
  if (row == 0 && neuron < neurons) {
    for (int other = 1; other < rows; ++other) sum += shared.sums[other * w.tile + column];
    static_cast<float*>(w.params.out)[neuron] = sum;
  }
  __syncthreads();
}

// What a block found for one neuron: the result if no other block works on it, else a part of it, into scratch.
__device__ __forceinline__ void leave(const ImportanceWork& w, int64_t neuron, int64_t row, float sum) {
  if (w.partial_sums() == 0) static_cast<float*>(w.params.out)[neuron] = sum;
  else w.partial[row * w.params.neurons + neuron] = sum;
}

template <bool kRelu, class P, class T>
__device__ __forceinline__ void rows_block(const ImportanceWork& w, int64_t first, int64_t slice, ImportanceShared& shared) {
  const ImportanceParams& p = w.params;
  const int lane = thread() % w.lanes, group = thread() / w.lanes, groups = kThreads / w.lanes;
  const int column = group % w.tile, row = group / w.tile, rows = groups / w.tile;
  const int64_t neuron = first + column;
  const int64_t end = end_of(w, slice);
  float absolute = 0.0f;
  unsigned bits[1] = {};
  // Every thread goes through the loop equally often, because a warp's threads meet in the sum over lanes.
  for (int64_t base = slice * w.slice; base < end; base += rows) {
    const int64_t item = base + row;
    float sums[P::size] = {};
    if (item < end && neuron < p.neurons) {
      const Item part = item_of(w, item);
      const int64_t n = part.sample * p.activation_batch_stride + neuron * p.activation_neuron_stride;
      const int64_t g = part.sample * p.gradient_batch_stride + neuron * p.gradient_neuron_stride;
      const auto visit = [&](int64_t at_n, int64_t at_g) { take<kRelu, P, T>(p, n + at_n, g + at_g, sums, bits); };
      if constexpr (P::size > 1) {  // dense
#pragma unroll 4
        for (int64_t at = part.from + lane * P::size; at < part.to; at += w.lanes * P::size) visit(at, at);
      } else {
        for_positions(p, part.from + lane, part.to, w.lanes, visit);
      }
    }
    float sum = sums[0];
    for (int k = 1; k < P::size; ++k) sum += sums[k];
    sum = sum_over_lanes(sum, w.lanes);
    if (w.chunks > 1) {
      const bool any = any_of_lanes(any_gradient(bits[0]), w.lanes);
      bits[0] = 0;
      if (lane == 0 && item < end && neuron < p.neurons) leave(w, neuron, item, marked(sum, any));
    } else {
      absolute += fabsf(sum);
    }
  }
  if (w.chunks > 1) return;
  const bool any = any_of_lanes(any_gradient(bits[0]), w.lanes);
  if (lane == 0) shared.sums[group] = marked(absolute, any);
  __syncthreads();
  if (thread() < w.tile && first + thread() < p.neurons) {
    float sum = kNoGradient;
    for (int other = 0; other < rows; ++other) sum += shared.sums[other * w.tile + thread()];
    leave(w, first + thread(), slice, sum);
  }
}

template <bool kRelu, class P, class T>
__device__ __forceinline__ void columns_block(const ImportanceWork& w, int64_t first, int64_t slice, ImportanceShared& shared) {
  const ImportanceParams& p = w.params;
  const int column = thread() % w.lanes * P::size, group = thread() / w.lanes, groups = kThreads / w.lanes;
  const int member = group % w.team, row = group / w.team, rows = groups / w.team;
  const int64_t neuron = first + column;
  const int64_t end = end_of(w, slice);
  float absolute[P::size] = {};  // where each thread has neurons of its own
  unsigned all_bits[P::size] = {};
  float sum_of_samples = kNoGradient;  // else
  for (int64_t base = slice * w.slice; base < end; base += rows) {
    const int64_t item = base + row;
    float sums[P::size] = {};
    unsigned bits[P::size] = {};
    if (item < end && neuron < p.neurons) {
      const Item part = item_of(w, item);
      const int64_t n = part.sample * p.activation_batch_stride + neuron;
      const int64_t g = part.sample * p.gradient_batch_stride + neuron;
      for_positions(p, part.from + member, part.to, w.team, [&](int64_t at_n, int64_t at_g) {
        take<kRelu, P, T>(p, n + at_n, g + at_g, sums, bits);
      });
    }
    if (w.team == 1) {
      for (int k = 0; k < P::size; ++k) {
        absolute[k] += fabsf(sums[k]);
        all_bits[k] |= bits[k];
      }
      continue;
    }
    for (int k = 0; k < P::size; ++k) {
      shared.sums[group * w.tile + column + k] = marked(sums[k], any_gradient(bits[k]));
    }
    __syncthreads();
    if (thread() < w.tile) {
      float sum = kNoGradient;
      for (int other = 0; other < groups; ++other) sum += shared.sums[other * w.tile + thread()];
      if (w.chunks == 1) sum_of_samples += magnitude(sum);
      else if (first + thread() < p.neurons) leave(w, first + thread(), item, sum);
    }
    __syncthreads();
  }
  if (w.chunks > 1) return;
  if (w.team > 1) {
    if (thread() < w.tile && first + thread() < p.neurons) leave(w, first + thread(), slice, sum_of_samples);
    return;
  }
  for (int k = 0; k < P::size; ++k) {
    shared.sums[group * w.tile + column + k] = marked(absolute[k], any_gradient(all_bits[k]));
  }
  __syncthreads();
  if (thread() < w.tile && first + thread() < p.neurons) {
    float sum = kNoGradient;
    for (int other = 0; other < groups; ++other) sum += shared.sums[other * w.tile + thread()];
    leave(w, first + thread(), slice, sum);
  }
}

// One block's part of eq. 2 for one layer.
template <Layout layout, bool kRelu, class P, class T>
__device__ __forceinline__ void importance_block(const ImportanceWork& w, int64_t block, ImportanceShared& shared) {
  const int64_t tile = block / w.slices, slice = block % w.slices, first = tile * w.tile;
  if constexpr (layout == Layout::rows) rows_block<kRelu, P, T>(w, first, slice, shared);
  else columns_block<kRelu, P, T>(w, first, slice, shared);
  if (w.partial_sums() == 0) return;
  if (arrives_last(w.arrived + tile, static_cast<unsigned>(w.slices), shared.last)) finish_tile(w, first, shared);
}

}  // namespace npc::cuda
