// One list of a row as a sequence of tokens: t-th token of the list -> its row of kv.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

struct List {
  const int32_t* index;  // nullptr: every token of the row
  int64_t at;            // which list of the selection, for faults
  int64_t row, kv_head;
  int items;   // pages or tokens that index names
  int length;  // tokens of the row
  int tokens;  // tokens of the list
  bool pages;
  // The row's last page may be partly filled and, in a list of pages, anywhere: the pages behind it
  // then start early. Its place in the list, -1 where it is not listed, and what it lacks.
  int open_at, missing;
};

// Reads the head of a list. All threads of the block take part; `found` is shared memory of theirs.
__device__ inline List read_list(const Pages& p, const Selection& selection, int64_t row,
                                 int64_t kv_head, int64_t number, int length, int* found,
                                 int64_t* fault) {
  List list{nullptr, row * selection.lists + number, row, kv_head, 0, length, length, false, -1, 0};
  if (selection.index == nullptr) return list;
  const int64_t slots = p.row_pages * p.page_size;
  int count = selection.count[list.at];
  if (count == -1) return list;
  if (count < 1 || count > selection.width) {
    if (threadIdx.x == 0) raise(fault, Fault::kCount, list.at / selection.lists, number);
    count = count < 1 ? 0 : static_cast<int>(selection.width);
  }
  list.pages = selection.unit == Unit::kPages;
  // More than the row has would name something twice, and would not fit what is sized by the row.
  const int64_t most = list.pages ? p.row_pages : slots;
  list.items = static_cast<int>(count < most ? count : most);
  list.index = selection.index + list.at * selection.width;
  list.tokens = list.items;
  if (!list.pages || list.items == 0) return list;
  if (length == 0) {
    list.tokens = 0;
    return list;
  }

  const int size = static_cast<int>(p.page_size), last = (length - 1) / size;
  if (list.index[list.items - 1] == last) {
    list.open_at = list.items - 1;
  } else {
    if (threadIdx.x == 0) *found = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < list.items; i += blockDim.x) {
      if (list.index[i] == last) *found = i;
    }
    __syncthreads();
    list.open_at = *found;
  }
  if (list.open_at >= 0) list.missing = (last + 1) * size - length;
  list.tokens = static_cast<int>(static_cast<int64_t>(list.items) * size - list.missing);
  return list;
}

// The page and slot of the list's t-th token; false where there is no such token.
__device__ __forceinline__ bool find(const Pages& p, const List& list, int t, int64_t* fault,
                                     int& page, int& slot) {
  const int size = static_cast<int>(p.page_size);
  if (list.pages) {
    if (list.open_at >= 0 && t >= (list.open_at + 1) * size - list.missing) t += list.missing;
    const int item = t / size;
    page = list.index[item];
    slot = t - item * size;
    if (page < 0 || page > (list.length - 1) / size) {
      raise(fault, Fault::kIndex, list.at, item);
      return false;
    }
  } else {
    int token = t;
    if (list.index != nullptr) {
      token = list.index[t];
      if (token < 0 || token >= list.length) {
        raise(fault, Fault::kIndex, list.at, t);
        return false;
      }
    }
    page = token / size;
    slot = token - page * size;
  }
  return true;
}

// The row of kv that holds the key of the list's t-th token; -1 where there is no such token.
__device__ __forceinline__ int64_t locate(const Pages& p, const List& list, int t, int64_t* fault) {
  int page, slot;
  if (!find(p, list, t, fault, page, slot)) return -1;
  return row_of(p, list.row, list.kv_head, page, slot, fault);
}

}  // namespace cuda
}  // namespace quest
