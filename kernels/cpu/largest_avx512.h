// Exact selection without sorting: the threshold is found bit by bit, sixteen scores at a time.
#pragma once

#include "isa.h"
#include "vec_avx512.h"

namespace {

// Unsigned order = order of the floats; -0 equals +0 and NaN equals -infinity.
inline __m512i ordered(Vec x) {
  x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1(-__builtin_inff()));
  const __m512i bits = _mm512_castps_si512(add(x, set1(0.0f)));
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
}

void largest(const float* scores, int64_t count, int64_t keep, uint32_t* space, int32_t* index) {
  // Zero is below every key, so that what pads the last vector is never counted.
  uint32_t* keys = space;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const __m512i key = ordered(load_part(scores + i, n));
    _mm512_storeu_si512(keys + i, _mm512_maskz_mov_epi32(lanes_below(n), key));
  }
  uint32_t threshold = 0;
  int64_t reached = count;  // keys >= threshold
  for (int bit = 31; bit >= 0 && reached != keep; --bit) {
    const uint32_t tried = threshold | 1u << bit;
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(tried));
    __m512i total = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi32(1);
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 in = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), limit);
      total = _mm512_mask_add_epi32(total, in, total, one);
    }
    const int64_t found = _mm512_reduce_add_epi32(total);
    if (found >= keep) {
      threshold = tried;
      reached = found;
    }
  }
  // Too many reach it: the first ones at the threshold itself lose.
  int64_t lose = reached - keep, filled = 0;
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  alignas(64) int32_t packed[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 real = lanes_below(count - i < kLanes ? static_cast<int>(count - i) : kLanes);
    unsigned in = _mm512_mask_cmpge_epu32_mask(real, key, limit);
    if (lose > 0) {
      unsigned tied = _mm512_mask_cmpeq_epu32_mask(real, key, limit);
      for (; lose > 0 && tied != 0; --lose, tied &= tied - 1) in &= ~(tied & (0u - tied));
    }
    const int n = __builtin_popcount(in);
    _mm512_store_si512(packed, _mm512_maskz_compress_epi32(static_cast<__mmask16>(in), place));
    __builtin_memcpy(index + filled, packed, static_cast<size_t>(n) * 4);
    filled += n;
    place = _mm512_add_epi32(place, _mm512_set1_epi32(kLanes));
  }
}

}  // namespace
