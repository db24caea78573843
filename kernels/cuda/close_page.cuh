// Metadata of a page that has just been filled.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

// From all keys of a page, so that how they arrived cannot matter. The barrier makes those that the
// block has just written visible to it: all its threads take part.
template <typename T>
__device__ __forceinline__ void close_page(const Pages& p, int id, int64_t kv_head) {
  __syncthreads();
  const T* keys = static_cast<const T*>(p.kv) + key_row(p, id, kv_head) * p.dim;
  T* meta = static_cast<T*>(p.meta) + (static_cast<int64_t>(id) * p.kv_heads + kv_head) * 2 * p.dim;
  const int pieces = static_cast<int>(p.dim / 8);
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
    const int d = piece * 8;
    Eight<T> key;
    float high[8], low[8];
    key.load(keys + d);
    key.unpack(high);
    key.unpack(low);
#pragma unroll 4
    for (int64_t slot = 1; slot < p.page_size; ++slot) {
      float x[8];
      key.load(keys + slot * p.dim + d);
      key.unpack(x);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        high[e] = fmaxf(high[e], x[e]);
        low[e] = fminf(low[e], x[e]);
      }
    }
    key.pack(high);
    key.store(meta + d);
    key.pack(low);
    key.store(meta + p.dim + d);
  }
}

}  // namespace cuda
}  // namespace quest
