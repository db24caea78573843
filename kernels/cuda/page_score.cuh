// Scores of pages: a team of lanes scores kUnroll pages by itself, so a score depends on nothing
// else.
#pragma once

#include "rotate.cuh"

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

// Asks for the ids of a team's pages. None is looked at before the last one is on its way, nor
// before the row's length is known: each step waits for memory once.
template <typename T, int kLanes>
__device__ __forceinline__ void look_up(const Pages& p, int64_t row, int64_t first, Bounds<T>& b) {
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {
    const int64_t page = first + u * (kThreads / kLanes);
    const bool listed = page >= 0 && page < p.row_pages;
    b.id[u] = listed ? p.page_table[row * p.row_pages + page] : -1;
  }
}

// Of the pages that were looked up, those below `scored` stay; loads what metadata those below
// `closed` have.
template <typename T, int kLanes>
__device__ __forceinline__ void load_bounds(const Pages& p, int64_t row, int64_t kv_head,
                                            int64_t first, int64_t scored, int64_t closed,
                                            int64_t* fault, Bounds<T>& b) {
  constexpr int kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {
    const int64_t page = first + u * kTeams;
    const bool there = b.id[u] >= 0 && b.id[u] < p.pages;
    if (page < scored && !there) raise(fault, Fault::kPageTable, row, page);
    if (page >= scored || !there) b.id[u] = -1;
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

// Queries as scores take them, in shared memory: [upper | lower] against [maximum | minimum] makes
// the bound one dot product of twice the width. Rotated and split once, for all teams of a block.
template <typename T, int kLanes>
struct Sides {
  float4 part[kQueries][4][kLanes];  // upper 0-3 and 4-7, lower 0-3 and 4-7 of a lane's channels

  // Query heads head .. head + some - 1 of a row; all threads of the block take part.
  __device__ __forceinline__ void fill(const Strided& q, const Angles& angles, int64_t row,
                                       int64_t head, int some, int64_t dim, float radius_scale) {
    static_assert(kQueries * kLanes <= kThreads, "a thread has one part at most");
    const int i = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    if (i < some) {
      float x[8], lower[8];
      load_query<T>(q, angles, row, head + i, dim, lane, x);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float spread = radius_scale * fabsf(x[e]);
        lower[e] = (x[e] - spread) * 0.5f;
        x[e] = (x[e] + spread) * 0.5f;
      }
      part[i][0][lane] = make_float4(x[0], x[1], x[2], x[3]);
      part[i][1][lane] = make_float4(x[4], x[5], x[6], x[7]);
      part[i][2][lane] = make_float4(lower[0], lower[1], lower[2], lower[3]);
      part[i][3][lane] = make_float4(lower[4], lower[5], lower[6], lower[7]);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void get(int i, int side, int lane, float (&x)[8]) const {
    const float4 low = part[i][2 * side][lane], high = part[i][2 * side + 1][lane];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
};

// The sum over its team of one of kValues values a lane, of number lane / (kLanes / kValues): the
// bits of team_sum, with fewer exchanges.
template <int kLanes, int kValues>
__device__ __forceinline__ float spread_sum(float (&x)[kValues], int lane) {
  int offset = kLanes / 2;
#pragma unroll
  for (int many = kValues / 2; many > 0; many /= 2, offset /= 2) {
    const bool high = (lane & offset) != 0;
#pragma unroll
    for (int j = 0; j < many; ++j) {
      const float other = __shfl_xor_sync(kAll, high ? x[j] : x[j + many], offset);
      x[j] = (high ? x[j + many] : x[j]) + other;
    }
  }
  float sum = x[0];
#pragma unroll
  for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

// write(g, u, score), by one lane of the team: the score of its u-th page, for each query head
// g < group, or for g = 0 alone when the group is reduced. `head` is the group's first.
template <typename T, int kLanes, typename Write>
__device__ __forceinline__ void score_bounds(const Pages& p, Bounds<T>& b, const Strided& q,
                                             const Angles& angles, int64_t row, int64_t head,
                                             int64_t group, float radius_scale, Reduce reduce,
                                             Sides<T, kLanes>& sides, Write&& write) {
  constexpr int kMany = kUnroll<T>, kValues = 2 * kMany, kApart = kLanes / kValues;
  const int lane = threadIdx.x % kLanes;
  // Two queries at a time: this lane ends up with the score of one page by one of them.
  const int own_page = lane / kApart / 2, own_query = lane / kApart % 2;
  const bool writes = lane % kApart == 0;
  bool known = false;
#pragma unroll
  for (int u = 0; u < kMany; ++u) known = u == own_page ? b.id[u] >= 0 : known;
  float reduced = 0.0f;
  const auto add = [&](float score, bool first) {
    if (reduce == Reduce::kMax) {
      reduced = first || score > reduced || score != score ? score : reduced;
    } else {
      reduced = first ? score : reduced + score;
    }
  };
  for (int64_t g = 0; g < group; g += kQueries) {
    const int some = static_cast<int>(group - g < kQueries ? group - g : kQueries);
    if (g > 0) __syncthreads();  // the queries before them are not needed any more
    sides.fill(q, angles, row, head + g, some, p.dim, radius_scale);
#pragma unroll 1
    for (int pair = 0; pair < some; pair += 2) {
      const int second = pair + 1 < some ? pair + 1 : pair;
      float upper[2][8], lower[2][8];
      sides.get(pair, 0, lane, upper[0]);
      sides.get(pair, 1, lane, lower[0]);
      sides.get(second, 0, lane, upper[1]);
      sides.get(second, 1, lane, lower[1]);
      float sums[kValues];
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
        float maximum[8], minimum[8];
        b.high[u].stay_packed();
        b.low[u].stay_packed();
        b.high[u].unpack(maximum);
        b.low[u].unpack(minimum);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[2 * u + i] = dot(lower[i], minimum, dot(upper[i], maximum, 0.0f));
        }
      }
      const float sum = spread_sum<kLanes>(sums, lane), score = known ? sum : never();
      const float other = __shfl_xor_sync(kAll, score, kApart);
      if (reduce == Reduce::kPerQuery) {
        if (writes && pair + own_query < some) write(g + pair + own_query, own_page, score);
      } else {
        add(own_query == 0 ? score : other, g + pair == 0);
        if (pair + 1 < some) add(own_query == 0 ? other : score, false);
      }
    }
  }
  if (reduce == Reduce::kPerQuery || !writes || own_query != 0) return;
  write(0, own_page, reduced / (reduce == Reduce::kMean ? static_cast<float>(group) : 1.0f));
}

}  // namespace cuda
}  // namespace quest
