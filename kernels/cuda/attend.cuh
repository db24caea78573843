// Attention of a block's teams of lanes over tokens whose rows of kv are known.
#pragma once

#include "merge.cuh"

namespace quest {
namespace cuda {

constexpr int kWindow = 256;  // tokens that are looked up at a time

// Where scaled scores of a query's tokens go, if anywhere: those of query i < some to `to` + i *
// width.
struct ScoresOut {
  float* to;
  int64_t width;
  int some;
};

__device__ __forceinline__ Partial nothing_seen() {
  Partial part;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    part.top[i] = never();
    part.total[i] = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) part.sum[i][e] = 0.0f;
  }
  return part;
}

// Adds tokens [first, last) of a list, whose rows stand in `rows`, to what the first kSome queries
// have seen; `scale` is times log2(e). kSome is a constant so that nothing branches between the
// sums over lanes, which then overlap.
template <typename T, int kLanes, int kSome>
__device__ __forceinline__ void attend_with(const Pages& p, float scale,
                                            const float (&query)[kQueries][8], const int64_t* rows,
                                            int first, int last, const ScoresOut& scores,
                                            Partial& part) {
  constexpr int kTeams = kThreads / kLanes, kMany = sizeof(T) == 2 ? 4 : 2;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const bool own = lane * 8 < p.dim;
  const int64_t to_value = p.page_size * p.dim;
  const T* base = static_cast<const T*>(p.kv) + lane * 8;
#pragma unroll 1
  for (int step = first; step < last; step += kTeams * kMany) {
    Eight<T> key[kMany], value[kMany];
    bool known[kMany];
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      const int t = step + u * kTeams + team;
      const int64_t row = t < last ? rows[t - first] : -1;
      known[u] = row >= 0;
      key[u].clear();
      value[u].clear();
      if (known[u] && own) {
        key[u].load(base + row * p.dim);
        value[u].load(base + row * p.dim + to_value);
      }
    }
    float score[kMany][kSome];
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      float x[8];
      key[u].unpack(x);
#pragma unroll
      for (int i = 0; i < kSome; ++i) score[u][i] = dot(query[i], x, 0.0f);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
#pragma unroll
        for (int i = 0; i < kSome; ++i) {
          score[u][i] += __shfl_xor_sync(kAll, score[u][i], offset);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
#pragma unroll
      for (int i = 0; i < kSome; ++i) score[u][i] = known[u] ? score[u][i] * scale : never();
    }
    if (scores.to != nullptr && lane == 0) {
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
        const int t = step + u * kTeams + team;
        if (t >= last || t >= scores.width) continue;
#pragma unroll
        for (int i = 0; i < kSome; ++i) {
          if (i < scores.some) scores.to[i * scores.width + t] = score[u][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSome; ++i) {
      float top = part.top[i];
#pragma unroll
      for (int u = 0; u < kMany; ++u) top = fmaxf(top, score[u][i]);
      const float offset = offset_of(top), rescale = exp2f(part.top[i] - offset);
      part.top[i] = top;
      part.total[i] *= rescale;
#pragma unroll
      for (int e = 0; e < 8; ++e) part.sum[i][e] *= rescale;
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
        score[u][i] = exp2f(score[u][i] - offset);
        part.total[i] += score[u][i];
      }
    }
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      float x[8];
      value[u].unpack(x);
#pragma unroll
      for (int i = 0; i < kSome; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) part.sum[i][e] = fmaf(score[u][i], x[e], part.sum[i][e]);
      }
    }
  }
}

// For `some` queries; those beyond are any numbers and count for nothing. fp32 has one width only:
// its rows are twice as long to read, which hides the sums that are not needed.
template <typename T, int kLanes>
__device__ __forceinline__ void attend_window(const Pages& p, float scale,
                                              const float (&query)[kQueries][8],
                                              const int64_t* rows, int first, int last, int some,
                                              const ScoresOut& scores, Partial& part) {
  static_assert(kQueries == 4, "3 go as 4");
  if constexpr (sizeof(T) == 2) {
    if (some == 1) {
      return attend_with<T, kLanes, 1>(p, scale, query, rows, first, last, scores, part);
    }
    if (some == 2) {
      return attend_with<T, kLanes, 2>(p, scale, query, rows, first, last, scores, part);
    }
  }
  attend_with<T, kLanes, 4>(p, scale, query, rows, first, last, scores, part);
}

}  // namespace cuda
}  // namespace quest
