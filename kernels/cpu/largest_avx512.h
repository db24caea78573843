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

// The keys among `count` that reach `limit`.
inline int64_t reaching(const uint32_t* keys, int64_t count, uint32_t limit) {
  const __m512i least = _mm512_set1_epi32(static_cast<int>(limit)), one = _mm512_set1_epi32(1);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 real = lanes_below(count - i < kLanes ? static_cast<int>(count - i) : kLanes);
    const __mmask16 in = _mm512_mask_cmpge_epu32_mask(real, key, least);
    total = _mm512_mask_add_epi32(total, in, total, one);
  }
  return _mm512_reduce_add_epi32(total);
}

// The keys in [low, high], in order; `to` may be `keys`.
inline int64_t between(const uint32_t* keys, int64_t count, uint32_t low, uint32_t high,
                       uint32_t* to) {
  const __m512i least = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i most = _mm512_set1_epi32(static_cast<int>(high));
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 real = lanes_below(count - i < kLanes ? static_cast<int>(count - i) : kLanes);
    const __mmask16 in =
        _mm512_mask_cmple_epu32_mask(_mm512_mask_cmpge_epu32_mask(real, key, least), key, most);
    _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(in, key));
    found += __builtin_popcount(in);
  }
  return found;
}

void largest(const float* scores, int64_t count, int64_t keep, uint32_t* space, int32_t* index) {
  constexpr int kBits = 3;  // found between two looks at who still competes
  uint32_t *const keys = space, *const competing = space + count + kLanes;
  __m512i low = _mm512_set1_epi32(-1), high = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const __m512i key = ordered(load_part(scores + i, n));
    _mm512_storeu_si512(keys + i, key);
    low = _mm512_mask_min_epu32(low, lanes_below(n), low, key);
    high = _mm512_mask_max_epu32(high, lanes_below(n), high, key);
  }
  const uint32_t top = _mm512_reduce_max_epu32(high), same = top ^ _mm512_reduce_min_epu32(low);
  // All keys share the bits above `bit`, so that the search begins there.
  int bit = same == 0 ? -1 : 31 - __builtin_clz(same);
  uint32_t threshold = bit < 0 ? top : top & ~((2u << bit) - 1u);
  int64_t reached = count, above = 0;  // keys >= threshold, and those above all that compete
  const uint32_t* from = keys;
  for (int64_t left = count; bit >= 0 && reached != keep;) {
    for (int i = 0; i < kBits && bit >= 0 && reached != keep; ++i, --bit) {
      const uint32_t tried = threshold | 1u << bit;
      const int64_t found = above + reaching(from, left, tried);
      if (found >= keep) {
        threshold = tried;
        reached = found;
      }
    }
    if (bit < 0 || reached == keep) break;
    const uint32_t last = threshold | ((2u << bit) - 1u);
    left = between(from, left, threshold, last, competing);
    above = reached - left;
    from = competing;
  }
  // Too many reach it: the first ones at the threshold itself lose.
  int64_t lose = reached - keep, filled = 0;
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 real = lanes_below(count - i < kLanes ? static_cast<int>(count - i) : kLanes);
    unsigned in = _mm512_mask_cmpge_epu32_mask(real, key, limit);
    if (lose > 0) {
      unsigned tied = _mm512_mask_cmpeq_epu32_mask(real, key, limit);
      for (; lose > 0 && tied != 0; --lose, tied &= tied - 1) in &= ~(tied & (0u - tied));
    }
    const int n = __builtin_popcount(in);
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(in), place);
    _mm512_mask_storeu_epi32(index + filled, lanes_below(n), packed);
    filled += n;
    place = _mm512_add_epi32(place, _mm512_set1_epi32(kLanes));
  }
}

}  // namespace
