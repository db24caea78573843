// Attention over packed tokens where they are packed, and over the pool's where they are not.
//
// A list's tokens become tiles of kBlock tokens with a bit for each that is listed, in list order.
// kSplit tiles are a split, kChunk of them a chunk, counted in list positions: equal lists give
// equal bits, whatever the batch, the threads and the spelling of the list. Tiles that are packed
// whole go chunk by chunk where the instruction set has a fast path; others are widened to fp32,
// token by token from where each lies, and go through attend_block. Rows of which nothing is packed
// are attend's, bit for bit.
#include <algorithm>
#include <cmath>
#include <memory>

#include "lists.h"
#include "packed.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

constexpr int64_t kSplit = 64;  // tiles
constexpr int64_t kRowsOfTask = 64;
static_assert(kSplit % kChunk == 0, "a split holds whole chunks");

// Tokens of one tile of a row.
struct Tile {
  const uint8_t* block;  // of kv head 0; nullptr: nothing here is packed
  int32_t number;        // in the row
  int32_t within;        // in its block
  uint16_t listed;
  bool whole;  // every listed key and value is packed
};

struct Job {
  const Pages& p;
  const Packed& packed;
  const PackedLayout layout;
  const int32_t* lengths;
  const Selection& selection;
  int64_t heads, group;
  float scale;
  const Attended& result;
  const float* q;                        // [R, H, D]
  std::vector<std::vector<Tile>> tiles;  // of each row's lists
  int64_t splits;                        // of the longest list
  float* state;                          // [R, splits, H, record], as in attend.cpp
  int64_t record;
  void (*fast)(const PackedChunk&);
  const float *turn_cos, *turn_sin;  // of NuqChunk

  int64_t lists() const { return selection.index == nullptr ? 1 : selection.lists; }
  const std::vector<Tile>& of(int64_t row, int64_t list) const {
    return tiles[static_cast<size_t>(row * lists() + list)];
  }
  float* of(int64_t row, int64_t split, int64_t head) const {
    return state + ((row * splits + split) * heads + head) * record;
  }
};

bool anything_packed(const Packed& packed, int64_t row) {
  return packed.keys[row] > 0 || packed.values[row] > 0;
}

// The tiles of tokens [first, last) go behind those that are there.
void add_run(const Job& job, int64_t row, int64_t first, int64_t last, std::vector<Tile>& tiles) {
  const int64_t some = std::max(job.packed.keys[row], job.packed.values[row]);
  const int64_t both = std::min(job.packed.keys[row], job.packed.values[row]);
  while (first < last) {
    const int64_t number = first / kBlock, end = std::min(last, (number + 1) * kBlock);
    const uint32_t upto = (1u << (end - number * kBlock)) - 1u;
    const auto listed = static_cast<uint16_t>(upto & ~((1u << first % kBlock) - 1u));
    const bool whole = first >= job.packed.nuq.sinks && end <= both;
    if (!tiles.empty() && tiles.back().number == number) {
      tiles.back().listed = static_cast<uint16_t>(tiles.back().listed | listed);
      tiles.back().whole = tiles.back().whole && whole;
    } else {
      const uint8_t* block = nullptr;
      if (number * kBlock < some) {
        block = packed_block(job.packed, job.layout, "attend_packed", job.p.kv_heads, row,
                             number * kBlock / job.layout.group);
      }
      const int64_t within = number % (job.layout.group / kBlock);
      tiles.push_back(
          {block, static_cast<int32_t>(number), static_cast<int32_t>(within), listed, whole});
    }
    first = end;
  }
}

void make_tiles(const Job& job, int64_t row, int64_t list, std::vector<Tile>& tiles) {
  const Selection& s = job.selection;
  const int64_t length = job.lengths[row], at = row * s.lists + list;
  if (s.index == nullptr || s.count[at] < 0) {
    add_run(job, row, 0, length, tiles);
    return;
  }
  const int64_t size = s.unit == Unit::kPages ? job.p.page_size : 1;
  for (int64_t i = 0; i < s.count[at]; ++i) {
    const int64_t first = s.index[at * s.width + i] * size;
    add_run(job, row, first, std::min(first + size, length), tiles);
  }
}

// Splits of the lists of rows [row, row + rows) for kv heads [kv_head, + kv_heads): all query heads
// of these, or `query_head` alone.
struct Task {
  int64_t row, rows, kv_head, kv_heads, query_head, list, split;
};

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
  const int64_t heads = job.p.kv_heads, id = (tile.block - job.packed.data) / (heads * l.bytes);
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
    if (tile.block == nullptr || ends[of] <= first) continue;
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
  const int64_t heads = job.p.kv_heads, id = (tile.block - job.packed.data) / (heads * l.bytes);
  const int64_t first = static_cast<int64_t>(tile.number / 2) * kTurned * (l.dim / 2);
  const auto* norms = reinterpret_cast<const uint8_t*>(nuq.values + id * 2 * kBlock);
  chunk.value_minima[at] = norms;
  chunk.value_scales[at] = norms + 2 * kBlock;
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
      const int64_t next = (later->block - job.packed.data) / (heads * l.bytes);
      ask_outliers(nuq, next * (2 * heads + 1) + of * heads + next_head);
    }
  }
}

// Tiles [first, last) of one list; `jump` bytes behind each block lies the one that is read next,
// 0: the block of the tile kChunk further on, for kv head `next_head`; < 0: not to be asked for.
void attend_tiles(const Job& job, const std::vector<Tile>& tiles, int64_t first, int64_t last,
                  int64_t row, int64_t kv_head, int64_t head, int64_t heads, float* state,
                  int64_t jump, int64_t next_head) {
  const PackedLayout& l = job.layout;
  for (int64_t i = first; i < last;) {
    const Tile& tile = tiles[static_cast<size_t>(i)];
    if (job.fast == nullptr || !tile.whole) {
      attend_tile(job, tile, row, kv_head, head, heads, state);
      ++i;
      continue;
    }
    PackedChunk chunk{};
    NuqChunk nuq{};
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
      } else {
        const int64_t values = 2 * one.within * kBlock;
        chunk.value_scales[at] = chunk.block[at] + l.value_scales + values;
        chunk.value_minima[at] = chunk.block[at] + l.value_minima + values;
      }
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

void run(const Job& job, const Task& t) {
  const int64_t from = t.split * kSplit, heads = t.query_head < 0 ? job.group : 1;
  const auto head_of = [&](int64_t kv_head) {
    return t.query_head < 0 ? kv_head * job.group : t.query_head;
  };
  int64_t ends[kRowsOfTask], most = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    const auto tiles = static_cast<int64_t>(job.of(t.row + i, t.list).size());
    ends[i] = std::min(tiles, from + kSplit);
    most = std::max(most, ends[i]);
    for (int64_t k = head_of(t.kv_head);
         ends[i] > from && k < head_of(t.kv_head) + heads * t.kv_heads; ++k) {
      float* state = job.of(t.row + i, t.split, k);
      std::fill(state, state + job.p.dim, 0.0f);
      state[job.p.dim] = kNever;
      state[job.p.dim + 1] = 0.0f;
    }
  }
  const int64_t last = t.kv_head + t.kv_heads - 1;
  for (int64_t first = from; first < most; first += kChunk) {
    for (int64_t h = t.kv_head; h <= last; ++h) {
      for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = t.row + i;
        attend_tiles(job, job.of(row, t.list), first, std::min(ends[i], first + kChunk), row, h,
                     head_of(h), heads, job.of(row, t.split, head_of(h)),
                     i > 0      ? -1
                     : h < last ? job.layout.bytes
                                : 0,
                     t.kv_head);
      }
    }
  }
}

// The splits of one query head, merged in order.
void merge(const Job& job, int64_t row, int64_t head) {
  const Pages& p = job.p;
  const int64_t list = head * job.lists() / job.heads, at = row * job.heads + head;
  const int64_t splits = (static_cast<int64_t>(job.of(row, list).size()) + kSplit - 1) / kSplit;
  float top = kNever, total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) top = std::max(top, job.of(row, s, head)[p.dim]);
  static thread_local std::vector<float> merged;
  float* out = scratch(merged, p.dim);
  std::fill(out, out + p.dim, 0.0f);
  for (int64_t s = 0; s < splits; ++s) {
    const float* sum = job.of(row, s, head);
    const float weight = std::exp(sum[p.dim] - top);
    total += weight * sum[p.dim + 1];
    for (int64_t d = 0; d < p.dim; ++d) out[d] += weight * sum[d];
  }
  const float inverse = 1.0f / total;
  for (int64_t d = 0; d < p.dim; ++d) out[d] *= inverse;
  narrow_from(out, job.result.out, p.dtype, at * p.dim, p.dim);
  job.result.lse[at] = top + std::log(total);
  job.result.attended[at] =
      static_cast<int32_t>(named_tokens(p, job.lengths, job.selection, row, list));
}

// Every split of every list of rows of which something is packed. Rows whose first block is the
// same are one task: they share it.
std::vector<Task> tasks_of(const Job& job) {
  const Pages& p = job.p;
  const Selection& selection = job.selection;
  std::vector<Task> tasks;
  const auto add = [&](int64_t row, int64_t rows, int64_t h, int64_t some, int64_t query_head,
                       int64_t list) {
    size_t most = 0;
    for (int64_t r = row; r < row + rows; ++r) most = std::max(most, job.of(r, list).size());
    // The last split first: it has the tokens that are not packed, which take longest.
    for (int64_t s = (static_cast<int64_t>(most) + kSplit - 1) / kSplit - 1; s >= 0; --s) {
      tasks.push_back({row, rows, h, some, query_head, list, s});
    }
  };
  const auto first_block = [&](int64_t row) {
    return job.packed.table[row * job.packed.row_blocks];
  };
  for (int64_t row = 0; row < p.rows;) {
    int64_t rows = 1;
    if (!anything_packed(job.packed, row)) {
      ++row;
      continue;
    }
    if (selects_all(selection, row)) {
      while (rows < kRowsOfTask && row + rows < p.rows && selects_all(selection, row + rows) &&
             anything_packed(job.packed, row + rows) &&
             first_block(row + rows) == first_block(row)) {
        ++rows;
      }
      add(row, rows, 0, p.kv_heads, -1, 0);
    } else if (selection.lists == 1) {
      add(row, 1, 0, p.kv_heads, -1, 0);
    } else if (selection.lists == p.kv_heads) {
      for (int64_t h = 0; h < p.kv_heads; ++h) add(row, 1, h, 1, -1, h);
    } else {
      for (int64_t k = 0; k < job.heads; ++k) add(row, 1, k / job.group, 1, k, k);
    }
    row += rows;
  }
  return tasks;
}

// One row of a call, as a call of its own.
void attend_unpacked(const Job& job, const void* q, int64_t row, int threads) {
  const int64_t bytes = bytes_of(job.p.dtype), heads = job.heads, dim = job.p.dim;
  Pages p = job.p;
  p.page_table += row * p.row_pages;
  p.rows = 1;
  Selection s = job.selection;
  if (s.index != nullptr) {
    s.index += row * s.lists * s.width;
    s.count += row * s.lists;
  }
  const Attended& all = job.result;
  const Attended one{static_cast<char*>(all.out) + row * heads * dim * bytes,
                     all.attended + row * heads,
                     all.read + row * p.kv_heads,
                     all.lse + row * heads,
                     nullptr,
                     0};
  attend(p, static_cast<const char*>(q) + row * heads * dim * bytes, nullptr, 0, heads,
         job.lengths + row, s, job.scale, one, threads);
}

}  // namespace

void attend_packed(const Pages& p, const Packed& packed, const void* q, int64_t heads,
                   const int32_t* lengths, const Selection& selection, float scale,
                   const Attended& result, int threads) {
  check_lengths(p, "attend_packed", lengths);
  check_packed(packed, "attend_packed", p.rows, 0, lengths);
  check_counts(p, selection);
  count_read(p, lengths, selection, result.read, threads);
  static thread_local std::vector<float> queries, workspace;
  const int64_t all = p.rows * heads * p.dim;
  float* wide = scratch(queries, all);
  widen_to(wide, q, p.dtype, 0, all);
  constexpr int64_t kLine = 64 / sizeof(float);
  Job job{p,
          packed,
          layout_of(packed, p.dim),
          lengths,
          selection,
          heads,
          heads / p.kv_heads,
          scale,
          result,
          wide,
          {},
          0,
          nullptr,
          (p.dim + 2 + kLine - 1) / kLine * kLine,
          nullptr,
          nullptr,
          nullptr};
  if (p.dtype == DType::kBFloat16 && p.dim % 16 == 0 && p.dim <= 256 && packed.bits <= 4 &&
      (packed.nuq.keys == nullptr || packed.nuq.positions >= kTurned)) {
    job.fast = current_isa().packed_chunk;
  }
  static thread_local std::vector<float> turns;
  if (job.fast != nullptr && packed.nuq.keys != nullptr) {
    const int64_t half = p.dim / 2;
    float* turn = scratch(turns, 2 * half * kTurned);
    for (int64_t i = 0; i < half * kTurned; ++i) {
      turn[i] = packed.nuq.cos[i % kTurned * half + i / kTurned];
      turn[half * kTurned + i] = packed.nuq.sin[i % kTurned * half + i / kTurned];
    }
    job.turn_cos = turn;
    job.turn_sin = turn + half * kTurned;
  }
  job.tiles.resize(static_cast<size_t>(p.rows * job.lists()));
  for (int64_t i = 0; i < p.rows * job.lists(); ++i) {
    const int64_t row = i / job.lists();
    std::vector<Tile>& tiles = job.tiles[static_cast<size_t>(i)];
    if (!anything_packed(packed, row)) continue;
    tiles.reserve(static_cast<size_t>(lengths[row] / kBlock + 1));
    make_tiles(job, row, i % job.lists(), tiles);
    const int64_t splits = (static_cast<int64_t>(tiles.size()) + kSplit - 1) / kSplit;
    job.splits = std::max(job.splits, splits);
  }
  void* state = scratch(workspace, p.rows * heads * job.splits * job.record + kLine);
  size_t space = workspace.size() * sizeof(float);
  std::align(64, 1, state, space);
  job.state = static_cast<float*>(state);
  const std::vector<Task> tasks = tasks_of(job);
  parallel(static_cast<int64_t>(tasks.size()), threads,
           [&](int64_t i) { run(job, tasks[static_cast<size_t>(i)]); });
  parallel(p.rows * p.kv_heads, job.splits * p.rows * heads > 512 ? threads : 1, [&](int64_t i) {
    const int64_t row = i / p.kv_heads, first = i % p.kv_heads * job.group;
    if (!anything_packed(packed, row)) return;
    for (int64_t k = first; k < first + job.group; ++k) merge(job, row, k);
  });
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!anything_packed(packed, row)) attend_unpacked(job, q, row, threads);
  }
}

}  // namespace cpu
}  // namespace quest
