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

using quest::cpu::kTurned;

// A query turned back to b, times the keys' scale, pair by pair as codes meet it: (a, b), and
// (b, -a); and what the keys' offsets add to either.
template <int H>
struct TurnedQuery {
  alignas(64) uint32_t plain[H * kFastDim / 2], crossed[H * kFastDim / 2];
  alignas(64) float plain_offset[H * kFastDim / 2], crossed_offset[H * kFastDim / 2];
  // All a and all b themselves, heads side by side: pair j at place_of(j).
  alignas(64) float turned[2][kFastDim / 2 * 4];
};

// Where side_by_side puts lanes: j / 16 * 64 + j % 4 * 16 + j % 16 / 4 * 4.
inline __m512i place_of(__m512i j) {
  const auto part = [&](int mask, int shift) {
    return _mm512_slli_epi32(_mm512_and_si512(j, _mm512_set1_epi32(mask)), shift);
  };
  return _mm512_or_si512(_mm512_or_si512(part(~15, 2), part(3, 4)), part(12, 0));
}

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
                            bool outliers, TurnedQuery<H>& to) {
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
    if (!outliers) continue;
    Vec beside[4];
    side_by_side(first, beside);
    for (int r = 0; r < 4; ++r) store(to.turned[0] + 4 * j + r * kLanes, beside[r]);
    side_by_side(second, beside);
    for (int r = 0; r < 4; ++r) store(to.turned[1] + 4 * j + r * kLanes, beside[r]);
  }
}

// Sixteen outliers (zeros beyond the count): token and channel, and what is added.
struct Outliers {
  __m512i token, channel;
  Vec off;
  int some;

  Outliers(const uint16_t* from, int64_t count, int64_t dim) {
    some = static_cast<int>(count < kLanes ? count : kLanes);
    const auto own = static_cast<__mmask16>((1u << some) - 1u);
    const __m512i words = _mm512_maskz_loadu_epi32(own, from);
    const __m512i place = _mm512_and_si512(words, _mm512_set1_epi32(0xffff));
    // Exact: places are below 2^12, and half a channel away from the next token.
    const Vec exact =
        mul(add(_mm512_cvtepi32_ps(place), set1(0.5f)), set1(1.0f / static_cast<float>(dim)));
    token = _mm512_cvttps_epi32(exact);
    const __m512i before = _mm512_mullo_epi32(token, _mm512_set1_epi32(static_cast<int>(dim)));
    channel = _mm512_sub_epi32(place, before);
    off = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
  }
};

// What the outliers of a tile's keys add to its sixteen scores, a vector a head.
template <int H>
QUEST_APART void outlier_keys(const PackedChunk& c, int tile, const TurnedQuery<H>& query,
                              Vec* added) {
  constexpr int kOther = kFastDim / 2 * 4;  // from a to b
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const __m512i half = _mm512_set1_epi32(static_cast<int>(c.layout->dim / 2));
  alignas(64) float sums[kBlock * 4], by_cosine[kLanes], by_sine[kLanes];
  alignas(64) int32_t own[kLanes], other[kLanes], to[kLanes];
  for (int r = 0; r < 4; ++r) store(sums + r * kLanes, set1(0.0f));
  for (int64_t done = 0; done < nuq.count[0][tile]; done += kLanes) {
    const Outliers some(nuq.outliers[0][tile] + 2 * done, nuq.count[0][tile] - done, c.layout->dim);
    const __mmask16 second = _mm512_cmpge_epi32_mask(some.channel, half);
    const __m512i j = _mm512_mask_sub_epi32(some.channel, second, some.channel, half);
    const __m512i at =
        _mm512_add_epi32(_mm512_mullo_epi32(j, _mm512_set1_epi32(kTurned)),
                         _mm512_add_epi32(some.token, _mm512_set1_epi32(nuq.odd[tile] * kBlock)));
    const Vec sine = _mm512_i32gather_ps(at, nuq.turn_sin, 4);
    store(by_cosine, mul(some.off, _mm512_i32gather_ps(at, nuq.turn_cos, 4)));
    store(by_sine, mul(some.off, _mm512_mask_sub_ps(sine, second, set1(0.0f), sine)));
    const __m512i place = place_of(j), beyond = _mm512_set1_epi32(kOther);
    _mm512_store_si512(own, _mm512_mask_add_epi32(place, second, place, beyond));
    _mm512_store_si512(other, _mm512_mask_sub_epi32(_mm512_add_epi32(place, beyond), second,
                                                    _mm512_add_epi32(place, beyond), beyond));
    _mm512_store_si512(to, place_of(some.token));
    for (int i = 0; i < some.some; ++i) {
      const __m128 x = _mm_fmadd_ps(_mm_load_ps(query.turned[0] + other[i]),
                                    _mm_set1_ps(by_sine[i]), _mm_load_ps(sums + to[i]));
      _mm_store_ps(sums + to[i], _mm_fmadd_ps(_mm_load_ps(query.turned[0] + own[i]),
                                              _mm_set1_ps(by_cosine[i]), x));
    }
  }
  Vec held[4];
  for (int r = 0; r < 4; ++r) held[r] = load(sums + r * kLanes);
  side_by_side(held, added);
}

// Sums of T tiles from `tile` on.
template <int B, int H, int T>
QUEST_APART void turned_sums(const PackedChunk& c, int tile, __m512i table,
                             const TurnedQuery<H>& query, Vec* sum) {
  const PackedLayout& l = *c.layout;
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const uint8_t *from[T], *ahead[T];
  for (int t = 0; t < T; ++t) {
    from[t] = c.block[tile + t] + l.key_codes;
    ahead[t] = c.next[tile + t] == nullptr ? from[t] : c.next[tile + t] + l.key_codes;
  }
  Vec by_cosine[H * T], by_sine[H * T];
  each<H * T>([&](auto i) QUEST_HERE { by_cosine[i] = by_sine[i] = set1(0.0f); });
  const float* cos = nuq.turn_cos + nuq.odd[tile] * kBlock;
  const float* sin = nuq.turn_sin + nuq.odd[tile] * kBlock;
  for (int64_t s = 0, j = 0; j < l.dim / 2; ++s, j += kEach<B>) {
    Strip<B> strip[T];
    each<T>([&](auto t) QUEST_HERE {
      strip[t] = Strip<B>(from[t], s, l.high_plane);
      ask(ahead[t] + s * 64, 64);
    });
    each<kEach<B>>([&](auto i) QUEST_HERE {
      __m512bh pairs[T];
      each<T>([&](auto t) QUEST_HERE { pairs[t] = strip[t].next(table); });
      each<H>([&](auto h) QUEST_HERE {
        const int64_t at = h * (kFastDim / 2) + j + i;
        const Vec low = set1(query.plain_offset[at]), crossed_low = set1(query.crossed_offset[at]);
        const __m512bh q = everywhere(query.plain[at]), r = everywhere(query.crossed[at]);
        each<T>([&](auto t) QUEST_HERE {
          const int64_t turn = (j + i) * kTurned + t * kBlock;
          by_cosine[h * T + t] =
              fma(load(cos + turn), _mm512_dpbf16_ps(low, q, pairs[t]), by_cosine[h * T + t]);
          by_sine[h * T + t] =
              fma(load(sin + turn), _mm512_dpbf16_ps(crossed_low, r, pairs[t]), by_sine[h * T + t]);
        });
      });
    });
  }
  each<H * T>([&](auto i) QUEST_HERE { sum[i] = add(by_cosine[i], by_sine[i]); });
}

// Scores of T tiles of a chunk that are turned from the same position.
template <int B, int H, int T>
void turned_keys(const PackedChunk& c, int tile, const float* q, const Levels& keys,
                 FoldedChunk<H>& f) {
  TurnedQuery<H> query;
  Vec sum[H * T], added[4];
  bool outliers = false;
  for (int t = 0; t < T; ++t) outliers = outliers || c.nuq->count[0][tile + t] > 0;
  turn_query<H>(c, tile, q, keys.middle, outliers, query);
  turned_sums<B, H, T>(c, tile, keys.table, query, sum);
  for (int t = 0; t < T; ++t) {
    for (int h = 0; h < 4; ++h) added[h] = set1(0.0f);
    if (c.nuq->count[0][tile + t] > 0) outlier_keys<H>(c, tile + t, query, added);
    for (int h = 0; h < H; ++h) {
      const Vec whole = mul(add(sum[h * T + t], added[h]), set1(c.scale));
      store(f.score + h * kTokens + (tile + t) * kBlock,
            _mm512_mask_blend_ps(c.listed[tile + t], set1(-__builtin_inff()), whole));
    }
  }
}

// Adds the outliers of a chunk's values, weighed by the exponentials of the scores. Heads lie side
// by side while it does so.
template <int H>
QUEST_APART void outlier_values(const PackedChunk& c, int64_t head, const FoldedChunk<H>& f) {
  const quest::cpu::NuqChunk& nuq = *c.nuq;
  const int64_t dim = c.layout->dim;
  alignas(64) float sums[kFastDim * 4], weights[kBlock * 4], off[kLanes];
  alignas(64) int32_t from[kLanes], to[kLanes];
  for (int64_t i = 0; i < 4 * dim; i += kLanes) store(sums + i, set1(0.0f));
  Vec apart[4], beside[4];
  for (int h = 0; h < 4; ++h) apart[h] = set1(0.0f);
  for (int tile = 0; tile < c.tiles; ++tile) {
    each<H>([&](auto h) QUEST_HERE { apart[h] = load(f.score + h * kTokens + tile * kBlock); });
    side_by_side(apart, beside);
    for (int r = 0; r < 4; ++r) store(weights + r * kLanes, beside[r]);
    for (int64_t done = 0; done < nuq.count[1][tile]; done += kLanes) {
      const Outliers some(nuq.outliers[1][tile] + 2 * done, nuq.count[1][tile] - done, dim);
      _mm512_store_si512(from, place_of(some.token));
      _mm512_store_si512(to, place_of(some.channel));
      store(off, some.off);
      for (int i = 0; i < some.some; ++i) {
        const __m128 sum = _mm_fmadd_ps(_mm_load_ps(weights + from[i]), _mm_set1_ps(off[i]),
                                        _mm_load_ps(sums + to[i]));
        _mm_store_ps(sums + to[i], sum);
      }
    }
  }
  for (int64_t d = 0; d < dim; d += kLanes) {
    for (int r = 0; r < 4; ++r) beside[r] = load(sums + 4 * d + r * kLanes);
    side_by_side(beside, apart);
    each<H>([&](auto h) QUEST_HERE {
      float* sum = c.sum + (head + h) * c.stride + d;
      store(sum, add(load(sum), apart[h]));
    });
  }
}

}  // namespace
