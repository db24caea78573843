// attend: a block takes one part of one list for up to kQueries query heads; each team of lanes
// walks over its tokens with a running maximum, and the parts are merged by the last block.
#include "launch.h"
#include "list.cuh"
#include "lists.h"
#include "merge.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kWindow = 256;  // tokens that are looked up at a time

struct AttendArgs {
  Pages p;
  const void *q, *rolled_query;
  int64_t rolled, heads, group;
  const int32_t* lengths;
  Selection selection;
  // A unit is what shares a list and a kv head: `queries` query heads, in `tiles` of kQueries.
  int64_t units, queries;
  unsigned tiles;
  float scale;  // times log2(e)
  Attended result;
  int32_t* counters;
  Waiting waiting;
  int64_t* fault;
};

// Adds tokens [first, last) of the list, whose rows stand in `rows`, to what has been seen.
template <typename T, int kLanes>
__device__ __forceinline__ void attend_window(const AttendArgs& a,
                                              const float (&query)[kQueries][8],
                                              const int64_t* rows, int first, int last,
                                              const int64_t& slot, int some, Partial& part) {
  constexpr int kTeams = kThreads / kLanes, kMany = sizeof(T) == 2 ? 4 : 2;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const bool own = lane * 8 < a.p.dim;
  const int64_t to_value = a.p.page_size * a.p.dim;
  const T* base = static_cast<const T*>(a.p.kv) + lane * 8;
#pragma unroll 1
  for (int step = first; step < last; step += kTeams * kMany) {
    Eight<T> key[kMany], value[kMany];
    bool known[kMany];
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      const int t = step + u * kTeams + team;
      const int64_t row = t < last ? rows[t - first] : -1;
      known[u] = row >= 0;
      key[u].clear();
      value[u].clear();
      if (known[u] && own) {
        key[u].load_constant(base + row * a.p.dim);
        value[u].load_constant(base + row * a.p.dim + to_value);
      }
    }
    float score[kMany][kQueries];
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      float x[8];
      key[u].unpack(x);
      const int t = step + u * kTeams + team;
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i >= some) break;
        const float sum = team_sum<kLanes>(dot(query[i], x, 0.0f));
        score[u][i] = known[u] ? sum * a.scale : never();
        if (a.result.probabilities != nullptr && lane == 0 && t < last &&
            t < a.result.probability_width) {
          a.result.probabilities[(slot + i) * a.result.probability_width + t] = score[u][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= some) break;
      float top = part.top[i];
#pragma unroll
      for (int u = 0; u < kMany; ++u) top = fmaxf(top, score[u][i]);
      const float offset = offset_of(top), rescale = exp2f(part.top[i] - offset);
      part.top[i] = top;
      part.total[i] *= rescale;
#pragma unroll
      for (int e = 0; e < 8; ++e) part.sum[i][e] *= rescale;
#pragma unroll
      for (int u = 0; u < kMany; ++u) {
        score[u][i] = exp2f(score[u][i] - offset);
        part.total[i] += score[u][i];
      }
    }
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      float x[8];
      value[u].unpack(x);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i >= some) break;
#pragma unroll
        for (int e = 0; e < 8; ++e) part.sum[i][e] = fmaf(score[u][i], x[e], part.sum[i][e]);
      }
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3) attend_kernel(const __grid_constant__ AttendArgs a) {
  __shared__ __align__(16) MergeShared shared;
  __shared__ int64_t rows[kWindow];
  __shared__ int found;
  __shared__ List list;  // here rather than in registers, of which the walk needs all
  __shared__ int64_t slot;
  const Pages& p = a.p;
  const int split = blockIdx.x % kSplits, lane = threadIdx.x % kLanes;
  const Place place = place_of(p, a.tiles * kSplits);
  const int64_t r = place.row, unit = place.head, tile = place.tile / kSplits;
  const unsigned group = static_cast<unsigned>(a.group);
  const int64_t kv_head = a.units == p.kv_heads ? place.head : place.head / group;
  const int64_t left = a.queries - tile * kQueries;
  const int some = static_cast<int>(left < kQueries ? left : kQueries);

  const int length = length_of(p, a.lengths, r, a.fault);
  const int64_t number = a.selection.lists == 1 ? 0 : unit;
  const List head = read_list(p, a.selection, r, kv_head, number, length, &found, a.fault);
  if (threadIdx.x == 0) {
    list = head;
    slot = r * a.heads + unit * a.queries + tile * kQueries;
  }
  __syncthreads();
  const int n = list.tokens, chunk = n > 0 ? chunk_of(n) : 1;
  const int splits = n > 0 ? (n - 1) / chunk + 1 : 1;
  if (split >= splits) return;
  if (split == 0 && threadIdx.x < some) {
    a.result.attended[slot + threadIdx.x] = n;
    if (a.units == p.kv_heads) a.result.read[r * p.kv_heads + kv_head] = n;
  }

  Partial part;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    part.top[i] = never();
    part.total[i] = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) part.sum[i][e] = 0.0f;
  }
  const int begin = split * chunk, end = n - begin < chunk ? n : begin + chunk;
  const int turned = list.index == nullptr ? 0 : static_cast<int>(a.rolled < n ? a.rolled : n);
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {  // first the tokens that see the rolled query
    const int from = turn == 0 ? begin : (begin > turned ? begin : turned);
    const int to = turn == 0 ? (end < turned ? end : turned) : end;
    if (from >= to) continue;
    float query[kQueries][8];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= some) break;
      load_query<T>(turn == 0 ? a.rolled_query : a.q, slot + i, p.dim, lane, query[i]);
    }
#pragma unroll 1
    for (int first = from; first < to; first += kWindow) {
      const int last = to - first < kWindow ? to : first + kWindow;
      __syncthreads();  // the rows of the last window are not needed any more
      for (int t = first + threadIdx.x; t < last; t += kThreads) {
        rows[t - first] = locate(p, list, t, a.fault);
      }
      __syncthreads();
      attend_window<T, kLanes>(a, query, rows, first, last, slot, some, part);
    }
  }

  const Final final{a.result.out, a.result.lse, slot, p.dim, some};
  merge_block<T, kLanes>(part, shared, final, a.waiting, split, splits);
  if (splits == 1) return;
  int32_t* counter = a.counters + blockIdx.x / kSplits;
  merge_splits<T>(shared, final, a.waiting, counter, splits);
}

// Scores of the tokens of a list become probabilities, and zero beyond its end.
__global__ void __launch_bounds__(kThreads) probabilities_kernel(Attended result, unsigned tiles) {
  const int64_t slot = blockIdx.x / tiles, t = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (t >= result.probability_width) return;
  float* score = result.probabilities + slot * result.probability_width + t;
  const bool listed = t < result.attended[slot];
  *score = listed ? exp2f(*score - result.lse[slot] * kLog2E) : 0.0f;
}

int64_t waiting_heads(int64_t rows, int64_t heads) {
  return rows * heads * kSplits * static_cast<int64_t>(sizeof(float2));
}

}  // namespace

int64_t attend_workspace_bytes(int64_t rows, int64_t heads, int64_t dim) {
  return waiting_heads(rows, heads) +
         rows * heads * kSplits * dim * static_cast<int64_t>(sizeof(float));
}

void attend(const Launch& launch, const Pages& p, const void* q, const void* rolled_query,
            int64_t rolled, int64_t heads, const int32_t* lengths, const Selection& selection,
            float scale, const Attended& result, int32_t* counters, void* workspace) {
  check_shape(p, "attend");
  const int64_t group = heads / p.kv_heads;
  const bool alone = selection.index != nullptr && selection.lists == heads && group > 1;
  const int64_t units = alone ? heads : p.kv_heads, queries = alone ? 1 : group;
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  char* space = static_cast<char*>(workspace);
  const Waiting waiting{reinterpret_cast<float2*>(space),
                        reinterpret_cast<float*>(space + waiting_heads(p.rows, heads))};
  const AttendArgs args{p,
                        q,
                        rolled_query,
                        rolled,
                        heads,
                        group,
                        lengths,
                        selection,
                        units,
                        queries,
                        static_cast<unsigned>(tiles),
                        scale * kLog2E,
                        result,
                        counters,
                        waiting,
                        launch.fault};
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    using T = decltype(element);
    start(launch, "attend", p.rows * units * tiles * kSplits,
          [&](unsigned grid, cudaStream_t stream) {
            attend_kernel<T, decltype(lanes)::value><<<grid, kThreads, 0, stream>>>(args);
          });
  });
  if (alone) count_union(launch, p, group, lengths, selection, result.read);
  if (result.probabilities == nullptr) return;
  const int64_t width_tiles = (result.probability_width + kThreads - 1) / kThreads;
  start(launch, "attend", p.rows * heads * width_tiles, [&](unsigned grid, cudaStream_t stream) {
    probabilities_kernel<<<grid, kThreads, 0, stream>>>(result, static_cast<unsigned>(width_tiles));
  });
}

void load_attend() {
  load(probabilities_kernel);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t dim : {64, 128, 256}) {
      by_row(dtype, dim, [](auto element, auto lanes) {
        load(attend_kernel<decltype(element), decltype(lanes)::value>);
      });
    }
  }
}

}  // namespace cuda
}  // namespace quest
