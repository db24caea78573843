// The ops on a GPU: the same pages, selections and results as quest::cpu, launched on a stream.
//
// All pointers are device pointers. No function allocates, waits for the device or reads a value
// from it, so every call can be captured in a CUDA graph. What depends on values is checked on the
// device: an index out of range is never followed (what it names counts as absent), and the first
// such fault of a call is left in Launch::fault. Results are the same bits in every run, and a
// row's result does not depend on the other rows. D is a multiple of 8 up to kLargestDim; kv, meta
// and q are aligned to 16 bytes.
#pragma once

#include "../ops.h"

namespace quest {
namespace cuda {

constexpr int64_t kLargestDim = 256;

// What a fault says: code << 58 | at << 32 | column, the least of a call; kNoFault before any.
// `at` counts the leading dimensions of the tensor that is named, flattened.
enum class Fault : int {
  kLengths = 1,    // lengths[at] is not in 1..P * S
  kPageTable = 2,  // page_table[at, column] is no page of the pool
  kCount = 3,      // count[at] is not in 1..width and not -1
  kIndex = 4,      // index[at, column] is beyond the row
  kTwice = 5,      // index[at, column] stands in its list twice (found by check_lists only)
  kStarts = 6,     // from starts[at] on, the tokens do not fit the row
  kItems = 7,      // items[at] is beyond the scores
  kKeep = 8,       // keep[at] is 0, but force_last keeps one
  kBlocks = 9,     // packed.table[at, column] is no block
  kKeys = 10,      // packed.keys[at] is no whole group of the row's tokens
  kValues = 11,    // packed.values[at] is beyond the row's tokens
  kOutliers = 12,  // from packed.nuq.starts[at, column] on, no outliers can lie
};
constexpr int64_t kNoFault = INT64_MAX;

struct Launch {
  int device;
  void* stream;    // cudaStream_t
  int64_t* fault;  // one value
};

int device_count();

// Which capture of a graph a stream is in; 0: none.
uint64_t capture_id(void* stream);

// Loads every kernel's code now: otherwise the first call of each does, which a capture forbids.
void warm_up(int device);

void append(const Launch& launch, const Pages& pages, const Strided& k, const Strided& v,
            const int32_t* starts, int64_t tokens);

void page_scores(const Launch& launch, const Pages& pages, const void* q, int64_t heads,
                 const int32_t* lengths, float radius_scale, Reduce reduce, bool score_open,
                 float* out);

void select_top(const Launch& launch, const float* scores, const int32_t* items,
                const int32_t* keep, int64_t rows, int64_t lists, int64_t items_max,
                bool force_last, int32_t* index, int64_t width, int32_t* count);

// `counters` [R * H] are zero before the first call and left zero; `workspace` has
// attend_workspace_bytes, aligned to 16. Calls that may run at the same time must share neither.
int64_t attend_workspace_bytes(int64_t rows, int64_t heads, int64_t dim);
void attend(const Launch& launch, const Pages& pages, const void* q, const void* rolled_query,
            int64_t rolled, int64_t heads, const int32_t* lengths, const Selection& selection,
            float scale, const Attended& result, int32_t* counters, void* workspace);

// Looks for items that a list names twice, which `attend` would weigh twice.
void check_lists(const Launch& launch, const Pages& pages, const int32_t* lengths,
                 const Selection& selection);

// The bits of rotating, append, page_scores, select_top with force_last and attend, in two kernels.
// `counters` and `workspace` as for attend, the latter of decode_workspace_bytes.
int64_t decode_workspace_bytes(const Pages& pages, int64_t heads, Reduce reduce);
void decode(const Launch& launch, const Pages& pages, const Token& token, int64_t heads,
            const Attended& result, int32_t* counters, void* workspace);

// A block of packed.data is of layout `layout` and aligned to 16 bytes; no two rows may write into
// the same block in one call.
void pack(const Launch& launch, const Pages& pages, const Packed& packed,
          const PackedLayout& layout, const int32_t* keys, const int32_t* values);

// `counters` and `workspace` as for attend.
void attend_packed(const Launch& launch, const Pages& pages, const Packed& packed,
                   const PackedLayout& layout, const void* q, int64_t heads, const int32_t* lengths,
                   const Selection& selection, float scale, const Attended& result,
                   int32_t* counters, void* workspace);

void token_scores(const Launch& launch, const Pages& pages, const void* q, int64_t heads,
                  const int32_t* lengths, float scale, float* out, int64_t width);

void gather(const Launch& launch, const Pages& pages, int64_t length, void* k, void* v);

// As quest::cpu's; weights, x and out are aligned to 16 bytes.
void linear4(const Launch& launch, const Int4& weights, const void* x, DType dtype, int64_t rows,
             void* out);
void widen4(const Launch& launch, const Int4& weights, int64_t first, int64_t count, DType dtype,
            void* out);

}  // namespace cuda
}  // namespace quest
