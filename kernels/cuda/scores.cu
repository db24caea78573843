// page_scores and token_scores: each team of lanes scores its pages or tokens by itself, so a
// score depends on nothing else.
#include "launch.h"
#include "rows.cuh"

namespace quest {
namespace cuda {
namespace {

// What a team keeps in flight: 16 bytes a lane and operand, four times (fp32: twice as much,
// twice).
template <typename T>
constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;

template <typename T, int kLanes>
constexpr int kTile = kThreads / kLanes * kUnroll<T>;  // pages or tokens of a block

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
__global__ void __launch_bounds__(kThreads, 3)
    page_scores_kernel(const __grid_constant__ PageArgs a) {
  constexpr int kTeams = kThreads / kLanes, kMany = kUnroll<T>;
  const Pages& p = a.p;
  const Place place = place_of(p, a.tiles);
  const int64_t r = place.row, h = place.head, heads = p.kv_heads * a.group;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const int64_t first = static_cast<int64_t>(place.tile) * kTile<T, kLanes> + team;
  const int length = length_of(p, a.lengths, r, a.fault);
  const int64_t last = length > 0 ? (length - 1) / static_cast<int>(p.page_size) : 0;
  const int64_t scored = length > 0 ? last + (a.score_open ? 1 : 0) : 0;

  // Page ids first, then all that they lead to: each step waits for memory once.
  int id[kMany];
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    const int64_t page = first + u * kTeams;
    id[u] = page < scored ? physical(p, r, page, a.fault) : -1;
  }
  Eight<T> high[kMany], low[kMany];
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    high[u].clear();
    low[u].clear();
    const int64_t page = first + u * kTeams;
    if (id[u] < 0 || page == last || lane * 8 >= p.dim) continue;
    const int64_t row = (static_cast<int64_t>(id[u]) * p.kv_heads + h) * 2;
    const T* meta = static_cast<const T*>(p.meta) + row * p.dim + lane * 8;
    high[u].load_constant(meta);
    low[u].load_constant(meta + p.dim);
  }
  if (a.score_open) {  // the last page has no metadata yet
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      if (id[u] < 0 || first + u * kTeams != last || lane * 8 >= p.dim) continue;
      const T* keys = static_cast<const T*>(p.kv) + key_row(p, id[u], h) * p.dim + lane * 8;
      extremes(keys, length - last * p.page_size, p.dim, high[u], low[u]);
    }
  }

  float reduced[kMany];
#pragma unroll
  for (int u = 0; u < kMany; ++u) reduced[u] = 0.0f;
  for (int64_t g = 0; g < a.group; g += kQueries) {
    const int some = static_cast<int>(a.group - g < kQueries ? a.group - g : kQueries);
    // [upper | lower] against [maximum | minimum]: the bound is one dot product of twice the width.
    float upper[kQueries][8], lower[kQueries][8];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= some) break;
      load_query<T>(a.q, r * heads + h * a.group + g + i, p.dim, lane, upper[i]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float x = upper[i][e], spread = a.radius_scale * fabsf(x);
        upper[i][e] = (x + spread) * 0.5f;
        lower[i][e] = (x - spread) * 0.5f;
      }
    }
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      const int64_t page = first + u * kTeams;
      float maximum[8], minimum[8];
      high[u].unpack(maximum);
      low[u].unpack(minimum);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i >= some) break;
        const float sum = team_sum<kLanes>(dot(lower[i], minimum, dot(upper[i], maximum, 0.0f)));
        const float score = id[u] >= 0 ? sum : never();
        if (a.reduce == Reduce::kPerQuery) {
          if (lane == 0 && page < p.row_pages) {
            a.out[(r * heads + h * a.group + g + i) * p.row_pages + page] = score;
          }
        } else if (g + i == 0) {
          reduced[u] = score;
        } else if (a.reduce == Reduce::kMax) {
          reduced[u] = score > reduced[u] || score != score ? score : reduced[u];
        } else {
          reduced[u] += score;
        }
      }
    }
  }
  if (a.reduce == Reduce::kPerQuery || lane != 0) return;
#pragma unroll
  for (int u = 0; u < kMany; ++u) {
    const int64_t page = first + u * kTeams;
    if (page >= p.row_pages) continue;
    const float divisor = a.reduce == Reduce::kMean ? static_cast<float>(a.group) : 1.0f;
    a.out[(r * p.kv_heads + h) * p.row_pages + page] = reduced[u] / divisor;
  }
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
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t dim : {64, 128, 256}) {
      by_row(dtype, dim, [](auto element, auto lanes) {
        load(page_scores_kernel<decltype(element), decltype(lanes)::value>);
        load(token_scores_kernel<decltype(element), decltype(lanes)::value>);
      });
    }
  }
}

}  // namespace cuda
}  // namespace quest
