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

// Packed keys are whole groups, and neither they nor the values outnumber a row's blocks or tokens.
inline void check_packed(const Packed& packed, const char* op, int64_t rows, int64_t most_tokens,
                         const int32_t* lengths) {
  const auto check = [&](const char* name, const int32_t* ends, int64_t r, int64_t step) {
    int64_t most = packed.row_blocks * packed.group;
    const int64_t tokens = lengths == nullptr ? most_tokens : lengths[r];
    most = tokens < most ? tokens : most;
    if (ends[r] < 0 || ends[r] > most || ends[r] % step != 0) {
      refuse(op, std::string("packed.") + name + "[" + std::to_string(r) + "] is " +
                     std::to_string(ends[r]) + "; expected a multiple of " + std::to_string(step) +
                     " in 0.." + std::to_string(most));
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    check("keys", packed.keys, r, packed.group);
    check("values", packed.values, r, 1);
  }
}

}  // namespace cpu
}  // namespace quest
