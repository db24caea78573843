#include <algorithm>
#include <cmath>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

struct Scratch {
  std::vector<float> score;
  std::vector<int64_t> rows;
  std::vector<char> open;  // metadata of the open page
};

Scratch& mine() {
  static thread_local Scratch one;
  return one;
}

constexpr int64_t kPart = 256;  // pages of a task

// [a | b] against [maximum | minimum]: the bound is one dot product of twice the width.
struct Weights {
  std::vector<float> wide;         // [H, 2 D]
  std::vector<uint16_t> narrowed;  // the same in bf16, where that loses nothing
  bool exact = false;

  void make(const Pages& p, const void* q, int64_t head, int64_t heads, float radius_scale) {
    const int64_t dim = p.dim;
    float* to = scratch(wide, heads * 2 * dim);
    uint16_t* less = scratch(narrowed, heads * 2 * dim);
    exact = p.dtype == DType::kBFloat16;
    for (int64_t i = 0; i < heads; ++i, to += 2 * dim, less += 2 * dim) {
      widen_to(to + dim, q, p.dtype, (head + i) * dim, dim);
      for (int64_t d = 0; d < dim; ++d) {
        const float x = to[dim + d], spread = radius_scale * std::fabs(x);
        to[d] = (x + spread) * 0.5f;
        to[dim + d] = (x - spread) * 0.5f;
      }
      for (int64_t d = 0; exact && d < 2 * dim; ++d) {
        less[d] = narrow(to[d]);
        exact = widen(less[d]) == to[d];
      }
    }
  }
};

struct Scoring {
  const Pages& p;
  const Weights& weights;
  int64_t row, heads, group;
  Reduce reduce;
  float* out;  // [heads or kv heads, P]

  void multiply(int64_t kv_head, const void* meta, const int64_t* rows, int64_t count, float* to,
                int64_t stride, Ahead& ahead) const {
    const Isa& isa = current_isa();
    const int64_t dim = 2 * p.dim, from = kv_head * group * dim;
    if (weights.exact) {
      isa.keys[static_cast<int>(p.dtype)](weights.narrowed.data() + from, group, dim, meta, rows,
                                          count, 1.0f, to, stride, ahead);
    } else {
      isa.dot[static_cast<int>(p.dtype)](weights.wide.data() + from, group, dim, meta, rows, count,
                                         1.0f, to, stride);
    }
  }

  // Scores [group, count] of one kv head to where they belong.
  void put(int64_t kv_head, int64_t page, const float* score, int64_t stride, int64_t count) const {
    if (reduce == Reduce::kPerQuery) {
      for (int64_t i = 0; i < group; ++i) {
        float* to = out + (kv_head * group + i) * p.row_pages + page;
        std::copy(score + i * stride, score + i * stride + count, to);
      }
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      float total = score[j];
      for (int64_t i = 1; i < group; ++i) {
        const float x = score[i * stride + j];
        total = reduce == Reduce::kMax ? (x > total || x != x ? x : total) : total + x;
      }
      if (reduce == Reduce::kMean) total /= static_cast<float>(group);
      out[kv_head * p.row_pages + page + j] = total;
    }
  }

  // Pages [first, end), all full. Pages are outermost: the heads of one lie side by side.
  void closed(int64_t first, int64_t end) const {
    float* score = scratch(mine().score, group * kBlock);
    int64_t place[2][kBlock], rows[kBlock], next_rows[kBlock];
    const auto locate = [&](int64_t page, int64_t* to) {
      for (int i = 0; i < kBlock && page < end; ++i) {
        to[i] = physical(p, "page_scores", row, std::min(page + i, end - 1)) * p.kv_heads;
      }
    };
    int64_t *now = place[0], *later = place[1];
    locate(first, now);
    for (int64_t page = first; page < end; page += kBlock, std::swap(now, later)) {
      const int64_t count = std::min<int64_t>(kBlock, end - page);
      locate(page + kBlock, later);
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        Ahead ahead;
        if (page + kBlock < end) {
          // The same number of rows of the next block, but in the order of memory.
          for (int64_t i = 0; i < kBlock; ++i) {
            const int64_t at = h * kBlock + i;
            next_rows[i] = later[at / p.kv_heads] + at % p.kv_heads;
          }
          ahead = {static_cast<const char*>(p.meta), 0, 2 * p.dim * bytes_of(p.dtype), next_rows, 0,
                   static_cast<int>(kBlock)};
        }
        for (int i = 0; i < count; ++i) rows[i] = now[i] + h;
        multiply(h, p.meta, rows, count, score, kBlock, ahead);
        put(h, page, score, kBlock, count);
      }
    }
  }

  // The page that is not full yet: its metadata is made for the occasion.
  void open(int64_t page, int64_t length) const {
    const Isa& isa = current_isa();
    const int64_t id = physical(p, "page_scores", row, page), width = p.dim * bytes_of(p.dtype);
    float* score = scratch(mine().score, group * kBlock);
    char* meta = scratch(mine().open, 2 * width);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const char* keys = static_cast<const char*>(p.kv) + key_row(p, id, h) * width;
      isa.extremes[static_cast<int>(p.dtype)](keys, length - page * p.page_size, p.dim, meta,
                                              meta + width);
      const int64_t zero = 0;
      Ahead nothing;
      multiply(h, meta, &zero, 1, score, kBlock, nothing);
      put(h, page, score, kBlock, 1);
    }
  }
};

}  // namespace

void page_scores(const Pages& p, const void* q, int64_t heads, const int32_t* lengths,
                 float radius_scale, Reduce reduce, bool score_open, float* out, int threads) {
  check_lengths(p, "page_scores", lengths);
  const int64_t group = heads / p.kv_heads;
  const int64_t outputs = reduce == Reduce::kPerQuery ? heads : p.kv_heads;
  static thread_local std::vector<Weights> kept;
  if (static_cast<int64_t>(kept.size()) < p.rows) kept.resize(static_cast<size_t>(p.rows));
  Weights* weights = kept.data();
  parallel(p.rows, heads * p.rows > 64 ? threads : 1,
           [&](int64_t r) { weights[r].make(p, q, r * heads, heads, radius_scale); });
  const int64_t parts = (p.row_pages + kPart - 1) / kPart;
  parallel(p.rows * parts, threads, [&](int64_t task) {
    const int64_t r = task / parts, first = task % parts * kPart;
    const int64_t last =
        (lengths[r] - 1) / p.page_size;  // the page that is not full yet, or just is
    const int64_t end = std::min(first + kPart, p.row_pages);
    const Scoring scoring{p, weights[r], r, heads, group, reduce, out + r * outputs * p.row_pages};
    scoring.closed(first, std::min(end, last));
    if (score_open && first <= last && last < end) scoring.open(last, lengths[r]);
    const int64_t scored = std::max(first, std::min(end, last + (score_open ? 1 : 0)));
    for (int64_t i = 0; i < outputs; ++i) {
      float* row = out + (r * outputs + i) * p.row_pages;
      std::fill(row + scored, row + end, kNever);
    }
  });
}

void token_scores(const Pages& p, const void* q, int64_t heads, const int32_t* lengths, float scale,
                  float* out, int64_t width, int threads) {
  check_lengths(p, "token_scores", lengths);
  const Isa& isa = current_isa();
  const int64_t group = heads / p.kv_heads;
  parallel(p.rows * p.kv_heads, threads, [&](int64_t task) {
    const int64_t h = task / p.rows, r = task % p.rows, length = lengths[r];
    Scratch& s = mine();
    const char* query =
        static_cast<const char*>(q) + (r * heads + h * group) * p.dim * bytes_of(p.dtype);
    int64_t* rows = scratch(s.rows, length);
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
