// append and gather: one block a (row, kv head, page of the row).
#include "close_page.cuh"
#include "launch.h"
#include "rows.cuh"

namespace quest {
namespace cuda {
namespace {

struct AppendArgs {
  Pages p;
  Strided k, v;
  const int32_t* starts;
  int64_t tokens;
  unsigned touched;  // most pages of a row that `tokens` can reach into
  int64_t* fault;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendArgs a) {
  const Pages& p = a.p;
  const Place place = place_of(p, a.touched);
  const int64_t h = place.head, r = place.row;
  const int64_t start = a.starts[r], end = start + a.tokens;
  if (start < 0 || end > p.row_pages * p.page_size) {
    if (threadIdx.x == 0) raise(a.fault, Fault::kStarts, r, 0);
    return;
  }
  const int64_t page =
      static_cast<unsigned>(start) / static_cast<unsigned>(p.page_size) + place.tile;
  const int64_t page_start = page * p.page_size, page_end = page_start + p.page_size;
  if (page_start >= end) return;
  const int id = physical(p, r, page, a.fault);
  if (id < 0) return;
  T* keys = static_cast<T*>(p.kv) + key_row(p, id, h) * p.dim;

  const int64_t from = start > page_start ? start : page_start;
  const int64_t to = end < page_end ? end : page_end;
  const int pieces = static_cast<int>(p.dim / 8);
  const T* from_k = static_cast<const T*>(a.k.data) + r * a.k.row + h * a.k.head;
  const T* from_v = static_cast<const T*>(a.v.data) + r * a.v.row + h * a.v.head;
  const int copies = static_cast<int>(to - from) * pieces;
  for (int i = threadIdx.x; i < 2 * copies; i += kThreads) {
    const bool value = i >= copies;
    const int one = value ? i - copies : i;
    const int token = one / pieces, d = one % pieces * 8;
    const T* source = value ? from_v + (from - start + token) * a.v.token
                            : from_k + (from - start + token) * a.k.token;
    const int64_t slot = from - page_start + token + (value ? p.page_size : 0);
    Eight<T> piece;
    piece.load_constant(source + d);
    piece.store(keys + slot * p.dim + d);
  }
  if (to == page_end) close_page<T>(p, id, h);
}

struct GatherArgs {
  Pages p;
  int64_t length;
  unsigned pages;
  void *k, *v;
  int64_t* fault;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs a) {
  const Pages& p = a.p;
  const Place place = place_of(p, a.pages);
  const int64_t h = place.head, r = place.row, page = place.tile;
  const int64_t first = page * p.page_size;
  const int64_t left = a.length - first, filled = left < p.page_size ? left : p.page_size;
  const int id = physical(p, r, page, a.fault);
  const int64_t pieces = p.dim / 8, copies = filled * pieces;
  const T* keys = static_cast<const T*>(p.kv) + (id < 0 ? 0 : key_row(p, id, h) * p.dim);
  const int64_t to = ((r * p.kv_heads + h) * a.length + first) * p.dim;
  for (int64_t i = threadIdx.x; i < copies; i += kThreads) {
    Eight<T> key, value;
    key.clear();
    value.clear();
    if (id >= 0) {  // tokens of a page that does not exist are zero
      key.load_constant(keys + i * 8);
      value.load_constant(keys + p.page_size * p.dim + i * 8);
    }
    key.store(static_cast<T*>(a.k) + to + i * 8);
    value.store(static_cast<T*>(a.v) + to + i * 8);
  }
}

}  // namespace

void append(const Launch& launch, const Pages& p, const Strided& k, const Strided& v,
            const int32_t* starts, int64_t tokens) {
  check_shape(p, "append");
  if (tokens == 0) return;
  const int64_t touched = (tokens - 1 + p.page_size - 1) / p.page_size + 1;
  const AppendArgs args{p, k, v, starts, tokens, static_cast<unsigned>(touched), launch.fault};
  by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    start(launch, "append", p.rows * p.kv_heads * touched, [&](unsigned grid, cudaStream_t stream) {
      append_kernel<T><<<grid, kThreads, 0, stream>>>(args);
    });
  });
}

void gather(const Launch& launch, const Pages& p, int64_t length, void* k, void* v) {
  check_shape(p, "gather");
  const int64_t pages = (length + p.page_size - 1) / p.page_size;
  const GatherArgs args{p, length, static_cast<unsigned>(pages), k, v, launch.fault};
  by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    start(launch, "gather", p.rows * p.kv_heads * pages, [&](unsigned grid, cudaStream_t stream) {
      gather_kernel<T><<<grid, kThreads, 0, stream>>>(args);
    });
  });
}

void load_append() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    by_dtype(dtype, [](auto element) {
      load(append_kernel<decltype(element)>);
      load(gather_kernel<decltype(element)>);
    });
  }
}

}  // namespace cuda
}  // namespace quest
