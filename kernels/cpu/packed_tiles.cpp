// Lists of tokens, as tiles.
#include <algorithm>

#include "packed_job.h"

namespace quest {
namespace cpu {
namespace packed_attention {
namespace {

// The tiles of tokens [first, last) go behind those that are there.
void add_run(const Job& job, int64_t row, int64_t first, int64_t last, std::vector<Tile>& tiles) {
  const int64_t some = std::max(job.packed.keys[row], job.packed.values[row]);
  const int64_t both = std::min(job.packed.keys[row], job.packed.values[row]);
  while (first < last) {
    const int64_t number = first / kBlock, end = std::min(last, (number + 1) * kBlock);
    const uint32_t upto = (1u << (end - number * kBlock)) - 1u;
    const auto listed = static_cast<uint16_t>(upto & ~((1u << first % kBlock) - 1u));
    const bool whole = first >= job.packed.nuq.sinks && end <= both;
    if (!tiles.empty() && tiles.back().number == number) {
      tiles.back().listed = static_cast<uint16_t>(tiles.back().listed | listed);
      tiles.back().whole = tiles.back().whole && whole;
    } else {
      const uint8_t* block = nullptr;
      if (number * kBlock < some) {
        block = packed_block(job.packed, job.layout, "attend_packed", job.p.kv_heads, row,
                             number * kBlock / job.layout.group);
      }
      const int64_t within = number % (job.layout.group / kBlock);
      tiles.push_back(
          {block, static_cast<int32_t>(number), static_cast<int32_t>(within), listed, whole});
    }
    first = end;
  }
}

}  // namespace

void make_tiles(const Job& job, int64_t row, int64_t list, std::vector<Tile>& tiles) {
  const Selection& s = job.selection;
  const int64_t length = job.lengths[row], at = row * s.lists + list;
  if (s.index == nullptr || s.count[at] < 0) {
    add_run(job, row, 0, length, tiles);
    return;
  }
  const int64_t size = s.unit == Unit::kPages ? job.p.page_size : 1;
  for (int64_t i = 0; i < s.count[at]; ++i) {
    const int64_t first = s.index[at * s.width + i] * size;
    add_run(job, row, first, std::min(first + size, length), tiles);
  }
}

}  // namespace packed_attention
}  // namespace cpu
}  // namespace quest
