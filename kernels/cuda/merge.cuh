// Partial attention and how parts become one: sums of exponentials in powers of two, weighed by
// their maxima and added in a fixed order, so that every run gives the same bits.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

constexpr int kSplits = 32;      // most parts of a list that are attended to at the same time
constexpr int kLeastChunk = 64;  // tokens that are worth a part
constexpr int kChunkStep = 32;
constexpr int kRowFloats = kThreads * 8;  // of one query: teams * lanes * 8, whatever D is

// Tokens of a part: a function of the list alone, else a row would depend on its neighbours.
__device__ __forceinline__ int chunk_of(int tokens) {
  const int even = (tokens - 1) / kSplits + 1;
  const int chunk = even > kLeastChunk ? even : kLeastChunk;
  return (chunk + kChunkStep - 1) / kChunkStep * kChunkStep;
}

// Attention over some tokens: scores are in powers of two, `top` their maximum, `total` and `sum`
// are sums of 2 ** (score - top) and of that times the value.
struct Partial {
  float top[kQueries], total[kQueries];
  float sum[kQueries][8];
};

// exp2's argument must not be -inf - -inf where nothing has been seen.
__device__ __forceinline__ float offset_of(float top) { return top == never() ? 0.0f : top; }

struct MergeShared {
  float sum[kQueries * kRowFloats];  // [query][team][lanes * 8]
  float top[kQueries][kSplits], total[kQueries][kSplits], weight[kQueries][kSplits];
  float merged_top[kQueries], merged_total[kQueries];
  bool last;
};

// Where a part waits for the others: [slot, split], slot = row * H + head.
struct Waiting {
  float2* heads;  // top and total
  float* sums;    // [.., D]
};

inline int64_t waiting_heads(int64_t rows, int64_t heads) {
  return rows * heads * kSplits * static_cast<int64_t>(sizeof(float2));
}

inline Waiting waiting_in(void* workspace, int64_t rows, int64_t heads) {
  char* space = static_cast<char*>(workspace);
  return {reinterpret_cast<float2*>(space),
          reinterpret_cast<float*>(space + waiting_heads(rows, heads))};
}

struct Final {
  void* out;
  float* lse;
  int64_t slot;  // of the first of the `some` query heads
  int64_t dim;
  int some;
};

// From top[i][0..parts) and total: the weights, and the merged top and total. Warp i does query i.
__device__ __forceinline__ void weigh_parts(MergeShared& s, int parts, int some) {
  static_assert(kThreads / 32 == kQueries && kSplits == 32, "a warp a query, a lane a part");
  const int i = threadIdx.x / 32, part = threadIdx.x % 32;
  if (i >= some) return;
  const float own = part < parts ? s.top[i][part] : never();
  float top = own;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAll, top, offset));
  }
  const float weight = exp2f(own - offset_of(top));
  s.weight[i][part] = weight;
  const float total = team_sum<32>(part < parts ? weight * s.total[i][part] : 0.0f);
  if (part == 0) {
    s.merged_top[i] = top;
    s.merged_total[i] = total;
  }
}

// No tokens at all: zero. A sum that is NaN stays NaN.
__device__ __forceinline__ float inverse_of(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

template <typename T>
__device__ __forceinline__ void finish(const MergeShared& s, const Final& f, int i, int d,
                                       float sum) {
  const float value = sum * inverse_of(s.merged_total[i]);
  narrow(value, static_cast<T*>(f.out)[(f.slot + i) * f.dim + d]);
  if (d == 0) f.lse[f.slot + i] = (s.merged_top[i] + log2f(s.merged_total[i])) * kLn2;
}

// The block's parts into one, and that to where it belongs: the result if it is the only one.
template <typename T, int kLanes>
__device__ __forceinline__ void merge_block(const Partial& part, MergeShared& s, const Final& f,
                                            const Waiting& waiting, int split, int splits) {
  constexpr int kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    if (i >= f.some) break;
    if (lane == 0) {
      s.top[i][team] = part.top[i];
      s.total[i][team] = part.total[i];
    }
    float4* to = reinterpret_cast<float4*>(s.sum + (i * kThreads + threadIdx.x) * 8);
    to[0] = make_float4(part.sum[i][0], part.sum[i][1], part.sum[i][2], part.sum[i][3]);
    to[1] = make_float4(part.sum[i][4], part.sum[i][5], part.sum[i][6], part.sum[i][7]);
  }
  __syncthreads();
  weigh_parts(s, kTeams, f.some);
  __syncthreads();
  const int dim = static_cast<int>(f.dim);
#pragma unroll 1
  for (int x = threadIdx.x; x < f.some * dim; x += kThreads) {
    const int i = x / dim, d = x % dim;
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < kTeams; ++t) {
      sum = fmaf(s.weight[i][t], s.sum[i * kRowFloats + t * kLanes * 8 + d], sum);
    }
    if (splits == 1) {
      finish<T>(s, f, i, d, sum);
      continue;
    }
    const int64_t at = (f.slot + i) * kSplits + split;
    waiting.sums[at * dim + d] = sum;
    if (d == 0) waiting.heads[at] = make_float2(s.merged_top[i], s.merged_total[i]);
  }
}

// The last block to arrive merges what all have left, in the order of the splits. Returns at once
// in the others. `counter` is left zero.
template <typename T>
__device__ __forceinline__ void merge_splits(MergeShared& s, const Final& f, const Waiting& waiting,
                                             int32_t* counter, int splits) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) s.last = atomicAdd(counter, 1) == splits - 1;
  __syncthreads();
  if (!s.last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  {
    const int i = threadIdx.x / 32, split = threadIdx.x % 32;
    if (i < f.some && split < splits) {
      // Past the first-level cache, which does not see other blocks' writes.
      const float2 head = __ldcg(waiting.heads + (f.slot + i) * kSplits + split);
      s.top[i][split] = head.x;
      s.total[i][split] = head.y;
    }
  }
  __syncthreads();
  weigh_parts(s, splits, f.some);
  __syncthreads();
  const int dim = static_cast<int>(f.dim);
  for (int x = threadIdx.x; x < f.some * dim; x += kThreads) {
    const int i = x / dim, d = x % dim;
    const float* sums = waiting.sums + (f.slot + i) * kSplits * f.dim + d;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) {
      sum = fmaf(s.weight[i][split], __ldcg(sums + split * dim), sum);
    }
    finish<T>(s, f, i, d, sum);
  }
}

}  // namespace cuda
}  // namespace quest
