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

// Tokens of a block of attend.
constexpr int kBlock = 16;

// out[h * stride + i] = scale * <q[h], base[rows[i]]>; q is [heads, dim] fp32, a row is dim wide.
using Dot = void (*)(const float* q, int64_t heads, int64_t dim, const void* base,
                     const int64_t* rows, int64_t count, float scale, float* out, int64_t stride);

// What will be read next: the keys, then the values, of a block's rows. They are asked for a row at
// a time, spread evenly over the arithmetic, since a processor follows few lines at once and stalls
// on more.
struct Ahead {
  const char* keys = nullptr;
  int64_t values = 0, bytes = 0;  // of a row of values behind its key; in a row
  const int64_t* rows = nullptr;
  int fetched = 2 * kBlock;  // rows asked for so far
  int share = 0;             // rows to ask for while keys are multiplied
};

// As Dot, for queries of the keys' own dtype: their product may use that dtype's units.
using Keys = void (*)(const void* q, int64_t heads, int64_t dim, const void* base,
                      const int64_t* rows, int64_t count, float scale, float* out, int64_t stride,
                      Ahead& ahead);

// maximum and minimum, each dim wide, over count contiguous rows.
using Extremes = void (*)(const void* base, int64_t count, int64_t dim, void* maximum,
                          void* minimum);

// Some query heads of one row that share a kv head go on over one block of tokens. Arrays of heads
// are `heads` long; state and raw scores lie a stride apart.
struct AttendBlock {
  const void *q,
      *rolled_q;  // [heads, dim] in the dtype of the keys; the latter for tokens < rolled
  int64_t rolled, heads, dim;
  const void* base;
  const int64_t* rows;  // token i: key base[rows[i]], value base[rows[i] + values]
  int64_t values;
  int n;  // tokens, 1..kBlock
  float scale;
  int64_t stride;          // of the state, in heads
  float *maximum, *total;  // of the scores so far; of their exponentials
  float* sum;              // [heads, dim]: values weighed by the exponentials
  float* raw;              // scaled scores, or nullptr
  int64_t raw_stride;
  Ahead ahead;
};

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
  // Indexed by DType.
  Keys keys[2];
  Dot dot[2];
  Extremes extremes[2];
  void (*attend_block[2])(const AttendBlock& block);
  // x[i] = exp(x[i] - maximum) * inverse in place.
  void (*probabilities)(float* x, int64_t count, float maximum, float inverse);
  // The positions of the `keep` largest scores, ascending; of equal ones the highest positions.
  // NaN counts as -infinity. `space` holds count + 16 values. nullptr where there is no fast way.
  void (*largest)(const float* scores, int64_t count, int64_t keep, uint32_t* space,
                  int32_t* index);
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
