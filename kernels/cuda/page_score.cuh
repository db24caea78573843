// Scores of pages: a team of lanes scores kUnroll pages by itself, so a score depends on nothing
// else.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

// What a team keeps in flight: 16 bytes a lane and operand, four times (fp32: twice as much,
// twice).
template <typename T>
constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;

template <typename T, int kLanes>
constexpr int kTile = kThreads / kLanes * kUnroll<T>;  // pages or tokens of a block

// A lane's part of its team's pages: `first`, `first` + teams, ...; id -1 where there is none.
template <typename T>
struct Bounds {
  int id[kUnroll<T>];
  Eight<T> high[kUnroll<T>], low[kUnroll<T>];
};

// Looks up the pages below `scored` and loads what metadata those below `closed` have.
template <typename T, int kLanes>
__device__ __forceinline__ void load_bounds(const Pages& p, int64_t row, int64_t kv_head,
                                            int64_t first, int64_t scored, int64_t closed,
                                            int64_t* fault, Bounds<T>& b) {
  constexpr int kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  // Page ids first, then all that they lead to: each step waits for memory once.
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {
    const int64_t page = first + u * kTeams;
    b.id[u] = page < scored ? physical(p, row, page, fault) : -1;
  }
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {
    b.high[u].clear();
    b.low[u].clear();
    if (b.id[u] < 0 || first + u * kTeams >= closed || lane * 8 >= p.dim) continue;
    const int64_t at = (static_cast<int64_t>(b.id[u]) * p.kv_heads + kv_head) * 2;
    const T* meta = static_cast<const T*>(p.meta) + at * p.dim + lane * 8;
    b.high[u].load(meta);
    b.low[u].load(meta + p.dim);
  }
}

// ready(g, some): called by the whole block before it asks for queries g .. g + some - 1 of the
// group. query(g, i, x): this lane's part of query g + i. write(g, u, score), by one lane of the
// team: the score of its u-th page, for each g, or for g = 0 alone when the group is reduced.
template <typename T, int kLanes, typename Ready, typename Query, typename Write>
__device__ __forceinline__ void score_bounds(Bounds<T>& b, int64_t group, float radius_scale,
                                             Reduce reduce, Ready&& ready, Query&& query,
                                             Write&& write) {
  constexpr int kMany = kUnroll<T>;
  const int lane = threadIdx.x % kLanes;
  float reduced[kMany];
#pragma unroll
  for (int u = 0; u < kMany; ++u) reduced[u] = 0.0f;
  for (int64_t g = 0; g < group; g += kQueries) {
    const int some = static_cast<int>(group - g < kQueries ? group - g : kQueries);
    ready(g, some);
#pragma unroll 1
    for (int pair = 0; pair < some; pair += 2) {
      // [upper | lower] against [maximum | minimum]: the bound is one dot product of twice the
      // width. Two queries at a time leave registers for more blocks than four would.
      float upper[2][8], lower[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (pair + i >= some) break;
        query(g, pair + i, upper[i]);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float x = upper[i][e], spread = radius_scale * fabsf(x);
          upper[i][e] = (x + spread) * 0.5f;
          lower[i][e] = (x - spread) * 0.5f;
        }
      }
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
        float maximum[8], minimum[8];
        b.high[u].stay_packed();
        b.low[u].stay_packed();
        b.high[u].unpack(maximum);
        b.low[u].unpack(minimum);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (pair + i >= some) break;
          const float sum = team_sum<kLanes>(dot(lower[i], minimum, dot(upper[i], maximum, 0.0f)));
          const float score = b.id[u] >= 0 ? sum : never();
          if (reduce == Reduce::kPerQuery) {
            if (lane == 0) write(g + pair + i, u, score);
          } else if (g + pair + i == 0) {
            reduced[u] = score;
          } else if (reduce == Reduce::kMax) {
            reduced[u] = score > reduced[u] || score != score ? score : reduced[u];
          } else {
            reduced[u] += score;
          }
        }
      }
    }
  }
  if (reduce == Reduce::kPerQuery || lane != 0) return;
  const float divisor = reduce == Reduce::kMean ? static_cast<float>(group) : 1.0f;
#pragma unroll
  for (int u = 0; u < kMany; ++u) write(0, u, reduced[u] / divisor);
}

}  // namespace cuda
}  // namespace quest
