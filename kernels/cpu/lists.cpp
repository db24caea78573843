#include "lists.h"

#include "threads.h"

namespace quest {
namespace cpu {
namespace {

struct Scratch {
  std::vector<uint64_t> listed, united;  // bit i: item i (page or token) of the row
};

Scratch& mine() {
  static thread_local Scratch one;
  return one;
}

uint64_t* cleared(std::vector<uint64_t>& buffer, int64_t words) {
  uint64_t* bits = scratch(buffer, words);
  std::memset(bits, 0, static_cast<size_t>(words) * 8);
  return bits;
}

[[noreturn]] void refuse_item(Unit unit, int64_t item, int64_t row, const std::string& what) {
  refuse("attend", std::string("index: ") + (unit == Unit::kPages ? "page " : "token ") +
                       std::to_string(item) + " of row " + std::to_string(row) + " " + what);
}

// Tokens of the row's last page that do not exist yet.
int64_t unfilled(const Pages& p, int64_t length) {
  return (p.page_size - length % p.page_size) % p.page_size;
}

}  // namespace

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

bool selects_all(const Selection& selection, int64_t row) {
  if (selection.index == nullptr) return true;
  for (int64_t i = 0; i < selection.lists; ++i) {
    if (selection.count[row * selection.lists + i] >= 0) return false;
  }
  return true;
}

int64_t named_tokens(const Pages& p, const int32_t* lengths, const Selection& selection,
                     int64_t row, int64_t list) {
  const int64_t at = row * selection.lists + list;
  const int64_t count = selection.index == nullptr ? -1 : selection.count[at];
  if (count < 0) return lengths[row];
  if (selection.unit == Unit::kTokens) return count;
  const int64_t last = (lengths[row] - 1) / p.page_size;
  const int32_t* index = selection.index + at * selection.width;
  int64_t missing = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] == last) missing = unfilled(p, lengths[row]);
  }
  return count * p.page_size - missing;
}

int64_t check_lists(const Pages& p, const int32_t* lengths, const Selection& selection, int64_t row,
                    int64_t first_list, int64_t lists) {
  const int64_t length = lengths[row];
  const Unit unit = selection.unit;
  const int64_t limit = unit == Unit::kPages ? (length - 1) / p.page_size + 1 : length;
  const int64_t words = (limit + 63) / 64;
  Scratch& s = mine();
  uint64_t* united = cleared(s.united, words);
  bool every = false;
  for (int64_t list = first_list; list < first_list + lists; ++list) {
    const int64_t at = row * selection.lists + list;
    const int64_t count = selection.count[at];
    every = every || count < 0;
    uint64_t* listed = lists == 1 ? united : cleared(s.listed, words);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t item = selection.index[at * selection.width + i];
      if (item < 0 || item >= limit) {
        refuse_item(unit, item, row, "is out of range 0.." + std::to_string(limit - 1));
      }
      const uint64_t bit = uint64_t{1} << (item % 64);
      if (listed[item / 64] & bit) refuse_item(unit, item, row, "is listed twice");
      listed[item / 64] |= bit;
    }
    if (lists > 1) {
      for (int64_t w = 0; w < words; ++w) united[w] |= listed[w];
    }
  }
  if (every) return length;
  int64_t items = 0;
  for (int64_t w = 0; w < words; ++w) items += __builtin_popcountll(united[w]);
  if (unit == Unit::kTokens) return items;
  const bool partial = united[(limit - 1) / 64] >> ((limit - 1) % 64) & 1;
  return items * p.page_size - (partial ? unfilled(p, length) : 0);
}

void count_read(const Pages& p, const int32_t* lengths, const Selection& selection, int32_t* read,
                int threads) {
  if (selection.index == nullptr) {
    for (int64_t i = 0; i < p.rows * p.kv_heads; ++i) read[i] = lengths[i / p.kv_heads];
    return;
  }
  const int64_t each = selection.lists == 1 ? 1 : selection.lists / p.kv_heads;
  const int64_t units = selection.lists == 1 ? 1 : p.kv_heads;
  parallel(p.rows * units, threads, [&](int64_t task) {
    const int64_t row = task / units, h = task % units;
    const int64_t tokens = check_lists(p, lengths, selection, row, h * each, each);
    for (int64_t i = h; i < (units == 1 ? p.kv_heads : h + 1); ++i) {
      read[row * p.kv_heads + i] = static_cast<int32_t>(tokens);
    }
  });
}

}  // namespace cpu
}  // namespace quest
