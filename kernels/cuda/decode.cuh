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

__device__ __forceinline__ int keep_of(const Token& token, int64_t row) {
  return token.keep == nullptr ? -1 : __ldcg(token.keep + row);
}

// The lists of select_top with force_last: keep >= pages or < 0 is everything.
__device__ __forceinline__ Rule rule_of(const Pages& p, int length, int keep, int64_t row,
                                        int64_t* fault) {
  const int size = static_cast<int>(p.page_size), last = length > 0 ? (length - 1) / size : 0;
  Rule rule{length, 0, 0, last};
  if (length == 0 || keep < 0 || keep > last) return rule;
  if (keep == 0) {
    raise(fault, Fault::kKeep, row, 0);
    rule.tokens = 0;
    return rule;
  }
  return {length - (last + 1 - keep) * size, keep, keep - 1, last};
}

}  // namespace cuda
}  // namespace quest
