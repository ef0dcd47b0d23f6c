// Vectors of kVectorBytes, with GCC's and Clang's vector extension: one source for every
// instruction set. Each set has these functions in a namespace of its name, NPC_ISA, so that the
// linker merges none of them with those of another set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace npc::cpu::NPC_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct half_bits {
  uint16_t bits;
};
struct bfloat_bits {
  uint16_t bits;
};

// The type in which elements of T are computed.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class R>
struct VectorOf {
  using Int = std::conditional_t<sizeof(R) == sizeof(int64_t), int64_t, int32_t>;
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(R));
  typedef R type __attribute__((vector_size(kVectorBytes)));
  typedef Int mask __attribute__((vector_size(kVectorBytes)));
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
using Mask = typename VectorOf<R>::mask;  // lanes of all ones or all zeros
template <class R>
constexpr int kLanes = VectorOf<R>::lanes;

constexpr int kHalfLanes = kLanes<float>;
typedef uint16_t Words __attribute__((vector_size(kHalfLanes * 2)));
typedef uint32_t Dwords __attribute__((vector_size(kVectorBytes)));

template <class V>
static inline V read(const void* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}
template <class V>
static inline void write(void* target, V value) {
  __builtin_memcpy(target, &value, sizeof(V));
}

static inline Dwords select(Dwords condition, Dwords yes, Dwords no) { return (condition & yes) | (~condition & no); }

static inline Vector<float> widen_half(Words bits) {
#if defined(__AVX512F__)
  // The unmasked intrinsics start from an uninitialized register, and GCC 12 warns about that.
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  const Dwords half = __builtin_convertvector(bits, Dwords);
  const Dwords magnitude = (half & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals.
  Dwords result = (Dwords)((Vector<float>)magnitude * 0x1p112f);
  result |= (Dwords)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vector<float>)(result | ((half & 0x8000u) << 16));
#endif
}

static inline Words narrow_half(Vector<float> value) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Words)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Dwords bits = (Dwords)value;
  const Dwords sign = bits & 0x80000000u;
  const Dwords magnitude = bits ^ sign;
  const Dwords special = select((Dwords)(magnitude > 0x7f800000u), Dwords{} + 0x7e00u, Dwords{} + 0x7c00u);
  // Adding 0.5 lets the adder round a subnormal result; its bits then hold that result.
  const Dwords subnormal = (Dwords)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
  const Dwords normal = (magnitude - 0x37fff001u + ((magnitude >> 13) & 1u)) >> 13;
  Dwords half = select((Dwords)(magnitude < 0x38800000u), subnormal, normal);
  half = select((Dwords)(magnitude >= 0x47800000u), special, half);
  return __builtin_convertvector(half | (sign >> 16), Words);
#endif
}

static inline Vector<float> widen_bfloat(Words bits) {
  return (Vector<float>)(__builtin_convertvector(bits, Dwords) << 16);
}

static inline Words narrow_bfloat(Vector<float> value) {
  const Dwords bits = (Dwords)value;
  const Dwords rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Dwords is_nan = (Dwords)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(select(is_nan, Dwords{} + 0x7fc0u, rounded), Words);
}

// Rounds the magnitude up with the probability that the cut-off bits give. Infinities and NaN (all
// exponent bits set) are kept.
static inline Words narrow_bfloat_stochastically(Vector<float> value, Dwords random) {
  const Dwords bits = (Dwords)value;
  const Dwords special = (Dwords)((bits & 0x7f800000u) == 0x7f800000u);
  const Words rounded = __builtin_convertvector((bits + (random & 0xffffu)) >> 16, Words);
  const Words whole = __builtin_convertvector(special, Words);
  return (whole & narrow_bfloat(value)) | (~whole & rounded);
}

static inline Vector<float> load(const float* source) { return read<Vector<float>>(source); }
static inline Vector<double> load(const double* source) { return read<Vector<double>>(source); }
static inline Vector<float> load(const half_bits* source) { return widen_half(read<Words>(source)); }
static inline Vector<float> load(const bfloat_bits* source) { return widen_bfloat(read<Words>(source)); }

static inline void store(float* target, Vector<float> value) { write(target, value); }
static inline void store(double* target, Vector<double> value) { write(target, value); }
static inline void store(half_bits* target, Vector<float> value) { write(target, narrow_half(value)); }
static inline void store(bfloat_bits* target, Vector<float> value) { write(target, narrow_bfloat(value)); }

// The first `count` elements; the other lanes are zero. Reads nothing beyond these elements.
template <class T>
static inline Vector<Real<T>> load_partial(const T* source, int64_t count) {
  T buffer[kLanes<Real<T>>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
}
template <class T>
static inline void store_partial(T* target, Vector<Real<T>> value, int64_t count) {
  T buffer[kLanes<Real<T>>];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

template <class R>
static inline Vector<R> broadcast(R value) {
  return Vector<R>{} + value;
}

// The same, but a zero keeps its sign.
template <class R>
static inline Vector<R> broadcast_bits(R value) {
  Vector<R> lanes;
  for (int i = 0; i < kLanes<R>; ++i) lanes[i] = value;
  return lanes;
}

template <class R>
static inline Vector<R> absolute(Vector<R> value) {
  constexpr auto sign = typename VectorOf<R>::Int(typename VectorOf<R>::Int(1) << (sizeof(R) * 8 - 1));
  return (Vector<R>)((Mask<R>)value & ~(Mask<R>{} + sign));
}

// The value in the mask's lanes of ones, and zero in the others, even where the value is NaN.
template <class R>
static inline Vector<R> keep(Mask<R> mask, Vector<R> value) {
  return (Vector<R>)((Mask<R>)value & mask);
}

// Ones in the first `count` lanes, and ones in the last `count` lanes.
template <class R>
static inline Mask<R> first_lanes(int count) {
  using Int = typename VectorOf<R>::Int;
  Mask<R> lane;
  for (int i = 0; i < kLanes<R>; ++i) lane[i] = static_cast<Int>(i);
  return lane < static_cast<Int>(count);
}
template <class R>
static inline Mask<R> last_lanes(int count) {
  return ~first_lanes<R>(kLanes<R> - count);
}

template <class V, int... I>
static inline V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{(2 * I)...}) + __builtin_shuffle(a, b, Index{(2 * I + 1)...});
#endif
}
// {a0 + a1, a2 + a3, ..., b0 + b1, ...}
template <class R>
static inline Vector<R> add_pairs(Vector<R> a, Vector<R> b) {
  return add_pairs(a, b, std::make_integer_sequence<int, kLanes<R>>{});
}

// The sums of kLanes rows that fill `vectors` vectors in order, so that each row has `vectors`
// lanes.
template <class R, int vectors>
static inline Vector<R> reduce_rows(const Vector<R>* lanes) {
  if constexpr (vectors == 1) {
    return lanes[0];
  } else {
    Vector<R> half[vectors / 2];
    for (int i = 0; i < vectors / 2; ++i) half[i] = add_pairs<R>(lanes[2 * i], lanes[2 * i + 1]);
    return reduce_rows<R, vectors / 2>(half);
  }
}

template <class R>
static inline Vector<R> square_root(Vector<R> value) {
  R lanes[kLanes<R>];
  write(lanes, value);
  for (int i = 0; i < kLanes<R>; ++i) lanes[i] = std::sqrt(lanes[i]);
  return read<Vector<R>>(lanes);
}

template <class R>
static inline R sum_lanes(Vector<R> value) {
  R lanes[kLanes<R>];
  write(lanes, value);
  for (int width = kLanes<R> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

static inline float to_real(float value) { return value; }
static inline double to_real(double value) { return value; }
static inline float to_real(half_bits value) {
  const Words bits = Words{} + value.bits;
  return widen_half(bits)[0];
}
static inline float to_real(bfloat_bits value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

}  // namespace npc::cpu::NPC_ISA
