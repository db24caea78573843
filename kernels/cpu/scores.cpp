#include <cmath>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

struct Scratch {
  std::vector<float> query, score;
  std::vector<int64_t> rows;
  std::vector<char> open;  // metadata of the open page
};

Scratch& mine() {
  static thread_local Scratch one;
  return one;
}

// out[j] = max or mean over the heads of score[:, j].
void reduce_heads(const float* score, int64_t heads, int64_t count, Reduce reduce, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    float total = score[j];
    for (int64_t i = 1; i < heads; ++i) {
      const float x = score[i * count + j];
      total = reduce == Reduce::kMax ? (x > total || x != x ? x : total) : total + x;
    }
    out[j] = reduce == Reduce::kMax ? total : total / static_cast<float>(heads);
  }
}

}  // namespace

void page_scores(const Pages& p, const void* q, int64_t heads, const int32_t* lengths,
                 float radius_scale, Reduce reduce, bool score_open, float* out, int threads) {
  check_lengths(p, "page_scores", lengths);
  const Isa& isa = current_isa();
  const int64_t group = heads / p.kv_heads, dim = p.dim;
  const int64_t width = dim * bytes_of(p.dtype);
  const Dot dot = isa.dot[static_cast<int>(p.dtype)];
  // kv heads outermost: rows that share their prefix then read the same pages one after another.
  parallel(p.rows * p.kv_heads, threads, [&](int64_t task) {
    const int64_t h = task / p.rows, r = task % p.rows;
    const int64_t last = (lengths[r] - 1) / p.page_size;
    const int64_t scored = last + (score_open ? 1 : 0);
    Scratch& s = mine();

    // [a | b] against [maximum | minimum]: the bound is one dot product of twice the width.
    float* weights = scratch(s.query, group * dim * 3);
    float* plain = weights + group * dim * 2;
    widen_to(plain, q, p.dtype, (r * heads + h * group) * dim, group * dim);
    for (int64_t i = 0; i < group; ++i) {
      for (int64_t d = 0; d < dim; ++d) {
        const float x = plain[i * dim + d], spread = radius_scale * std::fabs(x);
        weights[i * 2 * dim + d] = (x + spread) * 0.5f;
        weights[i * 2 * dim + dim + d] = (x - spread) * 0.5f;
      }
    }
    int64_t* rows = scratch(s.rows, last + 1);
    for (int64_t j = 0; j < last; ++j) rows[j] = physical(p, "page_scores", r, j) * p.kv_heads + h;

    float* score = reduce == Reduce::kPerQuery ? out + (r * heads + h * group) * p.row_pages
                                               : scratch(s.score, group * scored);
    const int64_t stride = reduce == Reduce::kPerQuery ? p.row_pages : scored;
    dot(weights, group, 2 * dim, p.meta, rows, last, 1.0f, score, stride);
    if (score_open) {
      const int64_t id = physical(p, "page_scores", r, last);
      const char* keys = static_cast<const char*>(p.kv) + key_row(p, id, h) * width;
      char* meta = scratch(s.open, 2 * width);
      isa.extremes[static_cast<int>(p.dtype)](keys, lengths[r] - last * p.page_size, dim, meta,
                                              meta + width);
      const int64_t zero = 0;
      dot(weights, group, 2 * dim, meta, &zero, 1, 1.0f, score + last, stride);
    }
    const int64_t outputs = reduce == Reduce::kPerQuery ? group : 1;
    float* first = reduce == Reduce::kPerQuery ? score : out + (r * p.kv_heads + h) * p.row_pages;
    if (reduce != Reduce::kPerQuery) reduce_heads(score, group, scored, reduce, first);
    for (int64_t i = 0; i < outputs; ++i) {
      for (int64_t j = scored; j < p.row_pages; ++j) first[i * p.row_pages + j] = kNever;
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
    float* query = scratch(s.query, group * p.dim);
    widen_to(query, q, p.dtype, (r * heads + h * group) * p.dim, group * p.dim);
    int64_t* rows = scratch(s.rows, length);
    for (int64_t first = 0; first < length; first += p.page_size) {
      const int64_t base = key_row(p, physical(p, "token_scores", r, first / p.page_size), h);
      const int64_t filled = length - first < p.page_size ? length - first : p.page_size;
      for (int64_t i = 0; i < filled; ++i) rows[first + i] = base + i;
    }
    float* score = out + (r * heads + h * group) * width;
    isa.keys[static_cast<int>(p.dtype)](query, group, p.dim, p.kv, rows, length, scale, score,
                                        width);
    for (int64_t i = 0; i < group; ++i) {
      for (int64_t j = length; j < width; ++j) score[i * width + j] = kNever;
    }
  });
}

}  // namespace cpu
}  // namespace quest
