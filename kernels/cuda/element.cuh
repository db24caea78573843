// Eight neighbouring elements of a row: what one lane loads, as 16 bytes or, for fp32, twice 16.
#pragma once

#include <cstdint>

namespace quest {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
__device__ __forceinline__ float widen(float x) { return x; }

// Round to nearest, ties to even.
__device__ __forceinline__ void narrow(float x, BFloat16& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, Float16& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }

template <typename T>
struct Eight {
  static constexpr int kWords = sizeof(T) / 2;  // of 16 bytes
  uint4 word[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = make_uint4(0, 0, 0, 0);
  }

  // Memory that nothing writes while the kernel runs.
  __device__ __forceinline__ void load_constant(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = reinterpret_cast<const uint4*>(from)[i];
  }

  // Past the first-level cache: see chain.cuh.
  __device__ __forceinline__ void load_early(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  }

  // The same, the first four from one place and the last four from another, each aligned to its
  // size.
  __device__ __forceinline__ void load_fours_early(const T* first, const T* last) {
    if constexpr (sizeof(T) == 4) {
      word[0] = __ldcg(reinterpret_cast<const uint4*>(first));
      word[kWords - 1] = __ldcg(reinterpret_cast<const uint4*>(last));
    } else {
      const uint2 low = __ldcg(reinterpret_cast<const uint2*>(first));
      const uint2 high = __ldcg(reinterpret_cast<const uint2*>(last));
      word[0] = make_uint4(low.x, low.y, high.x, high.y);
    }
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = word[i];
  }

  // What is unpacked after this in a loop is unpacked in each turn: kept over the turns, it would
  // take twice the registers.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      asm volatile("" : "+r"(word[i].x), "+r"(word[i].y), "+r"(word[i].z), "+r"(word[i].w));
    }
  }

  __device__ __forceinline__ void unpack(float (&x)[8]) const { unpack_as(x, T{}); }

  // For values that T holds exactly, or to round them.
  __device__ __forceinline__ void pack(const float (&x)[8]) {
    if constexpr (sizeof(T) == 4) {
      word[0] = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                           __float_as_uint(x[3]));
      word[kWords - 1] = make_uint4(__float_as_uint(x[4]), __float_as_uint(x[5]),
                                    __float_as_uint(x[6]), __float_as_uint(x[7]));
    } else {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T low, high;
        narrow(x[2 * i], low);
        narrow(x[2 * i + 1], high);
        pair[i] = bits_of(low) | bits_of(high) << 16;
      }
      word[0] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }

 private:
  template <typename U>
  static __device__ __forceinline__ uint32_t bits_of(U x) {
    return x.bits;
  }

  __device__ __forceinline__ void unpack_as(float (&x)[8], float) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      x[4 * i] = __uint_as_float(word[i].x);
      x[4 * i + 1] = __uint_as_float(word[i].y);
      x[4 * i + 2] = __uint_as_float(word[i].z);
      x[4 * i + 3] = __uint_as_float(word[i].w);
    }
  }
  __device__ __forceinline__ void unpack_as(float (&x)[8], BFloat16) const {
    const uint32_t pair[4] = {word[0].x, word[0].y, word[0].z, word[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(pair[i] << 16);
      x[2 * i + 1] = __uint_as_float(pair[i] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void unpack_as(float (&x)[8], Float16) const {
    const uint32_t pair[4] = {word[0].x, word[0].y, word[0].z, word[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = widen(Float16{static_cast<uint16_t>(pair[i] & 0xffffu)});
      x[2 * i + 1] = widen(Float16{static_cast<uint16_t>(pair[i] >> 16)});
    }
  }
};

}  // namespace cuda
}  // namespace quest
