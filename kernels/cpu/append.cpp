#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {

void append(const Pages& p, const Strided& k, const Strided& v, const int32_t* starts,
            int64_t tokens, int threads) {
  // Everything is checked before anything is written.
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t start = starts[r], end = start + tokens;
    if (start < 0 || end > p.row_pages * p.page_size) {
      refuse("append", "starts[" + std::to_string(r) + "] is " + std::to_string(start) + ": " +
                           std::to_string(tokens) + " tokens from there do not fit the row's " +
                           std::to_string(p.row_pages * p.page_size) + " slots");
    }
    for (int64_t page = start / p.page_size; page * p.page_size < end; ++page) {
      physical(p, "append", r, page);
    }
  }
  const Isa& isa = current_isa();
  const int64_t bytes = bytes_of(p.dtype), width = p.dim * bytes;
  parallel(p.rows * p.kv_heads, threads, [&](int64_t task) {
    const int64_t r = task / p.kv_heads, h = task % p.kv_heads;
    const char* from_k = static_cast<const char*>(k.data) + (r * k.row + h * k.head) * bytes;
    const char* from_v = static_cast<const char*>(v.data) + (r * v.row + h * v.head) * bytes;
    int64_t i = 0;
    while (i < tokens) {
      const int64_t position = starts[r] + i, page = position / p.page_size;
      const int64_t id = p.page_table[r * p.row_pages + page];
      char* keys = static_cast<char*>(p.kv) + key_row(p, id, h) * width;
      char* values = keys + p.page_size * width;
      int64_t slot = position % p.page_size;
      for (; slot < p.page_size && i < tokens; ++slot, ++i) {
        std::memcpy(keys + slot * width, from_k + i * k.token * bytes, static_cast<size_t>(width));
        std::memcpy(values + slot * width, from_v + i * v.token * bytes,
                    static_cast<size_t>(width));
      }
      if (slot == p.page_size) {
        // From all keys of the page, so that how they arrived cannot matter.
        char* meta = static_cast<char*>(p.meta) + (id * p.kv_heads + h) * 2 * width;
        isa.extremes[static_cast<int>(p.dtype)](keys, p.page_size, p.dim, meta, meta + width);
      }
    }
  });
}

void gather(const Pages& p, int64_t length, void* k, void* v, int threads) {
  const int64_t pages = (length + p.page_size - 1) / p.page_size;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t page = 0; page < pages; ++page) physical(p, "gather", r, page);
  }
  const int64_t width = p.dim * bytes_of(p.dtype);
  parallel(p.rows * p.kv_heads, threads, [&](int64_t task) {
    const int64_t r = task / p.kv_heads, h = task % p.kv_heads;
    for (int64_t page = 0; page < pages; ++page) {
      const int64_t first = page * p.page_size;
      const int64_t filled = length - first < p.page_size ? length - first : p.page_size;
      const int64_t id = p.page_table[r * p.row_pages + page];
      const char* keys = static_cast<const char*>(p.kv) + key_row(p, id, h) * width;
      const int64_t to = (task * length + first) * width;
      std::memcpy(static_cast<char*>(k) + to, keys, static_cast<size_t>(filled * width));
      std::memcpy(static_cast<char*>(v) + to, keys + p.page_size * width,
                  static_cast<size_t>(filled * width));
    }
  });
}

}  // namespace cpu
}  // namespace quest
