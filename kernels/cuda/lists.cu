// What lists name, counted in bitmaps: `read` where query heads choose alone, and repeated items.
#include "launch.h"
#include "lists.h"
#include "rows.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWords = 8192;          // of a window's bitmap
constexpr int kWindow = kWords * 32;  // pages or tokens that one window covers

struct ListArgs {
  Pages p;
  const int32_t* lengths;
  Selection selection;
  int64_t group;
  int32_t* read;
  int64_t* fault;
};

// Items that a row has.
__device__ __forceinline__ int limit_of(const ListArgs& a, int length) {
  if (length == 0 || a.selection.unit == Unit::kTokens) return length;
  return (length - 1) / static_cast<int>(a.p.page_size) + 1;
}

__device__ __forceinline__ int count_of(const Selection& s, int64_t at) {
  const int count = s.count[at];
  return count < s.width ? count : static_cast<int>(s.width);
}

// Marks a list's items that lie in [first, first + kWindow) and below limit; `twice` reports.
template <typename Twice>
__device__ __forceinline__ void mark(const int32_t* index, int count, int first, int limit,
                                     unsigned* bits, Twice&& twice) {
  for (int i = threadIdx.x; i < count; i += kBlock) {
    const int item = index[i];
    if (item < first || item >= limit || item - first >= kWindow) continue;
    const unsigned bit = 1u << (item % 32);
    if (atomicOr(&bits[(item - first) / 32], bit) & bit) twice(i);
  }
}

// read[r, g]: tokens of the union of the lists of a kv head's query heads. One block each.
__global__ void __launch_bounds__(kBlock) union_kernel(const __grid_constant__ ListArgs a) {
  __shared__ unsigned bits[kWords];
  __shared__ int total;
  const unsigned kv_heads = static_cast<unsigned>(a.p.kv_heads);
  const int64_t r = blockIdx.x / kv_heads, h = blockIdx.x % kv_heads;
  const int length = length_of(a.p, a.lengths, r, a.fault);
  const int limit = limit_of(a, length);
  const int64_t at = r * a.selection.lists + h * a.group;
  const bool pages = a.selection.unit == Unit::kPages;
  bool every = false;
  for (int64_t i = 0; i < a.group; ++i) every = every || a.selection.count[at + i] == -1;
  if (threadIdx.x == 0) total = every ? length : 0;
  for (int first = 0; first < limit && !every; first += kWindow) {
    for (int w = threadIdx.x; w < kWords; w += kBlock) bits[w] = 0;
    __syncthreads();
    for (int64_t i = 0; i < a.group; ++i) {
      mark(a.selection.index + (at + i) * a.selection.width, count_of(a.selection, at + i), first,
           limit, bits, [](int) {});
    }
    __syncthreads();
    int sum = 0;
    for (int w = threadIdx.x; w < kWords; w += kBlock) {
      int slots = __popc(bits[w]);
      if (pages) slots *= static_cast<int>(a.p.page_size);
      const int last = limit - 1 - first;
      if (pages && last / 32 == w && (bits[w] >> (last % 32) & 1)) {
        slots -= limit * static_cast<int>(a.p.page_size) - length;
      }
      sum += slots;
    }
    atomicAdd(&total, sum);
    __syncthreads();
    if (kWindow > limit - first) break;  // first += kWindow could overflow
  }
  __syncthreads();
  if (threadIdx.x == 0) a.read[blockIdx.x] = total;
}

// One block a list.
__global__ void __launch_bounds__(kBlock) twice_kernel(const __grid_constant__ ListArgs a) {
  __shared__ unsigned bits[kWords];
  const int64_t at = blockIdx.x;
  const unsigned row = blockIdx.x / static_cast<unsigned>(a.selection.lists);
  const int length = length_of(a.p, a.lengths, row, a.fault);
  const int limit = limit_of(a, length), count = count_of(a.selection, at);
  for (int first = 0; first < limit; first += kWindow) {
    for (int w = threadIdx.x; w < kWords; w += kBlock) bits[w] = 0;
    __syncthreads();
    mark(a.selection.index + at * a.selection.width, count, first, limit, bits,
         [&](int i) { raise(a.fault, Fault::kTwice, at, i); });
    __syncthreads();
    if (kWindow > limit - first) break;
  }
}

}  // namespace

void count_union(const Launch& launch, const Pages& p, int64_t group, const int32_t* lengths,
                 const Selection& selection, int32_t* read) {
  const ListArgs args{p, lengths, selection, group, read, launch.fault};
  start(launch, "attend", p.rows * p.kv_heads, [&](unsigned grid, cudaStream_t stream) {
    union_kernel<<<grid, kBlock, 0, stream>>>(args);
  });
}

void check_lists(const Launch& launch, const Pages& p, const int32_t* lengths,
                 const Selection& selection) {
  if (selection.index == nullptr) return;
  const ListArgs args{p, lengths, selection, 1, nullptr, launch.fault};
  start(launch, "attend", p.rows * selection.lists, [&](unsigned grid, cudaStream_t stream) {
    twice_kernel<<<grid, kBlock, 0, stream>>>(args);
  });
}

void load_lists() {
  load(union_kernel);
  load(twice_kernel);
}

}  // namespace cuda
}  // namespace quest
