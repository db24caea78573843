// Attention over packed tokens where they are packed, and over the pool's where they are not: the
// splits of every list, and their merge. Rows of which nothing is packed are attend's, bit for bit.
#include <algorithm>
#include <cmath>
#include <memory>

#include "packed_job.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace packed_attention {
namespace {

constexpr int64_t kSplit = 64;  // tiles
constexpr int64_t kRowsOfTask = 64;
static_assert(kSplit % kChunk == 0, "a split holds whole chunks");

bool anything_packed(const Packed& packed, int64_t row) {
  return packed.keys[row] > 0 || packed.values[row] > 0;
}

// Splits of the lists of rows [row, row + rows) for kv heads [kv_head, + kv_heads): all query heads
// of these, or `query_head` alone.
struct Task {
  int64_t row, rows, kv_head, kv_heads, query_head, list, split;
};

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
}  // namespace packed_attention

void attend_packed(const Pages& p, const Packed& packed, const void* q, int64_t heads,
                   const int32_t* lengths, const Selection& selection, float scale,
                   const Attended& result, int threads) {
  using namespace packed_attention;
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
          q,
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
