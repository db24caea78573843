// The ops of quest_dist, without torch and without Python: plain pointers and sizes.
//
// Shape letters: R rows, H query heads, G kv heads (H = G * group), N pages in the pool, P pages in
// a row's page table, S tokens a page holds, D head dimension, L tokens of a row, n new tokens.
// Every function throws std::invalid_argument naming the op and the argument when an index it is
// about to follow is out of range; shapes and dtypes are the caller's business (quest_dist/ops.py).
#pragma once

#include <cstdint>

namespace quest {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // fp16: CUDA only

// One layer of the paged pool and the rows that look into it.
struct Pages {
  void* kv;    // [N, G, 2, S, D]: keys (rotated), values
  void* meta;  // [N, G, 2, D]: per channel maximum and minimum of a closed page's keys
  const int32_t* page_table;  // [R, P]
  DType dtype;
  int64_t pages, kv_heads, page_size, dim, rows, row_pages;
};

// Metadata in int8 in the place of Pages::meta: code n of row r stands for offset + scale n.
// values == nullptr: there is none.
struct ByteMeta {
  const int8_t* values;         // [N, G, 2, D]
  const float *scale, *offset;  // [R, G, 2, D]
};

// Keys packed before their rotation, and numbers that codes are far from: see
// quest_dist/nuq_packing.py. keys == nullptr: none of this, but scales and minima in the blocks.
struct Nuq {
  const float* keys;         // [G, 2, D]: what levels are multiplied by, and what is added
  const uint16_t* values;    // fp16 [blocks, 2, tile]: the same for each token of a block
  const int32_t* starts;     // [blocks, 2 G + 1]: a block's outliers of keys, then of values
  const uint16_t* outliers;  // [outliers, 2]: token * D + channel, ascending for each start; fp16
  const float *cos, *sin;    // [positions, D / 2]: the rotation to each position
  int64_t outlier_count, positions, sinks;  // sinks: first tokens that are not packed
};

// Keys and values in codes of few bits: leading tokens of each row, in blocks of `group` tokens.
// What a block holds stands in quest_dist/packing.py.
struct Packed {
  uint8_t* data;                 // [blocks, G, bytes of a block]
  const int32_t* table;          // [R, row_blocks]
  const int32_t *keys, *values;  // [R]: tokens whose keys, values are packed
  const float* levels;           // [2, 2^bits]: what codes of keys, of values, stand for
  int64_t blocks, row_blocks, bits, group;
  Nuq nuq;
};

// Offsets in a block, in bytes; see packed_layout.h.
struct PackedLayout {
  int bits;
  int64_t dim, group, width;  // width: channels of a group of values
  int64_t vectors, high_plane, tile_bytes;
  int64_t value_scales, value_minima, key_codes, value_codes, bytes;
};

struct Strided {  // [R, G, n, D] whose last dimension is contiguous; strides in elements
  const void* data;
  int64_t row, head, token;
};

enum class Reduce : int { kPerQuery = 0, kMax = 1, kMean = 2 };
enum class Unit : int { kPages = 0, kTokens = 1 };

// What each row attends to; index == nullptr means every token of every row.
struct Selection {
  const int32_t* index;  // [R, lists, width]
  const int32_t* count;  // [R, lists], -1: every token
  int64_t lists, width;  // lists is 1, G or H
  Unit unit;
};

struct Attended {
  void* out;             // [R, H, D], the dtype of the pool
  int32_t* attended;     // [R, H]
  int32_t* read;         // [R, G]
  float* lse;            // [R, H]
  float* probabilities;  // [R, H, probability_width] or nullptr
  int64_t probability_width;
};

// Rotary embedding by halves; cos == nullptr: q and k are rotated already.
struct Angles {
  const void *cos, *sin;  // [R, D], contiguous in D
  int64_t cos_row, sin_row;
  bool wide;  // fp32, else the dtype of the pool
};

// One new token of every row, at lengths - 1, and what it attends to.
struct Token {
  Strided q, k, v;  // [R, H or G, 1, D]; k.data == nullptr: they are in the pool already
  Angles angles;
  const int32_t* lengths;
  const int32_t* keep;  // pages a row attends to, < 0: all; nullptr: all of every row
  float radius_scale;
  Reduce reduce;
  float scale;
};

// A linear layer's weights in 4 bits: output o and input i weigh (code - zero) * scale, the latter
// two of o and the group of `group` inputs that i is in (the last group may be smaller). Tiles of
// kTileOutputs outputs follow one another, the last filled up with zeros; a tile is its groups, and
// a group a head and lines, of kLine bytes each:
//   head: fp16 scale[16], uint8 zero[16], 16 bytes of nothing;
//   line, for each 8 inputs: uint32 word[16], one an output; bits 16 p + 4 n hold input 2 n + p.
// Hence a line's 16-bit halves shifted by 4 n are the pairs of inputs that a bf16 dot product
// takes.
struct Int4 {
  const uint8_t* data;
  int64_t outputs, inputs, group;  // inputs and group are multiples of 8
};
constexpr int64_t kTileOutputs = 16, kLine = 64, kLineInputs = 8;

inline int64_t tile_bytes(const Int4& w) {
  return kLine * (w.inputs / kLineInputs + (w.inputs + w.group - 1) / w.group);
}

namespace cpu {

void append(const Pages& pages, const Strided& k, const Strided& v, const int32_t* starts,
            int64_t tokens, int threads);

// out [R, Hs, P]; Hs is H for kPerQuery, else G. pages.meta is not read where there are bytes.
void page_scores(const Pages& pages, const ByteMeta& bytes, const void* q, int64_t heads,
                 const int32_t* lengths, float radius_scale, Reduce reduce, bool score_open,
                 float* out, int threads);

// scores [R, lists, items_max]; index [R, lists, width] and count [R, lists] are written whole.
void select_top(const float* scores, const int32_t* items, const int32_t* keep, int64_t rows,
                int64_t lists, int64_t items_max, bool force_last, int32_t* index, int64_t width,
                int32_t* count, int threads);

// Most tokens that any list of the selection names.
int64_t listed_tokens(const Pages& pages, const int32_t* lengths, const Selection& selection);

void attend(const Pages& pages, const void* q, const void* rolled_query, int64_t rolled,
            int64_t heads, const int32_t* lengths, const Selection& selection, float scale,
            const Attended& result, int threads);

// The bits of rotating, append, page_scores, select_top with force_last and attend. Lengths, keep
// and the page table are checked before anything is written.
void decode(const Pages& pages, const Token& token, int64_t heads, const Attended& result,
            int threads);

// out [R, H, width], -infinity beyond a row's length.
void token_scores(const Pages& pages, const void* q, int64_t heads, const int32_t* lengths,
                  float scale, float* out, int64_t width, int threads);

// Asks for huge pages under memory that has not been touched yet: far fewer address translations.
void prefer_huge_pages(void* data, int64_t bytes);

// k and v [R, G, length, D], contiguous.
void gather(const Pages& pages, int64_t length, void* k, void* v, int threads);

// Packs tokens [keys[r], packed.keys[r]) and [values[r], packed.values[r]) of every row. Rows may
// share blocks, but only one may write into a block in a call.
void pack(const Pages& pages, const Packed& packed, const int32_t* keys, const int32_t* values,
          int threads);

// attend over packed tokens where they are packed, over the pool's where they are not.
void attend_packed(const Pages& pages, const Packed& packed, const void* q, int64_t heads,
                   const int32_t* lengths, const Selection& selection, float scale,
                   const Attended& result, int threads);

// Causal attention of the last n of L positions, bf16, D in {64, 128}. q [R, H, n, D] and
// k, v [R, G, L, D] strided; out [R, n, H, D] contiguous; workspace of prefill_workspace bytes.
bool has_prefill();
int64_t prefill_workspace(int64_t rows, int64_t kv_heads, int64_t length, int64_t dim);
void prefill_attend(const Strided& q, const Strided& k, const Strided& v, int64_t rows,
                    int64_t heads, int64_t kv_heads, int64_t queries, int64_t length, int64_t dim,
                    float scale, void* out, void* workspace, int threads);

// out [rows, outputs] = x [rows, inputs] times the weights, both of dtype. Weights are taken as
// they are, never rounded to dtype; a row's bits depend neither on the other rows nor on the
// threads.
void linear4(const Int4& weights, const void* x, DType dtype, int64_t rows, void* out, int threads);

// out [count, inputs]: the weights of outputs from `first` on, rounded to dtype.
void widen4(const Int4& weights, int64_t first, int64_t count, DType dtype, void* out, int threads);

// The instruction set in use, all those this machine supports (best first, comma separated), and
// the choice of one.
const char* isa();
const char* isas();
void set_isa(const char* name);

}  // namespace cpu
}  // namespace quest
