#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {

bool has_prefill() { return current_isa().prefill != nullptr; }

void prefill_attend(const Strided& q, const Strided& k, const Strided& v, int64_t rows,
                    int64_t heads, int64_t kv_heads, int64_t queries, int64_t length, int64_t dim,
                    float scale, void* out, int threads) {
  const Isa& isa = current_isa();
  if (isa.prefill == nullptr) refuse("prefill_attend", std::string("no fast path on ") + isa.name);
  const int64_t blocks = (queries + kPrefillQueries - 1) / kPrefillQueries;
  const int64_t group = heads / kv_heads;
  // The last block attends to the most keys: longest first keeps threads evenly busy.
  parallel(blocks * rows * heads, threads, [&](int64_t task) {
    const int64_t block = blocks - 1 - task / (rows * heads);
    const int64_t r = task % (rows * heads) / heads, h = task % heads;
    const int64_t first = block * kPrefillQueries;
    static thread_local std::vector<char> buffer;
    char* raw = scratch(buffer, kPrefillScratch + 64);
    PrefillBlock b;
    b.q = static_cast<const uint16_t*>(q.data) + r * q.row + h * q.head + first * q.token;
    b.k = static_cast<const uint16_t*>(k.data) + r * k.row + h / group * k.head;
    b.v = static_cast<const uint16_t*>(v.data) + r * v.row + h / group * v.head;
    b.out = static_cast<uint16_t*>(out) + ((r * queries + first) * heads + h) * dim;
    b.q_token = q.token;
    b.k_token = k.token;
    b.v_token = v.token;
    b.out_token = heads * dim;
    b.queries = queries - first < kPrefillQueries ? queries - first : kPrefillQueries;
    b.first = length - queries + first;
    b.dim = dim;
    b.scale = scale;
    b.scratch = raw + (64 - reinterpret_cast<uintptr_t>(raw) % 64) % 64;
    isa.prefill(b);
  });
}

}  // namespace cpu
}  // namespace quest
