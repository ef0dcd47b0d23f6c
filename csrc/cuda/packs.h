// How numbers move between memory and registers: in packs of 16 bytes, with several loads in flight
// at a time.
//
// A multiprocessor reaches the memory's bandwidth only if enough loads are outstanding
// (docs/development/machine-code.md), so a thread loads all packs of a batch before it uses the first. The accesses
// are written in PTX (runtime.h), because the compiler splits copies of structs into words and
// halves. test_machine_code.py checks the compiled kernels.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace npc::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void from_float(float value, float& out) { out = value; }
__device__ __forceinline__ void from_float(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// Stochastic rounding: rounds the magnitude up with the probability that the cut-off bits give.
// Infinities and NaN (all exponent bits set) are kept.
__device__ __forceinline__ void from_float_stochastically(float value, uint32_t random, __nv_bfloat16& out) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return from_float(value, out);
  out = __ushort_as_bfloat16(static_cast<unsigned short>((bits + (random & 0xffffu)) >> 16));
}

constexpr int kPackBytes = 16;

// The numbers that one access moves.
template <class T_>
struct alignas(kPackBytes) Pack {
  using T = T_;
  static constexpr int size = kPackBytes / sizeof(T);
  T at[size];
};

// One number, where 16-byte accesses are not allowed.
template <class T_>
struct Single {
  using T = T_;
  static constexpr int size = 1;
  T at[1];
};

// As many floats as P has numbers, in one pack or two.
template <class P>
struct alignas(P::size == 1 ? sizeof(float) : kPackBytes) Floats {
  using T = float;
  static constexpr int size = P::size;
  float at[size];
};

// The numbers of a pack, exactly.
template <class P>
__device__ __forceinline__ Floats<P> floats_of(const P& pack) {
  Floats<P> floats;
  if constexpr (P::size > 1 && std::is_same_v<typename P::T, __nv_bfloat16>) {
    // The bits are the upper half of a float's. The compiler takes more instructions to convert one by one.
    Words words;
    memcpy(&words, &pack, sizeof(P));
    for (int word = 0; word < P::size / 2; ++word) {
      floats.at[2 * word] = __uint_as_float(words.at[word] << 16);
      floats.at[2 * word + 1] = __uint_as_float(words.at[word] & 0xffff0000u);
    }
  } else {
    for (int i = 0; i < P::size; ++i) floats.at[i] = to_float(pack.at[i]);
  }
  return floats;
}

// Loads the pack that begins at `from`, if it is wanted. Otherwise nothing is read and `pack` keeps
// its bits.
template <class P>
__device__ __forceinline__ void load_if(bool wanted, const typename P::T* from, P& pack) {
  if constexpr (P::size == 1) {
    if (wanted) pack.at[0] = *from;
  } else {
    constexpr int words = sizeof(P) / sizeof(Words);
    Words bits[words];
    memcpy(bits, &pack, sizeof(P));
    for (int word = 0; word < words; ++word) {
      load_16_bytes_if(wanted, reinterpret_cast<const char*>(from) + word * sizeof(Words), bits[word]);
    }
    memcpy(&pack, bits, sizeof(P));
  }
}

template <class P>
__device__ __forceinline__ void store(typename P::T* to, const P& pack) {
  if constexpr (P::size == 1) {
    *to = pack.at[0];
  } else {
    constexpr int words = sizeof(P) / sizeof(Words);
    Words bits[words];
    memcpy(bits, &pack, sizeof(P));
    for (int word = 0; word < words; ++word) {
      store_16_bytes(reinterpret_cast<char*>(to) + word * sizeof(Words), bits[word]);
    }
  }
}

}  // namespace npc::cuda
