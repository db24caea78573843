// The inner loops, once per instruction set: each isa_*.cpp fills one table of function pointers.
//
// The tables' code is compiled with that instruction set's flags, so these files and what they
// include define everything in unnamed namespaces and use no inline code of the standard library:
// the linker could otherwise keep the AVX-512 copy of a shared function for every caller.
//
// Every loop handles a token or a page by itself: its result depends neither on its neighbours nor
// on how many heads are done together. Sums over tokens run in list order. Hence equal lists give
// equal bits, whatever the batch, the threads and the spelling of the list.
#pragma once

#include <stdint.h>

namespace quest {
namespace cpu {

// out[h * stride + i] = scale * <q[h], base[rows[i]]>; q is [heads, dim] fp32, a row is dim wide.
using Dot = void (*)(const float* q, int64_t heads, int64_t dim, const void* base,
                     const int64_t* rows, int64_t count, float scale, float* out, int64_t stride);

// sum[h, :] += sum_i p[h * stride + i] * base[rows[i]]; sum is [heads, dim] fp32.
using Weigh = void (*)(const float* p, int64_t stride, int64_t heads, int64_t dim, const void* base,
                       const int64_t* rows, int64_t count, float* sum);

// maximum and minimum, each dim wide, over count contiguous rows.
using Extremes = void (*)(const void* base, int64_t count, int64_t dim, void* maximum,
                          void* minimum);

// One block of queries of one (row, head) of prefill_attend, bf16; see prefill.cpp for the packing.
struct PrefillBlock {
  const uint16_t* q;      // the block's first query
  const uint16_t *k, *v;  // packed tiles of the kv head, 64-byte aligned
  uint16_t* out;
  int64_t q_token, out_token;   // strides in elements
  int64_t queries, first, dim;  // first: position of the block's first query
  float scale;
};
using Prefill = void (*)(const PrefillBlock& block);

struct Isa {
  const char* name;
  // Indexed by DType. `keys` is for queries of the keys' own dtype (their product may use that
  // dtype's units), `dot` for fp32 queries.
  Dot keys[2];
  Dot dot[2];
  Weigh weigh[2];
  Extremes extremes[2];
  // x[i] = exp(x[i] - max x) in place; returns the sum and leaves max x in *maximum.
  float (*exponentials)(float* x, int64_t count, float* maximum);
  Prefill prefill;  // nullptr where there is no fast path
};

extern const Isa kScalar;
#ifdef QUEST_X86
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Bf16;
#endif

const Isa& current_isa();

constexpr int64_t kMaxDim = 1024;
constexpr int64_t kPrefillQueries = 48;  // queries of a block
constexpr int64_t kPrefillKeys = 64;     // keys of a tile

}  // namespace cpu
}  // namespace quest
