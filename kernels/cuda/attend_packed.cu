// attend_packed: attend's blocks, lists, parts and merge, in which the key and the value of a token
// come from its packed block or from its page. A row of which nothing is packed gets attend's bits.
#include "attend.cuh"
#include "launch.h"
#include "list.cuh"
#include "lists.h"
#include "nuq.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kLooked = 128;  // tokens that are looked up at a time

struct PackedArgs {
  Pages p;
  Packed packed;
  PackedLayout layout;
  const void* q;
  int64_t heads, group;
  const int32_t* lengths;
  Selection selection;
  int64_t units, queries;  // as in attend.cu
  unsigned tiles;
  float scale;  // times log2(e)
  Attended result;
  int32_t* counters;
  Waiting waiting;
  int64_t* fault;
};

// Where a token's key and value are.
struct Spot {
  int64_t row;           // of kv; -1: nowhere
  const uint8_t* block;  // where something of it is packed
  int token, id;         // of the row; of the block
  Outliers outliers[2];  // of its key and its value, where the block is KVQuant's
};

struct Ends {
  int keys, values;
};

// Eight channels of a spot's key (or value) as fp32, zero beyond the row.
template <typename T>
__device__ __forceinline__ void read_spot(const PackedArgs& a, const Spot& spot, int kv_head,
                                          int end, bool value, int lane, float (&x)[8]) {
  const PackedLayout& l = a.layout;
  const bool own = lane * 8 < a.p.dim && spot.row >= 0;
  if (own && spot.token < end && spot.token >= a.packed.nuq.sinks) {
    const int t = spot.token % static_cast<int>(l.group);
    const float* levels = a.packed.levels;
    if (a.packed.nuq.keys != nullptr && value) {
      unpack_nuq_value(a.packed, l, spot.block, spot.id, spot.outliers[1], t, lane * 8, x);
    } else if (a.packed.nuq.keys != nullptr) {
      unpack_turned_key(a.packed, l, spot.block, kv_head, spot.outliers[0], t, spot.token, lane * 8,
                        x);
    } else if (value) {
      unpack_value(l, spot.block, t, lane * 8, levels + (1 << l.bits), x);
    } else {
      unpack_key(l, spot.block, t, lane * 8, levels, x);
    }
    return;
  }
  Eight<T> raw;
  raw.clear();
  const int64_t row = spot.row + (value ? a.p.page_size : 0);
  if (own) raw.load(static_cast<const T*>(a.p.kv) + row * a.p.dim + lane * 8);
  raw.unpack(x);
}

// As attend_with, token by token from where each is; the order of its sums is the same.
template <typename T, int kLanes, int kSome>
__device__ __forceinline__ void attend_spots(const PackedArgs& a, const float (&query)[kQueries][8],
                                             const Spot* spots, const Ends& ends, int kv_head,
                                             int first, int last, Partial& part) {
  constexpr int kTeams = kThreads / kLanes, kMany = 1;  // more take longer to compile than to run
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
#pragma unroll 1
  for (int step = first; step < last; step += kTeams * kMany) {
    float score[kMany][kSome];
#pragma unroll
    for (int u = 0; u < kMany; ++u) {
      const int t = step + u * kTeams + team;
      const Spot& spot = t < last ? spots[t - first] : Spot{-1, nullptr, 0, 0, {}};
      float x[8];
      read_spot<T>(a, spot, kv_head, ends.keys, false, lane, x);
#pragma unroll
      for (int i = 0; i < kSome; ++i) score[u][i] = dot(query[i], x, 0.0f);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int i = 0; i < kSome; ++i) {
          score[u][i] += __shfl_xor_sync(kAll, score[u][i], offset);
        }
      }
#pragma unroll
      for (int i = 0; i < kSome; ++i) score[u][i] = spot.row >= 0 ? score[u][i] * a.scale : never();
    }
#pragma unroll
    for (int i = 0; i < kSome; ++i) {
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
      const int t = step + u * kTeams + team;
      const Spot& spot = t < last ? spots[t - first] : Spot{-1, nullptr, 0, 0, {}};
      float x[8];
      read_spot<T>(a, spot, kv_head, ends.values, true, lane, x);
#pragma unroll
      for (int i = 0; i < kSome; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) part.sum[i][e] = fmaf(score[u][i], x[e], part.sum[i][e]);
      }
    }
  }
}

__device__ inline void find_outliers(const PackedArgs& a, int64_t kv_head, Spot& spot) {
  const int t = spot.token % static_cast<int>(a.layout.group), dim = static_cast<int>(a.p.dim);
  for (int of = 0; of < 2; ++of) {
    const int64_t column = kv_head + of * a.p.kv_heads;
    spot.outliers[of] = outliers_of(a.packed, dim, a.p.kv_heads, spot.id, column, t, a.fault);
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    attend_packed_kernel(const __grid_constant__ PackedArgs a) {
  __shared__ __align__(16) MergeShared shared;
  __shared__ Spot spots[kLooked];
  __shared__ int found;
  __shared__ List list;
  __shared__ int64_t slot;
  __shared__ Ends ends;
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
    const int step = a.packed.nuq.keys == nullptr ? static_cast<int>(a.layout.group) : 1;
    ends = {packed_end(a.packed, a.packed.keys, r, length, step, Fault::kKeys, a.fault),
            packed_end(a.packed, a.packed.values, r, length, 1, Fault::kValues, a.fault)};
  }
  __syncthreads();
  const int n = list.tokens, chunk = n > 0 ? chunk_of(n) : 1;
  const int splits = n > 0 ? (n - 1) / chunk + 1 : 1;
  if (split >= splits) return;
  if (split == 0 && threadIdx.x < some) {
    a.result.attended[slot + threadIdx.x] = n;
    if (a.units == p.kv_heads) a.result.read[r * p.kv_heads + kv_head] = n;
  }

  Partial part = nothing_seen();
  const int begin = split * chunk, end = n - begin < chunk ? n : begin + chunk;
  float query[kQueries][8];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    load_query<T>(a.q, slot + (i < some ? i : 0), p.dim, lane, query[i]);
  }
  const int packed = ends.keys > ends.values ? ends.keys : ends.values;
#pragma unroll 1
  for (int first = begin; first < end; first += kLooked) {
    const int last = end - first < kLooked ? end : first + kLooked;
    __syncthreads();  // the spots of the last window are not needed any more
    for (int t = first + threadIdx.x; t < last; t += kThreads) {
      Spot spot{-1, nullptr, 0, 0, {}};
      int page, at;
      if (find(p, list, t, a.fault, page, at)) {
        spot.row = row_of(p, r, kv_head, page, at, a.fault);
        spot.token = page * static_cast<int>(p.page_size) + at;
        if (spot.token < packed) {
          const int block = spot.token / static_cast<int>(a.layout.group);
          spot.id = block_of(a.packed, r, block, a.fault);
          if (spot.id < 0) {
            spot.row = -1;
          } else {
            spot.block = data_of(a.packed, a.layout, p.kv_heads, kv_head, spot.id);
            if (a.packed.nuq.keys != nullptr) find_outliers(a, kv_head, spot);
          }
        }
      }
      spots[t - first] = spot;
    }
    __syncthreads();
    // fp32 has no walk of its own for one query: it would take longer to compile than to run.
    if (sizeof(T) == 2 && some == 1) {
      attend_spots<T, kLanes, 1>(a, query, spots, ends, kv_head, first, last, part);
    } else {
      attend_spots<T, kLanes, kQueries>(a, query, spots, ends, kv_head, first, last, part);
    }
  }

  const Final final{a.result.out, a.result.lse, slot, p.dim, some};
  merge_block<T, kLanes>(part, shared, final, a.waiting, split, splits);
  if (splits == 1) return;
  int32_t* counter = a.counters + blockIdx.x / kSplits;
  merge_splits<T>(shared, final, a.waiting, counter, splits);
}

}  // namespace

void attend_packed(const Launch& launch, const Pages& p, const Packed& packed,
                   const PackedLayout& layout, const void* q, int64_t heads, const int32_t* lengths,
                   const Selection& selection, float scale, const Attended& result,
                   int32_t* counters, void* workspace) {
  check_shape(p, "attend_packed");
  const int64_t group = heads / p.kv_heads;
  const bool alone = selection.index != nullptr && selection.lists == heads && group > 1;
  const int64_t units = alone ? heads : p.kv_heads, queries = alone ? 1 : group;
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  const PackedArgs args{p,
                        packed,
                        layout,
                        q,
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
    start(launch, "attend_packed", p.rows * units * tiles * kSplits,
          [&](unsigned grid, cudaStream_t stream) {
            attend_packed_kernel<T, decltype(lanes)::value><<<grid, kThreads, 0, stream>>>(args);
          });
  });
  if (alone) count_union(launch, p, group, lengths, selection, result.read);
}

void load_attend_packed() {
  for_every_row([](auto element, auto lanes) {
    load(attend_packed_kernel<decltype(element), decltype(lanes)::value>);
  });
}

}  // namespace cuda
}  // namespace quest
