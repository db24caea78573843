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
inline __m512bh pairs(const int8_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_cvtne2ps_pbh(load(p + kLanes), load(p)));
}
inline __m512bh pairs_part(const int8_t* p, int n) {
  const auto bytes = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((1ull << n) - 1ull), p);
  alignas(32) int8_t padded[kPairs];
  _mm256_store_si256(reinterpret_cast<__m256i*>(padded), bytes);
  return pairs(padded);
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
                       float scale, float* out, int64_t stride, const Ahead& ahead) {
  for (int64_t h = 0; h < heads; ++h) {
    ask_share(ahead, 0, kKeysShare, static_cast<int>(h), static_cast<int>(heads));
    Vec sum[kLanes];
    for (int i = 0; i < kLanes; ++i) sum[i] = set1(0.0f);
    int64_t d = 0;
    for (; d + kPairs <= dim; d += kPairs) {
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
                      int64_t stride, const Ahead& ahead, int from, int to) {
  __m512bh weight[H][V];
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < V; ++v) weight[h][v] = pairs(query + (h * V + v) * kPairs);
  }
  Vec part[H][kBlock];
  for (int i = 0; i < n; ++i) {
    ask_share(ahead, from, to - H, i, kBlock);
    __m512bh key[V];
    for (int v = 0; v < V; ++v) key[v] = pairs(row(i) + v * kPairs);
    for (int h = 0; h < H; ++h) {
      Vec sum = set1(0.0f);
      for (int v = 0; v < V; ++v) sum = _mm512_dpbf16_ps(sum, weight[h][v], key[v]);
      part[h][i] = sum;
    }
  }
  for (int h = 0; h < H; ++h) {
    ask_share(ahead, to - H, to, h, H);
    for (int i = n; i < kBlock; ++i) part[h][i] = set1(0.0f);
    store_part(out + h * stride, mul(set1(scale), reduce(part[h])), n);
  }
}

template <int V, typename Rows>
inline void keys_some(const uint16_t* query, int64_t heads, Rows row, int n, float scale,
                      float* out, int64_t stride, const Ahead& ahead) {
  for (int64_t h = 0; h < heads;) {
    const uint16_t* q = query + h * V * kPairs;
    float* to = out + h * stride;
    const int64_t left = heads - h, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int asked = static_cast<int>(kKeysShare * h / heads);
    const int until = static_cast<int>(kKeysShare * (h + some) / heads);
    if (some == 4) {
      keys_rows<4, V>(q, row, n, scale, to, stride, ahead, asked, until);
    } else if (some == 2) {
      keys_rows<2, V>(q, row, n, scale, to, stride, ahead, asked, until);
    } else {
      keys_rows<1, V>(q, row, n, scale, to, stride, ahead, asked, until);
    }
    h += some;
  }
}

void keys_pairs(const void* q, int64_t heads, int64_t dim, const void* base, const int64_t* rows,
                int64_t count, float scale, float* out, int64_t stride, const Ahead& ahead) {
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
// weight 0. Unpacking works on quarters of a vector, so that of 32 channels the first 16 sums are
// those of channels 0-3 of each eight, and the others those of channels 4-7: see settle_pairs.
template <int H, int C, typename Rows>
inline void weigh_channels(const uint32_t* weight, Rows row, int64_t d, int n, float* sum,
                           int64_t pitch, const Ahead& ahead, int from, int to) {
  Vec total[H][2 * C];
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < 2 * C; ++c) total[h][c] = load(sum + h * pitch + d + c * kLanes);
  }
  for (int i = 0; i < n; i += 2) {
    const uint16_t *one = row(i) + d, *two = row(i + 1 < n ? i + 1 : i) + d;
    ask_share(ahead, from, to, i / 2, kBlock / 2);
    __m512bh value[2 * C];
    for (int c = 0; c < C; ++c) {
      const __m512i x = _mm512_loadu_si512(one + c * 32), y = _mm512_loadu_si512(two + c * 32);
      value[2 * c] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(x, y));
      value[2 * c + 1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(x, y));
    }
    for (int h = 0; h < H; ++h) {
      const __m512bh p = reinterpret_cast<__m512bh>(
          _mm512_set1_epi32(static_cast<int>(weight[h * kBlock / 2 + i / 2])));
      for (int c = 0; c < 2 * C; ++c) total[h][c] = _mm512_dpbf16_ps(total[h][c], p, value[c]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < 2 * C; ++c) store(sum + h * pitch + d + c * kLanes, total[h][c]);
  }
}

void settle_pairs(float* sum, int64_t dim) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t d = 0; d + 32 <= dim; d += 32) {
    const Vec a = load(sum + d), b = load(sum + d + kLanes);
    store(sum + d, _mm512_permutex2var_ps(a, low, b));
    store(sum + d + kLanes, _mm512_permutex2var_ps(a, high, b));
  }
}

// Meanwhile rows [from, to) of what comes next are asked for.
template <int H, typename Rows>
inline void weigh_some(const uint32_t* weight, int64_t dim, Rows row, int n, float* sum,
                       int64_t pitch, const Ahead& ahead, int from, int to) {
  constexpr int kWide = H > 2 ? 2 : 4;  // as many sums as registers hold
  const int steps = static_cast<int>(dim / (32 * kWide));
  int64_t d = 0;
  for (int step = 0; step < steps; ++step, d += 32 * kWide) {
    weigh_channels<H, kWide>(weight, row, d, n, sum, pitch, ahead,
                             from + (to - from) * step / steps,
                             from + (to - from) * (step + 1) / steps);
  }
  for (; d + 32 <= dim; d += 32) {
    weigh_channels<H, 1>(weight, row, d, n, sum, pitch, Ahead(), 0, 0);
  }
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
                       int64_t pitch, const Ahead& ahead) {
  const auto share = [heads](int h) { return kSoftShare + (2 * kBlock - kSoftShare) * h / heads; };
  for (int h = 0; h < heads;) {
    const uint32_t* p = weight + h * kBlock / 2;
    float* to = sum + h * pitch;
    const int left = heads - h, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (some == 4) {
      weigh_some<4>(p, dim, row, n, to, pitch, ahead, share(h), share(h + some));
    } else if (some == 2) {
      weigh_some<2>(p, dim, row, n, to, pitch, ahead, share(h), share(h + some));
    } else {
      weigh_some<1>(p, dim, row, n, to, pitch, ahead, share(h), share(h + some));
    }
    h += some;
  }
}

void weigh_pairs(const float* p, int heads, int64_t dim, const uint16_t* const* row, int n,
                 float* sum, int64_t pitch, const Ahead& ahead) {
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
