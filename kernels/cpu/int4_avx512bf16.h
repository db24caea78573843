// Rows in bf16 times weights in 4 bits: a permutation looks 32 codes up as bf16, and a dot product
// of pairs takes them with two inputs that all outputs share. See int4.h for the order of sums.
#pragma once

#include "int4.h"

namespace {

// Bytes ahead of what is multiplied now.
constexpr int64_t kInt4Ahead = 2048;

template <int R, int T>
void int4_some_pairs(const Int4Block& b, int64_t row, int64_t tile) {
  const uint16_t* x = static_cast<const uint16_t*>(b.x) + row * b.inputs;
  const uint8_t* at = b.tiles + tile * b.bytes;
  const int64_t groups = (b.inputs + b.group - 1) / b.group;
  // code - 8 in bf16, twice over: the permutation looks at five bits, of which four are the code.
  const __m512i values = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      static_cast<int16_t>(0xC100), static_cast<int16_t>(0xC0E0), static_cast<int16_t>(0xC0C0),
      static_cast<int16_t>(0xC0A0), static_cast<int16_t>(0xC080), static_cast<int16_t>(0xC040),
      static_cast<int16_t>(0xC000), static_cast<int16_t>(0xBF80), 0, 0x3F80, 0x4000, 0x4040, 0x4080,
      0x40A0, 0x40C0, 0x40E0));
  Vec total[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) total[r][t] = set1(0.0f);
  }
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g, first += b.group) {
    const int64_t lines = (b.inputs - first < b.group ? b.inputs - first : b.group) / 8;
    Vec part[2][R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) part[0][r][t] = part[1][r][t] = set1(0.0f);
    }
    const uint8_t* head = at;
    at += 64;
    for (int64_t l = 0; l < lines; ++l, at += 64) {
      const uint16_t* pairs = x + first + l * 8;
      for (int t = 0; t < T; ++t) {
        const uint8_t* line = at + t * b.bytes;
        __builtin_prefetch(line + kInt4Ahead);
        const __m512i codes = _mm512_loadu_si512(line);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const __m512i low = n == 0 ? codes : _mm512_srli_epi16(codes, 4 * n);
          const __m512bh weight = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(low, values));
          for (int r = 0; r < R; ++r) {
            int32_t two;
            __builtin_memcpy(&two, pairs + r * b.inputs + 2 * n, 4);
            part[n % 2][r][t] = _mm512_dpbf16_ps(
                part[n % 2][r][t], weight, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const uint8_t* of = head + t * b.bytes;
      const Vec scale = load_half(reinterpret_cast<const uint16_t*>(of));
      const Vec offset = mul(scale, sub(set1(8.0f), load_bytes(of + 32)));
      for (int r = 0; r < R; ++r) {
        total[r][t] = fma(scale, add(part[0][r][t], part[1][r][t]), total[r][t]);
        total[r][t] = fma(offset, set1(b.sums[(row + r) * groups + g]), total[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) store(b.out + ((row + r) * b.count + tile + t) * 16, total[r][t]);
  }
}

void int4_pairs(const Int4Block& b) {
  int64_t row = 0;
  QUEST_INT4_ROWS(int4_some_pairs, 8, 1)
  QUEST_INT4_ROWS(int4_some_pairs, 4, 2)
  QUEST_INT4_ROWS(int4_some_pairs, 2, 4)
  QUEST_INT4_ROWS(int4_some_pairs, 1, 4)
}

}  // namespace
