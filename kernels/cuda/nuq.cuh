// KVQuant's blocks on the device: eight neighbouring channels of a token as fp32, outliers added
// and keys turned. What lies where stands in quest_dist/packing.py.
#pragma once

#include "packed.cuh"

namespace quest {
namespace cuda {

// Outliers [first, end) of one token's key or value.
struct Outliers {
  int first, end;
};

// Those of token t of block `id`: of its key (column kv_head of starts) or value (kv_heads
// further).
__device__ inline Outliers outliers_of(const Packed& packed, int dim, int64_t kv_heads, int64_t id,
                                       int64_t column, int t, int64_t* fault) {
  const Nuq& nuq = packed.nuq;
  const int32_t* starts = nuq.starts + id * (2 * kv_heads + 1) + column;
  int first = starts[0], end = starts[1];
  if (first < 0 || first > end || end > nuq.outlier_count) {
    raise(fault, Fault::kOutliers, id, column);
    return {0, 0};
  }
  for (int last = end; first < last;) {
    const int middle = (first + last) / 2;
    if (nuq.outliers[2 * middle] < t * dim) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  Outliers found{first, first};
  while (found.end < end && nuq.outliers[2 * found.end] < (t + 1) * dim) ++found.end;
  return found;
}

__device__ __forceinline__ float outlier_at(const Nuq& nuq, int number) {
  return widen(Float16{nuq.outliers[2 * number + 1]});
}

// Channels [c, c + 8) of the key of token t of a block, whose row has it at `position`. Half a head
// is a multiple of eight: all are of the same half, and of one strip, or two of codes of 4 bits.
__device__ __forceinline__ void unpack_turned_key(const Packed& packed, const PackedLayout& l,
                                                  const uint8_t* block, int kv_head,
                                                  const Outliers& outliers, int t, int position,
                                                  int c, float (&x)[8]) {
  const Nuq& nuq = packed.nuq;
  const int dim = static_cast<int>(l.dim), half = dim / 2;
  const bool second = c >= half, wide = l.bits == 4;
  const int j0 = second ? c - half : c;
  const uint8_t* low = block + l.key_codes + (wide ? j0 / 4 : j0 / 8) * 64 + t * 4;
  const uint8_t* high = block + l.key_codes + l.high_plane + j0 / 16 * 64 + t * 4;
  const uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(low),
                             wide ? *reinterpret_cast<const uint32_t*>(low + 64) : 0};
  const uint32_t top = l.bits == 3 ? *reinterpret_cast<const uint32_t*>(high) >> j0 % 16 : 0;
  const float* scale = nuq.keys + kv_head * 2 * dim + j0;
  const int64_t turn = static_cast<int64_t>(position) * half + j0;
  const float *cos = nuq.cos + turn, *sin = nuq.sin + turn;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t both = wide ? words[e / 4] >> e % 4 * 4 : words[0] >> e * 2;
    const uint32_t mask = wide ? 15u : 3u;
    const uint32_t even = (both & mask) | (top >> e & 1u) << 2;
    const uint32_t odd = (both >> 16 & mask) | (top >> (16 + e) & 1u) << 2;
    const float a = fmaf(packed.levels[even], scale[e], scale[dim + e]);
    const float b = fmaf(packed.levels[odd], scale[half + e], scale[dim + half + e]);
    x[e] = second ? fmaf(b, cos[e], a * sin[e]) : fmaf(a, cos[e], -b * sin[e]);
  }
#pragma unroll 1
  for (int i = outliers.first; i < outliers.end; ++i) {
    const int channel = nuq.outliers[2 * i] - t * dim;
    // Which of the eight it is, or turns with.
    const int at = (channel >= half ? channel - half : channel) - j0;
    if (at < 0 || at >= 8) continue;
    const bool own = (channel >= half) == second;
    const float part = own ? cos[at] : second ? sin[at] : -sin[at];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] += e == at ? outlier_at(nuq, i) * part : 0.0f;
  }
}

// The same of its value.
__device__ __forceinline__ void unpack_nuq_value(const Packed& packed, const PackedLayout& l,
                                                 const uint8_t* block, int id,
                                                 const Outliers& outliers, int t, int c,
                                                 float (&x)[8]) {
  const Nuq& nuq = packed.nuq;
  const uint16_t* norms = nuq.values + static_cast<int64_t>(id) * 32 + t;
  const float low = widen(Float16{norms[0]}), scale = widen(Float16{norms[16]});
  const int place = t * static_cast<int>(l.dim) + c;
  value_codes(l, block, t, c, packed.levels + (1 << l.bits), scale, low, x);
#pragma unroll 1
  for (int i = outliers.first; i < outliers.end; ++i) {
    const int at = nuq.outliers[2 * i] - place;
    const float off = outlier_at(nuq, i);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] += e == at ? off : 0.0f;
  }
}

}  // namespace cuda
}  // namespace quest
