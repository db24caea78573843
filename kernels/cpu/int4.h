// Rows in fp32 times weights in 4 bits, over an abstract vector whose lanes are outputs.
//
// Per group: sum of (code - 8) x, in two parts, then scale times that, then scale (8 - zero) times
// the sum of x. The order is the same for any number of rows and tiles done together.
#pragma once

#include "isa.h"

namespace {

using quest::cpu::Int4Block;

constexpr int kInt4Vecs = 16 / kLanes;  // of a tile

template <int R, int T>
void int4_some(const Int4Block& b, int64_t row, int64_t tile) {
  const float* x = static_cast<const float*>(b.x) + row * b.inputs;
  const uint8_t* at = b.tiles + tile * b.bytes;
  const int64_t groups = (b.inputs + b.group - 1) / b.group;
  Vec total[R][T][kInt4Vecs];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kInt4Vecs; ++v) total[r][t][v] = set1(0.0f);
    }
  }
  const Vec middle = set1(8.0f);
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g, first += b.group) {
    const int64_t lines = (b.inputs - first < b.group ? b.inputs - first : b.group) / 8;
    Vec part[2][R][T][kInt4Vecs];
    for (auto& half : part) {
      for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
          for (int v = 0; v < kInt4Vecs; ++v) half[r][t][v] = set1(0.0f);
        }
      }
    }
    const uint8_t* head = at;
    at += 64;
    for (int64_t l = 0; l < lines; ++l, at += 64) {
      for (int i = 0; i < 8; ++i) {
        const int shift = i % 2 * 16 + i / 2 * 4;
        for (int t = 0; t < T; ++t) {
          const uint32_t* words = reinterpret_cast<const uint32_t*>(at + t * b.bytes);
          for (int v = 0; v < kInt4Vecs; ++v) {
            const Vec code = sub(nibbles(words + v * kLanes, shift), middle);
            for (int r = 0; r < R; ++r) {
              const Vec by = set1(x[r * b.inputs + first + l * 8 + i]);
              part[i % 2][r][t][v] = fma(code, by, part[i % 2][r][t][v]);
            }
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kInt4Vecs; ++v) {
        const uint8_t* of = head + t * b.bytes;
        const Vec scale = load_half(reinterpret_cast<const uint16_t*>(of) + v * kLanes);
        const Vec offset = mul(scale, sub(middle, load_bytes(of + 32 + v * kLanes)));
        for (int r = 0; r < R; ++r) {
          Vec& sum = total[r][t][v];
          sum = fma(scale, add(part[0][r][t][v], part[1][r][t][v]), sum);
          sum = fma(offset, set1(b.sums[(row + r) * groups + g]), sum);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      float* to = b.out + ((row + r) * b.count + tile + t) * 16;
      for (int v = 0; v < kInt4Vecs; ++v) store(to + v * kLanes, total[r][t][v]);
    }
  }
}

// All rows and tiles, some<rows, tiles> together.
#define QUEST_INT4_ROWS(some, R, T)                                  \
  for (; b.rows - row >= R; row += R) {                              \
    int64_t tile = 0;                                                \
    for (; b.count - tile >= T; tile += T) some<R, T>(b, row, tile); \
    for (; tile < b.count; ++tile) some<R, 1>(b, row, tile);         \
  }

void int4_rows(const Int4Block& b) {
  int64_t row = 0;
  QUEST_INT4_ROWS(int4_some, 4, 1)
  QUEST_INT4_ROWS(int4_some, 2, 2)
  QUEST_INT4_ROWS(int4_some, 1, 4)
}

}  // namespace
