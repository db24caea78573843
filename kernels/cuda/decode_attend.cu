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

constexpr int kBits = 8;      // of a key at a time: few enough bins for so few threads
constexpr int kHeld = 8192;   // keys that are held in shared memory; more are read again
constexpr int kNamed = 8192;  // pages of which is known whether a list of a group names them
constexpr int kItems = 512;   // pages of a part that are held; more are looked for again
static_assert(kItems > kWindow, "a window of tokens is of so many pages at most");

struct AttendArgs {
  Pages p;
  Token token;
  int64_t heads, group;
  // A unit is what shares a list and a kv head, as in attend: `queries` query heads, in `tiles`.
  int64_t units, queries;
  unsigned tiles;
  unsigned counting;  // blocks ahead of the others, which count what a group's lists name together
  float scale;        // times log2(e)
  const float* scores;
  Attended result;
  int32_t* counters;
  Waiting waiting;
  int64_t* fault;
};

// Memory of a block. It is the file's, so that what works on nothing else (an exact top-k, the
// parts' merge) is compiled once and not for every element type and D: that is most of the code.
struct Shared {
  union {
    unsigned keys[kHeld];
    MergeShared merge;  // when no key is needed any more
  };
  Selecting<kThreads, kBits> selecting;
  int items[kItems];  // winners first_held, first_held + 1, ... of the list, ascending
  unsigned named[kNamed / 32];
  int64_t rows[kWindow];
};
__shared__ __align__(16) Shared s;

// Fills s.keys with those of scores [first, count), as many as it holds.
__device__ __noinline__ void hold_keys(const float* scores, int first, int count) {
  __syncthreads();  // what was held is not needed any more
  const int size = count - first < kHeld ? count - first : kHeld;
#pragma unroll 8
  for (int i = threadIdx.x; i < size; i += kThreads) {
    s.keys[i] = ordered(__ldcg(scores + first + i));
  }
  __syncthreads();
}

// The keys of a list's scores, a window at a time in shared memory: the usual list has one.
struct Keys {
  static constexpr int kWindow = kHeld;
  const float* scores;
  int count;
  int held;  // first key of the window in shared memory, -1: it is none of this list

  __device__ __forceinline__ void hold(int first) {
    if (first != held) hold_keys(scores, first, count);
    held = first;
  }
  __device__ __forceinline__ unsigned operator()(int i) const { return s.keys[i]; }
};

// The threshold of what wins in a list.
__device__ __noinline__ Threshold choose(const float* scores, int count, int wanted) {
  Keys keys{scores, count, -1};
  return threshold(keys, count, wanted, s.selecting);
}

// Of the list that was chosen from last: either fills s.items with the pages that are winner number
// `first` and on, or marks in s.named those that are page number `first` and on.
__device__ __noinline__ void list_winners(const float* scores, int count, Threshold best, int first,
                                          bool name) {
  Keys keys{scores, count, count <= kHeld ? 0 : -1};
  ascending(keys, count, best, s.selecting, [&](int position, int page) {
    const int at = (name ? page : position) - first;
    if (at < 0 || at >= (name ? kNamed : kItems)) return;
    if (name) {
      atomicOr(&s.named[at / 32], 1u << at % 32);
    } else {
      s.items[at] = page;
    }
  });
  __syncthreads();
}

// read of a (row, kv head) whose query heads choose alone: the union of their lists.
__device__ __noinline__ void count_read(const AttendArgs& a) {
  const Place place = place_of(a.p, 1);
  const int64_t at = place.row * a.p.kv_heads + place.head;
  const int keep = keep_of(a.token, place.row);
  const int length = length_of(a.p, a.token.lengths, place.row, a.fault);
  const Rule rule = rule_of(a.p, length, keep, place.row, a.fault);
  wait_for_earlier();
  let_next_start();
  int many = 0;  // closed pages that this thread counted
  constexpr int kWords = kNamed / 32;
#pragma unroll 1
  for (int first = 0; first < rule.last && rule.wanted > 0; first += kNamed) {
#pragma unroll
    for (int w = 0; w < kWords; w += kThreads) s.named[w + threadIdx.x] = 0;
#pragma unroll 1
    for (int64_t g = 0; g < a.group; ++g) {
      const float* scores = a.scores + (at * a.group + g) * a.p.row_pages;
      list_winners(scores, rule.last, choose(scores, rule.last, rule.wanted), first, true);
    }
#pragma unroll
    for (int w = 0; w < kWords; w += kThreads) many += __popc(s.named[w + threadIdx.x]);
    if (rule.last - first <= kNamed) break;  // first += kNamed could overflow
    __syncthreads();
  }
  const int before = sum_before(many, s.selecting);
  if (threadIdx.x != kThreads - 1) return;
  const int size = static_cast<int>(a.p.page_size);
  a.result.read[at] = rule.tokens + (before + many - rule.wanted) * size;
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3)
    decode_attend_kernel(const __grid_constant__ AttendArgs a) {
  __shared__ __align__(16) Eight<T> queries[kQueries][kLanes];  // rotated once, for all teams
  const Pages& p = a.p;
  if (blockIdx.x < a.counting) {
    count_read(a);
    return;
  }
  const unsigned block = blockIdx.x - a.counting;
  const int split = block % kSplits, lane = threadIdx.x % kLanes;
  const Place place = place_of(p, a.tiles * kSplits, block);
  const int64_t r = place.row, unit = place.head, tile = place.tile / kSplits;
  const bool alone = a.counting > 0;
  const int64_t h = alone ? place.head / static_cast<unsigned>(a.group) : place.head;
  const int64_t left = a.queries - tile * kQueries;
  const int some = static_cast<int>(left < kQueries ? left : kQueries);
  const int64_t in_row = unit * a.queries + tile * kQueries, slot = r * a.heads + in_row;

  // Lengths, keep, q and the angles are older than the first kernel, which has waited for all
  // before it when this one starts: they may be read now.
  const int keep = keep_of(a.token, r), length = length_of(p, a.token.lengths, r, a.fault);
  const Rule rule = rule_of(p, length, keep, r, a.fault);
  const int n = rule.tokens, chunk = n > 0 ? chunk_of(n) : 1;
  const int splits = n > 0 ? (n - 1) / chunk + 1 : 1;
  if (split >= splits) return;  // split 0 waits, so the grid does not end before the first kernel
  static_assert(kQueries * kLanes <= kThreads, "a thread has one part at most");
  if (const int i = threadIdx.x / kLanes; i < some) {
    float x[8];
    load_query<T>(a.token.q, a.token.angles, r, in_row + i, p.dim, lane, x);
    queries[i][lane].pack(x);
  }
  __syncthreads();

  // Scores and the new token's key and value come from the first kernel; results, the workspace and
  // the counters may be in use by what came before it, or by the decode before this one.
  wait_for_earlier();
  let_next_start();
  if (split == 0 && threadIdx.x < some) {
    a.result.attended[slot + threadIdx.x] = n;
    if (!alone) a.result.read[r * p.kv_heads + h] = n;
  }

  const float* scores = a.scores + (r * a.units + unit) * p.row_pages;
  Threshold best{};
  if (rule.wanted > 0) best = choose(scores, rule.last, rule.wanted);

  float query[kQueries][8];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    queries[i < some ? i : 0][lane].unpack(query[i]);
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
      list_winners(scores, rule.last, best, first_held, false);
    }
#pragma unroll
    for (int at = 0; at < kWindow; at += kThreads) {
      const int t = first + at + static_cast<int>(threadIdx.x);
      if (t >= last) break;
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
  merge_splits<T>(s.merge, final, a.waiting, a.counters + block / kSplits, splits);
}

}  // namespace

void start_decode_attend(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
                         const float* scores, const Attended& result, int32_t* counters,
                         void* workspace, bool chained) {
  const int64_t group = heads / p.kv_heads;
  const bool alone = token.keep != nullptr && token.reduce == Reduce::kPerQuery && group > 1;
  const int64_t units = alone ? heads : p.kv_heads, queries = alone ? 1 : group;
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  const int64_t counting = alone ? p.rows * p.kv_heads : 0;
  const AttendArgs args{p,
                        token,
                        heads,
                        group,
                        units,
                        queries,
                        static_cast<unsigned>(tiles),
                        static_cast<unsigned>(counting),
                        token.scale * kLog2E,
                        scores,
                        result,
                        counters,
                        waiting_in(workspace, p.rows, heads),
                        launch.fault};
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    start_chained(launch, "decode", counting + p.rows * units * tiles * kSplits,
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
