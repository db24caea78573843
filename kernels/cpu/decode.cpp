// One decode step of a layer in one call: the ops after one another, on scratch memory.
#include "rows.h"

namespace quest {
namespace cpu {
namespace {

template <typename T>
T* mine(int64_t count) {
  static thread_local std::vector<T> one;
  return scratch(one, count);
}

// x [R, heads, D] in rows, turned by the angles if there are any: two products and a sum in fp32,
// rounded once.
char* prepared(const Pages& p, const Strided& x, int64_t heads, const Angles& angles, char* out) {
  const int64_t dim = p.dim, half = dim / 2, bytes = bytes_of(p.dtype);
  const DType own = angles.wide ? DType::kFloat32 : p.dtype;
  float wide[kMaxDim], turned[kMaxDim], cos[kMaxDim], sin[kMaxDim];
  for (int64_t r = 0; r < p.rows; ++r) {
    if (angles.cos != nullptr) {
      widen_to(cos, angles.cos, own, r * angles.cos_row, dim);
      widen_to(sin, angles.sin, own, r * angles.sin_row, dim);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from = r * x.row + h * x.head, to = (r * heads + h) * dim;
      if (angles.cos == nullptr) {
        std::memcpy(out + to * bytes, static_cast<const char*>(x.data) + from * bytes,
                    static_cast<size_t>(dim * bytes));
        continue;
      }
      widen_to(wide, x.data, p.dtype, from, dim);
      for (int64_t d = 0; d < half; ++d) {
        turned[d] = wide[d] * cos[d] + -wide[half + d] * sin[d];
        turned[half + d] = wide[half + d] * cos[half + d] + wide[d] * sin[half + d];
      }
      narrow_from(turned, out, p.dtype, to, dim);
    }
  }
  return out;
}

// The rows' starts, pages and, at most, pages to keep of any row.
struct Plan {
  int32_t *starts, *items;
  int64_t width = 0;

  Plan(const Pages& p, const Token& token) : starts(mine<int32_t>(2 * p.rows)), items(starts) {
    items += p.rows;
    check_lengths(p, "decode", token.lengths);
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t pages = (token.lengths[r] - 1) / p.page_size + 1;
      starts[r] = token.lengths[r] - 1;
      items[r] = static_cast<int32_t>(pages);
      check_pages(p, "decode", r, pages);
      if (token.keep == nullptr) continue;
      const int64_t keep = token.keep[r];
      if (keep == 0) {
        refuse("decode", "keep[" + std::to_string(r) +
                             "] is 0; expected at least the last page, or -1 for all");
      }
      if (keep < pages && keep > width) width = keep;
    }
  }
};

}  // namespace

void decode(const Pages& p, const Token& token, int64_t heads, const Attended& result,
            int threads) {
  const Plan plan(p, token);
  const int64_t bytes = bytes_of(p.dtype), queries = p.rows * heads * p.dim * bytes;
  const int64_t keys = token.k.data == nullptr ? 0 : p.rows * p.kv_heads * p.dim * bytes;
  char* space = mine<char>(queries + keys);
  const char* q = prepared(p, token.q, heads, token.angles, space);
  if (token.k.data != nullptr) {
    const Strided k{prepared(p, token.k, p.kv_heads, token.angles, space + queries),
                    p.kv_heads * p.dim, p.dim, p.dim};
    append(p, k, token.v, plan.starts, 1, threads);
  }
  Selection selection{nullptr, nullptr, 1, 0, Unit::kPages};
  if (token.keep != nullptr) {
    const int64_t lists = token.reduce == Reduce::kPerQuery ? heads : p.kv_heads;
    float* scores = mine<float>(p.rows * lists * p.row_pages);
    static thread_local std::vector<int32_t> kept;
    int32_t* count = scratch(kept, p.rows * lists * (plan.width + 1));
    int32_t* index = count + p.rows * lists;
    page_scores(p, {nullptr, nullptr, nullptr}, q, heads, token.lengths, token.radius_scale,
                token.reduce, false, scores, threads);
    select_top(scores, plan.items, token.keep, p.rows, lists, p.row_pages, true, index, plan.width,
               count, threads);
    selection = {index, count, lists, plan.width, Unit::kPages};
  }
  attend(p, q, nullptr, 0, heads, token.lengths, selection, token.scale, result, threads);
}

}  // namespace cpu
}  // namespace quest
