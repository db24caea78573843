// Packed blocks on the device: their place, and eight neighbouring channels of a token as fp32.
// What lies where stands in quest_dist/packing.py.
#pragma once

#include "element.cuh"
#include "rows.cuh"

namespace quest {
namespace cuda {

// Leading tokens of a row whose keys (or values) are packed; what is beyond its blocks or tokens
// counts as not packed.
__device__ inline int packed_end(const Packed& packed, const int32_t* ends, int64_t row, int length,
                                 int step, Fault code, int64_t* fault) {
  const int end = ends[row];
  int64_t room = packed.row_blocks * packed.group;
  if (packed.nuq.keys != nullptr && packed.nuq.positions < room) room = packed.nuq.positions;
  const int most = static_cast<int>(length < room ? length : room);
  if (end >= 0 && end <= most && end % step == 0) return end;
  if (threadIdx.x == 0) raise(fault, code, row, 0);
  return 0;
}

// The number of a row's block, -1 where its table names none.
__device__ __forceinline__ int block_of(const Packed& packed, int64_t row, int64_t number,
                                        int64_t* fault) {
  const int id = packed.table[row * packed.row_blocks + number];
  if (id >= 0 && id < packed.blocks) return id;
  raise(fault, Fault::kBlocks, row, number);
  return -1;
}

__device__ __forceinline__ uint8_t* data_of(const Packed& packed, const PackedLayout& l,
                                            int64_t kv_heads, int64_t kv_head, int64_t id) {
  return packed.data + (id * kv_heads + kv_head) * l.bytes;
}

__device__ __forceinline__ float half_at(const uint8_t* at) {
  return widen(Float16{*reinterpret_cast<const uint16_t*>(at)});
}

// Bits of a code in a word of plane `bits`, for vector `vector`.
__device__ __forceinline__ uint32_t part_of(uint32_t word, int vector, int bits) {
  return word >> vector % (16 / bits) * bits & ((1u << bits) - 1u);
}

__device__ __forceinline__ const uint8_t* strip_of(const uint8_t* tile, int vector, int bits) {
  return tile + vector / (16 / bits) * 64;
}

// Channels [c, c + 8) of the key of token t of a block; c is a multiple of 8 below dim.
__device__ __forceinline__ void unpack_key(const PackedLayout& l, const uint8_t* block, int t,
                                           int c, const float* levels, float (&x)[8]) {
  const uint8_t* tile = block + l.key_codes + t / 16 * l.tile_bytes;
  const int at = t % 16 * 4, bits = l.bits == 3 ? 2 : l.bits;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int vector = c / 2 + i;
    const uint32_t both = *reinterpret_cast<const uint32_t*>(strip_of(tile, vector, bits) + at);
    uint32_t even = part_of(both & 0xffffu, vector, bits), odd = part_of(both >> 16, vector, bits);
    if (l.bits == 3) {
      const uint32_t high =
          *reinterpret_cast<const uint32_t*>(strip_of(tile + l.high_plane, vector, 1) + at);
      even |= part_of(high & 0xffffu, vector, 1) << 2;
      odd |= part_of(high >> 16, vector, 1) << 2;
    }
    x[2 * i] = levels[even];
    x[2 * i + 1] = levels[odd];
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint8_t* scale = block + 2 * (c + e);
    x[e] = fmaf(x[e], half_at(scale), half_at(scale + 2 * l.dim));
  }
}

// Channels [c, c + 8) of its value, by the scale and the minimum of their group.
__device__ __forceinline__ void value_codes(const PackedLayout& l, const uint8_t* block, int t,
                                            int c, const float* levels, float scale, float minimum,
                                            float (&x)[8]) {
  const uint8_t* tile = block + l.value_codes + t / 16 * l.tile_bytes;
  const int vector = c / 16 * 8 + t % 16 / 2, at = c % 16 * 4 + t % 2 * 2;
  const int bits = l.bits == 3 ? 2 : l.bits;
  const uint8_t* low = strip_of(tile, vector, bits) + at;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    uint32_t code = part_of(*reinterpret_cast<const uint16_t*>(low + 4 * e), vector, bits);
    if (l.bits == 3) {
      const uint8_t* high = strip_of(tile + l.high_plane, vector, 1) + at;
      code |= part_of(*reinterpret_cast<const uint16_t*>(high + 4 * e), vector, 1) << 2;
    }
    x[e] = fmaf(levels[code], scale, minimum);
  }
}

// The same where the block holds scale and minimum.
__device__ __forceinline__ void unpack_value(const PackedLayout& l, const uint8_t* block, int t,
                                             int c, const float* levels, float (&x)[8]) {
  const int number = c / static_cast<int>(l.width) * static_cast<int>(l.group) + t;
  value_codes(l, block, t, c, levels, half_at(block + l.value_scales + 2 * number),
              half_at(block + l.value_minima + 2 * number), x);
}

}  // namespace cuda
}  // namespace quest
