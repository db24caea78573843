// One block of attend: scores, running softmax, weighed values. Include after inner.h.
#pragma once

#include "isa.h"

namespace {

using quest::cpu::Ahead;
using quest::cpu::AttendBlock;

constexpr int kHeads = 8;  // that share one look at the keys

// Of the rows that come next, those asked for beside the keys, and up to the end of the
// exponentials: about their shares of the time.
constexpr int kKeysShare = 16;
constexpr int kSoftShare = 20;

// The share of step `step` of `steps` of rows [from, to).
__attribute__((always_inline)) inline void ask_share(const Ahead& ahead, int from, int to, int step,
                                                     int steps) {
  if (ahead.rows == nullptr) return;
  const int end = from + (to - from) * (step + 1) / steps;
  for (int i = from + (to - from) * step / steps; i < end; ++i) ask(ahead.rows[i], ahead.bytes);
}

// sum[h, columns] += p * rows for H heads and C vectors of columns, tokens in order.
template <typename T, int H, int C>
inline void weigh_block(const float* p, const T* const* row, int n, float* sum, int64_t pitch) {
  Vec total[H][C];
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) total[h][c] = load(sum + h * pitch + c * kLanes);
  }
  for (int i = 0; i < n; ++i) {
    Vec value[C];
    for (int c = 0; c < C; ++c) value[c] = load(row[i] + c * kLanes);
    for (int h = 0; h < H; ++h) {
      const Vec weight = set1(p[h * kBlock + i]);
      for (int c = 0; c < C; ++c) total[h][c] = fma(weight, value[c], total[h][c]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int c = 0; c < C; ++c) store(sum + h * pitch + c * kLanes, total[h][c]);
  }
}

template <typename T, int H>
inline void weigh_heads(const float* p, int64_t dim, const T* const* row, int n, float* sum,
                        int64_t pitch) {
  int64_t d = 0;
  const T* column[kBlock];
  while (d + kLanes <= dim) {
    const bool wide = d + 4 * kLanes <= dim;
    for (int i = 0; i < n; ++i) column[i] = row[i] + d;
    if (wide) {
      weigh_block<T, H, 4>(p, column, n, sum + d, pitch);
    } else {
      weigh_block<T, H, 1>(p, column, n, sum + d, pitch);
    }
    d += wide ? 4 * kLanes : kLanes;
  }
  if (d < dim) {
    const int rest = static_cast<int>(dim - d);
    for (int h = 0; h < H; ++h) {
      Vec total = load_part(sum + h * pitch + d, rest);
      for (int i = 0; i < n; ++i) {
        total = fma(set1(p[h * kBlock + i]), load_part(row[i] + d, rest), total);
      }
      store_part(sum + h * pitch + d, total, rest);
    }
  }
}

// Scores of some heads become exponentials of a running softmax; what was summed is scaled down
// where a new maximum appears. Each head's arithmetic is its own.
inline void soften(const AttendBlock& b, int64_t first, int heads, float* score,
                   const Ahead& ahead) {
  constexpr int kVectors = kBlock / kLanes;
  Vec sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = set1(0.0f);
  for (int h = 0; h < heads; ++h) {
    ask_share(ahead, kKeysShare, kSoftShare, h, heads);
    float* x = score + h * kBlock;
    const int64_t at = (first + h) * b.stride;
    for (int i = b.n; i < kBlock; ++i) x[i] = -__builtin_inff();
    Vec high = load(x);
    for (int v = 1; v < kVectors; ++v) high = max(high, load(x + v * kLanes));
    const float seen = b.maximum[at], highest = top(high);
    if (highest > seen) {
      const float shrink = first_lane(exp_negative(set1(seen - highest)));
      b.maximum[at] = highest;
      b.total[at] *= shrink;
      float* sum = b.sum + at;
      if (shrink != 1.0f) {
        for (int64_t d = 0; d < b.dim; ++d) sum[d] *= shrink;
      }
    }
    const Vec offset = set1(b.maximum[at]);
    for (int v = 0; v < kVectors; ++v) {
      const Vec e = exp_negative(sub(load(x + v * kLanes), offset));
      store(x + v * kLanes, e);
      sums[h] = add(sums[h], e);
    }
  }
  float total[kLanes];
  store(total, reduce(sums));
  for (int h = 0; h < heads; ++h) b.total[(first + h) * b.stride] += total[h];
}

// Keys without a unit of their own: the queries are widened first.
template <typename T>
void keys_widened(const void* q, int64_t heads, int64_t dim, const void* base, const int64_t* rows,
                  int64_t count, float scale, float* out, int64_t stride, const Ahead& ahead) {
  const T* from = static_cast<const T*>(q);
  float wide[2 * kMaxDim];  // page scores multiply twice the width
  for (int64_t h = 0; h < heads; ++h) {
    ask_share(ahead, 0, kKeysShare, static_cast<int>(h), static_cast<int>(heads));
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(wide + d, load(from + h * dim + d));
    if (d < dim) {
      const int rest = static_cast<int>(dim - d);
      store_part(wide + d, load_part(from + h * dim + d, rest), rest);
    }
    dot<T>(wide, 1, dim, base, rows, count, scale, out + h * stride, stride);
  }
}

template <>
void keys_widened<float>(const void* q, int64_t heads, int64_t dim, const void* base,
                         const int64_t* rows, int64_t count, float scale, float* out,
                         int64_t stride, const Ahead& ahead) {
  ask_share(ahead, 0, kKeysShare, 0, 1);
  dot<float>(static_cast<const float*>(q), heads, dim, base, rows, count, scale, out, stride);
}

template <typename T>
void weigh(const float* p, int heads, int64_t dim, const T* const* row, int n, float* sum,
           int64_t pitch, const Ahead& ahead) {
  ask_share(ahead, kSoftShare, 2 * kBlock, 0, 1);
  for (int h = 0; h < heads;) {
    const float* weight = p + h * kBlock;
    float* total = sum + h * pitch;
    const int left = heads - h;
    if (kHeadBlock >= 4 && left >= 4) {
      weigh_heads<T, 4>(weight, dim, row, n, total, pitch);
      h += 4;
    } else if (kHeadBlock >= 3 && left >= 3) {
      weigh_heads<T, 3>(weight, dim, row, n, total, pitch);
      h += 3;
    } else if (kHeadBlock >= 2 && left >= 2) {
      weigh_heads<T, 2>(weight, dim, row, n, total, pitch);
      h += 2;
    } else {
      weigh_heads<T, 1>(weight, dim, row, n, total, pitch);
      h += 1;
    }
  }
}

template <typename T>
using Weigh = void (*)(const float* p, int heads, int64_t dim, const T* const* row, int n,
                       float* sum, int64_t pitch, const Ahead& ahead);

template <typename T, quest::cpu::Keys keys, Weigh<T> weigh>
void attend_block(const AttendBlock& b) {
  float score[kHeads * kBlock];
  const T* row[kBlock];
  const T* values = static_cast<const T*>(b.base) + b.values * b.dim;
  for (int i = 0; i < b.n; ++i) row[i] = values + b.rows[i] * b.dim;
  const int64_t pitch = b.stride;
  const char* next[2 * kBlock];
  const int64_t bytes = b.dim * static_cast<int64_t>(sizeof(T));
  for (int i = 0; b.next_rows != nullptr && i < kBlock; ++i) {
    next[i] = static_cast<const char*>(b.next_base) + b.next_rows[i] * bytes;
    next[kBlock + i] = next[i] + b.values * bytes;
  }
  Ahead ahead{b.next_rows != nullptr ? next : nullptr, bytes};
  for (int64_t first = 0; first < b.heads; first += kHeads) {
    const int heads = b.heads - first < kHeads ? static_cast<int>(b.heads - first) : kHeads;
    const int64_t skip = first * b.dim;
    keys(static_cast<const T*>(b.q) + skip, heads, b.dim, b.base, b.rows, b.n, b.scale, score,
         kBlock, ahead);
    if (b.rolled > 0) {
      keys(static_cast<const T*>(b.rolled_q) + skip, heads, b.dim, b.base, b.rows, b.rolled,
           b.scale, score, kBlock, ahead);
    }
    if (b.raw != nullptr) {
      for (int h = 0; h < heads; ++h) {
        float* raw = b.raw + (first + h) * b.raw_stride;
        for (int i = 0; i < b.n; ++i) raw[i] = score[h * kBlock + i];
      }
    }
    soften(b, first, heads, score, ahead);
    weigh(score, heads, b.dim, row, b.n, b.sum + first * pitch, pitch, ahead);
    ahead.rows = nullptr;
  }
}

void probabilities(float* x, int64_t count, float maximum, float inverse) {
  const Vec offset = set1(maximum), factor = set1(inverse);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(x + i, mul(exp_negative(sub(load(x + i), offset)), factor));
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_part(x + i, mul(exp_negative(sub(load_part(x + i, rest), offset)), factor), rest);
  }
}

}  // namespace
