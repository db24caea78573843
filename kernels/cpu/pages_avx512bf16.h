// Page scores by the dot product of pairs of bf16: a page's metadata against weights that bf16
// holds.
#pragma once

#include "pairs_avx512bf16.h"

namespace {

// V vectors of 32 channels, in registers, against a weight.
template <int V>
inline Vec times_pairs(const __m512bh* row, const uint16_t* weight) {
  Vec even = set1(0.0f), odd = set1(0.0f);
#pragma GCC unroll 4
  for (int v = 0; v < V; v += 2) {
    even = _mm512_dpbf16_ps(even, row[v], pairs(weight + v * kPairs));
    odd = _mm512_dpbf16_ps(odd, row[v + 1], pairs(weight + (v + 1) * kPairs));
  }
  return add(even, odd);
}

// `rows` rows of V vectors, each met by G weights, as many as fill a vector with sums or fewer. Of
// what is read next some rows at once are asked for, one where a row has little arithmetic:
// measured, single rows leave the memory idle behind much of it, and many are more than it takes
// up.
template <int V, int G, typename T>
__attribute__((always_inline)) inline Vec some_rows(const uint16_t* weight, int rows, const T* row,
                                                    const T* next) {
  constexpr int kWidth = V * kPairs, kBytes = kWidth * static_cast<int>(sizeof(T));
  constexpr int kTogether = G < kLanes / G ? G : kLanes / G;
  Vec sum[kLanes];
  for (int i = rows * G; i < kLanes; ++i) sum[i] = set1(0.0f);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    if (i % kTogether == 0) {
      ask(next + i * kWidth, (rows - i < kTogether ? rows - i : kTogether) * kBytes);
    }
    __m512bh x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = pairs(row + i * kWidth + v * kPairs);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      sum[i * G + g] = times_pairs<V>(x, weight + (i * G + g) * kWidth);
    }
  }
  return reduce(sum);
}

template <int V, int G, typename T>
inline void rows_of_groups(const uint16_t* weight, int64_t rows, const T* row, const T* next,
                           float* out) {
  constexpr int kRows = kLanes / G, kSums = kRows * G;
  for (; rows >= kRows; rows -= kRows) {
    store_part(out, some_rows<V, G>(weight, kRows, row, next), kSums);
    weight += kSums * V * kPairs;
    row += kRows * V * kPairs;
    next += kRows * V * kPairs;
    out += kSums;
  }
  if (rows == 0) return;
  const int left = static_cast<int>(rows);
  store_part(out, some_rows<V, G>(weight, left, row, next), left * G);
}

// rows_of_groups of G heads or fewer; false for larger groups.
template <int V, int G = 8, typename T>
inline bool grouped(const uint16_t* weight, int64_t heads, int64_t group, const T* row,
                    const T* next, float* out) {
  if (group == G) {
    rows_of_groups<V, G>(weight, heads / G, row, next, out);
    return true;
  }
  if constexpr (G > 1) return grouped<V, G - 1>(weight, heads, group, row, next, out);
  return false;
}

// Of rows in bf16, or in int8, whose values bf16 holds exactly.
template <typename T>
void page_pairs(const void* weights, int64_t heads, int64_t group, int64_t dim, const void* rows,
                const void* next, float* out) {
  const auto* weight = static_cast<const uint16_t*>(weights);
  const auto* row = static_cast<const T*>(rows);
  const auto* ahead = next == nullptr ? row : static_cast<const T*>(next);
  if (dim == 256 && grouped<8>(weight, heads, group, row, ahead, out)) return;
  if (dim == 128 && grouped<4>(weight, heads, group, row, ahead, out)) return;
  page_rows(weight, heads, group, dim, row, static_cast<const T*>(next), out, [dim](const T* one) {
    return [dim, one](const uint16_t* by) {
      Vec even = set1(0.0f), odd = set1(0.0f);
      int64_t d = 0;
      for (; d + 2 * kPairs <= dim; d += 2 * kPairs) {
        even = _mm512_dpbf16_ps(even, pairs(one + d), pairs(by + d));
        odd = _mm512_dpbf16_ps(odd, pairs(one + d + kPairs), pairs(by + d + kPairs));
      }
      if (d + kPairs <= dim) {
        even = _mm512_dpbf16_ps(even, pairs(one + d), pairs(by + d));
        d += kPairs;
      }
      const Vec sum = add(even, odd);
      if (d == dim) return sum;
      const int rest = static_cast<int>(dim - d);
      return _mm512_dpbf16_ps(sum, pairs_part(one + d, rest), pairs_part(by + d, rest));
    };
  });
}

}  // namespace
