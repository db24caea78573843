// Causal flash attention of a block of queries with the bf16 dot product; see isa.h for the rules.
//
// Six queries against 64 keys are 24 accumulators of 16 lanes: they stay in registers while pairs
// of channels (for scores) or of keys (for values) stream past. Softmax is online, in base 2.
// Include vec_avx512.h and inner.h first.
#pragma once

namespace {

using quest::cpu::kPrefillKeys;
using quest::cpu::kPrefillQueries;
using quest::cpu::PrefillBlock;

constexpr int kStrip = 6;  // queries in registers at once
constexpr int kWide = 4;   // vectors across
static_assert(kPrefillKeys == kWide * kLanes && kPrefillQueries % kStrip == 0, "tile shapes");

template <int D>
struct PrefillState {
  alignas(64) float sum[kPrefillQueries][D];
  alignas(64) float total[kPrefillQueries][kLanes];  // partial sums, one a lane
  float top[kPrefillQueries];
};

// 2^x for x <= 0, below 1e-38 for x < -127 and for -infinity.
inline Vec exp2_negative(Vec x) {
  const Vec bounded = max(set1(-127.0f), x);
  const Vec n = nearest(bounded);
  const Vec r = sub(bounded, n);
  Vec p = set1(1.535336188319500e-4f);
  p = fma(p, r, set1(1.339887440266574e-3f));
  p = fma(p, r, set1(9.618437357674640e-3f));
  p = fma(p, r, set1(5.550332471162809e-2f));
  p = fma(p, r, set1(2.402264791363012e-1f));
  p = fma(p, r, set1(6.931472028550421e-1f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512bh broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
inline __m512bh load_pairs(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_load_si512(p));
}

// acc[i][c] += sum over `pairs` of left[i] . right, right being [pairs][row] pairs wide.
template <int Pairs>
inline void multiply(Vec (&acc)[kStrip][kWide], const uint16_t* const (&left)[kStrip],
                     const uint16_t* right, int row) {
  for (int p = 0; p < Pairs; ++p) {
    __m512bh column[kWide];
    for (int c = 0; c < kWide; ++c) column[c] = load_pairs(right + (p * row + c * kLanes) * 2);
    for (int i = 0; i < kStrip; ++i) {
      const __m512bh pair = broadcast_pair(left[i] + 2 * p);
      for (int c = 0; c < kWide; ++c) acc[i][c] = _mm512_dpbf16_ps(acc[i][c], pair, column[c]);
    }
  }
}

// One strip of queries, of which `rows` are real, against one tile of keys and values.
template <int D>
void strip_tile(const PrefillBlock& b, PrefillState<D>& state, int64_t strip, int rows,
                int64_t tile, float scale) {
  const uint16_t* query[kStrip];
  for (int i = 0; i < kStrip; ++i) {
    query[i] = b.q + (strip + (i < rows ? i : rows - 1)) * b.q_token;
  }
  Vec s[kStrip][kWide];
  for (int i = 0; i < kStrip; ++i) {
    for (int c = 0; c < kWide; ++c) s[i][c] = set1(0.0f);
  }
  multiply<D / 2>(s, query, b.k + tile * kPrefillKeys * D, kPrefillKeys);

  alignas(64) uint16_t weight[kStrip][kPrefillKeys];
  const int64_t seen_by_first = b.first + strip + 1 - tile * kPrefillKeys;
  for (int i = 0; i < kStrip; ++i) {
    Vec high = set1(-__builtin_inff());
    for (int c = 0; c < kWide; ++c) {
      s[i][c] = mul(s[i][c], set1(scale));
      const int64_t seen = seen_by_first + i - c * kLanes;
      if (seen < kLanes) {
        s[i][c] =
            _mm512_mask_mov_ps(set1(-__builtin_inff()), lanes_below(seen > 0 ? seen : 0), s[i][c]);
      }
      high = max(high, s[i][c]);
    }
    const int64_t q = strip + i;
    const float before = state.top[q], row_high = _mm512_reduce_max_ps(high);
    if (!(row_high <= before)) {
      const Vec shrink = exp2_negative(set1(before - row_high));
      for (int d = 0; d < D; d += kLanes) {
        store(state.sum[q] + d, mul(load(state.sum[q] + d), shrink));
      }
      store(state.total[q], mul(load(state.total[q]), shrink));
      state.top[q] = row_high;
    }
    const Vec top = set1(state.top[q]);
    for (int c = 0; c < kWide; ++c) s[i][c] = exp2_negative(sub(s[i][c], top));
    store(state.total[q],
          add(load(state.total[q]), add(add(s[i][0], s[i][1]), add(s[i][2], s[i][3]))));
    for (int c = 0; c < kWide; c += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(s[i][c + 1], s[i][c]);
      _mm512_store_si512(weight[i] + c * kLanes, reinterpret_cast<__m512i>(both));
    }
  }

  const uint16_t* weights[kStrip];
  for (int i = 0; i < kStrip; ++i) weights[i] = weight[i];
  for (int column = 0; column < D; column += kWide * kLanes) {
    Vec out[kStrip][kWide];
    for (int i = 0; i < kStrip; ++i) {
      for (int c = 0; c < kWide; ++c) out[i][c] = load(state.sum[strip + i] + column + c * kLanes);
    }
    multiply<kPrefillKeys / 2>(out, weights, b.v + tile * kPrefillKeys * D + column * 2, D);
    for (int i = 0; i < kStrip; ++i) {
      for (int c = 0; c < kWide; ++c) store(state.sum[strip + i] + column + c * kLanes, out[i][c]);
    }
  }
}

template <int D>
void prefill_block(const PrefillBlock& b) {
  PrefillState<D> state;
  __builtin_memset(&state, 0, sizeof(state));
  for (float& top : state.top) top = -__builtin_inff();
  const int64_t tiles = (b.first + b.queries - 1) / kPrefillKeys + 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t strip = 0; strip < b.queries; strip += kStrip) {
      const int rows = b.queries - strip < kStrip ? static_cast<int>(b.queries - strip) : kStrip;
      if (tile * kPrefillKeys > b.first + strip + rows - 1) continue;
      strip_tile<D>(b, state, strip, rows, tile, b.scale * 1.44269504f);
    }
  }
  for (int64_t q = 0; q < b.queries; ++q) {
    const Vec inverse = set1(1.0f / _mm512_reduce_add_ps(load(state.total[q])));
    for (int d = 0; d < D; d += kLanes) {
      const __m256bh half = _mm512_cvtneps_pbh(mul(load(state.sum[q] + d), inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(b.out + q * b.out_token + d),
                          reinterpret_cast<__m256i>(half));
    }
  }
}

void prefill(const PrefillBlock& b) {
  if (b.dim == 64) {
    prefill_block<64>(b);
  } else {
    prefill_block<128>(b);
  }
}

}  // namespace
