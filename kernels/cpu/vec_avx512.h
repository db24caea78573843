// Sixteen floats in AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int kLanes = 16;
constexpr int kHeadBlock = 4;
using Vec = __m512;

inline __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const uint16_t* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const int8_t* p) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// The words' bits [shift, shift + 4).
inline Vec nibbles(const uint32_t* p, int shift) {
  const __m512 values = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i words = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_permutexvar_ps(words, values);  // which looks at four bits
}
// Of fp16 that is not negative.
inline Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
inline Vec load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
inline Vec load_part(const uint16_t* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
inline Vec load_part(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes_below(n), p)));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store_part(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec nearest(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p * 2^n for integral n in [-126, 127]; 0 where x < limit.
inline Vec scale_exp(Vec p, Vec n, Vec x, Vec limit) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), p, n);
}
// Lane i of the result is the sum of a[i]'s lanes, added as a tree.
inline Vec reduce(const Vec* a) {
  Vec u[4];
  for (int i = 0; i < 4; ++i) {
    Vec low =
        add(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    Vec high = add(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]),
                   _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
    u[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
  }
  Vec v0 = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xDD));
  Vec v1 = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xDD));
  return add(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xDD));
}
inline float top(Vec a) { return _mm512_reduce_max_ps(a); }
inline float first_lane(Vec a) { return _mm512_cvtss_f32(a); }

}  // namespace
