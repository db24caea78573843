// page_scores and token_scores: each team of lanes scores its pages or tokens by itself.
#include "launch.h"
#include "page_score.cuh"

namespace quest {
namespace cuda {
namespace {

struct PageArgs {
  Pages p;
  const void* q;
  const int32_t* lengths;
  int64_t group;
  unsigned tiles;
  float radius_scale;
  Reduce reduce;
  bool score_open;
  float* out;
  int64_t* fault;
};

// Per channel maximum and minimum of a page's first `filled` keys, this lane's part.
template <typename T>
__device__ __forceinline__ void extremes(const T* keys, int64_t filled, int64_t dim,
                                         Eight<T>& highest, Eight<T>& lowest) {
  float high[8], low[8];
  highest.load_constant(keys);
  highest.unpack(high);
  highest.unpack(low);
  for (int64_t slot = 1; slot < filled; ++slot) {
    float x[8];
    lowest.load_constant(keys + slot * dim);
    lowest.unpack(x);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      high[e] = fmaxf(high[e], x[e]);
      low[e] = fminf(low[e], x[e]);
    }
  }
  highest.pack(high);
  lowest.pack(low);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    page_scores_kernel(const __grid_constant__ PageArgs a) {
  constexpr int kTeams = kThreads / kLanes;
  __shared__ __align__(16) Sides<T, kLanes> sides;
  const Pages& p = a.p;
  const Place place = place_of(p, a.tiles);
  const int64_t r = place.row, h = place.head;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(place.tile) * kTile<T, kLanes> + team;
  Bounds<T> bounds;
  look_up<T, kLanes>(p, r, first, bounds);
  const int length = length_of(p, a.lengths, r, a.fault);
  const int64_t last = length > 0 ? (length - 1) / static_cast<int>(p.page_size) : 0;
  const int64_t scored = length > 0 ? last + (a.score_open ? 1 : 0) : 0;

  load_bounds<T, kLanes>(p, r, h, first, scored, last, a.fault, bounds);
  if (a.score_open) {  // the last page has no metadata yet
    int id = -1;
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) id = first + u * kTeams == last ? bounds.id[u] : id;
    if (id >= 0 && lane * 8 < p.dim) {
      const T* keys = static_cast<const T*>(p.kv) + key_row(p, id, h) * p.dim + lane * 8;
      Eight<T> high, low;
      extremes(keys, length - last * p.page_size, p.dim, high, low);
#pragma unroll
      for (int u = 0; u < kUnroll<T>; ++u) {
        if (first + u * kTeams == last) bounds.high[u] = high, bounds.low[u] = low;
      }
    }
  }
  const bool each = a.reduce == Reduce::kPerQuery;
  const int64_t lists = each ? a.group : 1, list = (r * p.kv_heads + h) * lists;
  const Strided q{a.q, p.kv_heads * a.group * p.dim, p.dim, 0};
  score_bounds<T, kLanes>(p, bounds, q, Angles{}, r, h * a.group, a.group, a.radius_scale, a.reduce,
                          sides, [&](int64_t g, int u, float score) {
                            const int64_t page = first + u * kTeams;
                            if (page < p.row_pages) a.out[(list + g) * p.row_pages + page] = score;
                          });
}

struct TokenArgs {
  Pages p;
  const void* q;
  const int32_t* lengths;
  int64_t group, width;
  unsigned tiles;
  float scale;
  float* out;
  int64_t* fault;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    token_scores_kernel(const __grid_constant__ TokenArgs a) {
  constexpr int kTeams = kThreads / kLanes, kMany = kUnroll<T>;
  const Pages& p = a.p;
  const Place place = place_of(p, a.tiles);
  const int64_t r = place.row, h = place.head, heads = p.kv_heads * a.group;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(place.tile) * kTile<T, kLanes> + team;
  const int length = length_of(p, a.lengths, r, a.fault);

  int64_t row[kMany];  // of kv, -1 where there is no such token
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    const int64_t token = first + u * kTeams;
    const unsigned page = static_cast<unsigned>(token) / static_cast<unsigned>(p.page_size);
    const int id = token < length ? physical(p, r, page, a.fault) : -1;
    row[u] = id < 0 ? -1 : key_row(p, id, h) + token - page * p.page_size;
  }
  Eight<T> key[kMany];
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    key[u].clear();
    if (row[u] < 0 || lane * 8 >= p.dim) continue;
    key[u].load_constant(static_cast<const T*>(p.kv) + row[u] * p.dim + lane * 8);
  }
  for (int64_t g = 0; g < a.group; ++g) {
    const int64_t head = r * heads + h * a.group + g;
    float query[8];
    load_query<T>(a.q, head, p.dim, lane, query);
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      float x[8];
      key[u].unpack(x);
      const float sum = team_sum<kLanes>(dot(query, x, 0.0f));
      const int64_t token = first + u * kTeams;
      if (lane == 0 && token < a.width) {
        a.out[head * a.width + token] = row[u] >= 0 ? a.scale * sum : never();
      }
    }
  }
}

}  // namespace

void page_scores(const Launch& launch, const Pages& p, const void* q, int64_t heads,
                 const int32_t* lengths, float radius_scale, Reduce reduce, bool score_open,
                 float* out) {
  check_shape(p, "page_scores");
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int kLanes = decltype(lanes)::value;
    const int64_t tiles = (p.row_pages + kTile<T, kLanes> - 1) / kTile<T, kLanes>;
    const PageArgs args{
        p,      q,          lengths, heads / p.kv_heads, static_cast<unsigned>(tiles), radius_scale,
        reduce, score_open, out,     launch.fault};
    start(launch, "page_scores", p.rows * p.kv_heads * tiles,
          [&](unsigned grid, cudaStream_t stream) {
            page_scores_kernel<T, kLanes><<<grid, kThreads, 0, stream>>>(args);
          });
  });
}

void token_scores(const Launch& launch, const Pages& p, const void* q, int64_t heads,
                  const int32_t* lengths, float scale, float* out, int64_t width) {
  check_shape(p, "token_scores");
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int kLanes = decltype(lanes)::value;
    const int64_t tiles = (width + kTile<T, kLanes> - 1) / kTile<T, kLanes>;
    const TokenArgs args{
        p,     q,   lengths,     heads / p.kv_heads, width, static_cast<unsigned>(tiles),
        scale, out, launch.fault};
    start(launch, "token_scores", p.rows * p.kv_heads * tiles,
          [&](unsigned grid, cudaStream_t stream) {
            token_scores_kernel<T, kLanes><<<grid, kThreads, 0, stream>>>(args);
          });
  });
}

void load_scores() {
  for_every_row([](auto element, auto lanes) {
    load(page_scores_kernel<decltype(element), decltype(lanes)::value>);
    load(token_scores_kernel<decltype(element), decltype(lanes)::value>);
  });
}

}  // namespace cuda
}  // namespace quest
