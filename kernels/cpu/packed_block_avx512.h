// Tiles of packed_block.h widened sixteen at a time, for codes of 2 to 4 bits.
#pragma once

#include "packed_block.h"
#include "vec_avx512.h"

namespace {

// The 16-bit words of a vector of codes hold two codes in each 32 bits: even ones (of a pair's
// first) and odd ones, as levels.
struct PairLevels {
  Vec table;
  __m512i mask;

  PairLevels(const PackedLayout& l, const float* levels) {
    alignas(64) float all[kLanes];
    for (int i = 0; i < kLanes; ++i) all[i] = levels[i & ((1 << l.bits) - 1)];
    table = load(all);
    mask = _mm512_set1_epi32(l.bits == 4 ? 15 : 3);
  }
  void look_up(const PackedLayout& l, const uint8_t* tile, int64_t vector, Vec* even,
               Vec* odd) const {
    const int bits = l.bits == 3 ? 2 : l.bits, each = 16 / bits;
    const __m512i words = _mm512_loadu_si512(tile + vector / each * 64);
    const auto shift = static_cast<unsigned>(vector % each) * static_cast<unsigned>(bits);
    __m512i low = _mm512_and_si512(_mm512_srli_epi32(words, shift), mask);
    __m512i high = _mm512_and_si512(_mm512_srli_epi32(words, shift + 16), mask);
    if (l.bits == 3) {
      const __m512i top = _mm512_loadu_si512(tile + l.high_plane + vector / 16 * 64);
      const auto at = static_cast<unsigned>(vector % 16);
      const __m512i one = _mm512_set1_epi32(1);
      const auto bit = [&](unsigned from) {
        return _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(top, from), one), 2);
      };
      low = _mm512_or_si512(low, bit(at));
      high = _mm512_or_si512(high, bit(at + 16));
    }
    *even = _mm512_permutexvar_ps(low, table);
    *odd = _mm512_permutexvar_ps(high, table);
  }
};

inline bool sixteens(const PackedLayout& l) { return l.bits <= 4 && l.dim % kLanes == 0; }

// Writes channel by channel: a vector holds one channel of all tokens.
template <typename Channels>
inline void unpack_keys(const PackedLayout& l, const uint8_t* tile, const float* levels,
                        const float* scale, const float* low, float* out, Channels&& channels) {
  const PairLevels pairs(l, levels);
  const __m512i rows =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(static_cast<int>(l.dim)));
  for (int64_t v = 0; v < l.dim / 2; ++v) {
    Vec one[2];
    pairs.look_up(l, tile, v, &one[0], &one[1]);
    for (int part = 0; part < 2; ++part) {
      const int64_t c = channels(v, part);
      const Vec x = fma(one[part], set1(scale[c]), set1(low[c]));
      _mm512_i32scatter_ps(out + c, rows, x, 4);
    }
  }
}

// scale_of(t, first), low_of(t, first): of token t's channels from `first` on.
template <typename Scale, typename Low>
inline void unpack_values(const PackedLayout& l, const uint8_t* tile, const float* levels,
                          float* out, Scale&& scale_of, Low&& low_of) {
  const PairLevels pairs(l, levels);
  for (int64_t first = 0; first < l.dim; first += kLanes) {
    for (int64_t t = 0; t < kBlock; t += 2) {
      Vec one[2];
      pairs.look_up(l, tile, first / 2 + t / 2, &one[0], &one[1]);
      for (int64_t part = 0; part < 2; ++part) {
        const Vec scale = set1(scale_of(t + part, first)), low = set1(low_of(t + part, first));
        store(out + (t + part) * l.dim + first, fma(one[part], scale, low));
      }
    }
  }
}

void unpack_sixteens(const PackedLayout& l, const uint8_t* block, int64_t number,
                     const float* levels, bool values, float* out) {
  if (!sixteens(l)) return unpack(l, block, number, levels, values, out);
  const uint8_t* tile = block + (values ? l.value_codes : l.key_codes) + number * l.tile_bytes;
  if (values) {
    const auto at = [&](int64_t part, int64_t t, int64_t first) {
      return from_half(block + part + 2 * (first / l.width * l.group + number * kBlock + t));
    };
    unpack_values(
        l, tile, levels, out,
        [&](int64_t t, int64_t first) { return at(l.value_scales, t, first); },
        [&](int64_t t, int64_t first) { return at(l.value_minima, t, first); });
    return;
  }
  float norms[2 * quest::cpu::kMaxDim];
  for (int64_t c = 0; c < 2 * l.dim; ++c) norms[c] = from_half(block + 2 * c);
  unpack_keys(l, tile, levels, norms, norms + l.dim, out,
              [](int64_t v, int part) { return 2 * v + part; });
}

void unpack_nuq_sixteens(const PackedLayout& l, const quest::cpu::NuqTile& tile, float* out) {
  if (!sixteens(l)) return unpack_nuq(l, tile, out);
  if (tile.key_scale == nullptr) {
    const auto* norms = reinterpret_cast<const uint8_t*>(tile.value_norms);
    unpack_values(
        l, tile.block + l.value_codes, tile.levels, out,
        [&](int64_t t, int64_t) { return from_half(norms + 2 * (kBlock + t)); },
        [&](int64_t t, int64_t) { return from_half(norms + 2 * t); });
    add_outliers(tile, out);
    return;
  }
  const int64_t half = l.dim / 2;
  unpack_keys(l, tile.block + l.key_codes, tile.levels, tile.key_scale, tile.key_offset, out,
              [&](int64_t v, int part) { return v + part * half; });
  add_outliers(tile, out);
  turn(tile, l.dim, out);
}

}  // namespace
