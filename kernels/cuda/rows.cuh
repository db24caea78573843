// What the kernels share: which lanes hold a row, looking into a row's pages, reporting faults.
//
// A row of D elements is held by kLanes neighbouring lanes, eight elements each (8 lanes for D up
// to 64, 16 up to 128, 32 up to 256); lanes beyond D hold zeros. A block has kThreads / kLanes such
// teams. Products are explicit fmaf and the build forbids others: a head's arithmetic is then the
// same bits however many heads are computed together.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "ops.h"

namespace quest {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kQueries = 4;  // query heads that share one reading of the keys; more take turns
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float never() { return __int_as_float(0xff800000); }  // -infinity

__device__ __forceinline__ void raise(int64_t* fault, Fault code, int64_t at, int64_t column) {
  const unsigned long long key = static_cast<unsigned long long>(code) << 58 |
                                 static_cast<unsigned long long>(at) << 32 |
                                 static_cast<uint32_t>(column);
  atomicMin(reinterpret_cast<unsigned long long*>(fault), key);
}

// A row's length, 0 where it is no length.
__device__ __forceinline__ int length_of(const Pages& p, const int32_t* lengths, int64_t row,
                                         int64_t* fault) {
  const int length = __ldcg(lengths + row);  // decode asks early: see chain.cuh
  if (length >= 1 && length <= p.row_pages * p.page_size) return length;
  raise(fault, Fault::kLengths, row, 0);
  return 0;
}

// The physical page of a row's logical page (which must be one of its P), -1 where it is none.
__device__ __forceinline__ int physical(const Pages& p, int64_t row, int64_t page, int64_t* fault) {
  const int id = p.page_table[row * p.row_pages + page];
  if (id >= 0 && id < p.pages) return id;
  raise(fault, Fault::kPageTable, row, page);
  return -1;
}

// In units of D elements of kv: the key of slot 0 of a page's kv head; its value is S further.
__device__ __forceinline__ int64_t key_row(const Pages& p, int64_t page, int64_t kv_head) {
  return (page * p.kv_heads + kv_head) * 2 * p.page_size;
}

// The row of kv that holds the key of a slot of a row's logical page; -1 where there is no page.
__device__ __forceinline__ int64_t row_of(const Pages& p, int64_t row, int64_t kv_head, int page,
                                          int slot, int64_t* fault) {
  const int id = physical(p, row, page, fault);
  return id < 0 ? -1 : key_row(p, id, kv_head) + slot;
}

// What a block does where a grid is rows * `heads` * tiles. Heads outermost: rows that share their
// prefix then read the same pages at the same time.
struct Place {
  unsigned tile, row, head;
};
__device__ __forceinline__ Place place_of(const Pages& p, unsigned tiles,
                                          unsigned block = blockIdx.x) {
  const unsigned rows = static_cast<unsigned>(p.rows), task = block / tiles;
  return {block % tiles, task % rows, task / rows};
}

template <int kLanes, typename Number>
__device__ __forceinline__ Number team_sum(Number x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAll, x, offset);
  }
  return x;
}

__device__ __forceinline__ float dot(const float (&a)[8], const float (&b)[8], float sum) {
#pragma unroll
  for (int e = 0; e < 8; ++e) sum = fmaf(a[e], b[e], sum);
  return sum;
}

// This lane's part of query `head` of a row.
template <typename T>
__device__ __forceinline__ void load_query(const void* q, int64_t head, int64_t dim, int lane,
                                           float (&x)[8]) {
  Eight<T> raw;
  raw.clear();
  if (lane * 8 < dim) raw.load_constant(static_cast<const T*>(q) + head * dim + lane * 8);
  raw.unpack(x);
}

}  // namespace cuda
}  // namespace quest
