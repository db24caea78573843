#include <algorithm>
#include <cmath>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

constexpr int64_t kPart = 128;  // pages of a task

template <typename T>
std::vector<T>& mine() {
  static thread_local std::vector<T> one;
  return one;
}

// Logical pages [0, count) of a row in the order in which they lie in memory, which is read much
// faster in its own order: a radix sort by the page's id, 11 bits a pass. Whether they lay so.
bool in_memory_order(const Pages& p, int64_t row, int64_t count, int32_t* order, int32_t* space) {
  constexpr int kBits = 11;
  const int32_t* id = p.page_table + row * p.row_pages;
  check_pages(p, "page_scores", row, count);
  uint32_t falls = 0;
  for (int64_t i = 1; i < count; ++i) falls |= id[i] < id[i - 1] ? 1u : 0u;
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  for (int shift = 0; falls != 0 && p.pages >> shift > 0; shift += kBits) {
    int32_t place[1 << kBits] = {};
    const auto digit = [&](int32_t i) { return id[i] >> shift & ((1 << kBits) - 1); };
    for (int64_t i = 0; i < count; ++i) ++place[digit(order[i])];
    int32_t sum = 0;
    for (int32_t& one : place) {
      const int32_t many = one;
      one = sum;
      sum += many;
    }
    for (int64_t i = 0; i < count; ++i) space[place[digit(order[i])]++] = order[i];
    std::memcpy(order, space, static_cast<size_t>(count) * sizeof(int32_t));
  }
  return falls == 0;
}

// [a | b] against [maximum | minimum]: the bound is one dot product of twice the width.
struct Weights {
  std::vector<float> wide;         // [H, 2 D]
  std::vector<uint16_t> narrowed;  // the same in bf16, where that loses nothing
  bool exact = false;
  // For metadata in int8: weights that hold the scale, [H, 2 D], and what the offset adds, [H].
  std::vector<float> scaled, added;
  std::vector<uint16_t> scaled_narrowed;
  bool scaled_exact = false;

  void make(const Pages& p, const void* q, int64_t head, int64_t heads, float radius_scale) {
    const int64_t dim = p.dim;
    float* to = scratch(wide, heads * 2 * dim);
    uint16_t* less = scratch(narrowed, heads * 2 * dim);
    uint32_t lost = p.dtype == DType::kBFloat16 ? 0 : 1;
    for (int64_t i = 0; i < heads; ++i, to += 2 * dim, less += 2 * dim) {
      widen_to(to + dim, q, p.dtype, (head + i) * dim, dim);
      for (int64_t d = 0; d < dim; ++d) {
        const float x = to[dim + d], spread = radius_scale * std::fabs(x);
        to[d] = (x + spread) * 0.5f;
        to[dim + d] = (x - spread) * 0.5f;
      }
      lost |= halve(to, 2 * dim, less);
    }
    exact = lost == 0;
  }

  // The upper halves of x, which are x in bf16, and the bits of all that this loses.
  static uint32_t halve(const float* x, int64_t count, uint16_t* out) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      out[i] = static_cast<uint16_t>(bits >> 16);
      lost |= bits & 0xffffu;
    }
    return lost;
  }

  void scale(const Pages& p, const ByteMeta& bytes, int64_t row, int64_t heads) {
    const int64_t width = 2 * p.dim, group = heads / p.kv_heads;
    float* to = scratch(scaled, heads * width);
    float* constant = scratch(added, heads);
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t from = (row * p.kv_heads + i / group) * width;
      const float *weight = wide.data() + i * width, *offset = bytes.offset + from;
      for (int64_t d = 0; d < width; ++d) to[i * width + d] = weight[d] * bytes.scale[from + d];
      double high = 0.0, low = 0.0;
      for (int64_t d = 0; d < p.dim; ++d) {
        high += static_cast<double>(weight[d]) * static_cast<double>(offset[d]);
        low += static_cast<double>(weight[p.dim + d]) * static_cast<double>(offset[p.dim + d]);
      }
      constant[i] = static_cast<float>(high + low);
    }
    uint16_t* less = scratch(scaled_narrowed, heads * width);
    scaled_exact = halve(to, heads * width, less) == 0;
  }
};

// A page's scores, a query head each.
float* space(int64_t heads) {
  static thread_local std::vector<float> one;
  return scratch(one, heads);
}

struct Scoring {
  const Pages& p;
  const ByteMeta& bytes;
  const Weights& weights;
  int64_t row, heads, group;
  Reduce reduce;

  const char* meta(int64_t page) const {
    const int64_t at = p.page_table[row * p.row_pages + page] * p.kv_heads * 2 * p.dim;
    if (bytes.values != nullptr) return reinterpret_cast<const char*>(bytes.values + at);
    return static_cast<const char*>(p.meta) + at * bytes_of(p.dtype);
  }

  // out [heads or kv heads]
  void closed(const void* meta, const void* next, float* out) const {
    if (bytes.values == nullptr) return score(meta, next, out);
    float* score = space(heads);
    const Isa& isa = current_isa();
    const bool narrow = weights.scaled_exact && isa.page_pairs_int8 != nullptr;
    const auto dots = narrow ? isa.page_pairs_int8 : isa.page_dots_int8;
    const void* by = narrow ? static_cast<const void*>(weights.scaled_narrowed.data())
                            : static_cast<const void*>(weights.scaled.data());
    dots(by, heads, group, 2 * p.dim, meta, next, score);
    for (int64_t k = 0; k < heads; ++k) score[k] += weights.added[static_cast<size_t>(k)];
    put(score, out);
  }

  // One page: all its heads, whose metadata lies side by side, in the dtype of the keys.
  void score(const void* meta, const void* next, float* out) const {
    const Isa& isa = current_isa();
    float* score = space(heads);
    const bool narrow = weights.exact && isa.page_pairs != nullptr;
    const auto dots = narrow ? isa.page_pairs : isa.page_dots[static_cast<int>(p.dtype)];
    const void* by = narrow ? static_cast<const void*>(weights.narrowed.data())
                            : static_cast<const void*>(weights.wide.data());
    dots(by, heads, group, 2 * p.dim, meta, next, score);
    put(score, out);
  }

  void put(const float* score, float* out) const {
    if (reduce == Reduce::kPerQuery) {
      std::copy(score, score + heads, out);
      return;
    }
    const Fold fold = current_isa().fold;
    if (fold != nullptr && group <= kFolded) {
      fold(score, p.kv_heads, group, reduce == Reduce::kMean, out);
      return;
    }
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      float total = score[h * group];
      for (int64_t i = 1; i < group; ++i) {
        const float x = score[h * group + i];
        total = reduce == Reduce::kMax ? (x > total || x != x ? x : total) : total + x;
      }
      if (reduce == Reduce::kMean) total /= static_cast<float>(group);
      out[h] = total;
    }
  }

  // The page that is not full yet: its metadata is made for the occasion.
  void open(int64_t page, int64_t length, float* out) const {
    const Isa& isa = current_isa();
    const int64_t id = physical(p, "page_scores", row, page), width = p.dim * bytes_of(p.dtype);
    char* meta = scratch(mine<char>(), p.kv_heads * 2 * width);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const char* keys = static_cast<const char*>(p.kv) + key_row(p, id, h) * width;
      char* to = meta + h * 2 * width;
      isa.extremes[static_cast<int>(p.dtype)](keys, length - page * p.page_size, p.dim, to,
                                              to + width);
    }
    score(meta, nullptr, out);
  }
};

}  // namespace

void page_scores(const Pages& p, const ByteMeta& bytes, const void* q, int64_t heads,
                 const int32_t* lengths, float radius_scale, Reduce reduce, bool score_open,
                 float* out, int threads) {
  check_lengths(p, "page_scores", lengths);
  const int64_t group = heads / p.kv_heads;
  const int64_t outputs = reduce == Reduce::kPerQuery ? heads : p.kv_heads;
  static thread_local std::vector<Weights> kept;
  if (static_cast<int64_t>(kept.size()) < p.rows) kept.resize(static_cast<size_t>(p.rows));
  Weights* weights = kept.data();
  parallel(p.rows, heads * p.rows > 64 ? threads : 1, [&](int64_t r) {
    weights[r].make(p, q, r * heads, heads, radius_scale);
    if (bytes.values != nullptr) weights[r].scale(p, bytes, r, heads);
  });
  int32_t* orders = scratch(mine<int32_t>(), 2 * p.rows * p.row_pages + p.rows);
  int32_t* ordered = orders + 2 * p.rows * p.row_pages;  // rows whose pages lie in their own order
  // The last page of a row is not full yet, or just is; those before it are closed.
  const auto last_page = [&](int64_t r) { return (lengths[r] - 1) / p.page_size; };
  parallel(p.rows, threads, [&](int64_t r) {
    int32_t* order = orders + 2 * r * p.row_pages;
    ordered[r] = in_memory_order(p, r, last_page(r), order, order + p.row_pages) ? 1 : 0;
  });
  const bool all_ordered = std::count(ordered, ordered + p.rows, 1) == p.rows;
  const int64_t parts = (p.row_pages + kPart - 1) / kPart;
  // Scores of other rows stay in that order until all are made: threads that wrote to one row of
  // `out` side by side would wait for each other's lines of the cache.
  float* made = scratch(mine<float>(), p.rows * p.row_pages * outputs);
  parallel(p.rows * parts, threads, [&](int64_t task) {
    const int64_t r = task / parts, first = task % parts * kPart, last = last_page(r);
    const int32_t* order = orders + 2 * r * p.row_pages;
    const int64_t end = std::min(first + kPart, p.row_pages), closed = std::min(end, last);
    const Scoring scoring{p, bytes, weights[r], r, heads, group, reduce};
    float* const part = made + (r * p.row_pages + first) * outputs;
    float* to = part;
    for (int64_t i = first; i < closed; ++i, to += outputs) {
      const void* next = i + 1 < closed ? scoring.meta(order[i + 1]) : nullptr;
      scoring.closed(scoring.meta(order[i]), next, to);
    }
    const bool open = score_open && first <= last && last < end;
    if (open) scoring.open(last, lengths[r], to);
    if (ordered[r] == 0) return;
    const int64_t there = std::max(closed + (open ? 1 : 0), first);
    for (int64_t k = 0; k < outputs; ++k) {
      float* row = out + (r * outputs + k) * p.row_pages;
      for (int64_t i = first; i < there; ++i) row[i] = part[(i - first) * outputs + k];
      std::fill(row + there, row + end, kNever);
    }
  });
  if (all_ordered) return;
  parallel(p.rows * outputs, p.rows * outputs * p.row_pages > kPart ? threads : 1,
           [&](int64_t task) {
             const int64_t r = task / outputs, last = last_page(r);
             if (ordered[r] != 0) return;
             const int32_t* order = orders + 2 * r * p.row_pages;
             const float* from = made + r * p.row_pages * outputs + task % outputs;
             float* row = out + task * p.row_pages;
             for (int64_t i = 0; i < last; ++i) row[order[i]] = from[i * outputs];
             if (score_open) row[last] = from[last * outputs];
             std::fill(row + last + (score_open ? 1 : 0), row + p.row_pages, kNever);
           });
}

void token_scores(const Pages& p, const void* q, int64_t heads, const int32_t* lengths, float scale,
                  float* out, int64_t width, int threads) {
  check_lengths(p, "token_scores", lengths);
  const Isa& isa = current_isa();
  const int64_t group = heads / p.kv_heads;
  parallel(p.rows * p.kv_heads, threads, [&](int64_t task) {
    const int64_t h = task / p.rows, r = task % p.rows, length = lengths[r];
    const char* query =
        static_cast<const char*>(q) + (r * heads + h * group) * p.dim * bytes_of(p.dtype);
    int64_t* rows = scratch(mine<int64_t>(), length);
    for (int64_t first = 0; first < length; first += p.page_size) {
      const int64_t base = key_row(p, physical(p, "token_scores", r, first / p.page_size), h);
      const int64_t filled = length - first < p.page_size ? length - first : p.page_size;
      for (int64_t i = 0; i < filled; ++i) rows[first + i] = base + i;
    }
    float* score = out + (r * heads + h * group) * width;
    Ahead nothing;
    isa.keys[static_cast<int>(p.dtype)](query, group, p.dim, p.kv, rows, length, scale, score,
                                        width, nothing);
    for (int64_t i = 0; i < group; ++i) {
      for (int64_t j = length; j < width; ++j) score[i * width + j] = kNever;
    }
  });
}

}  // namespace cpu
}  // namespace quest
