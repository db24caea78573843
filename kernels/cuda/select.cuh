// The exact top of a list by a block: its threshold by radix descent, then the winners ascending.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

// Unsigned order = order of the floats; -0 equals +0 and NaN equals -infinity.
__device__ __forceinline__ unsigned ordered(float x) {
  if (x != x) x = never();
  if (x == 0.0f) x = 0.0f;
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A block's memory for it; kBits of a key are looked at at a time.
template <int kBlock, int kBits>
struct Selecting {
  int bins[1 << kBits];
  int warp_sums[kBlock / 32];
  unsigned digit;
  int above, equal;
  int larger_of[kBlock / 32], ties_of[kBlock / 32];
};

// Sum of x over the threads before this one.
template <int kBlock, int kBits>
__device__ __forceinline__ int sum_before(int x, Selecting<kBlock, kBits>& s) {
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

// Of key(0) .. key(count - 1), whose `wanted` largest are sought; `wanted` is in 1..count.
template <int kBlock, int kBits, typename Key>
__device__ __forceinline__ Threshold threshold(const Key& key, int count, int wanted,
                                               Selecting<kBlock, kBits>& s) {
  unsigned prefix = 0;
  int left = 32;  // bits of a key that are not known yet
  while (left > 0) {
    const int bits = left < kBits ? left : kBits, bins = 1 << bits, shift = left - bits;
    for (int b = threadIdx.x; b < bins; b += kBlock) s.bins[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kBlock) {
      const unsigned one = key(i);
      if (left == 32 || one >> left == prefix) atomicAdd(&s.bins[(one >> shift) & (bins - 1)], 1);
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
    left = shift;
  }
  return {prefix, s.equal - wanted};
}

// Calls take(position, i) for each i of the winners: ascending, `position` winners before it. Of
// equal keys the highest positions win.
template <int kBlock, int kBits, typename Key, typename Take>
__device__ __forceinline__ void ascending(const Key& key, int count, const Threshold& t,
                                          Selecting<kBlock, kBits>& s, Take&& take) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Each warp goes over neighbouring keys, first to count them.
  const int own = ((count - 1) / kBlock + 1) * 32, first = own * warp;
  const int size = count - first < own ? count - first : own;  // none or less: no keys
  int larger = 0, ties = 0;
  for (int i = lane; i - lane < size; i += 32) {
    const unsigned one = i < size ? key(first + i) : 0;
    larger += __popc(__ballot_sync(kAll, i < size && one > t.key));
    ties += __popc(__ballot_sync(kAll, i < size && one == t.key));
  }
  if (lane == 0) {
    s.larger_of[warp] = larger;
    s.ties_of[warp] = ties;
  }
  __syncthreads();
  larger = ties = 0;
  for (int w = 0; w < warp; ++w) larger += s.larger_of[w], ties += s.ties_of[w];
  const unsigned before = (1u << lane) - 1;
  for (int i = lane; i - lane < size; i += 32) {
    const unsigned one = i < size ? key(first + i) : 0;
    const bool is_larger = i < size && one > t.key, tie = i < size && one == t.key;
    const unsigned all_larger = __ballot_sync(kAll, is_larger), all_ties = __ballot_sync(kAll, tie);
    const int larger_here = larger + __popc(all_larger & before);
    const int ties_here = ties + __popc(all_ties & before);
    if (is_larger || (tie && ties_here >= t.skip)) {
      take(larger_here + (ties_here > t.skip ? ties_here - t.skip : 0), first + i);
    }
    larger += __popc(all_larger);
    ties += __popc(all_ties);
  }
}

}  // namespace cuda
}  // namespace quest
