// One list of one row, read in blocks of tokens.
#pragma once

#include <algorithm>

#include "lists.h"

namespace quest {
namespace cpu {

// The row of kv of each token of a block, for kv head 0.
struct Block {
  int64_t key[kBlock];
  int n;
};

// One list of one row, read block by block.
class List {
 public:
  List() = default;
  List(const Pages& pages, const int32_t* lengths, const Selection& selection, int64_t row,
       int64_t list)
      : p_(&pages), row_(row), length_(lengths[row]) {
    tokens_ = named_tokens(pages, lengths, selection, row, list);
    const int64_t at = row * selection.lists + list;
    if (selection.index == nullptr || selection.count[at] < 0) return;
    index_ = selection.index + at * selection.width;
    pages_ = selection.unit == Unit::kPages;
    const int64_t last = (length_ - 1) / p_->page_size, count = selection.count[at];
    if (!pages_) return;
    missing_ = (last + 1) * p_->page_size - length_;
    behind_ = (std::find(index_, index_ + count, last) - index_ + 1) * p_->page_size - missing_;
  }

  int64_t tokens() const { return tokens_; }
  bool all() const { return index_ == nullptr; }

  void locate(int64_t first, int64_t last, Block& block) const {
    block.n = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(last - first, kBlock)));
    const int64_t size = p_->page_size;
    for (int i = 0; i < block.n;) {
      const int64_t position = first + i;
      int64_t page, slot, run = 1;  // of the tokens that follow in the same page
      if (all()) {
        page = position / size;
        slot = position % size;
        run = size - slot;
      } else if (!pages_) {
        page = index_[position] / size;
        slot = index_[position] % size;
      } else {
        // Pages are whole but for the row's last one, which may stand anywhere in the list: behind
        // it everything has moved forward.
        const int64_t whole = position >= behind_ ? position + missing_ : position;
        page = index_[whole / size];
        slot = whole % size;
        run = position < behind_ ? std::min(size - slot, behind_ - position) : size - slot;
      }
      const int64_t base = key_row(*p_, physical(*p_, "attend", row_, page), 0) + slot;
      const int end = static_cast<int>(std::min<int64_t>(i + run, block.n));
      for (int64_t key = base; i < end; ++i, ++key) block.key[i] = key;
    }
    // What follows a short block is read ahead, never attended to.
    for (int i = block.n; i < kBlock; ++i) block.key[i] = i > 0 ? block.key[i - 1] : 0;
  }

 private:
  const Pages* p_ = nullptr;
  const int32_t* index_ = nullptr;
  int64_t row_ = 0, length_ = 0, tokens_ = 0;
  // The first token behind the row's last page, where the list names that, and its free slots.
  int64_t behind_ = 0, missing_ = 0;
  bool pages_ = false;
};

}  // namespace cpu
}  // namespace quest
