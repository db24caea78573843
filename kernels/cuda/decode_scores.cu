// The first kernel of decode: one block of a (row, kv head) appends its token, the others score its
// closed pages.
//
// The token's page is never scored, not even when the token closes it: the metadata that a block
// writes is not read before the next step. Each block rotates the queries for itself, while the
// metadata is on its way.
#include "chain.cuh"
#include "close_page.cuh"
#include "decode.cuh"
#include "decode.h"
#include "launch.h"
#include "page_score.cuh"

namespace quest {
namespace cuda {
namespace {

struct ScoresArgs {
  Pages p;
  Token token;
  int64_t group;
  unsigned appends, tiles;  // blocks of a (row, kv head): the first `appends` (0 or 1) of `tiles`
  float* scores;
  int64_t* fault;
};

template <typename T>
__device__ __forceinline__ void append_token(const ScoresArgs& a, int64_t row, int64_t h,
                                             int position) {
  const Pages& p = a.p;
  const int size = static_cast<int>(p.page_size), dim = static_cast<int>(p.dim);
  const int page = position / size, slot = position - page * size, pieces = dim / 8;
  const int id = physical(p, row, page, a.fault);
  if (id < 0) return;
  T* key = static_cast<T*>(p.kv) + (key_row(p, id, h) + slot) * p.dim;
  for (int i = threadIdx.x; i < 2 * pieces; i += kThreads) {
    const bool value = i >= pieces;
    const Strided& from = value ? a.token.v : a.token.k;
    const T* source = static_cast<const T*>(from.data) + row * from.row + h * from.head;
    const int d = (value ? i - pieces : i) * 8;
    Eight<T> piece;
    if (value) {
      piece.load(source + d);
    } else {
      float x[8];
      load_rotated<T>(a.token.angles, row, source, dim, d, x);
      piece.pack(x);
    }
    piece.store(key + (value ? p.page_size * p.dim : 0) + d);
  }
  if (slot == size - 1) close_page<T>(p, id, h);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    decode_scores_kernel(const __grid_constant__ ScoresArgs a) {
  constexpr int kTeams = kThreads / kLanes;
  __shared__ __align__(16) Sides<T, kLanes> sides;
  // Whoever wrote q, k, v, the lengths or the pages may be the kernel before this one.
  wait_for_earlier();
  let_next_start();
  const Pages& p = a.p;
  const Place place = place_of(p, a.tiles);
  const int64_t r = place.row, h = place.head;
  const int team = threadIdx.x / kLanes;
  const int64_t first = (static_cast<int64_t>(place.tile) - a.appends) * kTile<T, kLanes> + team;
  Bounds<T> bounds;
  look_up<T, kLanes>(p, r, first, bounds);  // on their way with the length
  const int keep = keep_of(a.token, r), length = length_of(p, a.token.lengths, r, a.fault);
  if (length == 0) return;
  if (place.tile < a.appends) {
    append_token<T>(a, r, h, length - 1);
    return;
  }
  const Rule rule = rule_of(p, length, keep, r, a.fault);
  if (rule.wanted == 0) return;  // no page competes
  if (first - team >= rule.last) return;
  load_bounds<T, kLanes>(p, r, h, first, rule.last, rule.last, a.fault, bounds);
  const bool each = a.token.reduce == Reduce::kPerQuery;
  const int64_t lists = each ? a.group : 1, list = (r * p.kv_heads + h) * lists;
  score_bounds<T, kLanes>(p, bounds, a.token.q, a.token.angles, r, h * a.group, a.group,
                          a.token.radius_scale, a.token.reduce, sides,
                          [&](int64_t g, int u, float score) {
                            const int64_t page = first + u * kTeams;
                            if (page < rule.last) a.scores[(list + g) * p.row_pages + page] = score;
                          });
}

}  // namespace

bool start_decode_scores(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
                         float* scores) {
  const int64_t appends = token.k.data == nullptr ? 0 : 1;
  if (appends == 0 && token.keep == nullptr) return false;
  by_row(p.dtype, p.dim, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int kLanes = decltype(lanes)::value;
    const int64_t scoring =
        token.keep == nullptr ? 0 : (p.row_pages + kTile<T, kLanes> - 1) / kTile<T, kLanes>;
    const ScoresArgs args{p,
                          token,
                          heads / p.kv_heads,
                          static_cast<unsigned>(appends),
                          static_cast<unsigned>(appends + scoring),
                          scores,
                          launch.fault};
    start_chained(launch, "decode", p.rows * p.kv_heads * (appends + scoring),
                  decode_scores_kernel<T, kLanes>, args, true);
  });
  return true;
}

void load_decode_scores() {
  for_every_row([](auto element, auto lanes) {
    load(decode_scores_kernel<decltype(element), decltype(lanes)::value>);
  });
}

}  // namespace cuda
}  // namespace quest
