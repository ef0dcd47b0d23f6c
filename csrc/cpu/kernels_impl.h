// The inner loops, compiled once per instruction set by the kernels_<isa>.cpp that include this file.
//
// importance   reads n and dL/dn once (dL/dn again where a sum is zero) and writes N values. Three ways through memory:
//   rows       positions are contiguous: a row's products are summed in vector lanes; the lanes of kLanes rows are then
//              reduced together, three operations a row, and maps smaller than a vector share one.
//   columns    neurons are contiguous (fully connected layers, channels-last): one lane per neuron.
//   scattered  anything else, element by element.
// descend      reads value, gradient and momentum once, writes value and momentum once; frozen rows are not touched, but
//              where they are so short that rates are held by element, which writes them as they were. Of rows that
//              this step freezes the first moment is set to zero.
//              descend_anchored reads stiffness and anchor besides, and reads and writes the path integral.
//              descend_adam reads and writes two moments in place of the momentum.
//              descend_connections reads and writes an importance to each element besides.
#pragma once

#include <cmath>
#include <type_traits>

#include "../rules.h"
#include "kernels.h"
#include "simd.h"

namespace npc::cpu::NPC_ISA {

// ---------------------------------------------------------------------------------------------------- importance

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

  void offsets(int64_t index, int64_t& activation, int64_t& gradient) const {
    activation = gradient = 0;
    for (int dim = params->position_dims - 2; dim >= 0; --dim) {
      const int64_t at = index % params->position_size[dim];
      index /= params->position_size[dim];
      activation += at * params->activation_position_stride[dim];
      gradient += at * params->gradient_position_stride[dim];
    }
  }
};

constexpr int64_t kColumns = 1024;  // of which the sums fit the first cache beside what streams through it

template <class T> static inline Vector<Real<T>> product(const T* n, const T* g) { return load(n) * load(g); }

// The lanes' sums of n[i] * g[i] over a contiguous row.
template <class T> static inline Vector<Real<T>> dot_lanes(const T* n, const T* g, int64_t count) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  if (count < L) return load_partial(n, count) * load_partial(g, count);
  Vector<R> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    for (int k = 0; k < 4; ++k) sums[k] += product(n + i + k * L, g + i + k * L);
  }
  for (; i + L <= count; i += L) sums[0] += product(n + i, g + i);
  if (i < count) {  // the last whole vector again, only its lanes that were not counted yet
    const Mask<R> rest = last_lanes<R>(static_cast<int>(count - i));
    sums[1] += keep<R>(rest, product(n + count - L, g + count - L));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T> static inline Vector<Real<T>> row_lanes(const Positions& positions, const T* n, const T* g) {
  Vector<Real<T>> lanes = {};
  for (int64_t index = 0; index < positions.outer; ++index) {
    int64_t at_n, at_g;
    positions.offsets(index, at_n, at_g);
    lanes += dot_lanes(n + at_n, g + at_g, positions.inner);
  }
  return lanes;
}

// kLanes contiguous rows of `width` positions, width a power of two and smaller than a vector.
template <class T, int width> static inline Vector<Real<T>> packed_row_sums(const T* n, const T* g) {
  using R = Real<T>;
  Vector<R> lanes[width];
  for (int k = 0; k < width; ++k) lanes[k] = product(n + k * kLanes<R>, g + k * kLanes<R>);
  return reduce_rows<R, width>(lanes);
}

template <class T, int width>
static void packed_rows(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                        Real<T>* out) {
  constexpr int L = kLanes<Real<T>>;
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride + begin * width;
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride + begin * width;
    for (int64_t i = begin; i < end; i += L, n += L * width, g += L * width) {
      store(out + i, load(out + i) + absolute<Real<T>>(packed_row_sums<T, width>(n, g)));
    }
  }
}

// Contiguous rows of at least a vector each: as many whole vectors as fit, then one that ends with the row, of which
// only the lanes not counted yet are kept.
template <class T>
static void long_rows(const ImportanceParams& p, int64_t width, int64_t batch_begin, int64_t batch_end, int64_t begin,
                      int64_t end, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const int64_t whole = width / L * L;
  const Mask<R> rest = last_lanes<R>(static_cast<int>(width - whole));
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride + begin * width;
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride + begin * width;
    for (int64_t i = begin; i < end; i += L) {
      Vector<R> lanes[L];
      for (int k = 0; k < L; ++k, n += width, g += width) {
        Vector<R> sums = whole == width ? Vector<R>{} : keep<R>(rest, product(n + width - L, g + width - L));
        for (int64_t at = 0; at < whole; at += L) sums += product(n + at, g + at);
        lanes[k] = sums;
      }
      store(out + i, load(out + i) + absolute<R>(reduce_rows<R, L>(lanes)));
    }
  }
}

// Rows shorter than a vector: each is read with its neighbours and masked.
template <class T>
static void short_rows(const ImportanceParams& p, int64_t width, int64_t batch_begin, int64_t batch_end,
                       int64_t begin, int64_t end, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const Mask<R> row = first_lanes<R>(static_cast<int>(width));
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride + begin * width;
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride + begin * width;
    for (int64_t i = begin; i < end; i += L) {
      Vector<R> lanes[L];
      for (int k = 0; k < L; ++k, n += width, g += width) lanes[k] = keep<R>(row, product(n, g));
      store(out + i, load(out + i) + absolute<R>(reduce_rows<R, L>(lanes)));
    }
  }
}

// Rows in any arrangement, one after the other.
template <class T>
static void single_rows(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                        Real<T>* out) {
  using R = Real<T>;
  const Positions positions(p);
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride;
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride;
    for (int64_t i = begin; i < end; ++i) {
      const R sum = sum_lanes<R>(
          row_lanes(positions, n + i * p.activation_neuron_stride, g + i * p.gradient_neuron_stride));
      out[i] += sum < 0 ? -sum : sum;
    }
  }
}

// Contiguous samples whose rows are too few vectors long to repay a reduction each go through in blocks of kLanes
// rows; what is left over, and everything else, row by row.
template <class T>
static void rows(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                 Real<T>* out) {
  constexpr int L = kLanes<Real<T>>;
  constexpr int kLongestBlocked = 16 * L;
  const Positions positions(p);
  const int64_t width = positions.inner;
  const bool dense =
      positions.outer == 1 && p.activation_neuron_stride == width && p.gradient_neuron_stride == width;
  int64_t blocks_end = begin;
  if (dense && width <= kLongestBlocked) {
    blocks_end = begin + (end - begin) / L * L;
    if (width == 2 && L >= 2) {
      packed_rows<T, 2>(p, batch_begin, batch_end, begin, blocks_end, out);
    } else if (width == 4 && L >= 4) {
      packed_rows<T, 4>(p, batch_begin, batch_end, begin, blocks_end, out);
    } else if (width == 8 && L >= 8) {
      packed_rows<T, 8>(p, batch_begin, batch_end, begin, blocks_end, out);
    } else if (width == 16 && L >= 16) {
      packed_rows<T, 16>(p, batch_begin, batch_end, begin, blocks_end, out);
    } else if (width >= L) {
      long_rows<T>(p, width, batch_begin, batch_end, begin, blocks_end, out);
    } else {
      // The last row of a block reads L - width elements beyond itself, which must still belong to its sample.
      while (blocks_end > begin && (blocks_end - 1) * width + L > p.neurons * width) blocks_end -= L;
      short_rows<T>(p, width, batch_begin, batch_end, begin, blocks_end, out);
    }
  }
  single_rows<T>(p, batch_begin, batch_end, blocks_end, end, out);
}

// Columns [column, column + width), sample after sample and position after position, as they lie in memory: a row at a
// time and not a column at a time, so that the processor can fetch ahead. The sums of a sample stay in the first cache.
template <class T>
static void column_block(const ImportanceParams& p, const Positions& positions, int64_t batch_begin,
                         int64_t batch_end, int64_t column, int64_t width, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const bool single_position = positions.outer * positions.inner == 1;
  R sums[kColumns];
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride + column;
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride + column;
    if (single_position) {
      for (int64_t i = 0; i < width; i += L) {
        store(out + column + i, load(out + column + i) + absolute<R>(product(n + i, g + i)));
      }
      continue;
    }
    for (int64_t i = 0; i < width; i += L) store(sums + i, Vector<R>{});
    for (int64_t index = 0; index < positions.outer; ++index) {
      int64_t at_n, at_g;
      positions.offsets(index, at_n, at_g);
      for (int64_t at = 0; at < positions.inner; ++at) {
        const T* row_n = n + at_n + at * positions.activation_stride;
        const T* row_g = g + at_g + at * positions.gradient_stride;
        for (int64_t i = 0; i < width; i += L) store(sums + i, load(sums + i) + product(row_n + i, row_g + i));
      }
    }
    for (int64_t i = 0; i < width; i += L) {
      store(out + column + i, load(out + column + i) + absolute<R>(load(sums + i)));
    }
  }
}

template <class T>
static void scattered(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                      Real<T>* out) {
  using R = Real<T>;
  const Positions positions(p);
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    for (int64_t i = begin; i < end; ++i) {
      R sum = 0;
      for (int64_t index = 0; index < positions.outer; ++index) {
        int64_t at_n, at_g;
        positions.offsets(index, at_n, at_g);
        const T* n = static_cast<const T*>(p.activation) + b * p.activation_batch_stride +
                     i * p.activation_neuron_stride + at_n;
        const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride +
                     i * p.gradient_neuron_stride + at_g;
        for (int64_t at = 0; at < positions.inner; ++at) {
          sum += to_real(n[at * positions.activation_stride]) * to_real(g[at * positions.gradient_stride]);
        }
      }
      out[i] += sum < 0 ? -sum : sum;
    }
  }
}

template <class T>
static void columns(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                    Real<T>* out) {
  constexpr int L = kLanes<Real<T>>;
  const Positions positions(p);
  const int64_t whole = begin + (end - begin) / L * L;
  const int64_t widest = positions.outer * positions.inner == 1 ? whole - begin : kColumns;  // no sums to keep
  for (int64_t i = begin; i < whole; i += widest) {
    const int64_t width = whole - i < widest ? whole - i : widest;
    column_block<T>(p, positions, batch_begin, batch_end, i, width, out);
  }
  scattered<T>(p, batch_begin, batch_end, whole, end, out);
}

static inline bool is_zero(float value) { return value == 0; }
static inline bool is_zero(double value) { return value == 0; }
static inline bool is_zero(half_bits value) { return (value.bits & 0x7fffu) == 0; }
static inline bool is_zero(bfloat_bits value) { return (value.bits & 0x7fffu) == 0; }

// Whether a neuron's gradient is zero in all of these samples.
template <class T>
static bool no_gradient(const ImportanceParams& p, const Positions& positions, int64_t batch_begin, int64_t batch_end,
                        int64_t neuron) {
  for (int64_t b = batch_begin; b < batch_end; ++b) {
    const T* g = static_cast<const T*>(p.gradient) + b * p.gradient_batch_stride + neuron * p.gradient_neuron_stride;
    for (int64_t index = 0; index < positions.outer; ++index) {
      int64_t at_n, at_g;
      positions.offsets(index, at_n, at_g);
      for (int64_t at = 0; at < positions.inner; ++at) {
        if (!is_zero(g[at_g + at * positions.gradient_stride])) return false;
      }
    }
  }
  return true;
}

template <class T>
static void importance(const ImportanceParams& p, int64_t batch_begin, int64_t batch_end, int64_t begin, int64_t end,
                       void* untyped_out) {
  auto* out = static_cast<Real<T>*>(untyped_out);
  for (int64_t i = begin; i < end; ++i) out[i] = 0;
  const Positions positions(p);
  const bool adjacent_neurons = p.activation_neuron_stride == 1 && p.gradient_neuron_stride == 1;
  const bool adjacent_positions = positions.activation_stride == 1 && positions.gradient_stride == 1;
  const bool single_position = positions.outer == 1 && positions.inner == 1;
  if (adjacent_neurons && (single_position || !adjacent_positions)) {
    columns<T>(p, batch_begin, batch_end, begin, end, out);
  } else if (adjacent_positions && !single_position) {
    rows<T>(p, batch_begin, batch_end, begin, end, out);
  } else {
    scattered<T>(p, batch_begin, batch_end, begin, end, out);
  }
  // Gradients are looked at once more only where the sum leaves open whether there were any.
  for (int64_t i = begin; i < end; ++i) {
    if (out[i] == 0) out[i] = no_gradient<T>(p, positions, batch_begin, batch_end, i) ? kNoGradient : 0;
  }
}

// ------------------------------------------------------------------------------------------ importance to plasticity

static void plasticity(const LayerParams& layer, float* average, const float* measured, float* out, int64_t neurons,
                       float total, float active) {
  const auto alpha = static_cast<float>(layer.alpha), beta = static_cast<float>(layer.beta);
  const auto delta = static_cast<float>(layer.delta), one_minus_delta = static_cast<float>(1 - layer.delta);
  if (measured != nullptr && total > 0 && total <= __FLT_MAX__) {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = average[i];
      const float moved =
          moving_average(average[i], normalized_importance(measured[i], total, active), delta, one_minus_delta);
      average[i] = layer.active_only && received_no_gradient(measured[i]) ? average[i] : moved;
    }
  } else {
    for (int64_t i = 0; i < neurons; ++i) out[i] = average[i];
  }
  // `out` holds C before the step; loops of one kind each, which the compiler can run in vectors.
  if (layer.error_function) {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = plasticity_after(out[i], beta, plasticity_erf(average[i], alpha, beta));
    }
  } else {
    for (int64_t i = 0; i < neurons; ++i) {
      out[i] = plasticity_after(out[i], beta, plasticity_sigmoid(average[i], alpha, beta));
    }
  }
  if (!layer.active_only || measured == nullptr) return;
  for (int64_t i = 0; i < neurons; ++i) {
    if (received_no_gradient(measured[i])) out[i] = 0;
  }
}

// ----------------------------------------------------------------------------------------------------- the weights

constexpr int64_t kShortRun = 32;  // runs below this many elements get a rate per element instead of a loop per run
constexpr int64_t kTile = 256;

template <class T> struct Step {
  using R = Real<T>;
  R gradient_factor;  // 1 / grad_scale, negative to maximize
  R weight_decay, momentum;
};

// What a parameter asks for, known at compile time so that a plain step computes nothing else.
enum class Momentum { none, classic, nesterov };
template <Momentum momentum_, bool scaled_or_decayed> struct Options {
  static constexpr Momentum momentum = momentum_;
  static constexpr bool has_momentum = momentum_ != Momentum::none;
  static constexpr bool plain_gradient = !scaled_or_decayed;  // no weight decay, gradient factor 1
};

template <class O, class T>
static inline Vector<Real<T>> moved(const Step<T>& step, Vector<Real<T>> value, Vector<Real<T>> gradient,
                                    Vector<Real<T>> rate, Vector<Real<T>>& velocity) {
  Vector<Real<T>> d = gradient;
  if constexpr (!O::plain_gradient) d = gradient * step.gradient_factor + step.weight_decay * value;
  if constexpr (!O::has_momentum) {
    return value - rate * d;
  } else {
    velocity = step.momentum * velocity + d;
    return value - rate * (O::momentum == Momentum::nesterov ? d + step.momentum * velocity : velocity);
  }
}

// The mask's lanes of `result`, the others from `old`.
template <class R> static inline Vector<R> blend(Mask<R> mask, Vector<R> result, Vector<R> old) {
  return (Vector<R>)((Mask<R>)keep<R>(mask, result) | (Mask<R>)keep<R>(~mask, old));
}

// `count` elements that share one rate, of `room` that this thread owns. Where there is room, the last vector goes
// beyond the run and gives the elements there back as they were.
template <class O, class T>
static inline void descend_run(const Step<T>& step, T* value, const T* gradient, T* momentum, int64_t count, int64_t room,
                        Real<T> rate) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const Vector<R> rates = broadcast<R>(rate);
  Vector<R> velocity = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    for (int k = 0; k < 4; ++k) {
      const int64_t at = i + k * L;
      if constexpr (O::has_momentum) velocity = load(momentum + at);
      store(value + at, moved<O, T>(step, load(value + at), load(gradient + at), rates, velocity));
      if constexpr (O::has_momentum) store(momentum + at, velocity);
    }
  }
  for (; i + L <= count; i += L) {
    if constexpr (O::has_momentum) velocity = load(momentum + i);
    store(value + i,
          moved<O, T>(step, load(value + i), load(gradient + i), rates, velocity));
    if constexpr (O::has_momentum) store(momentum + i, velocity);
  }
  if (i == count) return;
  const int64_t rest = count - i;
  if (i + L <= room) {
    const Mask<R> mine = first_lanes<R>(static_cast<int>(rest));
    const Vector<R> old = load(value + i);
    Vector<R> old_velocity = {};
    if constexpr (O::has_momentum) velocity = old_velocity = load(momentum + i);
    store(value + i,
          blend<R>(mine, moved<O, T>(step, old, load(gradient + i), rates, velocity), old));
    if constexpr (O::has_momentum) store(momentum + i, blend<R>(mine, velocity, old_velocity));
    return;
  }
  if constexpr (O::has_momentum) velocity = load_partial(momentum + i, rest);
  const Vector<R> result = moved<O, T>(step, load_partial(value + i, rest),
                                                            load_partial(gradient + i, rest), rates, velocity);
  store_partial(value + i, result, rest);
  if constexpr (O::has_momentum) store_partial(momentum + i, velocity, rest);
}

// How values are stored, from the first `i` of a tile on: rounded to the nearest, or at random.
struct ToNearest {
  template <class T> void operator()(T* to, Vector<Real<T>> value, int64_t) const { store(to, value); }
};
struct AtRandom {
  uint32_t key;
  uint32_t first;  // the index of the tile's first element

  AtRandom(const ParameterParams& p, int64_t first_)
      : key(rounding_key(p.seed, *p.steps, static_cast<uint32_t>(first_ >> 32))), first(static_cast<uint32_t>(first_)) {}

  void operator()(bfloat_bits* to, Vector<float> value, int64_t i) const {
    Dwords index;
    for (int lane = 0; lane < kHalfLanes; ++lane) index[lane] = static_cast<uint32_t>(lane);
    index += first + static_cast<uint32_t>(i);
    write(to, narrow_bfloat_at_random(value, random_bits<Dwords>(key, index)));
  }
};

// The first `count` lanes.
template <class Put, class T>
static inline void put_some(const Put& put, T* to, Vector<Real<T>> value, int64_t i, int64_t count) {
  if (count >= kLanes<Real<T>>) {
    put(to, value, i);
    return;
  }
  T buffer[kLanes<Real<T>>];
  put(buffer, value, i);
  for (int64_t k = 0; k < count; ++k) to[k] = buffer[k];
}

// In place of an element's rate: it stays as it is (kClears: all but its first moment, which becomes 0).
constexpr float kStays = -2.0f;

// What happens to an element, by its neuron's plasticity: its rate, kStays or kClears.
template <class R> static inline R rate_of(float plasticity, R lr) {
  if (plasticity <= 0) return R(plasticity == 0 ? kStays : kClears);
  return plasticity * lr;
}

// `count` elements with a rate each, as of rate_of().
template <class O, class T, class Put>
static void descend_elements(const Step<T>& step, T* value, const T* gradient, T* momentum, int64_t count,
                             const Real<T>* rates, const Put& put) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t rest = count - i;
    const bool whole = rest >= L;
    const Vector<R> old = whole ? load(value + i) : load_partial(value + i, rest);
    const Vector<R> d = whole ? load(gradient + i) : load_partial(gradient + i, rest);
    const Vector<R> rate = load(rates + i);
    const Mask<R> stays = rate < R(0);
    Vector<R> velocity = {}, old_velocity = {};
    if constexpr (O::has_momentum) {
      old_velocity = velocity = whole ? load(momentum + i) : load_partial(momentum + i, rest);
    }
    Vector<R> result = moved<O, T>(step, old, d, rate, velocity);
    put_some(put, value + i, blend<R>(~stays, result, old), i, rest);
    if constexpr (O::has_momentum) {
      velocity = keep<R>(rate != R(kClears), blend<R>(~stays, velocity, old_velocity));
      if (whole) store(momentum + i, velocity);
      else store_partial(momentum + i, velocity, rest);
    }
  }
}

// Calls on_run(at, count, rate) for those runs of elements [begin, end) that move and clear(at, count) for those that
// lose their first moment, or, where runs are shorter than `short_run`, on_tile(at, count, rates) for tiles of at most
// kTile elements with a rate each, as of rate_of(), and kStays for a vector's worth beyond the last.
template <class R, class OnRun, class Clear, class OnTile>
static inline void for_each_rate(const ParameterParams& p, const float* plasticity, R lr, int64_t short_run,
                                 int64_t begin, int64_t end, const OnRun& on_run, const Clear& clear,
                                 const OnTile& on_tile) {
  if (plasticity == nullptr) {
    on_run(begin, end - begin, lr);
    return;
  }
  const int64_t runs_per_group = p.outer * p.middle;
  // Which neuron the run that holds element `begin` belongs to, advanced run by run.
  int64_t run = begin / p.run;
  int64_t row = run % p.middle, group_base = run / runs_per_group * p.middle, left_in_group =
      runs_per_group - run % runs_per_group;
  const auto next_run = [&] {
    if (++row == p.middle) row = 0;
    if (--left_in_group == 0) {
      left_in_group = runs_per_group;
      group_base += p.middle;
    }
  };
  int64_t left_in_run = p.run - begin % p.run;
  if (p.run >= short_run) {
    // Neighbours with one rate, as most have it while little is important, are one run.
    const auto rate = [&] { return rate_of<R>(plasticity[group_base + row], lr); };
    for (int64_t at = begin; at < end;) {
      const R own = rate();
      int64_t to = at;
      do {
        to = left_in_run < end - to ? to + left_in_run : end;
        left_in_run = p.run;
        if (to < end) next_run();
      } while (to < end && rate() == own);
      if (own >= 0) on_run(at, to - at, own);
      if (own == R(kClears)) clear(at, to - at);
      at = to;
    }
    return;
  }
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    R rates[kTile + kLanes<R>];
    for (int64_t i = 0; i < count;) {
      const R rate = rate_of<R>(plasticity[group_base + row], lr);
      const int64_t length = left_in_run < count - i ? left_in_run : count - i;
      for (int64_t k = 0; k < length; ++k) rates[i + k] = rate;
      i += length;
      left_in_run -= length;
      if (left_in_run == 0) {
        left_in_run = p.run;
        next_run();
      }
    }
    for (int k = 0; k < kLanes<R>; ++k) rates[count + k] = R(kStays);
    on_tile(at, count, rates);
  }
}

template <class T> static inline void set_to_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

template <class R> static inline R largest_rate(const ParameterParams& p) {
  return static_cast<R>(p.lr_address == nullptr ? p.lr : *p.lr_address);
}

template <class O, class T>
static void descend_with(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                         int64_t end) {
  using R = Real<T>;
  T* value = static_cast<T*>(p.value);
  const T* gradient = static_cast<const T*>(p.gradient);
  T* momentum = static_cast<T*>(p.momentum);
  const Step<T> step{static_cast<R>(gradient_factor), static_cast<R>(p.weight_decay),
                     static_cast<R>(p.momentum_factor)};
  const auto momentum_at = [&](int64_t at) { return O::has_momentum ? momentum + at : nullptr; };
  const auto on_run = [&](int64_t at, int64_t count, R rate) {
    descend_run<O, T>(step, value + at, gradient + at, momentum_at(at), count, end - at, rate);
  };
  const auto clear = [&](int64_t at, int64_t count) {
    if constexpr (O::has_momentum) set_to_zero(momentum + at, count);
  };
  const auto on_tile = [&](int64_t at, int64_t count, const R* rates) {
    descend_elements<O, T>(step, value + at, gradient + at, momentum_at(at), count, rates, ToNearest{});
  };
  for_each_rate(p, plasticity, largest_rate<R>(p), kShortRun, begin, end, on_run, clear, on_tile);
}

// The same with values rounded at random, tile by tile.
template <class O>
static void descend_at_random(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                              int64_t end) {
  auto* value = static_cast<bfloat_bits*>(p.value);
  const auto* gradient = static_cast<const bfloat_bits*>(p.gradient);
  auto* momentum = static_cast<bfloat_bits*>(p.momentum);
  const Step<bfloat_bits> step{static_cast<float>(gradient_factor), static_cast<float>(p.weight_decay),
                               static_cast<float>(p.momentum_factor)};
  const auto on_tile = [&](int64_t at, int64_t count, const float* rates) {
    descend_elements<O, bfloat_bits>(step, value + at, gradient + at, O::has_momentum ? momentum + at : nullptr, count,
                                     rates, AtRandom(p, at));
  };
  const auto on_run = [&](int64_t at, int64_t count, float rate) {
    float rates[kTile + kLanes<float>];
    for (float& one : rates) one = rate;
    for (int64_t i = 0; i < count; i += kTile) on_tile(at + i, count - i < kTile ? count - i : kTile, rates);
  };
  const auto clear = [&](int64_t at, int64_t count) {
    if constexpr (O::has_momentum) set_to_zero(momentum + at, count);
  };
  for_each_rate(p, plasticity, largest_rate<float>(p), kTile, begin, end, on_run, clear, on_tile);
}

template <class O, class T>
static void descend_rounded(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                            int64_t end) {
  if constexpr (std::is_same_v<T, bfloat_bits>) {
    if (p.stochastic_rounding) {
      descend_at_random<O>(p, plasticity, gradient_factor, begin, end);
      return;
    }
  }
  descend_with<O, T>(p, plasticity, gradient_factor, begin, end);
}

template <class T, Momentum momentum>
static void descend_with_momentum(const ParameterParams& p, const float* plasticity, double gradient_factor,
                                  int64_t begin, int64_t end) {
  if (p.weight_decay == 0 && gradient_factor == 1) {
    descend_rounded<Options<momentum, false>, T>(p, plasticity, gradient_factor, begin, end);
  } else {
    descend_rounded<Options<momentum, true>, T>(p, plasticity, gradient_factor, begin, end);
  }
}

template <class T>
static void descend(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                    int64_t end) {
  if (p.momentum == nullptr) {
    descend_with_momentum<T, Momentum::none>(p, plasticity, gradient_factor, begin, end);
  } else if (p.nesterov) {
    descend_with_momentum<T, Momentum::nesterov>(p, plasticity, gradient_factor, begin, end);
  } else {
    descend_with_momentum<T, Momentum::classic>(p, plasticity, gradient_factor, begin, end);
  }
}

// ------------------------------------------------------------------------------------------------------------- Adam

template <class T> struct AdamStep {
  using R = Real<T>;
  R gradient_factor, weight_decay, one_minus_first_decay, second_decay, one_minus_second_decay;
  R per_first_bias, per_root_of_second_bias, epsilon;

  AdamStep(const ParameterParams& p, double factor)
      : gradient_factor(static_cast<R>(factor)), weight_decay(static_cast<R>(p.weight_decay)),
        one_minus_first_decay(static_cast<R>(1 - p.first_decay)), second_decay(static_cast<R>(p.second_decay)),
        one_minus_second_decay(static_cast<R>(1 - p.second_decay)),
        per_first_bias(static_cast<R>(1 / bias(p.first_decay, p))),
        per_root_of_second_bias(static_cast<R>(1 / std::sqrt(bias(p.second_decay, p)))),
        epsilon(static_cast<R>(p.epsilon)) {}

  static double bias(double decay, const ParameterParams& p) {
    return bias_correction<double>(std::log(decay), double{*p.steps} + 1);
  }
};

template <class T>
static inline Vector<Real<T>> adam_moved(const AdamStep<T>& step, Vector<Real<T>> value, Vector<Real<T>> gradient,
                                         Vector<Real<T>> rate, Vector<Real<T>>& first, Vector<Real<T>>& second) {
  using R = Real<T>;
  const Vector<R> d = gradient * step.gradient_factor;
  first += step.one_minus_first_decay * (d - first);
  second = step.second_decay * second + step.one_minus_second_decay * d * d;
  const Vector<R> direction = adam_direction<Vector<R>, R>(first, square_root<R>(second), step.per_first_bias,
                                                           step.per_root_of_second_bias, step.epsilon);
  return value - rate * (direction + step.weight_decay * value);
}

// `count` elements; rate_at(i) are the rates of those from i on, as of rate_of().
template <class T, class RateAt, class Put>
static inline void adam_elements(const AdamStep<T>& step, T* value, const T* gradient, Real<T>* first, Real<T>* second,
                                 int64_t count, const RateAt& rate_at, const Put& put) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  const auto move = [&](int64_t i, auto read, int64_t rest) {
    const Vector<R> rate = rate_at(i), old = read(value + i), old_first = read(first + i),
                    old_second = read(second + i);
    const Mask<R> moves = rate >= R(0);
    Vector<R> new_first = old_first, new_second = old_second;
    const Vector<R> result = adam_moved<T>(step, old, read(gradient + i), rate, new_first, new_second);
    put_some(put, value + i, blend<R>(moves, result, old), i, rest);
    new_first = keep<R>(rate != R(kClears), blend<R>(moves, new_first, old_first));
    put_some(ToNearest{}, first + i, new_first, i, rest);
    put_some(ToNearest{}, second + i, blend<R>(moves, new_second, old_second), i, rest);
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) move(i, [](const auto* from) { return load(from); }, L);
  if (i < count) move(i, [&](const auto* from) { return load_partial(from, count - i); }, count - i);
}

template <class T, class PutFrom>
static inline void descend_adam_with(const ParameterParams& p, const float* plasticity, double gradient_factor,
                                     int64_t begin, int64_t end, const PutFrom& put_from) {
  using R = Real<T>;
  T* value = static_cast<T*>(p.value);
  const T* gradient = static_cast<const T*>(p.gradient);
  R* first = static_cast<R*>(p.first_moment);
  R* second = static_cast<R*>(p.second_moment);
  const AdamStep<T> step(p, gradient_factor);
  const auto move = [&](int64_t at, int64_t count, const auto& rate_at) {
    adam_elements<T>(step, value + at, gradient + at, first + at, second + at, count, rate_at, put_from(at));
  };
  const auto on_run = [&](int64_t at, int64_t count, R rate) {
    const Vector<R> rates = broadcast<R>(rate);
    move(at, count, [&](int64_t) { return rates; });
  };
  const auto on_tile = [&](int64_t at, int64_t count, const R* rates) {
    move(at, count, [&](int64_t i) { return load(rates + i); });
  };
  const auto clear = [&](int64_t at, int64_t count) { set_to_zero(first + at, count); };
  for_each_rate(p, plasticity, largest_rate<R>(p), kTile, begin, end, on_run, clear, on_tile);
}

template <class T>
static void descend_adam(const ParameterParams& p, const float* plasticity, double gradient_factor, int64_t begin,
                         int64_t end) {
  if constexpr (std::is_same_v<T, bfloat_bits>) {
    if (p.stochastic_rounding) {
      descend_adam_with<T>(p, plasticity, gradient_factor, begin, end, [&](int64_t at) { return AtRandom(p, at); });
      return;
    }
  }
  descend_adam_with<T>(p, plasticity, gradient_factor, begin, end, [](int64_t) { return ToNearest{}; });
}

// -------------------------------------------------------------------------------- weights with an anchor: EWC, MAS, SI

enum class Pull { none, is_explicit, implicit };

template <bool has_momentum, Pull kind, bool has_path, class T>
static void descend_anchored_with(const ParameterParams& p, double gradient_factor, int64_t begin, int64_t end) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  T* values = static_cast<T*>(p.value);
  const T* gradients = static_cast<const T*>(p.gradient);
  T* momentum = static_cast<T*>(p.momentum);
  const R* stiffness = static_cast<const R*>(p.stiffness);
  const R* anchor = static_cast<const R*>(p.anchor);
  R* path = static_cast<R*>(p.path);
  const R factor = static_cast<R>(gradient_factor), weight_decay = static_cast<R>(p.weight_decay);
  const R momentum_factor = static_cast<R>(p.momentum_factor);
  const R lr = largest_rate<R>(p);
  const double pull = anchor_pull(p.strength, p.momentum_factor, p.implicit);
  const Vector<R> explicit_pull = broadcast<R>(static_cast<R>(pull));
  const Vector<R> compliance = broadcast<R>(static_cast<R>(1 / (lr * pull)));
  const bool nesterov = p.nesterov;
  constexpr bool has_anchor = kind != Pull::none, implicit = kind == Pull::implicit;
  const auto move = [&](int64_t at, auto read, auto write) {
    const Vector<R> value = read(values + at);
    const Vector<R> loss_gradient = read(gradients + at) * factor;
    Vector<R> d = loss_gradient + weight_decay * value, stiff = {}, target = {};
    if constexpr (has_anchor) {
      stiff = read(stiffness + at), target = read(anchor + at);
      if (!implicit) d += anchor_gradient<Vector<R>>(value, target, stiff, explicit_pull);
    }
    if constexpr (has_momentum) {
      const Vector<R> velocity = momentum_factor * read(momentum + at) + d;
      write(momentum + at, velocity);
      d = nesterov ? d + momentum_factor * velocity : velocity;
    }
    Vector<R> result = value - lr * d;
    if constexpr (has_anchor) {
      if (implicit) result = towards_anchor<Vector<R>>(result, target, stiff, compliance);
    }
    write(values + at, result);
    // The movement is that of the value as it is stored, rounded to its type.
    if constexpr (has_path) write(path + at, read(path + at) - loss_gradient * (read(values + at) - value));
  };
  int64_t at = begin;
  const auto read = [](const auto* from) { return load(from); };
  const auto write = [](auto* to, Vector<R> vector) { store(to, vector); };
  for (; at + 4 * L <= end; at += 4 * L) {
    for (int k = 0; k < 4; ++k) move(at + k * L, read, write);
  }
  for (; at + L <= end; at += L) move(at, read, write);
  if (at == end) return;
  const int64_t rest = end - at;
  move(at, [rest](const auto* from) { return load_partial(from, rest); },
       [rest](auto* to, Vector<R> vector) { store_partial(to, vector, rest); });
}

template <bool has_momentum, Pull kind, class T>
static void descend_anchored_with_pull(const ParameterParams& p, double gradient_factor, int64_t begin, int64_t end) {
  if (p.path != nullptr) descend_anchored_with<has_momentum, kind, true, T>(p, gradient_factor, begin, end);
  else descend_anchored_with<has_momentum, kind, false, T>(p, gradient_factor, begin, end);
}

template <bool has_momentum, class T>
static void descend_anchored_with_momentum(const ParameterParams& p, double gradient_factor, int64_t begin,
                                           int64_t end) {
  if (p.stiffness == nullptr) {
    descend_anchored_with_pull<has_momentum, Pull::none, T>(p, gradient_factor, begin, end);
  } else if (p.implicit) {
    descend_anchored_with_pull<has_momentum, Pull::implicit, T>(p, gradient_factor, begin, end);
  } else {
    descend_anchored_with_pull<has_momentum, Pull::is_explicit, T>(p, gradient_factor, begin, end);
  }
}

template <class T>
static void descend_anchored(const ParameterParams& p, double gradient_factor, int64_t begin, int64_t end) {
  if (p.stiffness == nullptr && p.path == nullptr) {
    descend<T>(p, nullptr, gradient_factor, begin, end);
  } else if (p.momentum != nullptr) {
    descend_anchored_with_momentum<true, T>(p, gradient_factor, begin, end);
  } else {
    descend_anchored_with_momentum<false, T>(p, gradient_factor, begin, end);
  }
}

// ------------------------------------------------------------------------------------- a rate to every connection: CPC

// |value * gradient|, and kNoGradient where the gradient is zero.
template <class R> static inline Vector<R> connection_importance(Vector<R> value, Vector<R> gradient) {
  return (Vector<R>)((Mask<R>)absolute<R>(value * gradient) |
                     (Mask<R>)keep<R>(gradient == R(0), broadcast_bits<R>(R(kNoGradient))));
}

// The same of `count` elements, at most kTile, into out; there is none of what fills its last vector.
template <class T>
static inline void connection_importance(const T* value, const T* gradient, int64_t count, Real<T>* out) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, connection_importance<R>(load(value + i), load(gradient + i)));
  if (i == count) return;
  store(out + i, connection_importance<R>(load_partial(value + i, count - i), load_partial(gradient + i, count - i)));
}

template <class T>
static ConnectionTotal measure_connections(const ParameterParams& p, int64_t begin, int64_t end) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  R importance[kTile + L];
  ConnectionTotal total = {0, 0};
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    connection_importance(static_cast<const T*>(p.value) + at, static_cast<const T*>(p.gradient) + at, count,
                          importance);
    Vector<R> sum = {};
    Mask<R> inactive = {};  // each lane counts down
    int64_t i = 0;
    for (; i < count; i += L) {  // lanes beyond the last element received no gradient
      const Vector<R> lanes = load(importance + i);
      sum += lanes;
      inactive += (Mask<R>)lanes == (Mask<R>)broadcast_bits<R>(R(kNoGradient));
    }
    int64_t zeros = 0;
    for (int lane = 0; lane < L; ++lane) zeros -= inactive[lane];
    total.sum += sum_lanes<R>(sum);
    total.active += i - zeros;
  }
  return total;
}

template <class O, class T>
static void descend_connections_with(const ParameterParams& p, const LayerParams& layer, float total,
                                     float connections, double gradient_factor, int64_t begin, int64_t end) {
  using R = Real<T>;
  constexpr int L = kLanes<R>;
  T* value = static_cast<T*>(p.value);
  const T* gradient = static_cast<const T*>(p.gradient);
  T* momentum = static_cast<T*>(p.momentum);
  const Step<T> step{static_cast<R>(gradient_factor), static_cast<R>(p.weight_decay),
                     static_cast<R>(p.momentum_factor)};
  const R lr = largest_rate<R>(p);
  R measured[kTile + L], rates[kTile + L];
  float as_float[kTile], share[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = end - at < kTile ? end - at : kTile;
    connection_importance(value + at, gradient + at, count, measured);
    for (int64_t i = 0; i < count; ++i) as_float[i] = static_cast<float>(measured[i]);
    plasticity(layer, p.importance + at, as_float, share, count, total, connections);
    for (int64_t i = 0; i < count; ++i) rates[i] = rate_of<R>(share[i], lr);
    for (int k = 0; k < L; ++k) rates[count + k] = R(kStays);
    descend_elements<O, T>(step, value + at, gradient + at, O::has_momentum ? momentum + at : nullptr, count, rates,
                           ToNearest{});
  }
}

template <class T>
static void descend_connections(const ParameterParams& p, const LayerParams& layer, float total, float connections,
                                double gradient_factor, int64_t begin, int64_t end) {
  const auto run = p.momentum == nullptr ? descend_connections_with<Options<Momentum::none, true>, T>
                   : p.nesterov          ? descend_connections_with<Options<Momentum::nesterov, true>, T>
                                         : descend_connections_with<Options<Momentum::classic, true>, T>;
  run(p, layer, total, connections, gradient_factor, begin, end);
}

static constexpr Kernels table(const char* isa) {
  return Kernels{
      isa,
      {importance<float>, importance<double>, importance<half_bits>, importance<bfloat_bits>},
      plasticity,
      {descend<float>, descend<double>, descend<half_bits>, descend<bfloat_bits>},
      {descend_adam<float>, descend_adam<double>, descend_adam<half_bits>, descend_adam<bfloat_bits>},
      {descend_anchored<float>, descend_anchored<double>, descend_anchored<half_bits>, descend_anchored<bfloat_bits>},
      {measure_connections<float>, measure_connections<double>, measure_connections<half_bits>,
       measure_connections<bfloat_bits>},
      {descend_connections<float>, descend_connections<double>, descend_connections<half_bits>,
       descend_connections<bfloat_bits>},
  };
}

}  // namespace npc::cpu::NPC_ISA
