#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

// Keys as [D / 2][64 keys] pairs of channels and values as [64 / 2][D] pairs of keys: what a bf16
// dot product reads whole. Keys beyond the end are zero: they weigh nothing, and 0 * NaN would not.
void pack_tile(const uint16_t* k, int64_t k_token, const uint16_t* v, int64_t v_token,
               int64_t tokens, int64_t dim, uint16_t* packed_k, uint16_t* packed_v) {
  if (tokens < kPrefillKeys) {
    std::memset(packed_k, 0, static_cast<size_t>(kPrefillKeys * dim) * 2);
    std::memset(packed_v, 0, static_cast<size_t>(kPrefillKeys * dim) * 2);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t pair = 0; pair < dim / 2; ++pair) {
      std::memcpy(packed_k + (pair * kPrefillKeys + t) * 2, k + t * k_token + pair * 2, 4);
    }
    uint16_t* to = packed_v + t / 2 * dim * 2 + t % 2;
    for (int64_t d = 0; d < dim; ++d) to[2 * d] = v[t * v_token + d];
  }
}

}  // namespace

bool has_prefill() { return current_isa().prefill != nullptr; }

int64_t prefill_workspace(int64_t rows, int64_t kv_heads, int64_t length, int64_t dim) {
  const int64_t tiles = (length + kPrefillKeys - 1) / kPrefillKeys;
  return rows * kv_heads * tiles * kPrefillKeys * dim * 2 * 2 + 64;
}

void prefill_attend(const Strided& q, const Strided& k, const Strided& v, int64_t rows,
                    int64_t heads, int64_t kv_heads, int64_t queries, int64_t length, int64_t dim,
                    float scale, void* out, void* workspace, int threads) {
  const Isa& isa = current_isa();
  if (isa.prefill == nullptr) refuse("prefill_attend", std::string("no fast path on ") + isa.name);
  const int64_t tiles = (length + kPrefillKeys - 1) / kPrefillKeys;
  const int64_t tile_size = kPrefillKeys * dim, head_size = tiles * tile_size;
  const int64_t group = heads / kv_heads;
  char* raw = static_cast<char*>(workspace);
  raw += (64 - reinterpret_cast<uintptr_t>(raw) % 64) % 64;
  uint16_t* packed_k = reinterpret_cast<uint16_t*>(raw);
  uint16_t* packed_v = packed_k + rows * kv_heads * head_size;
  const uint16_t* from_k = static_cast<const uint16_t*>(k.data);
  const uint16_t* from_v = static_cast<const uint16_t*>(v.data);
  parallel(rows * kv_heads * tiles, threads, [&](int64_t task) {
    const int64_t r = task / (kv_heads * tiles), g = task / tiles % kv_heads;
    const int64_t first = task % tiles * kPrefillKeys;
    pack_tile(from_k + r * k.row + g * k.head + first * k.token, k.token,
              from_v + r * v.row + g * v.head + first * v.token, v.token,
              length - first < kPrefillKeys ? length - first : kPrefillKeys, dim,
              packed_k + task * tile_size, packed_v + task * tile_size);
  });
  const int64_t blocks = (queries + kPrefillQueries - 1) / kPrefillQueries;
  // The last block attends to the most keys: longest first keeps threads evenly busy.
  parallel(blocks * rows * heads, threads, [&](int64_t task) {
    const int64_t block = blocks - 1 - task / (rows * heads);
    const int64_t r = task % (rows * heads) / heads, h = task % heads;
    const int64_t first = block * kPrefillQueries, packed = (r * kv_heads + h / group) * head_size;
    PrefillBlock b;
    b.q = static_cast<const uint16_t*>(q.data) + r * q.row + h * q.head + first * q.token;
    b.k = packed_k + packed;
    b.v = packed_v + packed;
    b.out = static_cast<uint16_t*>(out) + ((r * queries + first) * heads + h) * dim;
    b.q_token = q.token;
    b.out_token = heads * dim;
    b.queries = queries - first < kPrefillQueries ? queries - first : kPrefillQueries;
    b.first = length - queries + first;
    b.dim = dim;
    b.scale = scale;
    isa.prefill(b);
  });
}

}  // namespace cpu
}  // namespace quest
