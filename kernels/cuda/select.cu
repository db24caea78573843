// select_top: one block a list; the exact threshold by radix descent, then one ascending pass.
#include "launch.h"
#include "rows.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kBlock = 512, kWarps = kBlock / 32;
// Digits of 11, 11 and 10 bits: the first holds sign, exponent and two bits more, so that scores of
// one magnitude do not all count in one bin.
constexpr int kBins = 2048;

struct SelectArgs {
  const float* scores;
  const int32_t *items, *keep;
  int64_t lists, items_max, width;
  bool force_last;
  int32_t *index, *count;
  int64_t* fault;
};

struct Shared {
  int bins[kBins];
  int warp_sums[kWarps];
  unsigned digit;
  int above, equal;
  int above_of[2][kWarps], ties_of[2][kWarps];  // two tiles of the ascending pass in turn
};

// Unsigned order = order of the floats; -0 equals +0 and NaN equals -infinity.
__device__ __forceinline__ unsigned ordered(float x) {
  if (x != x) x = never();
  if (x == 0.0f) x = 0.0f;
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of x over the threads before this one.
__device__ __forceinline__ int sum_before(int x, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) s.warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += s.warp_sums[w];
  return sum - x;
}

struct Threshold {
  unsigned key;  // the wanted-th largest key
  int skip;      // of the keys that equal it, the first `skip` lose
};

// `wanted` is in 1..count.
__device__ __forceinline__ Threshold threshold(const float* scores, int count, int wanted,
                                               Shared& s) {
  unsigned prefix = 0;
  int bits = 11, shift = 21;
  for (int pass = 0; pass < 3; ++pass) {
    const int bins = 1 << bits;
    for (int b = threadIdx.x; b < bins; b += kBlock) s.bins[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kBlock) {
      const unsigned key = ordered(scores[i]);
      if (pass == 0 || key >> (shift + bits) == prefix) {
        atomicAdd(&s.bins[(key >> shift) & (bins - 1)], 1);
      }
    }
    __syncthreads();
    // Thread t looks at neighbouring bins, the largest keys first.
    const int own = bins / kBlock, top = bins - 1 - static_cast<int>(threadIdx.x) * own;
    int sum = 0;
    for (int j = 0; j < own; ++j) sum += s.bins[top - j];
    int above = sum_before(sum, s);
    for (int j = 0; j < own; ++j) {
      const int here = s.bins[top - j];
      if (above < wanted && above + here >= wanted) {  // true for exactly one bin
        s.digit = static_cast<unsigned>(top - j);
        s.above = above;
        s.equal = here;
      }
      above += here;
    }
    __syncthreads();
    prefix = prefix << bits | s.digit;
    wanted -= s.above;
    if (pass == 1) bits = 10;
    shift -= bits;
  }
  return {prefix, s.equal - wanted};
}

__global__ void __launch_bounds__(kBlock, 1)
    select_top_kernel(const __grid_constant__ SelectArgs a) {
  __shared__ Shared s;
  const int64_t task = blockIdx.x, r = blockIdx.x / static_cast<unsigned>(a.lists);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int items = a.items[r];
  if (items < 0 || items > a.items_max) {
    if (threadIdx.x == 0) raise(a.fault, Fault::kItems, r, 0);
    items = items < 0 ? 0 : static_cast<int>(a.items_max);
  }
  const int keep = a.keep[r];
  if (a.force_last && keep == 0 && items > 0 && threadIdx.x == 0) {
    raise(a.fault, Fault::kKeep, r, 0);
  }
  const bool all = keep < 0 || keep >= items;
  const int kept = all ? 0 : static_cast<int>(keep < a.width ? keep : a.width);
  const int forced = a.force_last && kept > 0 ? 1 : 0;
  const int wanted = kept - forced, competing = items - forced;
  const float* scores = a.scores + task * a.items_max;
  int32_t* index = a.index + task * a.width;

  if (wanted > 0) {
    const Threshold t = threshold(scores, competing, wanted, s);
    // Equal scores: the highest positions win.
    int above = 0, ties = 0, turn = 0;
    for (int first = 0; first < competing; first += kBlock, turn ^= 1) {
      const int i = first + threadIdx.x;
      const unsigned key = i < competing ? ordered(scores[i]) : 0;
      const bool larger = i < competing && key > t.key, tie = i < competing && key == t.key;
      const unsigned before = (1u << lane) - 1;
      const unsigned all_larger = __ballot_sync(kAll, larger), all_ties = __ballot_sync(kAll, tie);
      if (lane == 0) {
        s.above_of[turn][warp] = __popc(all_larger);
        s.ties_of[turn][warp] = __popc(all_ties);
      }
      __syncthreads();
      int above_here = above + __popc(all_larger & before);
      int ties_here = ties + __popc(all_ties & before);
      for (int w = 0; w < kWarps; ++w) {
        const int more = s.above_of[turn][w], more_ties = s.ties_of[turn][w];
        if (w < warp) above_here += more, ties_here += more_ties;
        above += more, ties += more_ties;
      }
      if (larger || (tie && ties_here >= t.skip)) {
        index[above_here + (ties_here > t.skip ? ties_here - t.skip : 0)] = i;
      }
    }
  }
  if (threadIdx.x == 0) {
    a.count[task] = all ? -1 : kept;
    if (forced) index[kept - 1] = items - 1;
  }
  for (int64_t i = kept + threadIdx.x; i < a.width; i += kBlock) index[i] = -1;
}

}  // namespace

void select_top(const Launch& launch, const float* scores, const int32_t* items,
                const int32_t* keep, int64_t rows, int64_t lists, int64_t items_max,
                bool force_last, int32_t* index, int64_t width, int32_t* count) {
  if (items_max > 0x7fffffff) throw std::invalid_argument("select_top: scores is of 2^31 a row");
  const SelectArgs args{scores, items,      keep,  lists, items_max,
                        width,  force_last, index, count, launch.fault};
  start(launch, "select_top", rows * lists, [&](unsigned grid, cudaStream_t stream) {
    select_top_kernel<<<grid, kBlock, 0, stream>>>(args);
  });
}

void load_select() { load(select_top_kernel); }

}  // namespace cuda
}  // namespace quest
