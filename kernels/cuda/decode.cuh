// What a row keeps under a page rule; both kernels of decode find it by themselves.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

struct Rule {
  int tokens;  // that the row attends to
  int kept;    // pages in its lists, 0: every token
  int wanted;  // of them, that must win against the other closed pages; the last page is kept
               // anyway
  int last;    // the page of the newest token, so that pages 0 .. last - 1 compete
};

// The bits of select_top with force_last: keep >= pages or < 0 is everything.
__device__ __forceinline__ Rule rule_of(const Pages& p, int length, const int32_t* keep,
                                        int64_t row, int64_t* fault) {
  const int size = static_cast<int>(p.page_size), last = length > 0 ? (length - 1) / size : 0;
  Rule rule{length, 0, 0, last};
  if (keep == nullptr || length == 0) return rule;
  const int kept = keep[row];
  if (kept < 0 || kept > last) return rule;
  if (kept == 0) {
    raise(fault, Fault::kKeep, row, 0);
    rule.tokens = 0;
    return rule;
  }
  return {length - (last + 1 - kept) * size, kept, kept - 1, last};
}

}  // namespace cuda
}  // namespace quest
