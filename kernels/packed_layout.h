// What lies where in a block of packed keys and values (quest_dist/packing.py says it in words).
#pragma once

#include "ops.h"

namespace quest {

inline PackedLayout layout_of(const Packed& packed, int64_t dim) {
  constexpr int64_t kTile = 16;
  PackedLayout l{};
  l.bits = static_cast<int>(packed.bits);
  l.dim = dim;
  l.group = packed.group;
  l.width = packed.group < dim && packed.nuq.keys == nullptr ? packed.group : dim;
  l.vectors = (dim + 15) / 16 * 8;
  const auto strips = [&](int64_t plane) { return (l.vectors * plane + 15) / 16 * 64; };
  l.high_plane = strips(2);
  l.tile_bytes = l.bits == 3 ? strips(2) + strips(1) : strips(l.bits);
  if (packed.nuq.keys == nullptr) {
    l.value_scales = 4 * dim;
    l.value_minima = l.value_scales + 2 * l.group * (dim / l.width);
    l.key_codes = (2 * l.value_minima - l.value_scales + 63) / 64 * 64;
  }
  l.value_codes = l.key_codes + l.group / kTile * l.tile_bytes;
  l.bytes = 2 * l.value_codes - l.key_codes;
  return l;
}

}  // namespace quest
