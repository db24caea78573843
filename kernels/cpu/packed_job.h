// One call of attend_packed: its tiles, and the state that its splits are summed up in.
//
// A list's tokens become tiles of kBlock tokens with a bit for each that is listed, in list order.
// kSplit tiles are a split, kChunk of them a chunk, counted in list positions: equal lists give
// equal bits, whatever the batch, the threads and the spelling of the list.
#pragma once

#include "lists.h"
#include "packed.h"

namespace quest {
namespace cpu {
namespace packed_attention {

// Tokens of one tile of a row.
struct Tile {
  const uint8_t* block;  // of kv head 0; nullptr: nothing here is packed
  int32_t number;        // in the row
  int32_t within;        // in its block
  uint16_t listed;
  bool whole;  // every listed key and value is packed
};

struct Job {
  const Pages& p;
  const Packed& packed;
  const PackedLayout layout;
  const int32_t* lengths;
  const Selection& selection;
  int64_t heads, group;
  float scale;
  const Attended& result;
  const void* given;                     // q as it is
  const float* q;                        // [R, H, D]
  std::vector<std::vector<Tile>> tiles;  // of each row's lists
  int64_t splits;                        // of the longest list
  float* state;                          // [R, splits, H, record], as in attend.cpp
  int64_t record;
  void (*fast)(const PackedChunk&);
  const float *turn_cos, *turn_sin;  // of NuqChunk

  int64_t lists() const { return selection.index == nullptr ? 1 : selection.lists; }
  const std::vector<Tile>& of(int64_t row, int64_t list) const {
    return tiles[static_cast<size_t>(row * lists() + list)];
  }
  // The number of a tile's block.
  int64_t id_of(const Tile& tile) const {
    return (tile.block - packed.data) / (p.kv_heads * layout.bytes);
  }
  float* of(int64_t row, int64_t split, int64_t head) const {
    return state + ((row * splits + split) * heads + head) * record;
  }
};

// The tiles of one list of a row.
void make_tiles(const Job& job, int64_t row, int64_t list, std::vector<Tile>& tiles);

// Tiles [first, last) of one list join the state of `heads` query heads from `head` on. `jump`
// bytes behind each block lies the one that is read next, 0: the block of the tile kChunk further
// on, for kv head `next_head`; < 0: not to be asked for.
void attend_tiles(const Job& job, const std::vector<Tile>& tiles, int64_t first, int64_t last,
                  int64_t row, int64_t kv_head, int64_t head, int64_t heads, float* state,
                  int64_t jump, int64_t next_head);

}  // namespace packed_attention
}  // namespace cpu
}  // namespace quest
