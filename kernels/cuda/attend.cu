// attend: a block takes one part of one list for up to kQueries query heads; each team of lanes
// walks over its tokens with a running maximum, and the parts are merged by the last block.
#include "attend.cuh"
#include "launch.h"
#include "list.cuh"
#include "lists.h"

namespace quest {
namespace cuda {
namespace {

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

  float* scores = a.result.probabilities;
  const int64_t width = a.result.probability_width;
  const ScoresOut scored{scores == nullptr ? nullptr : scores + slot * width, width, some};
  Partial part = nothing_seen();
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
      const int64_t head = slot + (i < some ? i : 0);  // those beyond count for nothing
      load_query<T>(turn == 0 ? a.rolled_query : a.q, head, p.dim, lane, query[i]);
    }
#pragma unroll 1
    for (int first = from; first < to; first += kWindow) {
      const int last = to - first < kWindow ? to : first + kWindow;
      __syncthreads();  // the rows of the last window are not needed any more
      for (int t = first + threadIdx.x; t < last; t += kThreads) {
        rows[t - first] = locate(p, list, t, a.fault);
      }
      __syncthreads();
      attend_window<T, kLanes>(p, a.scale, query, rows, first, last, some, scored, part);
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
                        waiting_in(workspace, p.rows, heads),
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
  for_every_row([](auto element, auto lanes) {
    load(attend_kernel<decltype(element), decltype(lanes)::value>);
  });
}

}  // namespace cuda
}  // namespace quest
