// The inner loops over an abstract vector. Include one vec_*.h first; see isa.h for the rules.
#pragma once

#include "isa.h"

namespace {

using quest::cpu::kBlock;
using quest::cpu::kMaxDim;

// Asks for memory that will be read soon, and once: past the outer caches, which then keep what is
// read again. Always inline: gcc takes a function that only prefetches
// for one that does nothing, and drops calls of it.
__attribute__((always_inline)) inline void ask(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + b, 0, 0);
  }
}

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

// How the rows of a page's metadata meet their weights: multiply(row)(weight) gives a product whose
// lanes are still to be summed.
template <typename W, typename T, typename Multiply>
inline void page_rows(const W* weight, int64_t heads, int64_t group, int64_t dim, const T* row,
                      const T* next, float* out, Multiply multiply) {
  Vec sum[kLanes];
  int filled = 0;
  for (int64_t h = 0; h < heads; h += group, row += dim) {
    if (next != nullptr) ask(next + h / group * dim, dim * static_cast<int64_t>(sizeof(T)));
    const auto by = multiply(row);
    for (int64_t g = 0; g < group; ++g, weight += dim) {
      sum[filled] = by(weight);
      if (++filled < kLanes) continue;
      store(out, reduce(sum));
      out += kLanes;
      filled = 0;
    }
  }
  for (int i = filled; i < kLanes; ++i) sum[i] = set1(0.0f);
  if (filled > 0) store_part(out, reduce(sum), filled);
}

template <typename T>
void page_dots(const void* weights, int64_t heads, int64_t group, int64_t dim, const void* rows,
               const void* next, float* out) {
  page_rows(static_cast<const float*>(weights), heads, group, dim, static_cast<const T*>(rows),
            static_cast<const T*>(next), out, [dim](const T* row) {
              return [dim, row](const float* weight) {
                Vec sum = set1(0.0f);
                int64_t d = 0;
                for (; d + kLanes <= dim; d += kLanes) {
                  sum = fma(load(weight + d), load(row + d), sum);
                }
                if (d == dim) return sum;
                const int rest = static_cast<int>(dim - d);
                return fma(load_part(weight + d, rest), load_part(row + d, rest), sum);
              };
            });
}

// Some heads together: a row of bytes is widened once for all of them. Each sums as if alone.
template <int kHeads>
inline void byte_row(const float* weight, int64_t dim, const int8_t* row, Vec* sum) {
  Vec part[kHeads], other[kHeads];
  for (int i = 0; i < kHeads; ++i) part[i] = other[i] = set1(0.0f);
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    const Vec x = load(row + d), y = load(row + d + kLanes);
    for (int i = 0; i < kHeads; ++i) {
      part[i] = fma(load(weight + i * dim + d), x, part[i]);
      other[i] = fma(load(weight + i * dim + d + kLanes), y, other[i]);
    }
  }
  for (; d + kLanes <= dim; d += kLanes) {
    const Vec x = load(row + d);
    for (int i = 0; i < kHeads; ++i) part[i] = fma(load(weight + i * dim + d), x, part[i]);
  }
  if (d < dim) {
    const int rest = static_cast<int>(dim - d);
    const Vec x = load_part(row + d, rest);
    for (int i = 0; i < kHeads; ++i) {
      part[i] = fma(load_part(weight + i * dim + d, rest), x, part[i]);
    }
  }
  for (int i = 0; i < kHeads; ++i) sum[i] = add(part[i], other[i]);
}

// page_dots of a page's metadata in int8, with weights in fp32.
inline void page_dots_int8(const void* weights, int64_t heads, int64_t group, int64_t dim,
                           const void* rows, const void* next, float* out) {
  const float* weight = static_cast<const float*>(weights);
  const int8_t* row = static_cast<const int8_t*>(rows);
  const int8_t* ahead = static_cast<const int8_t*>(next);
  Vec sum[kLanes];
  int filled = 0;
  for (int64_t h = 0; h < heads; h += group, row += dim) {
    if (ahead != nullptr) ask(ahead + h / group * dim, dim);
    for (int64_t left = group; left > 0;) {
      const int room = kLanes - filled;
      const int many = left < 4   ? (left < room ? static_cast<int>(left) : room)
                       : room < 4 ? room
                                  : 4;
      if (many == 4) byte_row<4>(weight, dim, row, sum + filled);
      if (many == 3) byte_row<3>(weight, dim, row, sum + filled);
      if (many == 2) byte_row<2>(weight, dim, row, sum + filled);
      if (many == 1) byte_row<1>(weight, dim, row, sum + filled);
      weight += many * dim;
      left -= many;
      if ((filled += many) < kLanes) continue;
      store(out, reduce(sum));
      out += kLanes;
      filled = 0;
    }
  }
  for (int i = filled; i < kLanes; ++i) sum[i] = set1(0.0f);
  if (filled > 0) store_part(out, reduce(sum), filled);
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

}  // namespace
