// Eq. 2: the loops over memory, compiled once per instruction set (kernels.cpp). importance.cpp
// divides the work.
//
// They read n and dL/dn once (dL/dn again where a sum is zero) and write N values. There are three
// ways through memory:
//
//   rows       Positions are contiguous. A row's products are summed in vector lanes. Then the
//              lanes of kLanes rows are reduced together, in three operations a row. Maps smaller
//              than a vector share one.
//   columns    Neurons are contiguous (fully connected layers, channels-last): one lane per neuron.
//   scattered  Anything else, element by element.
#pragma once

#include "../rules.h"
#include "kernels.h"
#include "simd.h"

namespace npc::cpu::NPC_ISA {

// Where positions lie: all dimensions but the innermost, which the loops run through themselves.
struct Positions {
  int64_t outer = 1, inner = 1;
  int64_t activation_stride = 1, gradient_stride = 1;  // of the innermost dimension
  const ImportanceParams* params;

  explicit Positions(const ImportanceParams& p) : params(&p) {
    if (p.position_dims == 0) return;
    const int last = p.position_dims - 1;
    inner = p.position_size[last];
    activation_stride = p.activation_position_stride[last];
    gradient_stride = p.gradient_position_stride[last];
    for (int dim = 0; dim < last; ++dim) outer *= p.position_size[dim];
  }

  // Calls visit(n, g) for every row of the innermost dimension, from the addresses of a neuron's
  // first position.
  template <class T, class Visit>
  void for_each_row(const T* n, const T* g, const Visit& visit) const {
    for (int64_t row = 0; row < outer; ++row) {
      int64_t rest = row, at_n = 0, at_g = 0;
      for (int dim = params->position_dims - 2; dim >= 0; --dim) {
        const int64_t at = rest % params->position_size[dim];
        rest /= params->position_size[dim];
        at_n += at * params->activation_position_stride[dim];
        at_g += at * params->gradient_position_stride[dim];
      }
      visit(n + at_n, g + at_g);
    }
  }
};

constexpr int64_t kColumns = 1024;  // their sums fit the first-level cache beside the data that streams through it

// Calls visit(n, g) for every sample of a share, with the addresses of its first neuron's first
// position.
template <class T, class Visit>
static inline void for_each_sample(const ImportanceParams& p, const Share& share, const Visit& visit) {
  for (int64_t b = share.batch_begin; b < share.batch_end; ++b) {
    visit(static_cast<const T*>(p.activation) + b * p.activation_batch_stride,
          static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride);
  }
}

template <class T>
static inline Vector<Real<T>> product(const T* n, const T* g) {
  return load(n) * load(g);
}

// The lanes' sums of n[i] * g[i] over a contiguous row.
template <class T>
static inline Vector<Real<T>> dot_lanes(const T* n, const T* g, int64_t count) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  if (count < L) return load_partial(n, count) * load_partial(g, count);
  Vector<R> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    for (int k = 0; k < 4; ++k) sums[k] += product(n + i + k * L, g + i + k * L);
  }
  for (; i + L <= count; i += L) sums[0] += product(n + i, g + i);
  if (i < count) {  // the last whole vector again, but only the lanes that are not counted yet
    const Mask<R> rest = last_lanes<R>(static_cast<int>(count - i));
    sums[1] += keep<R>(rest, product(n + count - L, g + count - L));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
static inline Vector<Real<T>> row_lanes(const Positions& positions, const T* n, const T* g) {
  Vector<Real<T>> lanes = {};
  positions.for_each_row(n, g,
                         [&](const T* row_n, const T* row_g) { lanes += dot_lanes(row_n, row_g, positions.inner); });
  return lanes;
}

// Contiguous rows of `width` positions, in blocks of kLanes rows. row_sums(n, g) returns the sums
// of one block.
template <class T, class RowSums>
static inline void blocks_of_rows(const ImportanceParams& p, int64_t width, const Share& share, Real<T>* out,
                                  const RowSums& row_sums) {
  using R = Real<T>;
  for_each_sample<T>(p, share, [&](const T* n, const T* g) {
    for (int64_t i = share.neuron_begin; i < share.neuron_end; i += kLanes<R>) {
      store(out + i, load(out + i) + absolute<R>(row_sums(n + i * width, g + i * width)));
    }
  });
}

// Rows whose width is a power of two and smaller than a vector: a vector holds several.
template <class T, int width>
static void packed_rows(const ImportanceParams& p, const Share& share, Real<T>* out) {
  using R = Real<T>;
  blocks_of_rows<T>(p, width, share, out, [](const T* n, const T* g) {
    Vector<R> lanes[width];
    for (int k = 0; k < width; ++k) lanes[k] = product(n + k * kLanes<R>, g + k * kLanes<R>);
    return reduce_rows<R, width>(lanes);
  });
}

// Rows of at least a vector each: as many whole vectors as fit, then one that ends with the row. Of
// that one, only the lanes that are not counted yet are kept.
template <class T>
static void long_rows(const ImportanceParams& p, int64_t width, const Share& share, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const int64_t whole = width / L * L;
  const Mask<R> rest = last_lanes<R>(static_cast<int>(width - whole));
  blocks_of_rows<T>(p, width, share, out, [&](const T* n, const T* g) {
    Vector<R> lanes[L];
    for (int k = 0; k < L; ++k, n += width, g += width) {
      Vector<R> sums = whole == width ? Vector<R>{} : keep<R>(rest, product(n + width - L, g + width - L));
      for (int64_t at = 0; at < whole; at += L) sums += product(n + at, g + at);
      lanes[k] = sums;
    }
    return reduce_rows<R, L>(lanes);
  });
}

// Rows shorter than a vector: each is read with its neighbours and masked.
template <class T>
static void short_rows(const ImportanceParams& p, int64_t width, const Share& share, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const Mask<R> row = first_lanes<R>(static_cast<int>(width));
  blocks_of_rows<T>(p, width, share, out, [&](const T* n, const T* g) {
    Vector<R> lanes[L];
    for (int k = 0; k < L; ++k, n += width, g += width) lanes[k] = keep<R>(row, product(n, g));
    return reduce_rows<R, L>(lanes);
  });
}

// Rows in any arrangement, one after the other.
template <class T>
static void single_rows(const ImportanceParams& p, const Share& share, Real<T>* out) {
  using R = Real<T>;
  const Positions positions(p);
  for_each_sample<T>(p, share, [&](const T* n, const T* g) {
    for (int64_t i = share.neuron_begin; i < share.neuron_end; ++i) {
      const R sum =
          sum_lanes<R>(row_lanes(positions, n + i * p.activation_neuron_stride, g + i * p.gradient_neuron_stride));
      out[i] += sum < 0 ? -sum : sum;
    }
  });
}

// Rows of a few vectors do not repay a reduction each, so contiguous ones go through in blocks of
// kLanes. The rows that fill no block, and all others, follow one by one.
template <class T>
static void rows(const ImportanceParams& p, const Share& share, Real<T>* out) {
  constexpr int L = kLanes<Real<T>>;
  constexpr int kLongestBlocked = 16 * L;
  const Positions positions(p);
  const int64_t width = positions.inner;
  const bool dense = positions.outer == 1 && p.activation_neuron_stride == width && p.gradient_neuron_stride == width;
  Share blocks = share, rest = share;
  blocks.neuron_end = share.neuron_begin;
  if (dense && width <= kLongestBlocked) {
    blocks.neuron_end += (share.neuron_end - share.neuron_begin) / L * L;
    if (width == 2 && L >= 2) {
      packed_rows<T, 2>(p, blocks, out);
    } else if (width == 4 && L >= 4) {
      packed_rows<T, 4>(p, blocks, out);
    } else if (width == 8 && L >= 8) {
      packed_rows<T, 8>(p, blocks, out);
    } else if (width == 16 && L >= 16) {
      packed_rows<T, 16>(p, blocks, out);
    } else if (width >= L) {
      long_rows<T>(p, width, blocks, out);
    } else {
      // The last row of a block reads L - width elements beyond itself, which must still belong to
      // its sample.
      int64_t& end = blocks.neuron_end;
      while (end > share.neuron_begin && (end - 1) * width + L > p.neurons * width) end -= L;
      short_rows<T>(p, width, blocks, out);
    }
  }
  rest.neuron_begin = blocks.neuron_end;
  single_rows<T>(p, rest, out);
}

// Columns [column, column + width), sample by sample and position by position as they lie in
// memory. Reading a row at a time and not a column at a time lets the processor fetch ahead. The
// sums of a sample stay in the first-level cache.
template <class T>
static void column_block(const ImportanceParams& p, const Positions& positions, const Share& share, int64_t column,
                         int64_t width, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const bool single_position = positions.outer * positions.inner == 1;
  R sums[kColumns];
  for_each_sample<T>(p, share, [&](const T* n, const T* g) {
    n += column, g += column;
    if (single_position) {
      for (int64_t i = 0; i < width; i += L) {
        store(out + column + i, load(out + column + i) + absolute<R>(product(n + i, g + i)));
      }
      return;
    }
    for (int64_t i = 0; i < width; i += L) store(sums + i, Vector<R>{});
    positions.for_each_row(n, g, [&](const T* at_n, const T* at_g) {
      for (int64_t at = 0; at < positions.inner; ++at) {
        for (int64_t i = 0; i < width; i += L) store(sums + i, load(sums + i) + product(at_n + i, at_g + i));
        at_n += positions.activation_stride, at_g += positions.gradient_stride;
      }
    });
    for (int64_t i = 0; i < width; i += L) {
      store(out + column + i, load(out + column + i) + absolute<R>(load(sums + i)));
    }
  });
}

template <class T>
static void scattered(const ImportanceParams& p, const Share& share, Real<T>* out) {
  using R = Real<T>;
  const Positions positions(p);
  for_each_sample<T>(p, share, [&](const T* n, const T* g) {
    for (int64_t i = share.neuron_begin; i < share.neuron_end; ++i) {
      R sum = 0;
      const auto add = [&](const T* row_n, const T* row_g) {
        for (int64_t at = 0; at < positions.inner; ++at) {
          sum += to_real(row_n[at * positions.activation_stride]) * to_real(row_g[at * positions.gradient_stride]);
        }
      };
      positions.for_each_row(n + i * p.activation_neuron_stride, g + i * p.gradient_neuron_stride, add);
      out[i] += sum < 0 ? -sum : sum;
    }
  });
}

template <class T>
static void columns(const ImportanceParams& p, const Share& share, Real<T>* out) {
  constexpr int L = kLanes<Real<T>>;
  const Positions positions(p);
  Share rest = share;
  rest.neuron_begin += (share.neuron_end - share.neuron_begin) / L * L;
  const int64_t begin = share.neuron_begin, end = rest.neuron_begin;
  // Where there is a single position, there are no sums to keep.
  const int64_t widest = positions.outer * positions.inner == 1 ? end - begin : kColumns;
  for (int64_t i = begin; i < end; i += widest) {
    column_block<T>(p, positions, share, i, end - i < widest ? end - i : widest, out);
  }
  scattered<T>(p, rest, out);
}

static inline bool is_zero(float value) { return value == 0; }
static inline bool is_zero(double value) { return value == 0; }
static inline bool is_zero(half_bits value) { return (value.bits & 0x7fffu) == 0; }
static inline bool is_zero(bfloat_bits value) { return (value.bits & 0x7fffu) == 0; }

// Whether a neuron's gradient is zero in all samples of the share.
template <class T>
static bool no_gradient(const ImportanceParams& p, const Positions& positions, const Share& share, int64_t neuron) {
  bool none = true;
  for_each_sample<T>(p, share, [&](const T* n, const T* g) {
    if (!none) return;
    positions.for_each_row(n, g + neuron * p.gradient_neuron_stride, [&](const T*, const T* row) {
      for (int64_t at = 0; at < positions.inner && none; ++at) none = is_zero(row[at * positions.gradient_stride]);
    });
  });
  return none;
}

template <class T>
static void importance(const ImportanceParams& p, const Share& share, void* untyped_out) {
  auto* out = static_cast<Real<T>*>(untyped_out);
  for (int64_t i = share.neuron_begin; i < share.neuron_end; ++i) out[i] = 0;
  const Positions positions(p);
  const bool adjacent_neurons = p.activation_neuron_stride == 1 && p.gradient_neuron_stride == 1;
  const bool adjacent_positions = positions.activation_stride == 1 && positions.gradient_stride == 1;
  const bool single_position = positions.outer == 1 && positions.inner == 1;
  if (adjacent_neurons && (single_position || !adjacent_positions)) {
    columns<T>(p, share, out);
  } else if (adjacent_positions && !single_position) {
    rows<T>(p, share, out);
  } else {
    scattered<T>(p, share, out);
  }
  // The gradients are read again only where the sum does not show whether there were any.
  for (int64_t i = share.neuron_begin; i < share.neuron_end; ++i) {
    if (out[i] == 0) out[i] = no_gradient<T>(p, positions, share, i) ? kNoGradient : 0;
  }
}

}  // namespace npc::cpu::NPC_ISA
