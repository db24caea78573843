// The scores of a group of query heads become one: up to sixteen groups at a time.
#pragma once

#include "vec_avx512.h"

namespace {

void fold(const float* scores, int64_t groups, int64_t group, bool mean, float* out) {
  constexpr int kHeld = 2 * kLanes;  // scores in two registers
  const int64_t some = kHeld / group < kLanes ? kHeld / group : kLanes;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i place = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(group)));
  for (int64_t first = 0; first < groups; first += some) {
    const float* from = scores + first * group;
    const int n = static_cast<int>(groups - first < some ? groups - first : some);
    const int held = n * static_cast<int>(group);
    const Vec low = load_part(from, held < kLanes ? held : kLanes);
    const Vec high = load_part(from + kLanes, held < kLanes ? 0 : held - kLanes);
    Vec total = _mm512_permutex2var_ps(low, place, high);
    for (int i = 1; i < group; ++i) {
      const __m512i next = _mm512_add_epi32(place, _mm512_set1_epi32(i));
      const Vec x = _mm512_permutex2var_ps(low, next, high);
      if (mean) {
        total = add(total, x);
      } else {  // NaN stays
        const __mmask16 larger = _mm512_cmp_ps_mask(x, total, _CMP_GT_OQ);
        const __mmask16 none = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        total = _mm512_mask_mov_ps(total, static_cast<__mmask16>(larger | none), x);
      }
    }
    if (mean) total = _mm512_div_ps(total, set1(static_cast<float>(group)));
    store_part(out + first, total, n);
  }
}

}  // namespace
