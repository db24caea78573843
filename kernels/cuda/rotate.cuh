// Rotary embedding by halves, in the bits of quest_dist.reference.rotate: two products and a sum in
// fp32, rounded once to T.
#pragma once

#include "rows.cuh"

namespace quest {
namespace cuda {

// Eight values of cos or sin.
template <typename T>
__device__ __forceinline__ void load_angles(const void* from, bool wide, int64_t at,
                                            float (&x)[8]) {
  if (wide) {
    Eight<float> raw;
    raw.load_early(static_cast<const float*>(from) + at);
    raw.unpack(x);
  } else {
    Eight<T> raw;
    raw.load_early(static_cast<const T*>(from) + at);
    raw.unpack(x);
  }
}

// Channels d .. d + 7 of x [D], which belongs to a row; d is a multiple of 8 below D.
template <typename T>
__device__ __forceinline__ void load_rotated(const Angles& a, int64_t row, const T* x, int dim,
                                             int d, float (&y)[8]) {
  Eight<T> own;
  own.load_early(x + d);
  own.unpack(y);
  if (a.cos == nullptr) return;
  // D / 2 is a multiple of 4: four neighbours have neighbours for partners.
  const int half = dim / 2, next = d + 4;
  Eight<T> other;
  other.load_fours_early(x + (d < half ? d + half : d - half),
                         x + (next < half ? next + half : next - half));
  float partner[8], cos[8], sin[8];
  other.unpack(partner);
  load_angles<T>(a.cos, a.wide, row * a.cos_row + d, cos);
  load_angles<T>(a.sin, a.wide, row * a.sin_row + d, sin);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float turned = d + e < half ? -partner[e] : partner[e];
    y[e] = y[e] * cos[e] + turned * sin[e];
  }
  own.pack(y);
  own.unpack(y);
}

// This lane's part of query `head` of a row.
template <typename T>
__device__ __forceinline__ void load_query(const Strided& q, const Angles& angles, int64_t row,
                                           int64_t head, int64_t dim, int lane, float (&x)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = 0.0f;
  if (lane * 8 >= dim) return;
  const T* from = static_cast<const T*>(q.data) + row * q.row + head * q.head;
  load_rotated<T>(angles, row, from, static_cast<int>(dim), lane * 8, x);
}

}  // namespace cuda
}  // namespace quest
