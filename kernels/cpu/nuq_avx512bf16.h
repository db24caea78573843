// Tiles of KVQuant's codes: keys that are turned as they are met, and outliers.
//
// A key at position b + i, b that of its tile, is the one that its code stands for turned by b and
// then by i. The query is turned back by b, once for all of the tile, and meets the key as it was
// in two sums, one that grows by the cosine of i's angle and one by its sine: so one table of
// sixteen rotations serves every tile. Codes are pairs of what turns together, and meet bf16;
// offsets, cosines, sines and outliers meet fp32.
#pragma once

#include "packed_codes_avx512bf16.h"

namespace {

// A query turned back to a tile, times the keys' scale, pair by pair as codes meet it: (a, b), and
// (b, -a); and what the keys' offsets add to either.
template <int H>
struct TurnedQuery {
  alignas(64) uint32_t plain[H * kFastDim / 2], crossed[H * kFastDim / 2];
  alignas(64) float plain_offset[H * kFastDim / 2], crossed_offset[H * kFastDim / 2];
  // a and b themselves, heads side by side: pair j at place(j).
  alignas(64) float first[kFastDim / 2 * 4], second[kFastDim / 2 * 4];

  static int place(int j) { return j / kLanes * 4 * kLanes + j % 4 * kLanes + j % kLanes / 4 * 4; }
};

// Of four vectors, lane 4 l + r of all in the four lanes l of vector r; and the same back.
inline void side_by_side(const Vec* a, Vec* to) {
  const Vec ab = _mm512_unpacklo_ps(a[0], a[1]), cd = _mm512_unpacklo_ps(a[2], a[3]);
  const Vec ab_high = _mm512_unpackhi_ps(a[0], a[1]), cd_high = _mm512_unpackhi_ps(a[2], a[3]);
  const auto low = [](Vec x, Vec y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](Vec x, Vec y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  to[0] = low(ab, cd);
  to[1] = high(ab, cd);
  to[2] = low(ab_high, cd_high);
  to[3] = high(ab_high, cd_high);
}

inline void put_turned(uint32_t* to, Vec a, Vec b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

template <int H>
QUEST_APART void turn_query(const PackedChunk& c, int tile, const float* q, float middle,
                            TurnedQuery<H>& to) {
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const int half = static_cast<int>(c.layout->dim / 2);
  for (int j = 0; j < half; j += kLanes) {
    const auto own = static_cast<__mmask16>(half - j < kLanes ? (1u << (half - j)) - 1u : 0xffffu);
    const auto some = [&](const float* at) { return _mm512_maskz_loadu_ps(own, at + j); };
    const Vec cos = some(nuq.cos[tile]), sin = some(nuq.sin[tile]);
    const Vec scale_a = some(nuq.key_scale), scale_b = some(nuq.key_scale + half);
    const Vec offset_a = fma(set1(middle), scale_a, some(nuq.key_offset));
    const Vec offset_b = fma(set1(middle), scale_b, some(nuq.key_offset + half));
    Vec first[4], second[4];
    for (int h = 0; h < 4; ++h) first[h] = second[h] = set1(0.0f);
    each<H>([&](auto h) QUEST_HERE {
      const Vec x = some(q + h * 2 * half), y = some(q + h * 2 * half + half);
      const Vec a = fma(y, sin, mul(x, cos)), b = sub(mul(y, cos), mul(x, sin));
      const int at = h * (kFastDim / 2) + j;
      put_turned(to.plain + at, mul(a, scale_a), mul(b, scale_b));
      put_turned(to.crossed + at, mul(b, scale_a), sub(set1(0.0f), mul(a, scale_b)));
      store(to.plain_offset + at, fma(b, offset_b, mul(a, offset_a)));
      store(to.crossed_offset + at, sub(mul(b, offset_a), mul(a, offset_b)));
      first[h] = a;
      second[h] = b;
    });
    if (nuq.count[0][tile] == 0) continue;
    Vec beside[4];
    side_by_side(first, beside);
    for (int r = 0; r < 4; ++r) store(to.first + 4 * j + r * kLanes, beside[r]);
    side_by_side(second, beside);
    for (int r = 0; r < 4; ++r) store(to.second + 4 * j + r * kLanes, beside[r]);
  }
}

// Sixteen outliers from `from` on (zeros beyond the count): token, channel, and what is added.
struct Outliers {
  alignas(64) int32_t token[kLanes], channel[kLanes];
  alignas(64) float off[kLanes];
  int some;

  Outliers(const uint16_t* from, int64_t count, int64_t dim) {
    some = static_cast<int>(count < kLanes ? count : kLanes);
    const auto own = static_cast<__mmask16>((1u << some) - 1u);
    const __m512i words = _mm512_maskz_loadu_epi32(own, from);
    const __m512i place = _mm512_and_si512(words, _mm512_set1_epi32(0xffff));
    // Exact: places are below 2^12, and so far from the next whole number.
    const Vec exact =
        mul(add(_mm512_cvtepi32_ps(place), set1(0.5f)), set1(1.0f / static_cast<float>(dim)));
    const __m512i tokens = _mm512_cvttps_epi32(exact);
    const __m512i before = _mm512_mullo_epi32(tokens, _mm512_set1_epi32(static_cast<int>(dim)));
    _mm512_store_si512(token, tokens);
    _mm512_store_si512(channel, _mm512_sub_epi32(place, before));
    store(off, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16))));
  }
};

// What the outliers of a tile's keys add to its sixteen scores, a vector a head.
template <int H>
QUEST_APART void outlier_keys(const PackedChunk& c, int tile, const TurnedQuery<H>& query,
                              Vec* added) {
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const int half = static_cast<int>(c.layout->dim / 2);
  alignas(64) float sums[kBlock * 4];
  for (int r = 0; r < 4; ++r) store(sums + r * kLanes, set1(0.0f));
  for (int64_t done = 0; done < nuq.count[0][tile]; done += kLanes) {
    const Outliers some(nuq.outliers[0][tile] + 2 * done, nuq.count[0][tile] - done, 2 * half);
    for (int i = 0; i < some.some; ++i) {
      const int t = some.token[i], channel = some.channel[i];
      const int j = channel < half ? channel : channel - half, place = query.place(j);
      const float cos = nuq.turn_cos[j * kBlock + t], sin = nuq.turn_sin[j * kBlock + t];
      const __m128 a = _mm_load_ps(query.first + place), b = _mm_load_ps(query.second + place);
      const __m128 one = channel < half ? a : b, other = channel < half ? b : a;
      const float by_sine = some.off[i] * (channel < half ? sin : -sin);
      float* sum = sums + query.place(t);
      const __m128 x = _mm_fmadd_ps(other, _mm_set1_ps(by_sine), _mm_load_ps(sum));
      _mm_store_ps(sum, _mm_fmadd_ps(one, _mm_set1_ps(some.off[i] * cos), x));
    }
  }
  Vec held[4];
  for (int r = 0; r < 4; ++r) held[r] = load(sums + r * kLanes);
  side_by_side(held, added);
}

template <int B, int H>
QUEST_APART void turned_scores(const PackedChunk& c, int tile, __m512i table,
                               const TurnedQuery<H>& query, Vec* score) {
  const PackedLayout& l = *c.layout;
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const uint8_t* from = c.block[tile] + l.key_codes;
  const uint8_t* ahead = c.next[tile] == nullptr ? from : c.next[tile] + l.key_codes;
  Vec by_cosine[H], by_sine[H];
  each<H>([&](auto h) QUEST_HERE { by_cosine[h] = by_sine[h] = set1(0.0f); });
  const float *cos = nuq.turn_cos, *sin = nuq.turn_sin;
  for (int64_t s = 0, j = 0; j < l.dim / 2; ++s, j += kEach<B>) {
    Strip<B> strip(from, s, l.high_plane);
    ask(ahead + s * 64, 64);
    each<kEach<B>>([&](auto i) QUEST_HERE {
      const __m512bh pairs = strip.next(table);
      const Vec c_i = load(cos + (j + i) * kBlock), s_i = load(sin + (j + i) * kBlock);
      each<H>([&](auto h) QUEST_HERE {
        const int64_t at = h * (kFastDim / 2) + j + i;
        const Vec plain =
            _mm512_dpbf16_ps(set1(query.plain_offset[at]), everywhere(query.plain[at]), pairs);
        const Vec crossed =
            _mm512_dpbf16_ps(set1(query.crossed_offset[at]), everywhere(query.crossed[at]), pairs);
        by_cosine[h] = fma(c_i, plain, by_cosine[h]);
        by_sine[h] = fma(s_i, crossed, by_sine[h]);
      });
    });
  }
  each<H>([&](auto h) QUEST_HERE { score[h] = add(by_cosine[h], by_sine[h]); });
}

// Scores of one tile of a chunk.
template <int B, int H>
void turned_keys(const PackedChunk& c, int tile, const float* q, const Levels& keys,
                 FoldedChunk<H>& f) {
  TurnedQuery<H> query;
  Vec score[4], added[4];
  for (int h = 0; h < 4; ++h) added[h] = set1(0.0f);
  turn_query<H>(c, tile, q, keys.middle, query);
  turned_scores<B, H>(c, tile, keys.table, query, score);
  if (c.nuq->count[0][tile] > 0) outlier_keys<H>(c, tile, query, added);
  for (int h = 0; h < H; ++h) {
    const Vec whole = mul(add(score[h], added[h]), set1(c.scale));
    store(f.score + h * kTokens + tile * kBlock,
          _mm512_mask_blend_ps(c.listed[tile], set1(-__builtin_inff()), whole));
  }
}

// Adds the outliers of a chunk's values, weighed by the exponentials of the scores.
template <int H>
QUEST_APART void outlier_values(const PackedChunk& c, int64_t head, const FoldedChunk<H>& f) {
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  for (int tile = 0; tile < c.tiles; ++tile) {
    for (int64_t done = 0; done < nuq.count[1][tile]; done += kLanes) {
      const Outliers some(nuq.outliers[1][tile] + 2 * done, nuq.count[1][tile] - done,
                          c.layout->dim);
      for (int i = 0; i < some.some; ++i) {
        const float* weight = f.score + tile * kBlock + some.token[i];
        float* sum = c.sum + head * c.stride + some.channel[i];
        each<H>([&](auto h) QUEST_HERE { sum[h * c.stride] += weight[h * kTokens] * some.off[i]; });
      }
    }
  }
}

}  // namespace
