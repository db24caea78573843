// The exact top of a list by a block: its threshold by radix descent, then the winners ascending.
//
// Keys are seen in windows of Keys::kWindow: keys.hold(first), called by all threads of the block,
// makes keys(i) key number first + i.
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
#pragma unroll
  for (int w = 0; w < kBlock / 32 - 1; ++w) sum += w < warp ? s.warp_sums[w] : 0;
  return sum - x;
}

struct Threshold {
  unsigned key;  // the wanted-th largest key
  int skip;      // of the keys that equal it, the first `skip` lose
};

// Of keys 0 .. count - 1, whose `wanted` largest are sought; `wanted` is in 1..count.
template <int kBlock, int kBits, typename Keys>
__device__ __forceinline__ Threshold threshold(Keys& keys, int count, int wanted,
                                               Selecting<kBlock, kBits>& s) {
  constexpr int kBins = 1 << kBits, kOwn = kBins / kBlock;  // kOwn: of a thread
  unsigned prefix = 0;
  int left = 32;  // bits of a key that are not known yet
#pragma unroll 1
  while (left > 0) {
    const int bits = 32 % kBits == 0 || left > kBits ? kBits : left;
    const int bins = 1 << bits, shift = left - bits;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) s.bins[threadIdx.x + j * kBlock] = 0;
    __syncthreads();
    for (int first = 0;; first += Keys::kWindow) {
      keys.hold(first);
      const int window = count - first < Keys::kWindow ? count - first : Keys::kWindow;
      for (int i = threadIdx.x; i < window; i += 4 * kBlock) {
        unsigned some[4];  // on their way together
#pragma unroll
        for (int j = 0; j < 4; ++j) some[j] = window - i > j * kBlock ? keys(i + j * kBlock) : 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool counts = left == 32 || some[j] >> left == prefix;
          if (counts && window - i > j * kBlock) {
            atomicAdd(&s.bins[(some[j] >> shift) & (bins - 1)], 1);
          }
        }
      }
      if (count - first <= Keys::kWindow) break;  // first += kWindow could overflow
    }
    __syncthreads();
    // Thread t looks at neighbouring bins, the largest keys first.
    const int own = bins / kBlock, top = bins - 1 - static_cast<int>(threadIdx.x) * own;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum += j < own ? s.bins[top - j] : 0;
    int above = sum_before(sum, s);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int here = j < own ? s.bins[top - j] : 0;
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

// A warp compares keys first .. first + size - 1, 1024 of them at most: lane w gets what is larger
// than the threshold, and what equals it, of the w-th 32 keys.
template <typename Keys>
__device__ __forceinline__ void compare(const Keys& keys, int first, int size, const Threshold& t,
                                        unsigned& larger, unsigned& ties) {
  const int lane = threadIdx.x % 32;
  larger = ties = 0;
#pragma unroll 4
  for (int w = 0; w < 32 && w * 32 < size; ++w) {
    const int i = w * 32 + lane;
    const unsigned one = i < size ? keys(first + i) : 0;
    const unsigned all_larger = __ballot_sync(kAll, i < size && one > t.key);
    const unsigned all_ties = __ballot_sync(kAll, i < size && one == t.key);
    if (lane == w) larger = all_larger, ties = all_ties;
  }
}

// Calls take(position, i) for each i of the winners, which has `position` winners before it. Of
// equal keys the highest positions win.
template <int kBlock, int kBits, typename Keys, typename Take>
__device__ __forceinline__ void ascending(Keys& keys, int count, const Threshold& t,
                                          Selecting<kBlock, kBits>& s, Take&& take) {
  constexpr int kTurn = 1024;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int larger_ahead = 0, ties_ahead = 0;  // in the windows before
  for (int first = 0;; first += Keys::kWindow) {
    keys.hold(first);
    const int window = count - first < Keys::kWindow ? count - first : Keys::kWindow;
    // Each warp goes over neighbouring keys, first to count them.
    const int own = ((window - 1) / kBlock + 1) * 32, start = own * warp;
    const int size = window - start < own ? window - start : own;  // none or less: no keys
    unsigned of_larger = 0, of_ties = 0;
    int larger = 0, ties = 0;
    for (int done = 0; done < size; done += kTurn) {
      compare(keys, start + done, size - done, t, of_larger, of_ties);
      larger += __popc(of_larger);
      ties += __popc(of_ties);
    }
    larger = team_sum<32>(larger);
    ties = team_sum<32>(ties);
    if (lane == 0) {
      s.larger_of[warp] = larger;
      s.ties_of[warp] = ties;
    }
    __syncthreads();
    larger = larger_ahead, ties = ties_ahead;
#pragma unroll
    for (int w = 0; w < kBlock / 32; ++w) {
      if (w < warp) larger += s.larger_of[w], ties += s.ties_of[w];
      larger_ahead += s.larger_of[w], ties_ahead += s.ties_of[w];
    }
    for (int done = 0; done < size; done += kTurn) {
      if (size > kTurn) compare(keys, start + done, size - done, t, of_larger, of_ties);
      // Both counts of the lanes up to this one, in one number: 1024 at most each.
      const int here = __popc(of_larger) | __popc(of_ties) << 16;
      int sum = here;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAll, sum, offset);
        if (lane >= offset) sum += other;
      }
      int larger_before = larger + ((sum - here) & 0xffff);
      int ties_before = ties + ((sum - here) >> 16);
      for (unsigned left = of_larger | of_ties; left != 0; left &= left - 1) {
        const int bit = __ffs(left) - 1;
        const bool is_larger = (of_larger >> bit & 1) != 0;
        if (is_larger || ties_before >= t.skip) {
          const int winning_ties = ties_before > t.skip ? ties_before - t.skip : 0;
          take(larger_before + winning_ties, first + start + done + lane * 32 + bit);
        }
        if (is_larger) {
          ++larger_before;
        } else {
          ++ties_before;
        }
      }
      const int all = __shfl_sync(kAll, sum, 31);
      larger += all & 0xffff;
      ties += all >> 16;
    }
    if (count - first <= Keys::kWindow) break;
  }
}

}  // namespace cuda
}  // namespace quest
