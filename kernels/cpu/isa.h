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

#include "../ops.h"

namespace quest {
namespace cpu {

// Tokens of a block of attend.
constexpr int kBlock = 16;

// out[j] = <weights[j], rows[j / group]> for `heads` weights: those of one page's metadata, whose
// rows lie one after another, as do those at `next`, which are read next (or nullptr).
using PageDots = void (*)(const void* weights, int64_t heads, int64_t group, int64_t dim,
                          const void* rows, const void* next, float* out);

// out[h] = the largest, or the mean, of scores[h * group + i], i < group, for `groups` of them. NaN
// wins. A group has at most kFolded scores.
using Fold = void (*)(const float* scores, int64_t groups, int64_t group, bool mean, float* out);
constexpr int64_t kFolded = 32;

// What is read next, the 2 * kBlock rows of a block's keys and values. They are asked for row by
// row, spread evenly over the arithmetic: a processor follows few lines at once and stalls on more.
struct Ahead {
  const char* const* rows = nullptr;  // nullptr: nothing to ask for
  int64_t bytes = 0;                  // of a row
};

// out[h * stride + i] = scale * <q[h], base[rows[i]]>; q is [heads, dim] in the dtype of the keys,
// a row is dim wide.
using Keys = void (*)(const void* q, int64_t heads, int64_t dim, const void* base,
                      const int64_t* rows, int64_t count, float scale, float* out, int64_t stride,
                      const Ahead& ahead);

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
  int64_t stride;          // of the state, from head to head
  float *maximum, *total;  // of the scores so far; of their exponentials
  float* sum;              // [heads, dim]: values weighed by the exponentials; see settle
  float* raw;              // scaled scores, or nullptr
  int64_t raw_stride;
  const void* next_base;     // of the block that is read next
  const int64_t* next_rows;  // its kBlock rows, or nullptr
};

// Keys (or values) of a tile of a block as fp32, [kBlock, dim].
using Unpack = void (*)(const PackedLayout& layout, const uint8_t* block, int64_t tile,
                        const float* levels, bool values, float* out);

// One kv head's keys or values of a block that is packed as ops.h's Nuq says.
struct NuqTile {
  const uint8_t* block;
  const float* levels;                  // of keys, or of values
  const float *key_scale, *key_offset;  // [dim]; nullptr: these are values
  const uint16_t* value_norms;          // fp16 [2, kBlock]: what is added, and what multiplies
  const uint16_t* outliers;             // [count, 2], each within the tile
  int64_t count;
  const float *cos, *sin;  // of keys: [tokens, dim / 2]
  int64_t tokens;          // that have a position; others are not turned
};
// It as fp32, [kBlock, dim], keys turned to their positions.
using UnpackNuq = void (*)(const PackedLayout& layout, const NuqTile& tile, float* out);

// Tokens of a chunk of packed attention, in tiles.
constexpr int kChunk = 8;

// Positions of two tiles.
constexpr int kTurned = 2 * kBlock;

// What tiles of KVQuant's codes have beside them.
struct NuqChunk {
  const float *key_scale, *key_offset;     // [dim]
  const float *turn_cos, *turn_sin;        // [dim / 2, kTurned]: the rotation by 0, 1, ...
  int odd[kChunk];                         // 1 for a tile whose number in its row is odd
  const float *cos[kChunk], *sin[kChunk];  // [dim / 2]: to the even tile's first token
  const uint8_t* value_norms[kChunk];      // fp16 [2, kBlock]: what is added, and what multiplies
  const uint16_t* outliers[2][kChunk];     // of keys, of values
  int64_t count[2][kChunk];
};

// Some query heads of one row that share a kv head go on over some tiles, all packed.
struct PackedChunk {
  const PackedLayout* layout;
  const float* levels;  // [2, 2^bits]
  const float* q;       // [heads, dim]
  int64_t heads;
  float scale;
  int tiles;                     // 1..kChunk
  const uint8_t* block[kChunk];  // of each tile
  const uint8_t* next[kChunk];   // that is read next in its place, or nullptr
  int tile[kChunk];              // within its block
  const NuqChunk* nuq;           // nullptr: keys are turned already, and no outliers are apart
  uint16_t listed[kChunk];       // a bit a token; at least one
  int64_t stride;                // of the state, from head to head
  float *maximum, *total, *sum;  // as in AttendBlock; channels in order
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

// Some rows times some tiles of weights in 4 bits (ops.h says how they lie).
struct Int4Block {
  const uint8_t* tiles;
  int64_t count, bytes;  // tiles, and bytes of one
  int64_t inputs, group;
  const void* x;  // [rows, inputs], fp32 or bf16
  int64_t rows;
  const float* sums;  // [rows, groups] of x
  float* out;         // [rows, 16 count]
};
using Int4Rows = void (*)(const Int4Block& block);

struct Isa {
  const char* name;
  Int4Rows int4_rows;   // x in fp32
  Int4Rows int4_pairs;  // x in bf16, or nullptr
  // Indexed by DType.
  Keys keys[2];
  PageDots page_dots[2];     // weights are fp32
  PageDots page_dots_int8;   // of metadata in int8; weights are fp32
  PageDots page_pairs_int8;  // of them with weights in bf16, or nullptr
  PageDots page_pairs;  // of bf16 with weights in bf16; nullptr where there are no units for it
  Fold fold;            // nullptr where there is no fast way
  Extremes extremes[2];
  void (*attend_block[2])(const AttendBlock& block);
  // Puts the channels of a sum of attend_block in order; nullptr where they are.
  void (*settle[2])(float* sum, int64_t dim);
  // x[i] = exp(x[i] - maximum) * inverse in place.
  void (*probabilities)(float* x, int64_t count, float maximum, float inverse);
  // The positions of the `keep` largest scores, ascending; of equal ones the highest positions.
  // NaN counts as -infinity. `space` holds 2 (count + 16) values. nullptr where there is no fast
  // way.
  void (*largest)(const float* scores, int64_t count, int64_t keep, uint32_t* space,
                  int32_t* index);
  Prefill prefill;  // nullptr where there is no fast path
  Unpack unpack;
  UnpackNuq unpack_nuq;
  // For 2 to 4 bits and head dimensions that are multiples of 16 up to 256, with queries and folded
  // weights in bf16; nullptr where there is no fast path.
  void (*packed_chunk)(const PackedChunk& chunk);
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
