// Attention of one query a row, in one pass over the keys and values.
//
// A list's tokens are taken in blocks of kBlock, in list order, with a running softmax; kSplit
// tokens are a split, which is a task of its own, and splits are merged in order. Blocks and splits
// are counted in list positions, so equal lists give equal bits, whatever the batch, the threads
// and the spelling of the list.
//
// Where all heads read the same tokens, blocks are outermost and heads inside: memory is then read
// in its own order (a page of all heads is contiguous), and rows that share their prefix attend to
// a block together while it is in the nearest cache.
#include <algorithm>
#include <cmath>
#include <memory>

#include "list.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

constexpr int64_t kSplit = 1024;
constexpr int64_t kRowsOfTask = 64;
constexpr int64_t kTasksOfThread = 2;  // at least, where there are so many
static_assert(kSplit % kBlock == 0, "a split holds whole blocks");

struct Job {
  const Pages& p;
  const void* q;
  const void* rolled_query;
  int64_t rolled, heads, group;
  const int32_t* lengths;
  const Selection& selection;
  float scale;
  const Attended& result;
  int64_t splits;  // of the longest list
  // [R, splits, H, record]: a sum over D, then the maximum and the total. A record fills whole
  // lines of the cache, since splits are worked on at the same time, and those of a task lie
  // together.
  float* state;
  int64_t record;

  float* of(int64_t row, int64_t split, int64_t head) const {
    return state + ((row * splits + split) * heads + head) * record;
  }
};

// Tokens [first, last) of the lists of rows [row, row + rows) for kv heads [kv_head, + kv_heads):
// all query heads of these, or `query_head` alone.
struct Task {
  int64_t row, rows, kv_head, kv_heads, query_head, list, split;
};

void attend_block(const Job& job, const Isa& isa, const Block& block, int64_t row, int64_t head,
                  int64_t heads, int64_t kv_head, int64_t split, int64_t first, int64_t rolled,
                  const Block& next, int64_t next_kv_head, bool fetch) {
  const Pages& p = job.p;
  const int64_t bytes = bytes_of(p.dtype), from = row * job.heads + head;
  const Attended& r = job.result;
  float* state = job.of(row, split, head);
  const AttendBlock one{
      static_cast<const char*>(job.q) + from * p.dim * bytes,
      rolled > 0 ? static_cast<const char*>(job.rolled_query) + from * p.dim * bytes : nullptr,
      static_cast<int>(rolled),
      heads,
      p.dim,
      static_cast<const char*>(p.kv) + kv_head * 2 * p.page_size * p.dim * bytes,
      block.key,
      p.page_size,
      block.n,
      job.scale,
      job.record,
      state + p.dim,
      state + p.dim + 1,
      state,
      r.probabilities == nullptr ? nullptr : r.probabilities + from * r.probability_width + first,
      r.probability_width,
      static_cast<const char*>(p.kv) + next_kv_head * 2 * p.page_size * p.dim * bytes,
      fetch ? next.key : nullptr};
  isa.attend_block[static_cast<int>(p.dtype)](one);
}

// Asks for the beginning of a block's keys and of its values, long before they are read: the
// processor's own prefetcher stops where a page of memory ends, and follows the next one once it
// has seen some lines of it. Always inline: gcc drops calls of what only prefetches.
__attribute__((always_inline)) inline void lead(const Pages& p, const Block& block,
                                                int64_t kv_head) {
  constexpr int kLead = 512;
  if (block.n == 0) return;
  const int64_t row = p.dim * bytes_of(p.dtype), values = p.page_size * row;
  const char* keys = static_cast<const char*>(p.kv) + kv_head * 2 * values + block.key[0] * row;
  for (int i = 0; i < kLead; i += 64) {
    __builtin_prefetch(keys + i);
    __builtin_prefetch(keys + values + i);
  }
}

// Nothing attended yet, for all query heads that a task serves.
void start(const Job& job, const Task& t, int64_t row, int64_t heads) {
  const int64_t head = t.query_head < 0 ? t.kv_head * job.group : t.query_head;
  for (int64_t k = head; k < head + heads * t.kv_heads; ++k) {
    float* state = job.of(row, t.split, k);
    std::fill(state, state + job.p.dim, 0.0f);
    state[job.p.dim] = kNever;
    state[job.p.dim + 1] = 0.0f;
  }
}

void run(const Job& job, const Task& t) {
  const Isa& isa = current_isa();
  const int64_t from = t.split * kSplit;
  const int64_t heads = t.query_head < 0 ? job.group : 1;
  List lists[kRowsOfTask];
  Block blocks[3][kRowsOfTask];
  int64_t ends[kRowsOfTask], most = 0;
  const bool scattered =
      t.kv_heads == 1 && job.selection.unit == Unit::kPages && !selects_all(job.selection, t.row);
  for (int64_t i = 0; i < t.rows; ++i) {
    lists[i] = List(job.p, job.lengths, job.selection, t.row + i, t.list);
    ends[i] = std::min(lists[i].tokens(), from + kSplit);
    most = std::max(most, ends[i]);
    for (int64_t k = 0; k < 2; ++k) {
      lists[i].locate(from + k * kBlock, ends[i], blocks[k][i]);
      if (scattered) lead(job.p, blocks[k][i], t.kv_head);
    }
    if (ends[i] > from) start(job, t, t.row + i, heads);
  }
  const int64_t rolled = lists[0].all() ? 0 : job.rolled;
  Block *now = blocks[0], *later = blocks[1], *beyond = blocks[2];
  for (int64_t first = from; first < most; first += kBlock) {
    for (int64_t i = 0; i < t.rows; ++i) {
      lists[i].locate(first + 2 * kBlock, ends[i], beyond[i]);
      if (scattered) lead(job.p, beyond[i], t.kv_head);
    }
    const int64_t turned = std::max<int64_t>(0, std::min<int64_t>(rolled - first, kBlock));
    for (int64_t i = 0, next; i < t.rows; i = next) {
      const Block& block = now[i];
      for (next = i + 1; next < t.rows && now[next].n == block.n; ++next) {
        if (!std::equal(block.key, block.key + block.n, now[next].key)) break;
      }
      if (block.n == 0) continue;
      // What is read after this head: the same block for the next one, or the next block.
      const Block& after = next < t.rows ? now[next] : later[0].n > 0 ? later[0] : block;
      const int64_t last = t.kv_head + t.kv_heads - 1;
      for (int64_t h = t.kv_head; h <= last; ++h) {
        const int64_t head = t.query_head < 0 ? h * job.group : t.query_head;
        for (int64_t k = i; k < next; ++k) {
          attend_block(job, isa, block, t.row + k, head, heads, h, t.split, first, turned,
                       h < last ? block : after, h < last ? h + 1 : t.kv_head, k == i);
        }
      }
    }
    Block* const done = now;
    now = later;
    later = beyond;
    beyond = done;
  }
}

// The splits of one query head, merged in order.
void merge(const Job& job, int64_t row, int64_t head) {
  const Pages& p = job.p;
  const int64_t lists = job.selection.index == nullptr ? 1 : job.selection.lists;
  const int64_t list = head * lists / job.heads, at = row * job.heads + head;
  const int64_t n = named_tokens(p, job.lengths, job.selection, row, list);
  const int64_t splits = (n + kSplit - 1) / kSplit;
  const auto maximum = [&](int64_t split) { return job.of(row, split, head)[p.dim]; };
  float top = maximum(0), total = 0.0f;
  for (int64_t s = 1; s < splits; ++s) top = maximum(s) > top ? maximum(s) : top;
  static thread_local std::vector<float> merged;
  float* out = scratch(merged, p.dim);
  std::memset(out, 0, static_cast<size_t>(p.dim) * 4);
  for (int64_t s = 0; s < splits; ++s) {
    const float* sum = job.of(row, s, head);
    const float weight = std::exp(maximum(s) - top);
    total += weight * sum[p.dim + 1];
    for (int64_t d = 0; d < p.dim; ++d) out[d] += weight * sum[d];
  }
  const auto settle = current_isa().settle[static_cast<int>(p.dtype)];
  if (settle != nullptr) settle(out, p.dim);
  const float inverse = 1.0f / total;
  for (int64_t d = 0; d < p.dim; ++d) out[d] *= inverse;
  narrow_from(out, job.result.out, p.dtype, at * p.dim, p.dim);
  job.result.lse[at] = top + std::log(total);
  job.result.attended[at] = static_cast<int32_t>(n);
  if (job.result.probabilities != nullptr) {
    const int64_t width = job.result.probability_width;
    float* to = job.result.probabilities + at * width;
    current_isa().probabilities(to, n, top, inverse);
    std::fill(to + n, to + width, 0.0f);
  }
}

// Every split of every list, once. Rows whose first page is the same are one task: they share it.
// Where that leaves threads without work, kv heads that read the same tokens are parted.
std::vector<Task> tasks_of(const Job& job, int threads) {
  const Pages& p = job.p;
  const Selection& selection = job.selection;
  std::vector<Task> tasks;
  int64_t parts = 1;
  while (threads > 1 && p.kv_heads % (2 * parts) == 0 &&
         p.rows * job.splits * parts < kTasksOfThread * threads) {
    parts *= 2;
  }
  const auto add = [&](int64_t row, int64_t rows, int64_t h, int64_t some, int64_t query_head,
                       int64_t list) {
    int64_t most = 0;
    for (int64_t r = row; r < row + rows; ++r) {
      most = std::max(most, named_tokens(p, job.lengths, selection, r, list));
    }
    for (int64_t s = 0; s * kSplit < most; ++s) {
      tasks.push_back({row, rows, h, some, query_head, list, s});
    }
  };
  const auto all_heads = [&](int64_t row, int64_t rows) {
    const int64_t some = p.kv_heads / parts;
    for (int64_t h = 0; h < p.kv_heads; h += some) add(row, rows, h, some, -1, 0);
  };
  for (int64_t row = 0; row < p.rows;) {
    int64_t rows = 1;
    if (selects_all(selection, row)) {
      const int32_t* first = p.page_table + row * p.row_pages;
      while (rows < kRowsOfTask && row + rows < p.rows && selects_all(selection, row + rows) &&
             first[rows * p.row_pages] == *first) {
        ++rows;
      }
      all_heads(row, rows);
    } else if (selection.lists == 1) {
      all_heads(row, 1);
    } else if (selection.lists == p.kv_heads) {
      for (int64_t h = 0; h < p.kv_heads; ++h) add(row, 1, h, 1, -1, h);
    } else {
      for (int64_t k = 0; k < job.heads; ++k) add(row, 1, k / job.group, 1, k, k);
    }
    row += rows;
  }
  return tasks;
}

}  // namespace

int64_t listed_tokens(const Pages& p, const int32_t* lengths, const Selection& selection) {
  check_lengths(p, "attend", lengths);
  check_counts(p, selection);
  int64_t most = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t i = 0; i < (selection.index == nullptr ? 1 : selection.lists); ++i) {
      most = std::max(most, named_tokens(p, lengths, selection, r, i));
    }
  }
  return most;
}

void attend(const Pages& p, const void* q, const void* rolled_query, int64_t rolled, int64_t heads,
            const int32_t* lengths, const Selection& selection, float scale, const Attended& result,
            int threads) {
  const int64_t splits = (listed_tokens(p, lengths, selection) + kSplit - 1) / kSplit;
  constexpr int64_t kLine = 64 / sizeof(float);
  const int64_t record = (p.dim + 2 + kLine - 1) / kLine * kLine;
  static thread_local std::vector<float> workspace;
  void* state = scratch(workspace, p.rows * heads * splits * record + kLine);
  size_t space = workspace.size() * sizeof(float);
  std::align(64, 1, state, space);
  const Job job{p,       q,         rolled_query, rolled, heads,  heads / p.kv_heads,
                lengths, selection, scale,        result, splits, static_cast<float*>(state),
                record};
  count_read(p, lengths, selection, result.read, threads);
  const std::vector<Task> tasks = tasks_of(job, threads);
  parallel(static_cast<int64_t>(tasks.size()), threads,
           [&](int64_t i) { run(job, tasks[static_cast<size_t>(i)]); });
  parallel(p.rows * p.kv_heads, splits * p.rows * heads > 512 ? threads : 1, [&](int64_t i) {
    const int64_t row = i / p.kv_heads, h = i % p.kv_heads;
    for (int64_t k = h * job.group; k < (h + 1) * job.group; ++k) merge(job, row, k);
  });
}

}  // namespace cpu
}  // namespace quest
