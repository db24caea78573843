// Tiles of packed attention by what is packed of them: those that are packed whole go chunk by
// chunk where the instruction set has a fast path, those of which nothing is packed through
// attend_block as they are; others are widened to fp32 first, token by token from where each lies.
#include <algorithm>
#include <cmath>

#include "packed_job.h"

namespace quest {
namespace cpu {
namespace packed_attention {
namespace {

// The packed keys (of = 0) or values (1) of a tile, widened.
void widen_tile(const Job& job, const Tile& tile, int64_t kv_head, int of, float* wide) {
  const PackedLayout& l = job.layout;
  const uint8_t* block = tile.block + kv_head * l.bytes;
  const float* levels = job.packed.levels + of * (int64_t{1} << l.bits);
  const Nuq& nuq = job.packed.nuq;
  if (nuq.keys == nullptr) {
    current_isa().unpack(l, block, tile.within, levels, of == 1, wide);
    return;
  }
  const int64_t heads = job.p.kv_heads, id = job.id_of(tile);
  const int64_t first = static_cast<int64_t>(tile.number) * kBlock, half = l.dim / 2;
  NuqTile one{};
  one.block = block;
  one.levels = levels;
  one.outliers = outliers_of(job.packed, l, "attend_packed", heads, id, kv_head, of, &one.count);
  if (of == 1) {
    one.value_norms = nuq.values + id * 2 * kBlock;
  } else {
    one.key_scale = nuq.keys + kv_head * 2 * l.dim;
    one.key_offset = one.key_scale + l.dim;
    one.cos = nuq.cos + first * half;
    one.sin = nuq.sin + first * half;
    one.tokens = std::min<int64_t>(kBlock, nuq.positions - first);
  }
  current_isa().unpack_nuq(l, one, wide);
}

// Some query heads of one row over one tile, whose tokens are widened first.
void attend_tile(const Job& job, const Tile& tile, int64_t row, int64_t kv_head, int64_t head,
                 int64_t heads, float* state) {
  const Pages& p = job.p;
  const PackedLayout& l = job.layout;
  static thread_local std::vector<float> space;
  float* wide = scratch(space, 2 * kBlock * l.dim);
  const int64_t first = static_cast<int64_t>(tile.number) * kBlock;
  const int32_t ends[2] = {job.packed.keys[row], job.packed.values[row]};
  for (int of = 0; of < 2; ++of) {
    if (ends[of] <= first) continue;
    widen_tile(job, tile, kv_head, of, wide + of * kBlock * l.dim);
  }
  int64_t rows[kBlock];
  int n = 0;
  for (int64_t t = 0; t < kBlock; ++t) {
    if ((tile.listed >> t & 1) == 0) continue;
    rows[n++] = t;
    for (int of = 0; of < 2; ++of) {
      const int64_t token = first + t;
      if (token < ends[of] && token >= job.packed.nuq.sinks) continue;
      const int64_t page = physical(p, "attend_packed", row, token / p.page_size);
      const int64_t at = key_row(p, page, kv_head) + token % p.page_size + of * p.page_size;
      widen_to(wide + (of * kBlock + t) * l.dim, p.kv, p.dtype, at * p.dim, p.dim);
    }
  }
  const AttendBlock one{job.q + (row * job.heads + head) * l.dim,
                        nullptr,
                        0,
                        heads,
                        l.dim,
                        wide,
                        rows,
                        kBlock,
                        n,
                        job.scale,
                        job.record,
                        state + l.dim,
                        state + l.dim + 1,
                        state,
                        nullptr,
                        0,
                        nullptr,
                        nullptr};
  current_isa().attend_block[static_cast<int>(DType::kFloat32)](one);
}

// The listed tokens of a tile of which nothing is packed, as rows of D elements of their kv head.
int pool_rows(const Job& job, const Tile& tile, int64_t row, int64_t* rows) {
  const Pages& p = job.p;
  int n = 0;
  for (int64_t t = 0; t < kBlock; ++t) {
    if ((tile.listed >> t & 1) == 0) continue;
    const int64_t token = static_cast<int64_t>(tile.number) * kBlock + t;
    const int64_t page = physical(p, "attend_packed", row, token / p.page_size);
    rows[n++] = key_row(p, page, 0) + token % p.page_size;
  }
  return n;
}

// Tiles [first, last) of one list, of which nothing is packed, as attend goes over them: the sums
// of attend_block may be in an order of its own, so that they join the others' when they are done.
void attend_pool_tiles(const Job& job, const Tile* first, const Tile* last, int64_t row,
                       int64_t kv_head, int64_t head, int64_t heads, float* state) {
  const Pages& p = job.p;
  const int64_t bytes = bytes_of(p.dtype), dim = p.dim;
  const int dtype = static_cast<int>(p.dtype);
  const Isa& isa = current_isa();
  static thread_local std::vector<float> space;
  float* own = scratch(space, heads * job.record);
  for (int64_t h = 0; h < heads; ++h) {
    std::fill(own + h * job.record, own + h * job.record + dim, 0.0f);
    own[h * job.record + dim] = kNever;
    own[h * job.record + dim + 1] = 0.0f;
  }
  const char* base = static_cast<const char*>(p.kv) + kv_head * 2 * p.page_size * dim * bytes;
  int64_t rows[2][kBlock];
  int n = pool_rows(job, *first, row, rows[0]);
  for (int at = 0; first < last; ++first, at = 1 - at) {
    const int next = first + 1 < last ? pool_rows(job, first[1], row, rows[1 - at]) : 0;
    const AttendBlock one{
        static_cast<const char*>(job.given) + (row * job.heads + head) * dim * bytes,
        nullptr,
        0,
        heads,
        dim,
        base,
        rows[at],
        p.page_size,
        n,
        job.scale,
        job.record,
        own + dim,
        own + dim + 1,
        own,
        nullptr,
        0,
        base,
        next == kBlock ? rows[1 - at] : nullptr};
    isa.attend_block[dtype](one);
    n = next;
  }
  for (int64_t h = 0; h < heads; ++h, own += job.record, state += job.record) {
    if (isa.settle[dtype] != nullptr) isa.settle[dtype](own, dim);
    const float top = std::max(state[dim], own[dim]);
    const float before = std::exp(state[dim] - top), now = std::exp(own[dim] - top);
    state[dim] = top;
    state[dim + 1] = before * state[dim + 1] + now * own[dim + 1];
    for (int64_t d = 0; d < dim; ++d) state[d] = before * state[d] + now * own[d];
  }
}

// Asks for outliers from `number` of starts on, two lines of them.
void ask_outliers(const Nuq& nuq, int64_t number) {
  const int64_t first = nuq.starts[number];
  if (first < 0 || first + 32 > nuq.outlier_count) return;
  __builtin_prefetch(nuq.outliers + 2 * first);
  __builtin_prefetch(nuq.outliers + 2 * first + 32);
}

// A tile of KVQuant's codes becomes the `at`-th of a chunk; `later` is read next in its place, for
// kv head `next_head`, or nullptr.
void put_nuq(const Job& job, const Tile& tile, int64_t kv_head, const Tile* later,
             int64_t next_head, int at, PackedChunk& chunk, NuqChunk& to) {
  const PackedLayout& l = job.layout;
  const Nuq& nuq = job.packed.nuq;
  const int64_t heads = job.p.kv_heads, id = job.id_of(tile);
  const int64_t first = static_cast<int64_t>(tile.number / 2) * kTurned * (l.dim / 2);
  const auto* norms = reinterpret_cast<const uint8_t*>(nuq.values + id * 2 * kBlock);
  to.value_norms[at] = norms;
  chunk.nuq = &to;
  to.key_scale = nuq.keys + kv_head * 2 * l.dim;
  to.key_offset = to.key_scale + l.dim;
  to.turn_cos = job.turn_cos;
  to.turn_sin = job.turn_sin;
  to.odd[at] = tile.number % 2;
  to.cos[at] = nuq.cos + first;
  to.sin[at] = nuq.sin + first;
  for (int of = 0; of < 2; ++of) {
    to.outliers[of][at] =
        outliers_of(job.packed, l, "attend_packed", heads, id, kv_head, of, &to.count[of][at]);
    if (later != nullptr) {
      ask_outliers(nuq, job.id_of(*later) * (2 * heads + 1) + of * heads + next_head);
    }
  }
}

}  // namespace

void attend_tiles(const Job& job, const std::vector<Tile>& tiles, int64_t first, int64_t last,
                  int64_t row, int64_t kv_head, int64_t head, int64_t heads, float* state,
                  int64_t jump, int64_t next_head) {
  const PackedLayout& l = job.layout;
  for (int64_t i = first; i < last;) {
    const Tile& tile = tiles[static_cast<size_t>(i)];
    if (tile.block == nullptr) {
      while (i < last && tiles[static_cast<size_t>(i)].block == nullptr) ++i;
      attend_pool_tiles(job, &tile, tiles.data() + i, row, kv_head, head, heads, state);
      continue;
    }
    if (job.fast == nullptr || !tile.whole) {
      attend_tile(job, tile, row, kv_head, head, heads, state);
      ++i;
      continue;
    }
    PackedChunk chunk;  // every tile's part of it is set below
    NuqChunk nuq;
    chunk.tiles = 0;
    chunk.nuq = nullptr;
    for (; i < last && tiles[static_cast<size_t>(i)].whole; ++i, ++chunk.tiles) {
      const Tile& one = tiles[static_cast<size_t>(i)];
      const int at = chunk.tiles;
      chunk.block[at] = one.block + kv_head * l.bytes;
      chunk.tile[at] = one.within;
      chunk.listed[at] = one.listed;
      const size_t later = static_cast<size_t>(i + kChunk);
      const bool follows = jump == 0 && later < tiles.size() && tiles[later].whole;
      if (job.packed.nuq.keys != nullptr) {
        const Tile* next = jump > 0 ? &one : follows ? &tiles[later] : nullptr;
        put_nuq(job, one, kv_head, next, jump > 0 ? kv_head + 1 : next_head, at, chunk, nuq);
      }
      chunk.next[at] = nullptr;
      if (jump > 0) chunk.next[at] = chunk.block[at] + jump;
      if (follows) {
        chunk.next[at] = tiles[later].block + next_head * l.bytes +
                         (tiles[later].within - one.within) * l.tile_bytes;
      }
    }
    chunk.layout = &l;
    chunk.levels = job.packed.levels;
    chunk.q = job.q + (row * job.heads + head) * l.dim;
    chunk.heads = heads;
    chunk.scale = job.scale;
    chunk.stride = job.record;
    chunk.maximum = state + l.dim;
    chunk.total = state + l.dim + 1;
    chunk.sum = state;
    job.fast(chunk);
  }
}

}  // namespace packed_attention
}  // namespace cpu
}  // namespace quest
