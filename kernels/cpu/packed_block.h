// A tile of packed keys or values, widened to fp32. Include after a vec_*.h.
#pragma once

#include "isa.h"

namespace {

using quest::PackedLayout;

// Exact, of what pack.cpp writes (no infinity).
inline float from_half(const uint8_t* at) {
  uint16_t half;
  __builtin_memcpy(&half, at, 2);
  uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  __builtin_memcpy(&bits, &x, 4);
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  if ((half & 0x7c00u) == 0x7c00u) bits = 0x7fc00000u;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The 32 codes of a vector.
inline void vector_codes(const PackedLayout& l, const uint8_t* tile, int64_t vector,
                         uint16_t* codes) {
  const int bits = l.bits == 3 ? 2 : l.bits, each = 16 / bits;
  const uint8_t* strip = tile + vector / each * 64;
  const int shift = static_cast<int>(vector % each) * bits, mask = (1 << bits) - 1;
  uint16_t words[32];
  __builtin_memcpy(words, strip, 64);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint16_t>(words[i] >> shift & mask);
  if (l.bits != 3) return;
  __builtin_memcpy(words, tile + l.high_plane + vector / 16 * 64, 64);
  const int high = static_cast<int>(vector % 16);
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<uint16_t>(codes[i] | (words[i] >> high & 1) << 2);
  }
}

void unpack(const PackedLayout& l, const uint8_t* block, int64_t number, const float* levels,
            bool values, float* out) {
  const uint8_t* tile = block + (values ? l.value_codes : l.key_codes) + number * l.tile_bytes;
  uint16_t codes[32];
  if (!values) {
    for (int64_t c = 0; c < l.dim; c += 2) {
      vector_codes(l, tile, c / 2, codes);
      for (int64_t one = c; one < c + 2 && one < l.dim; ++one) {
        const float scale = from_half(block + 2 * one), low = from_half(block + 2 * (l.dim + one));
        for (int64_t t = 0; t < kBlock; ++t) {
          out[t * l.dim + one] = levels[codes[2 * t + one - c]] * scale + low;
        }
      }
    }
    return;
  }
  for (int64_t first = 0; first < l.dim; first += 16) {
    for (int64_t t = 0; t < kBlock; t += 2) {
      vector_codes(l, tile, first / 2 + t / 2, codes);
      // A group of values is 16 channels or more, or the head.
      for (int64_t one = t; one < t + 2; ++one) {
        const int64_t at = 2 * (first / l.width * l.group + number * kBlock + one);
        const float scale = from_half(block + l.value_scales + at);
        const float low = from_half(block + l.value_minima + at);
        for (int64_t c = first; c < first + 16 && c < l.dim; ++c) {
          out[one * l.dim + c] = levels[codes[2 * (c - first) + one - t]] * scale + low;
        }
      }
    }
  }
}

inline void add_outliers(const quest::cpu::NuqTile& tile, float* out) {
  for (int64_t i = 0; i < tile.count; ++i) {
    const uint16_t* outlier = tile.outliers + 2 * i;
    out[outlier[0]] += from_half(reinterpret_cast<const uint8_t*>(outlier + 1));
  }
}

// Turns keys to their positions.
inline void turn(const quest::cpu::NuqTile& tile, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < tile.tokens; ++t) {
    float *first = out + t * dim, *second = first + half;
    const float *cos = tile.cos + t * half, *sin = tile.sin + t * half;
    for (int64_t c = 0; c < half; ++c) {
      const float a = first[c], b = second[c];
      first[c] = a * cos[c] - b * sin[c];
      second[c] = b * cos[c] + a * sin[c];
    }
  }
}

void unpack_nuq(const PackedLayout& l, const quest::cpu::NuqTile& tile, float* out) {
  const bool values = tile.key_scale == nullptr;
  const uint8_t* codes_of = tile.block + (values ? l.value_codes : l.key_codes);
  const int64_t half = l.dim / 2;
  uint16_t codes[32];
  if (values) {
    const uint8_t* norms = reinterpret_cast<const uint8_t*>(tile.value_norms);
    for (int64_t first = 0; first < l.dim; first += 16) {
      for (int64_t t = 0; t < kBlock; t += 2) {
        vector_codes(l, codes_of, first / 2 + t / 2, codes);
        for (int64_t one = t; one < t + 2; ++one) {
          const float offset = from_half(norms + 2 * one);
          const float scale = from_half(norms + 2 * (kBlock + one));
          for (int64_t c = first; c < first + 16 && c < l.dim; ++c) {
            out[one * l.dim + c] = tile.levels[codes[2 * (c - first) + one - t]] * scale + offset;
          }
        }
      }
    }
  } else {
    for (int64_t c = 0; c < half; ++c) {
      vector_codes(l, codes_of, c, codes);
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t channel = c + part * half;
        const float scale = tile.key_scale[channel], offset = tile.key_offset[channel];
        for (int64_t t = 0; t < kBlock; ++t) {
          out[t * l.dim + channel] = tile.levels[codes[2 * t + part]] * scale + offset;
        }
      }
    }
  }
  add_outliers(tile, out);
  if (!values) turn(tile, l.dim, out);
}

}  // namespace
