// Blocks of packed keys and values: their place, and what rows may say of them.
#pragma once

#include "../packed_layout.h"
#include "rows.h"

namespace quest {
namespace cpu {

// The first of a row's block of all kv heads, checked.
inline uint8_t* packed_block(const Packed& packed, const PackedLayout& l, const char* op,
                             int64_t kv_heads, int64_t row, int64_t block) {
  const int64_t id = packed.table[row * packed.row_blocks + block];
  if (id < 0 || id >= packed.blocks) {
    refuse(op, "packed.table[" + std::to_string(row) + ", " + std::to_string(block) + "] is " +
                   std::to_string(id) + ", but the blocks are 0.." +
                   std::to_string(packed.blocks - 1));
  }
  return packed.data + id * kv_heads * l.bytes;
}

// The outliers of a block's keys (of = 0) or values (1) of one kv head, checked.
inline const uint16_t* outliers_of(const Packed& packed, const PackedLayout& l, const char* op,
                                   int64_t kv_heads, int64_t id, int64_t kv_head, int of,
                                   int64_t* count) {
  const Nuq& nuq = packed.nuq;
  const int64_t number = id * (2 * kv_heads + 1) + of * kv_heads + kv_head;
  const int64_t first = nuq.starts[number], end = nuq.starts[number + 1];
  if (first < 0 || end < first || end > nuq.outlier_count) {
    refuse(op, "packed.nuq.starts of block " + std::to_string(id) + " name outliers " +
                   std::to_string(first) + ".." + std::to_string(end) + " of " +
                   std::to_string(nuq.outlier_count));
  }
  *count = end - first;
  uint16_t furthest = 0;  // first without a branch for each
  for (int64_t i = first; i < end; ++i) {
    furthest = nuq.outliers[2 * i] > furthest ? nuq.outliers[2 * i] : furthest;
  }
  for (int64_t i = first; furthest >= l.group * l.dim && i < end; ++i) {
    if (nuq.outliers[2 * i] >= l.group * l.dim) {
      refuse(op, "packed.nuq.outliers[" + std::to_string(i) + "] is at " +
                     std::to_string(nuq.outliers[2 * i]) + " of a block's " +
                     std::to_string(l.group * l.dim) + " numbers");
    }
  }
  return nuq.outliers + 2 * first;
}

// Packed keys are whole groups (each token for itself where they are Nuq's, which have positions),
// and neither they nor the values outnumber a row's blocks or tokens.
inline void check_packed(const Packed& packed, const char* op, int64_t rows, int64_t most_tokens,
                         const int32_t* lengths) {
  const auto check = [&](const char* name, const int32_t* ends, int64_t r, int64_t step) {
    int64_t most = packed.row_blocks * packed.group;
    const int64_t tokens = lengths == nullptr ? most_tokens : lengths[r];
    most = tokens < most ? tokens : most;
    if (packed.nuq.keys != nullptr && packed.nuq.positions < most) most = packed.nuq.positions;
    if (ends[r] < 0 || ends[r] > most || ends[r] % step != 0) {
      refuse(op, std::string("packed.") + name + "[" + std::to_string(r) + "] is " +
                     std::to_string(ends[r]) + "; expected a multiple of " + std::to_string(step) +
                     " in 0.." + std::to_string(most));
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    check("keys", packed.keys, r, packed.nuq.keys == nullptr ? packed.group : 1);
    check("values", packed.values, r, 1);
  }
}

}  // namespace cpu
}  // namespace quest
