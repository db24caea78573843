// The inner loops over an abstract vector. Include one vec_*.h first; see isa.h for the rules.
#pragma once

#include "isa.h"

namespace {

using quest::cpu::kMaxDim;

// exp(x) for x <= 0: Cody-Waite reduction and a degree 6 polynomial, relative error below 2e-7;
// 0 below the smallest normal. NaN stays NaN.
inline Vec exp_negative(Vec x) {
  const Vec limit = set1(-87.33654f);
  const Vec bounded = max(limit, x);
  const Vec n = nearest(mul(bounded, set1(1.44269504f)));
  Vec r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_exp(p, n, x, limit);
}

template <typename T>
void dot(const float* q, int64_t heads, int64_t dim, const void* base, const int64_t* rows,
         int64_t count, float scale, float* out, int64_t stride) {
  const T* data = static_cast<const T*>(base);
  for (int64_t first = 0; first < count; first += kLanes) {
    const int n = count - first < kLanes ? static_cast<int>(count - first) : kLanes;
    const T* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = data + rows[first + (i < n ? i : n - 1)] * dim;
    for (int64_t h = 0; h < heads; ++h) {
      Vec sum[kLanes];
      for (int i = 0; i < kLanes; ++i) sum[i] = set1(0.0f);
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const Vec weight = load(q + h * dim + d);
        for (int i = 0; i < kLanes; ++i) sum[i] = fma(weight, load(row[i] + d), sum[i]);
      }
      if (d < dim) {
        const int rest = static_cast<int>(dim - d);
        const Vec weight = load_part(q + h * dim + d, rest);
        for (int i = 0; i < kLanes; ++i) sum[i] = fma(weight, load_part(row[i] + d, rest), sum[i]);
      }
      store_part(out + h * stride + first, mul(set1(scale), reduce(sum)), n);
    }
  }
}

// sum[h, columns] += p * rows for H heads and C vectors of columns, tokens in order.
template <typename T, int H, int C>
inline void weigh_block(const float* p, int64_t stride, int64_t dim, const T* const* row, int n,
                        float* sum) {
  Vec total[H][C];
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) total[h][c] = load(sum + h * dim + c * kLanes);
  }
  for (int i = 0; i < n; ++i) {
    Vec value[C];
    for (int c = 0; c < C; ++c) value[c] = load(row[i] + c * kLanes);
    for (int h = 0; h < H; ++h) {
      const Vec weight = set1(p[h * stride + i]);
      for (int c = 0; c < C; ++c) total[h][c] = fma(weight, value[c], total[h][c]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) store(sum + h * dim + c * kLanes, total[h][c]);
  }
}

template <typename T, int H>
inline void weigh_heads(const float* p, int64_t stride, int64_t dim, const T* const* row, int n,
                        float* sum) {
  const T* column[64];
  int64_t d = 0;
  while (d + kLanes <= dim) {
    const bool wide = d + 4 * kLanes <= dim;
    for (int i = 0; i < n; ++i) column[i] = row[i] + d;
    if (wide) {
      weigh_block<T, H, 4>(p, stride, dim, column, n, sum + d);
    } else {
      weigh_block<T, H, 1>(p, stride, dim, column, n, sum + d);
    }
    d += wide ? 4 * kLanes : kLanes;
  }
  if (d < dim) {
    const int rest = static_cast<int>(dim - d);
    for (int h = 0; h < H; ++h) {
      Vec total = load_part(sum + h * dim + d, rest);
      for (int i = 0; i < n; ++i) {
        total = fma(set1(p[h * stride + i]), load_part(row[i] + d, rest), total);
      }
      store_part(sum + h * dim + d, total, rest);
    }
  }
}

template <typename T>
void weigh(const float* p, int64_t stride, int64_t heads, int64_t dim, const void* base,
           const int64_t* rows, int64_t count, float* sum) {
  const T* data = static_cast<const T*>(base);
  for (int64_t first = 0; first < count; first += 64) {
    const int n = count - first < 64 ? static_cast<int>(count - first) : 64;
    const T* row[64];
    for (int i = 0; i < n; ++i) row[i] = data + rows[first + i] * dim;
    int64_t h = 0;
    while (h < heads) {
      const float* weight = p + h * stride + first;
      float* total = sum + h * dim;
      const int64_t left = heads - h;
      if (kHeadBlock >= 4 && left >= 4) {
        weigh_heads<T, 4>(weight, stride, dim, row, n, total);
        h += 4;
      } else if (kHeadBlock >= 3 && left >= 3) {
        weigh_heads<T, 3>(weight, stride, dim, row, n, total);
        h += 3;
      } else if (kHeadBlock >= 2 && left >= 2) {
        weigh_heads<T, 2>(weight, stride, dim, row, n, total);
        h += 2;
      } else {
        weigh_heads<T, 1>(weight, stride, dim, row, n, total);
        h += 1;
      }
    }
  }
}

inline void narrow_to(float* out, Vec x, int n) { store_part(out, x, n); }
// Only for values that came from bf16: the dropped half is zero.
inline void narrow_to(uint16_t* out, Vec x, int n) {
  float whole[kLanes];
  store(whole, x);
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &whole[i], 4);
    out[i] = static_cast<uint16_t>(bits >> 16);
  }
}

template <typename T>
void extremes(const void* base, int64_t count, int64_t dim, void* maximum, void* minimum) {
  const T* data = static_cast<const T*>(base);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int n = dim - d < kLanes ? static_cast<int>(dim - d) : kLanes;
    Vec high = load_part(data + d, n), low = high;
    for (int64_t i = 1; i < count; ++i) {
      const Vec x = load_part(data + i * dim + d, n);
      high = max(high, x);
      low = min(low, x);
    }
    narrow_to(static_cast<T*>(maximum) + d, high, n);
    narrow_to(static_cast<T*>(minimum) + d, low, n);
  }
}

float exponentials(float* x, int64_t count, float* maximum) {
  const float lowest = -__builtin_inff();
  Vec high = set1(lowest);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) high = max(high, load(x + i));
  float lane[kLanes];
  store(lane, high);
  float top = lowest;
  for (int l = 0; l < kLanes; ++l) top = lane[l] > top ? lane[l] : top;
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;

  const Vec offset = set1(top);
  Vec total = set1(0.0f);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    const Vec e = exp_negative(sub(load(x + i), offset));
    store(x + i, e);
    total = add(total, e);
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    const Vec e = exp_negative(sub(load_part(x + i, rest), offset));
    store_part(x + i, e, rest);
    // Lanes beyond the end hold exp(-top), not zero: only what was stored counts.
    total = add(total, load_part(x + i, rest));
  }
  store(lane, total);
  float sum = 0.0f;
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  *maximum = top;
  return sum;
}

}  // namespace
