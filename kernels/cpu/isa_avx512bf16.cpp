// AVX-512 with the bf16 dot product: pairs of bf16 multiplied exactly, summed in fp32.
// clang-format off: the vectors come before the loops over them
#include "vec_avx512.h"
#include "inner.h"
#include "prefill_avx512bf16.h"
// clang-format on

namespace {

constexpr int kPairs = 2 * kLanes;

inline __m512bh pairs(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline __m512bh pairs_part(const uint16_t* p, int n) {
  return reinterpret_cast<__m512bh>(
      _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p));
}

// As `dot` for queries whose values are bf16 exactly.
void dot_pairs(const float* q, int64_t heads, int64_t dim, const void* base, const int64_t* rows,
               int64_t count, float scale, float* out, int64_t stride) {
  const uint16_t* data = static_cast<const uint16_t*>(base);
  alignas(64) uint16_t packed[8 * kMaxDim];
  const int64_t fit = 8 * kMaxDim / dim;
  for (int64_t from = 0; from < heads; from += fit) {
    const int64_t some = heads - from < fit ? heads - from : fit;
    for (int64_t d = 0; d < some * dim; d += kLanes) {
      const int n = some * dim - d < kLanes ? static_cast<int>(some * dim - d) : kLanes;
      narrow_to(packed + d, load_part(q + from * dim + d, n), n);
    }
    for (int64_t first = 0; first < count; first += kLanes) {
      const int n = count - first < kLanes ? static_cast<int>(count - first) : kLanes;
      const uint16_t* row[kLanes];
      for (int i = 0; i < kLanes; ++i) row[i] = data + rows[first + (i < n ? i : n - 1)] * dim;
      for (int64_t h = 0; h < some; ++h) {
        Vec sum[kLanes];
        for (int i = 0; i < kLanes; ++i) sum[i] = set1(0.0f);
        int64_t d = 0;
        for (; d + kPairs <= dim; d += kPairs) {
          const __m512bh weight = pairs(packed + h * dim + d);
          for (int i = 0; i < kLanes; ++i) {
            sum[i] = _mm512_dpbf16_ps(sum[i], weight, pairs(row[i] + d));
          }
        }
        if (d < dim) {
          const int rest = static_cast<int>(dim - d);
          const __m512bh weight = pairs_part(packed + h * dim + d, rest);
          for (int i = 0; i < kLanes; ++i) {
            sum[i] = _mm512_dpbf16_ps(sum[i], weight, pairs_part(row[i] + d, rest));
          }
        }
        store_part(out + (from + h) * stride + first, mul(set1(scale), reduce(sum)), n);
      }
    }
  }
}

}  // namespace

namespace quest {
namespace cpu {

extern const Isa kAvx512Bf16;
const Isa kAvx512Bf16 = {
    "avx512bf16",
    {dot<float>, dot_pairs},
    {dot<float>, dot<uint16_t>},
    {weigh<float>, weigh<uint16_t>},
    {extremes<float>, extremes<uint16_t>},
    exponentials,
    prefill,
};

}  // namespace cpu
}  // namespace quest
