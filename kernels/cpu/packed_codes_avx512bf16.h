// What loops over packed codes by pairs of bf16 share: codes as levels, and what a chunk carries.
//
// What codes stand for is looked up in a table of 32 words of bf16 (levels, from the middle of
// them): a word's upper bits do not matter where the table repeats itself.
#pragma once

#include "block.h"
#include "packed_block.h"
#include "vec_avx512.h"

namespace {

using quest::cpu::kChunk;
using quest::cpu::PackedChunk;

// Loops that fill the registers stand apart, and are unrolled before anything else is done with
// them: else sums that are elements of an array would stay in memory.
#define QUEST_APART __attribute__((noinline))
#define QUEST_HERE __attribute__((always_inline))

template <int I>
struct Number {
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, typename Body>
QUEST_HERE inline void each(Body&& body) {
  if constexpr (I < N) {
    body(Number<I>());
    each<N, I + 1>(body);
  }
}

inline Vec halves(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

struct Levels {
  __m512i table;
  float middle;

  Levels(const float* levels, int bits) {
    const int count = 1 << bits;
    middle = 0.5f * (levels[0] + levels[count - 1]);
    alignas(64) float spread[32];
    for (int i = 0; i < 32; ++i) spread[i] = levels[i % count] - middle;
    table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(spread + 16), load(spread)));
  }
};

// Vectors that a strip of 64 bytes holds; of 3 bits, one of the plane of low bits.
template <int B>
constexpr int kEach = B == 4 ? 4 : 8;

// The codes of a strip's vectors as levels, one vector after the other.
template <int B>
struct Strip {
  __m512i words, high;

  Strip() = default;
  // Strip `number` of a tile; `high_plane` is where its plane of high bits begins.
  Strip(const uint8_t* tile, int64_t number, int64_t high_plane) {
    words = _mm512_loadu_si512(tile + number * 64);
    if (B == 3) {
      const __m512i both = _mm512_loadu_si512(tile + high_plane + number / 2 * 64);
      high = number % 2 == 0 ? _mm512_slli_epi16(both, 2) : _mm512_srli_epi16(both, 6);
    }
  }
  __m512bh next(__m512i table) {
    __m512i index = words;
    words = _mm512_srli_epi16(words, B == 4 ? 4 : 2);
    if (B == 3) {
      index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), index, high, 0xCA);
      high = _mm512_srli_epi16(high, 1);
    }
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table));
  }
};

inline __m512bh everywhere(uint32_t pair) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
}
inline void put_pairs(uint32_t* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
inline void put_pairs(uint32_t* to, Vec x, Vec y) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
}
// The sums of four vectors' lanes.
inline __m128 sums(const Vec* a) {
  const Vec ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const Vec cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d l = _mm512_castps_pd(ab), h = _mm512_castps_pd(cd);
  const Vec all =
      add(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

constexpr int kFastDim = 256;
constexpr int kFastGroups = kFastDim / kLanes;
constexpr int kTokens = kChunk * kBlock;

// What H heads carry through a chunk.
template <int H>
struct FoldedChunk {
  alignas(64) uint32_t query[H * kFastDim / 2];  // query * scale of one block's keys, in pairs
  float minimum[4];                              // query . minima of the same block
  alignas(64) float score[H * kTokens];          // and then their exponentials
  // Probability * scale of each tile's values, in pairs of tokens, two tiles of a head side by
  // side; and the sums of probability * minimum.
  alignas(64) uint32_t weight[kChunk * kFastGroups * H * kBlock / 2];
  alignas(16) float minima[kFastGroups * 4];

  uint32_t* weight_of(int tile, int group) {
    return weight + (tile / 2 * kFastGroups + group) * H * kBlock + tile % 2 * (kBlock / 2);
  }
};

}  // namespace
