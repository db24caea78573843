// The second kernel of decode: each block of a list chooses its pages again, by the scores that the
// first kernel left, and attends to its part of them.
//
// That is an exact top-k in every block instead of a kernel of its own. Parts, sums and their merge
// are those of attend, so the bits are those of attend over the list of select_top.
#include "attend.cuh"
#include "chain.cuh"
#include "decode.cuh"
#include "decode.h"
#include "launch.h"
#include "rotate.cuh"
#include "select.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kBits = 8;     // of a key at a time: few enough bins for so few threads
constexpr int kHeld = 8192;  // keys that are held in shared memory; more are read again
constexpr int kItems = 512;  // pages of a part that are held; more are looked for again
static_assert(kItems > kWindow, "a window of tokens is of so many pages at most");

struct AttendArgs {
  Pages p;
  Token token;
  int64_t heads, group;
  unsigned tiles;  // of kQueries query heads of a group
  float scale;     // times log2(e)
  const float* scores;
  Attended result;
  int32_t* counters;
  Waiting waiting;
  int64_t* fault;
};

template <typename T, int kLanes>
struct Shared {
  Queries<T, kLanes> queries;
  union {
    unsigned keys[kHeld];
    MergeShared merge;  // when no key is needed any more
  };
  Selecting<kThreads, kBits> selecting;
  int items[kItems];  // winners first_held, first_held + 1, ... of the list, ascending
  int64_t rows[kWindow];
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    decode_attend_kernel(const __grid_constant__ AttendArgs a) {
  __shared__ __align__(16) Shared<T, kLanes> s;
  const Pages& p = a.p;
  const int split = blockIdx.x % kSplits, lane = threadIdx.x % kLanes;
  const Place place = place_of(p, a.tiles * kSplits);
  const int64_t r = place.row, h = place.head, tile = place.tile / kSplits;
  const int64_t left = a.group - tile * kQueries;
  const int some = static_cast<int>(left < kQueries ? left : kQueries);
  const int64_t in_row = h * a.group + tile * kQueries, slot = r * a.heads + in_row;

  // Lengths, keep, q and the angles are older than the first kernel, which has waited for all
  // before it when this one starts: they may be read now.
  const int length = length_of(p, a.token.lengths, r, a.fault);
  const Rule rule = rule_of(p, length, a.token.keep, r, a.fault);
  const int n = rule.tokens, chunk = n > 0 ? chunk_of(n) : 1;
  const int splits = n > 0 ? (n - 1) / chunk + 1 : 1;
  if (split >= splits) return;  // split 0 waits, so the grid does not end before the first kernel
  s.queries.fill(a.token.q, a.token.angles, r, in_row, some, p.dim);

  // Scores and the new token's key and value come from the first kernel; results, the workspace and
  // the counters may be in use by what came before it, or by the decode before this one.
  wait_for_earlier();
  let_next_start();
  if (split == 0 && threadIdx.x < some) {
    a.result.attended[slot + threadIdx.x] = n;
    a.result.read[r * p.kv_heads + h] = n;
  }

  const float* scores = a.scores + (r * p.kv_heads + h) * p.row_pages;
  const auto key = [&](int i) { return i < kHeld ? s.keys[i] : ordered(__ldcg(scores + i)); };
  Threshold best{0, 0};
  if (rule.wanted > 0) {
    const int held = rule.last < kHeld ? rule.last : kHeld;
#pragma unroll 8
    for (int i = threadIdx.x; i < held; i += kThreads) s.keys[i] = ordered(__ldcg(scores + i));
    __syncthreads();
    best = threshold(key, rule.last, rule.wanted, s.selecting);
  }

  float query[kQueries][8];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    if (i >= some) break;
    s.queries.part[i][lane].unpack(query[i]);
  }
  Partial part = nothing_seen();
  const int size = static_cast<int>(p.page_size);
  const int begin = split * chunk, end = n - begin < chunk ? n : begin + chunk;
  int first_held = -kItems;
#pragma unroll 1
  for (int first = begin; first < end; first += kWindow) {
    const int last = end - first < kWindow ? end : first + kWindow;
    __syncthreads();  // the rows and items of the last window are not needed any more
    if (rule.wanted > 0 && (last - 1) / size - first_held >= kItems) {
      first_held = first / size;
      ascending(key, rule.last, best, s.selecting, [&](int position, int page) {
        const int at = position - first_held;
        if (at >= 0 && at < kItems) s.items[at] = page;
      });
      __syncthreads();
    }
    for (int t = first + threadIdx.x; t < last; t += kThreads) {
      const int item = t / size;
      int page = item;
      if (rule.kept > 0) page = item < rule.wanted ? s.items[item - first_held] : rule.last;
      s.rows[t - first] = row_of(p, r, h, page, t - item * size, a.fault);
    }
    __syncthreads();
    attend_window<T, kLanes>(p, a.scale, query, s.rows, first, last, some, {}, part);
  }

  __syncthreads();  // the keys make room
  const Final final{a.result.out, a.result.lse, slot, p.dim, some};
  merge_block<T, kLanes>(part, s.merge, final, a.waiting, split, splits);
  if (splits == 1) return;
  merge_splits<T>(s.merge, final, a.waiting, a.counters + blockIdx.x / kSplits, splits);
}

}  // namespace

void start_decode_attend(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
                         const float* scores, const Attended& result, int32_t* counters,
                         void* workspace, bool chained) {
  const int64_t group = heads / p.kv_heads, tiles = (group + kQueries - 1) / kQueries;
  const AttendArgs args{p,
                        token,
                        heads,
                        group,
                        static_cast<unsigned>(tiles),
                        token.scale * kLog2E,
                        scores,
                        result,
                        counters,
                        waiting_in(workspace, p.rows, heads),
                        launch.fault};
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    start_chained(launch, "decode", p.rows * p.kv_heads * tiles * kSplits,
                  decode_attend_kernel<decltype(element), decltype(lanes)::value>, args, chained);
  });
}

void load_decode_attend() {
  for_every_row([](auto element, auto lanes) {
    load(decode_attend_kernel<decltype(element), decltype(lanes)::value>);
  });
}

}  // namespace cuda
}  // namespace quest
