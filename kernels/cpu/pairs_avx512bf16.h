// Keys and values by the dot product of pairs of bf16: products are exact, sums fp32.
//
// Keys are paired along channels, values along tokens, so probabilities are rounded to bf16 before
// they weigh values (as every kernel on tensor cores does); what they sum to is not.
#pragma once

#include "block.h"
#include "vec_avx512.h"

namespace {

constexpr int kPairs = 2 * kLanes;

inline __m512bh pairs(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline __m512bh pairs_part(const uint16_t* p, int n) {
  return reinterpret_cast<__m512bh>(
      _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p));
}

// Rows of a page lie one after another: one address and constants. Others each have an address.
template <int kDim>
struct Adjacent {
  const uint16_t* first;
  const uint16_t* operator()(int i) const { return first + i * kDim; }
};
struct Apart {
  const uint16_t* const* row;
  const uint16_t* operator()(int i) const { return row[i]; }
};

inline bool adjacent(const uint16_t* const* row, int n, int64_t dim) {
  if (n != kBlock) return false;
  for (int i = 1; i < n; ++i) {
    if (row[i] - row[i - 1] != dim) return false;
  }
  return true;
}

template <typename Rows>
inline void keys_block(const uint16_t* query, int64_t heads, int64_t dim, Rows row, int n,
                       float scale, float* out, int64_t stride, Ahead& ahead) {
  const int64_t steps = heads * (dim / kPairs);
  int64_t step = 0;
  for (int64_t h = 0; h < heads; ++h) {
    Vec sum[kLanes];
    for (int i = 0; i < kLanes; ++i) sum[i] = set1(0.0f);
    int64_t d = 0;
    for (; d + kPairs <= dim; d += kPairs) {
      fetch(ahead, static_cast<int>(++step * ahead.share / steps));
      const __m512bh weight = pairs(query + h * dim + d);
      for (int i = 0; i < kLanes; ++i) {
        sum[i] = _mm512_dpbf16_ps(sum[i], weight, pairs(row(i) + d));
      }
    }
    if (d < dim) {
      const int rest = static_cast<int>(dim - d);
      const __m512bh weight = pairs_part(query + h * dim + d, rest);
      for (int i = 0; i < kLanes; ++i) {
        sum[i] = _mm512_dpbf16_ps(sum[i], weight, pairs_part(row(i) + d, rest));
      }
    }
    store_part(out + h * stride, mul(set1(scale), reduce(sum)), n);
  }
}

// As keys_block, with H queries of 32 V channels in registers: keys are read once, in the order of
// memory, which the processor's prefetcher follows.
template <int H, int V, typename Rows>
inline void keys_rows(const uint16_t* query, Rows row, int n, float scale, float* out,
                      int64_t stride, Ahead& ahead) {
  __m512bh weight[H][V];
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) weight[h][v] = pairs(query + (h * V + v) * kPairs);
  }
  Vec part[H][kBlock];
  for (int i = 0; i < n; ++i) {
    fetch(ahead, (i + 1) * ahead.share / kBlock);
    __m512bh key[V];
    for (int v = 0; v < V; ++v) key[v] = pairs(row(i) + v * kPairs);
    for (int h = 0; h < H; ++h) {
      Vec sum = set1(0.0f);
      for (int v = 0; v < V; ++v) sum = _mm512_dpbf16_ps(sum, weight[h][v], key[v]);
      part[h][i] = sum;
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int i = n; i < kBlock; ++i) part[h][i] = set1(0.0f);
    store_part(out + h * stride, mul(set1(scale), reduce(part[h])), n);
  }
}

template <int V, typename Rows>
inline void keys_some(const uint16_t* query, int64_t heads, Rows row, int n, float scale,
                      float* out, int64_t stride, Ahead& ahead) {
  for (int64_t h = 0; h < heads;) {
    const uint16_t* q = query + h * V * kPairs;
    float* to = out + h * stride;
    const int64_t left = heads - h;
    if (left >= 4) {
      keys_rows<4, V>(q, row, n, scale, to, stride, ahead);
      h += 4;
    } else if (left >= 2) {
      keys_rows<2, V>(q, row, n, scale, to, stride, ahead);
      h += 2;
    } else {
      keys_rows<1, V>(q, row, n, scale, to, stride, ahead);
      h += 1;
    }
  }
}

void keys_pairs(const void* q, int64_t heads, int64_t dim, const void* base, const int64_t* rows,
                int64_t count, float scale, float* out, int64_t stride, Ahead& ahead) {
  const uint16_t* data = static_cast<const uint16_t*>(base);
  const uint16_t* query = static_cast<const uint16_t*>(q);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int n = count - first < kBlock ? static_cast<int>(count - first) : kBlock;
    const uint16_t* row[kBlock];
    for (int i = 0; i < kBlock; ++i) row[i] = data + rows[first + (i < n ? i : n - 1)] * dim;
    const bool page = adjacent(row, n, dim);
    if (page && dim == 128) {
      keys_some<4>(query, heads, Adjacent<128>{row[0]}, n, scale, out + first, stride, ahead);
    } else if (page && dim == 64) {
      keys_some<2>(query, heads, Adjacent<64>{row[0]}, n, scale, out + first, stride, ahead);
    } else {
      keys_block(query, heads, dim, Apart{row}, n, scale, out + first, stride, ahead);
    }
  }
}

// Channels [d, d + 32 C) of H heads, tokens in pairs. An odd last token is paired with itself at
// weight 0.
template <int H, int C, typename Rows>
inline void weigh_channels(const uint32_t* weight, Rows row, int64_t d, int n, float* sum,
                           int64_t pitch, Ahead& ahead, int from, int to) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512i even = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
  // Unpacking works on quarters of a vector: a gets channels 0-3 of each eight, b channels 4-7.
  Vec a[H][C], b[H][C];
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) {
      const float* old = sum + h * pitch + d + c * 32;
      a[h][c] = _mm512_permutex2var_ps(load(old), even, load(old + 16));
      b[h][c] = _mm512_permutex2var_ps(load(old), odd, load(old + 16));
    }
  }
  for (int i = 0; i < n; i += 2) {
    const uint16_t *one = row(i) + d, *two = row(i + 1 < n ? i + 1 : i) + d;
    fetch(ahead, from + (i + 2) * (to - from) / kBlock);
    __m512bh first[C], second[C];
    for (int c = 0; c < C; ++c) {
      const __m512i x = _mm512_loadu_si512(one + c * 32), y = _mm512_loadu_si512(two + c * 32);
      first[c] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(x, y));
      second[c] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(x, y));
    }
    for (int h = 0; h < H; ++h) {
      const __m512bh p = reinterpret_cast<__m512bh>(
          _mm512_set1_epi32(static_cast<int>(weight[h * kBlock / 2 + i / 2])));
      for (int c = 0; c < C; ++c) {
        a[h][c] = _mm512_dpbf16_ps(a[h][c], p, first[c]);
        b[h][c] = _mm512_dpbf16_ps(b[h][c], p, second[c]);
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) {
      float* into = sum + h * pitch + d + c * 32;
      store(into, _mm512_permutex2var_ps(a[h][c], low, b[h][c]));
      store(into + 16, _mm512_permutex2var_ps(a[h][c], high, b[h][c]));
    }
  }
}

template <int H, typename Rows>
inline void weigh_some(const uint32_t* weight, int64_t dim, Rows row, int n, float* sum,
                       int64_t pitch, Ahead& ahead, int from, int to) {
  constexpr int kWide = 4;
  int64_t d = 0;
  for (; d + 32 * kWide <= dim; d += 32 * kWide) {
    weigh_channels<H, kWide>(weight, row, d, n, sum, pitch, ahead, from, to);
  }
  for (; d + 32 <= dim; d += 32)
    weigh_channels<H, 1>(weight, row, d, n, sum, pitch, ahead, from, to);
  if (dim % 32 == 0) return;
  for (; d < dim; ++d) {  // a head dimension that is no multiple of 32
    for (int h = 0; h < H; ++h) {
      float total = sum[h * pitch + d];
      for (int i = 0; i < n; ++i) {
        const uint32_t p = weight[h * kBlock / 2 + i / 2] >> (i % 2 * 16) << 16;
        const uint32_t v = static_cast<uint32_t>(row(i)[d]) << 16;
        float x, y;
        __builtin_memcpy(&x, &p, 4);
        __builtin_memcpy(&y, &v, 4);
        total += x * y;
      }
      sum[h * pitch + d] = total;
    }
  }
}

template <typename Rows>
inline void weigh_rows(const uint32_t* weight, int heads, int64_t dim, Rows row, int n, float* sum,
                       int64_t pitch, Ahead& ahead) {
  const int left = 2 * kBlock - ahead.share;
  for (int h = 0; h < heads; h += 2) {
    const int from = ahead.share + left * h / heads;
    const uint32_t* p = weight + h * kBlock / 2;
    if (h + 1 < heads) {
      const int to = ahead.share + left * (h + 2) / heads;
      weigh_some<2>(p, dim, row, n, sum + h * pitch, pitch, ahead, from, to);
    } else {
      weigh_some<1>(p, dim, row, n, sum + h * pitch, pitch, ahead, from, 2 * kBlock);
    }
  }
}

void weigh_pairs(const float* p, int heads, int64_t dim, const uint16_t* const* row, int n,
                 float* sum, int64_t pitch, Ahead& ahead) {
  alignas(64) uint32_t weight[kHeads * kBlock / 2];
  for (int h = 0; h < heads; ++h) {
    const __m256bh rounded = _mm512_cvtneps_pbh(load(p + h * kBlock));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weight + h * kBlock / 2),
                       reinterpret_cast<__m256i>(rounded));
  }
  const bool page = adjacent(row, n, dim);
  if (page && dim == 128) {
    weigh_rows(weight, heads, 128, Adjacent<128>{row[0]}, kBlock, sum, pitch, ahead);
  } else if (page && dim == 64) {
    weigh_rows(weight, heads, 64, Adjacent<64>{row[0]}, kBlock, sum, pitch, ahead);
  } else {
    weigh_rows(weight, heads, dim, Apart{row}, n, sum, pitch, ahead);
  }
}

}  // namespace
