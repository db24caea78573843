#include <cmath>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

struct Scratch {
  std::vector<float> query, rolled, score, sum;
  std::vector<int64_t> rows;
  std::vector<uint64_t> listed, united;  // bit t: token t of the row
};

Scratch& mine() {
  static thread_local Scratch one;
  return one;
}

int64_t popcount(const uint64_t* words, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += __builtin_popcountll(words[i]);
  return total;
}

// Turns one list of a row into rows of kv, in list order, refusing what is out of range or twice.
class Expansion {
 public:
  Expansion(const Pages& pages, int64_t row, int64_t kv_head, int64_t length, Scratch& s)
      : p_(pages), row_(row), head_(kv_head), length_(length), s_(s) {}

  int64_t every() {
    int64_t* rows = scratch(s_.rows, length_);
    int64_t n = 0;
    for (int64_t page = 0; page * p_.page_size < length_; ++page) n += page_slots(page, rows + n);
    return n;
  }

  int64_t list(const int32_t* index, int64_t count, Unit unit) {
    const int64_t words = (length_ + 63) / 64;
    uint64_t* listed = scratch(s_.listed, words);
    std::memset(listed, 0, static_cast<size_t>(words) * 8);
    const int64_t limit = unit == Unit::kPages ? (length_ - 1) / p_.page_size + 1 : length_;
    int64_t* rows = scratch(s_.rows, unit == Unit::kPages ? count * p_.page_size : count);
    int64_t n = 0, seen_page = -1, seen_base = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t item = index[i];
      if (item < 0 || item >= limit) refuse_item(unit, item, "is out of range 0..", limit - 1);
      const int64_t first = unit == Unit::kPages ? item * p_.page_size : item;
      if (listed[first / 64] >> (first % 64) & 1) refuse_item(unit, item, "is listed twice", -1);
      if (unit == Unit::kPages) {
        const int64_t slots = page_slots(item, rows + n);
        for (int64_t t = first; t < first + slots; ++t) listed[t / 64] |= uint64_t{1} << (t % 64);
        n += slots;
      } else {
        listed[first / 64] |= uint64_t{1} << (first % 64);
        const int64_t page = item / p_.page_size;
        if (page != seen_page) {
          seen_page = page;
          seen_base = key_row(p_, physical(p_, "attend", row_, page), head_);
        }
        rows[n++] = seen_base + (item - page * p_.page_size);
      }
    }
    return n;
  }

 private:
  int64_t page_slots(int64_t page, int64_t* rows) {
    const int64_t base = key_row(p_, physical(p_, "attend", row_, page), head_);
    const int64_t left = length_ - page * p_.page_size;
    const int64_t slots = left < p_.page_size ? left : p_.page_size;
    for (int64_t i = 0; i < slots; ++i) rows[i] = base + i;
    return slots;
  }

  [[noreturn]] void refuse_item(Unit unit, int64_t item, const char* what, int64_t limit) {
    refuse("attend", std::string("index: ") + (unit == Unit::kPages ? "page " : "token ") +
                         std::to_string(item) + " of row " + std::to_string(row_) + " " + what +
                         (limit >= 0 ? std::to_string(limit) : ""));
  }

  const Pages& p_;
  int64_t row_, head_, length_;
  Scratch& s_;
};

struct Job {
  const Pages& p;
  const void* q;
  const void* rolled_query;
  int64_t rolled, heads;
  const int32_t* lengths;
  const Selection& selection;
  float scale;
  const Attended& result;
};

// Attention of `some` heads from query head `head` on over the n rows of kv in s.rows.
void attend_heads(const Job& job, const Isa& isa, int64_t r, int64_t head, int64_t some, int64_t n,
                  bool all, Scratch& s) {
  const Pages& p = job.p;
  const int64_t dim = p.dim, first = job.heads * r + head;
  const int dtype = static_cast<int>(p.dtype);
  float* query = scratch(s.query, some * dim);
  float* score = scratch(s.score, some * n);
  float* sum = scratch(s.sum, some * dim);
  const int64_t* rows = s.rows.data();

  int64_t rolled = all ? 0 : (job.rolled < n ? job.rolled : n);
  if (rolled > 0) {
    float* other = scratch(s.rolled, some * dim);
    widen_to(other, job.rolled_query, p.dtype, first * dim, some * dim);
    isa.keys[dtype](other, some, dim, p.kv, rows, rolled, job.scale, score, n);
  }
  widen_to(query, job.q, p.dtype, first * dim, some * dim);
  isa.keys[dtype](query, some, dim, p.kv, rows + rolled, n - rolled, job.scale, score + rolled, n);

  float inverse[64];
  for (int64_t from = 0; from < some; from += 64) {
    const int64_t few = some - from < 64 ? some - from : 64;
    for (int64_t i = 0; i < few; ++i) {
      float top;
      const float total = isa.exponentials(score + (from + i) * n, n, &top);
      inverse[i] = 1.0f / total;
      job.result.lse[first + from + i] = top + std::log(total);
      job.result.attended[first + from + i] = static_cast<int32_t>(n);
    }
    std::memset(sum, 0, static_cast<size_t>(few * dim) * 4);
    // Values lie page_size rows behind their keys.
    const char* values = static_cast<const char*>(p.kv) + p.page_size * dim * bytes_of(p.dtype);
    isa.weigh[dtype](score + from * n, n, few, dim, values, rows, n, sum);
    for (int64_t i = 0; i < few; ++i) {
      for (int64_t d = 0; d < dim; ++d) sum[i * dim + d] *= inverse[i];
    }
    narrow_from(sum, job.result.out, p.dtype, (first + from) * dim, few * dim);
    if (job.result.probabilities != nullptr) {
      const int64_t width = job.result.probability_width;
      for (int64_t i = 0; i < few; ++i) {
        float* to = job.result.probabilities + (first + from + i) * width;
        for (int64_t t = 0; t < n; ++t) to[t] = score[(from + i) * n + t] * inverse[i];
        for (int64_t t = n; t < width; ++t) to[t] = 0.0f;
      }
    }
  }
}

void attend_row(const Job& job, int64_t r, int64_t h) {
  const Pages& p = job.p;
  const Selection& selection = job.selection;
  const Isa& isa = current_isa();
  const int64_t group = job.heads / p.kv_heads, length = job.lengths[r];
  const int64_t lists = selection.index == nullptr ? 1 : selection.lists;
  const bool per_query = lists == job.heads && group > 1;
  const int64_t words = (length + 63) / 64;
  Scratch& s = mine();
  Expansion expansion(p, r, h, length, s);
  uint64_t* united = scratch(s.united, words);
  std::memset(united, 0, static_cast<size_t>(words) * 8);
  bool every = false;
  for (int64_t i = 0; i < (per_query ? group : 1); ++i) {
    const int64_t list = lists == 1 ? 0 : per_query ? h * group + i : h;
    const int64_t at = r * lists + list;
    const int64_t count = selection.index == nullptr ? -1 : selection.count[at];
    const bool all = count < 0;
    const int64_t n =
        all ? expansion.every()
            : expansion.list(selection.index + at * selection.width, count, selection.unit);
    every = every || all;
    if (!all) {
      for (int64_t w = 0; w < words; ++w) united[w] |= s.listed[static_cast<size_t>(w)];
    }
    attend_heads(job, isa, r, h * group + i, per_query ? 1 : group, n, all, s);
  }
  job.result.read[r * p.kv_heads + h] =
      static_cast<int32_t>(every ? length : popcount(united, words));
}

void check_counts(const Pages& p, const Selection& selection) {
  if (selection.index == nullptr) return;
  for (int64_t i = 0; i < p.rows * selection.lists; ++i) {
    const int64_t count = selection.count[i];
    if (count == 0 || count < -1 || count > selection.width) {
      refuse("attend", "count[" + std::to_string(i / selection.lists) + ", " +
                           std::to_string(i % selection.lists) + "] is " + std::to_string(count) +
                           "; expected 1.." + std::to_string(selection.width) +
                           ", or -1 for every token");
    }
  }
}

}  // namespace

int64_t listed_tokens(const Pages& p, const int32_t* lengths, const Selection& selection) {
  check_lengths(p, "attend", lengths);
  check_counts(p, selection);
  int64_t most = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t last = (lengths[r] - 1) / p.page_size;
    for (int64_t i = 0; i < (selection.index == nullptr ? 1 : selection.lists); ++i) {
      const int64_t at = r * selection.lists + i;
      int64_t n = selection.index == nullptr ? -1 : selection.count[at];
      if (n < 0) {
        n = lengths[r];
      } else if (selection.unit == Unit::kPages) {
        const int32_t* index = selection.index + at * selection.width;
        int64_t missing = 0;
        for (int64_t j = 0; j < n; ++j) {
          if (index[j] == last) missing = (last + 1) * p.page_size - lengths[r];
        }
        n = n * p.page_size - missing;
      }
      if (n > most) most = n;
    }
  }
  return most;
}

void attend(const Pages& p, const void* q, const void* rolled_query, int64_t rolled, int64_t heads,
            const int32_t* lengths, const Selection& selection, float scale, const Attended& result,
            int threads) {
  check_lengths(p, "attend", lengths);
  check_counts(p, selection);
  const Job job{p, q, rolled_query, rolled, heads, lengths, selection, scale, result};
  // kv heads outermost: rows that share their prefix then read the same pages one after another.
  parallel(p.rows * p.kv_heads, threads,
           [&](int64_t task) { attend_row(job, task % p.rows, task / p.rows); });
}

}  // namespace cpu
}  // namespace quest
