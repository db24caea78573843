// Eight floats in portable C++; compilers turn the fixed loops into whatever vectors they have.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int kLanes = 8;
constexpr int kHeadBlock = 1;
struct Vec {
  float v[kLanes];
};

#define QUEST_EACH_LANE for (int i = 0; i < kLanes; ++i)

inline Vec set1(float x) {
  Vec r;
  QUEST_EACH_LANE r.v[i] = x;
  return r;
}
inline Vec load(const float* p) {
  Vec r;
  QUEST_EACH_LANE r.v[i] = p[i];
  return r;
}
inline Vec load(const uint16_t* p) {
  Vec r;
  QUEST_EACH_LANE {
    uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline Vec load(const int8_t* p) {
  Vec r;
  QUEST_EACH_LANE r.v[i] = static_cast<float>(p[i]);
  return r;
}
// x's bits [shift, shift + 4), one value a word.
inline Vec nibbles(const uint32_t* p, int shift) {
  Vec r;
  QUEST_EACH_LANE r.v[i] = static_cast<float>(p[i] >> shift & 15u);
  return r;
}
// Of fp16 that is not negative.
inline Vec load_half(const uint16_t* p) {
  Vec r;
  QUEST_EACH_LANE {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 13;
    memcpy(&r.v[i], &bits, 4);
    r.v[i] *= 0x1p112f;
  }
  return r;
}
inline Vec load_bytes(const uint8_t* p) {
  Vec r;
  QUEST_EACH_LANE r.v[i] = static_cast<float>(p[i]);
  return r;
}
template <typename T>
inline Vec load_part(const T* p, int n) {
  T padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
inline void store(float* p, Vec x) { QUEST_EACH_LANE p[i] = x.v[i]; }
inline void store_part(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
inline Vec add(Vec a, Vec b) {
  QUEST_EACH_LANE a.v[i] += b.v[i];
  return a;
}
inline Vec sub(Vec a, Vec b) {
  QUEST_EACH_LANE a.v[i] -= b.v[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  QUEST_EACH_LANE a.v[i] *= b.v[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  QUEST_EACH_LANE c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline Vec max(Vec a, Vec b) {
  QUEST_EACH_LANE a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Vec min(Vec a, Vec b) {
  QUEST_EACH_LANE a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Vec nearest(Vec a) {
  QUEST_EACH_LANE a.v[i] = nearbyintf(a.v[i]);
  return a;
}
// p * 2^n for integral n in [-126, 127]; 0 where x < limit.
inline Vec scale_exp(Vec p, Vec n, Vec x, Vec limit) {
  QUEST_EACH_LANE {
    uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    p.v[i] = x.v[i] < limit.v[i] ? 0.0f : p.v[i] * power;
  }
  return p;
}
// Lane i of the result is the sum of a[i]'s lanes, added as a tree.
inline Vec reduce(const Vec* a) {
  Vec r;
  QUEST_EACH_LANE {
    const float* x = a[i].v;
    r.v[i] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  }
  return r;
}

inline float top(Vec a) {
  float x = a.v[0];
  for (int i = 1; i < kLanes; ++i) x = x > a.v[i] ? x : a.v[i];
  return x;
}
inline float first_lane(Vec a) { return a.v[0]; }

#undef QUEST_EACH_LANE

}  // namespace
