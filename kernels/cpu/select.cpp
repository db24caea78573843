#include <cstring>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

struct Scratch {
  std::vector<uint32_t> keys, kept;
};

Scratch& mine() {
  static thread_local Scratch one;
  return one;
}

// Unsigned order = order of the floats; -0 equals +0 and NaN equals -infinity.
inline uint32_t ordered(float x) {
  if (x != x) x = kNever;
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (static_cast<uint32_t>(-static_cast<int32_t>(bits >> 31)) | 0x80000000u);
}

struct Threshold {
  uint32_t key;   // the keep-th largest key
  int64_t above;  // how many keys are larger
};

// Radix descent, eight bits a pass over the keys that share the prefix found so far.
Threshold threshold(const uint32_t* keys, int64_t count, int64_t keep, uint32_t* kept) {
  Threshold found{0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint32_t histogram[256] = {};
    for (int64_t i = 0; i < count; ++i) ++histogram[(keys[i] >> shift) & 255u];
    uint32_t digit = 255u;
    while (found.above + histogram[digit] < keep) found.above += histogram[digit--];
    found.key |= digit << shift;
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      kept[next] = key;  // branchless: overwritten unless counted
      next += ((key >> shift) & 255u) == digit;
    }
    keys = kept;
    count = next;
  }
  return found;
}

void select_row(const float* scores, int64_t items, int64_t keep, bool force_last, int32_t* index) {
  int64_t wanted = keep, competing = items;
  if (force_last) --wanted, --competing;
  int64_t filled = 0;
  if (wanted > 0) {
    Scratch& s = mine();
    if (current_isa().largest != nullptr) {
      current_isa().largest(scores, competing, wanted, scratch(s.keys, 2 * (competing + 16)),
                            index);
      if (force_last) index[wanted] = static_cast<int32_t>(items - 1);
      return;
    }
    uint32_t* keys = scratch(s.keys, competing);
    for (int64_t i = 0; i < competing; ++i) keys[i] = ordered(scores[i]);
    const Threshold t = threshold(keys, competing, wanted, scratch(s.kept, competing));
    // Equal scores: the highest positions win, so the first `skip` of the ties lose.
    int64_t ties = 0;
    for (int64_t i = 0; i < competing; ++i) ties += keys[i] == t.key;
    int64_t skip = ties - (wanted - t.above);
    for (int64_t i = 0; i < competing; ++i) {
      if (keys[i] < t.key) continue;
      if (keys[i] == t.key && skip-- > 0) continue;
      index[filled++] = static_cast<int32_t>(i);
    }
  }
  if (force_last) index[filled++] = static_cast<int32_t>(items - 1);
}

}  // namespace

void select_top(const float* scores, const int32_t* items, const int32_t* keep, int64_t rows,
                int64_t lists, int64_t items_max, bool force_last, int32_t* index, int64_t width,
                int32_t* count, int threads) {
  for (int64_t r = 0; r < rows; ++r) {
    if (items[r] < 0 || items[r] > items_max) {
      refuse("select_top", "items[" + std::to_string(r) + "] is " + std::to_string(items[r]) +
                               ", but scores has " + std::to_string(items_max) + " a row");
    }
    if (force_last && keep[r] == 0 && items[r] > 0) {
      refuse("select_top",
             "keep[" + std::to_string(r) + "] is 0, but force_last keeps at least the last item");
    }
  }
  parallel(rows * lists, threads, [&](int64_t task) {
    const int64_t r = task / lists;
    const bool all = keep[r] < 0 || keep[r] >= items[r];
    int32_t* to = index + task * width;
    const int64_t kept = all ? 0 : keep[r];
    count[task] = all ? -1 : keep[r];
    if (!all) select_row(scores + task * items_max, items[r], kept, force_last, to);
    for (int64_t i = kept; i < width; ++i) to[i] = -1;
  });
}

}  // namespace cpu
}  // namespace quest
