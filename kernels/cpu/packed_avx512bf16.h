// Packed tiles by the dot product of pairs of bf16, straight from their codes.
//
// Scales are folded into what the codes meet, in fp32 and then rounded to bf16: a block's keys meet
// query * scale, values probability * scale. Minima meet query and probability in fp32.
#pragma once

#include "nuq_avx512bf16.h"
#include "packed_codes_avx512bf16.h"

namespace {

template <int H>
QUEST_APART void fold_keys(const PackedChunk& c, int tile, const float* q, float middle,
                           FoldedChunk<H>& f) {
  const uint8_t* block = c.block[tile];
  const uint8_t* ahead = c.next[tile] == nullptr ? block : c.next[tile];
  const int64_t dim = c.layout->dim;
  Vec low[4];
  for (int h = 0; h < 4; ++h) low[h] = set1(0.0f);
  const auto minima = [&](int64_t d, Vec scale) {
    return fma(set1(middle), scale, halves(block + 2 * (dim + d)));
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    ask(ahead + 4 * d, 128);
    const Vec scale = halves(block + 2 * d), more = halves(block + 2 * (d + kLanes));
    const Vec minimum = minima(d, scale), beside = minima(d + kLanes, more);
    each<H>([&](auto h) QUEST_HERE {
      const Vec one = load(q + h * dim + d), two = load(q + h * dim + d + kLanes);
      low[h] = fma(two, beside, fma(one, minimum, low[h]));
      put_pairs(f.query + h * (kFastDim / 2) + d / 2, mul(one, scale), mul(two, more));
    });
  }
  if (d < dim) {
    const Vec scale = halves(block + 2 * d), minimum = minima(d, scale);
    each<H>([&](auto h) QUEST_HERE {
      const Vec one = load(q + h * dim + d);
      low[h] = fma(one, minimum, low[h]);
      put_pairs(f.query + h * (kFastDim / 2) + d / 2, mul(one, scale));
    });
  }
  _mm_storeu_ps(f.minimum, sums(low));
}

// Scores of T tiles of one block, from tile `first` of the chunk on.
template <int B, int H, int T>
QUEST_APART void packed_keys(const PackedChunk& c, int first, __m512i table, FoldedChunk<H>& f) {
  const PackedLayout& l = *c.layout;
  const uint8_t *from[T], *ahead[T];
  for (int t = 0; t < T; ++t) {
    const int64_t at = l.key_codes + c.tile[first + t] * l.tile_bytes;
    from[t] = c.block[first + t] + at;
    ahead[t] = c.next[first + t] == nullptr ? from[t] : c.next[first + t] + at;
  }
  Vec even[H * T], odd[H * T];
  each<H * T>([&](auto i) QUEST_HERE { even[i] = odd[i] = set1(0.0f); });
  const uint32_t* query = f.query;
  for (int64_t s = 0; s * kEach<B> < l.dim / 2; ++s, query += kEach<B>) {
    Strip<B> strip[T];
    each<T>([&](auto t) QUEST_HERE {
      strip[t] = Strip<B>(from[t], s, l.high_plane);
      ask(ahead[t] + s * 64, 64);
    });
    each<kEach<B> / 2>([&](auto j) QUEST_HERE {
      __m512bh one[T], two[T];
      each<T>([&](auto t) QUEST_HERE {
        one[t] = strip[t].next(table);
        two[t] = strip[t].next(table);
      });
      each<H>([&](auto h) QUEST_HERE {
        const __m512bh q = everywhere(query[h * (kFastDim / 2) + 2 * j]);
        const __m512bh r = everywhere(query[h * (kFastDim / 2) + 2 * j + 1]);
        each<T>([&](auto t) QUEST_HERE {
          even[h * T + t] = _mm512_dpbf16_ps(even[h * T + t], q, one[t]);
          odd[h * T + t] = _mm512_dpbf16_ps(odd[h * T + t], r, two[t]);
        });
      });
    });
  }
  each<H * T>([&](auto i) QUEST_HERE {
    const int h = i / T, tile = first + i % T;
    const Vec low = set1(f.minimum[h]), scale = set1(c.scale);
    const Vec score = mul(add(add(even[i], odd[i]), low), scale);
    store(f.score + h * kTokens + tile * kBlock,
          _mm512_mask_blend_ps(c.listed[tile], set1(-__builtin_inff()), score));
  });
}

// exp(x) for x <= 0, relative error below 1e-5: enough for weights that are rounded to bf16, in
// fewer steps than exp_negative. 0 of -infinity.
inline Vec exp_of(Vec x) {
  const Vec power = max(mul(x, set1(1.44269504f)), set1(-160.0f));
  const Vec whole = nearest(power), part = sub(power, whole);
  Vec p = set1(1.33335581e-3f);
  p = fma(p, part, set1(9.61812911e-3f));
  p = fma(p, part, set1(5.55041087e-2f));
  p = fma(p, part, set1(2.40226507e-1f));
  p = fma(p, part, set1(6.93147181e-1f));
  p = fma(p, part, set1(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// As `soften` of a block, for a chunk's scores of heads from `head` on.
template <int H>
QUEST_APART void soften_chunk(const PackedChunk& c, int64_t head, FoldedChunk<H>& f) {
  Vec totals[4];
  for (int h = 0; h < 4; ++h) totals[h] = set1(0.0f);
  for (int h = 0; h < H; ++h) {
    const int64_t at = (head + h) * c.stride;
    float* x = f.score + h * kTokens;
    Vec high = load(x);
    for (int t = 1; t < c.tiles; ++t) high = max(high, load(x + t * kBlock));
    const float seen = c.maximum[at], highest = top(high);
    if (highest > seen) {
      const Vec shrink = set1(first_lane(exp_of(set1(seen - highest))));
      c.maximum[at] = highest;
      c.total[at] *= first_lane(shrink);
      float* sum = c.sum + at;
      for (int64_t d = 0; d < c.layout->dim; d += kLanes)
        store(sum + d, mul(load(sum + d), shrink));
    }
    const Vec offset = set1(c.maximum[at]);
    for (int t = 0; t < c.tiles; ++t) {
      const Vec e = exp_of(sub(load(x + t * kBlock), offset));
      store(x + t * kBlock, e);
      totals[h] = add(totals[h], e);
    }
  }
  float total[4];
  _mm_storeu_ps(total, sums(totals));
  for (int h = 0; h < H; ++h) c.total[(head + h) * c.stride] += total[h];
}

template <int H>
QUEST_APART void fold_values(const PackedChunk& c, float middle, FoldedChunk<H>& f) {
  const PackedLayout& l = *c.layout;
  const int groups = static_cast<int>(l.dim / l.width);
  const bool apart = c.nuq != nullptr;  // a group is the head then
  const auto halves_of = [&](int t, int g, int64_t part, int64_t apart_part) {
    if (apart) return halves(c.nuq->value_norms[t] + apart_part);
    const int64_t at = part + 2 * (g * l.group + c.tile[t] * kBlock);
    if (c.next[t] != nullptr) ask(c.next[t] + at, 32);
    return halves(c.block[t] + at);
  };
  const auto scales = [&](int t, int g) { return halves_of(t, g, l.value_scales, 2 * kBlock); };
  const auto minima = [&](int t, int g, Vec scale) {
    return fma(set1(middle), scale, halves_of(t, g, l.value_minima, 0));
  };
  for (int g = 0; g < groups; ++g) {
    Vec low[4];
    for (int h = 0; h < 4; ++h) low[h] = set1(0.0f);
    for (int t = 0; t < c.tiles; t += 2) {
      const bool two = t + 1 < c.tiles;
      const Vec scale = scales(t, g), more = scales(two ? t + 1 : t, g);
      const Vec minimum = minima(t, g, scale), beside = minima(two ? t + 1 : t, g, more);
      uint32_t* to = f.weight_of(t, g);
      for (int h = 0; h < H; ++h) {
        const float* p = f.score + h * kTokens + t * kBlock;
        const Vec one = load(p), other = two ? load(p + kBlock) : set1(0.0f);
        low[h] = fma(other, beside, fma(one, minimum, low[h]));
        put_pairs(to + h * kBlock, mul(one, scale), mul(other, more));
      }
    }
    _mm_storeu_ps(f.minima + g * 4, sums(low));
  }
}

// Vectors [first, first + C) of 16 channels; every two of them share their group if kPaired.
template <int B, int H, int C, bool kPaired>
QUEST_APART void packed_values(const PackedChunk& c, int64_t head, int first, __m512i table,
                               FoldedChunk<H>& f) {
  const PackedLayout& l = *c.layout;
  constexpr int kShare = kPaired ? 2 : 1, kStrips = 8 / kEach<B>;
  int group[C];
  for (int i = 0; i < C; ++i) group[i] = static_cast<int>((first + i) * kLanes / l.width);
  Vec sum[H * C];
  float* state = c.sum + head * c.stride + first * kLanes;
  each<H * C>([&](auto i) QUEST_HERE {
    const int h = i / C, v = i % C;
    sum[i] = add(load(state + h * c.stride + v * kLanes), set1(f.minima[group[v] * 4 + h]));
  });
  for (int t = 0; t < c.tiles; ++t) {
    const int64_t at = l.value_codes + c.tile[t] * l.tile_bytes;
    const uint8_t* tile = c.block[t] + at;
    const uint8_t* ahead = c.next[t] == nullptr ? tile : c.next[t] + at;
    const uint32_t* weight[C / kShare];
    each<C / kShare>([&](auto i) QUEST_HERE { weight[i] = f.weight_of(t, group[i * kShare]); });
    each<kStrips>([&](auto s) QUEST_HERE {
      Strip<B> strip[C];
      each<C>([&](auto v) QUEST_HERE {
        strip[v] = Strip<B>(tile, (first + v) * kStrips + s, l.high_plane);
        ask(ahead + ((first + v) * kStrips + s) * 64, 64);
      });
      each<kEach<B>>([&](auto j) QUEST_HERE {
        __m512bh value[C];
        each<C>([&](auto v) QUEST_HERE { value[v] = strip[v].next(table); });
        each<H * C>([&](auto i) QUEST_HERE {
          constexpr int h = i / C, v = i % C;
          const __m512bh p = everywhere(weight[v / kShare][h * kBlock + s * kEach<B> + j]);
          sum[i] = _mm512_dpbf16_ps(sum[i], p, value[v]);
        });
      });
    });
  }
  each<H * C>([&](auto i) QUEST_HERE { store(state + i / C * c.stride + i % C * kLanes, sum[i]); });
}

template <int B, int H>
void packed_heads(const PackedChunk& c, int64_t head) {
  const PackedLayout& l = *c.layout;
  const Levels keys(c.levels, B), values(c.levels + (1 << B), B);
  FoldedChunk<H> f;
  for (int t = 0; c.nuq != nullptr && t < c.tiles;) {
    const bool two = t + 1 < c.tiles && c.nuq->cos[t + 1] == c.nuq->cos[t] && c.nuq->odd[t] == 0 &&
                     c.nuq->odd[t + 1] == 1;
    if (two) {
      turned_keys<B, H, 2>(c, t, c.q + head * l.dim, keys, f);
    } else {
      turned_keys<B, H, 1>(c, t, c.q + head * l.dim, keys, f);
    }
    t += two ? 2 : 1;
  }
  for (int t = 0; c.nuq == nullptr && t < c.tiles;) {
    const bool two = t + 1 < c.tiles && c.block[t + 1] == c.block[t];
    if (t == 0 || c.block[t] != c.block[t - 1]) {
      fold_keys<H>(c, t, c.q + head * l.dim, keys.middle, f);
    }
    if (two) {
      packed_keys<B, H, 2>(c, t, keys.table, f);
    } else {
      packed_keys<B, H, 1>(c, t, keys.table, f);
    }
    t += two ? 2 : 1;
  }
  soften_chunk<H>(c, head, f);
  fold_values<H>(c, values.middle, f);
  const int vectors = static_cast<int>(l.dim / kLanes);
  const bool paired = l.width % (2 * kLanes) == 0;
  int first = 0;
  for (; paired && first + 4 <= vectors; first += 4) {
    packed_values<B, H, 4, true>(c, head, first, values.table, f);
  }
  for (; first < vectors; ++first) {
    packed_values<B, H, 1, false>(c, head, first, values.table, f);
  }
  if (c.nuq != nullptr) outlier_values<H>(c, head, f);
}

template <int B>
void packed_bits(const PackedChunk& c) {
  int64_t head = 0;
  for (; head + 4 <= c.heads; head += 4) packed_heads<B, 4>(c, head);
  const int64_t left = c.heads - head;
  if (left == 3) packed_heads<B, 3>(c, head);
  if (left == 2) packed_heads<B, 2>(c, head);
  if (left == 1) packed_heads<B, 1>(c, head);
}

void packed_chunk(const PackedChunk& c) {
  if (c.layout->bits == 2) packed_bits<2>(c);
  if (c.layout->bits == 3) packed_bits<3>(c);
  if (c.layout->bits == 4) packed_bits<4>(c);
}

#undef QUEST_APART
#undef QUEST_HERE

}  // namespace
