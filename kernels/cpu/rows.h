// What the ops share: looking into a row's pages, and scratch memory that a thread keeps.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"
#include "isa.h"

namespace quest {
namespace cpu {

constexpr float kNever = -std::numeric_limits<float>::infinity();

[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + ": " + what);
}

inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 4; }

// count elements of dtype, from element `first` on, as fp32.
inline void widen_to(float* out, const void* data, DType dtype, int64_t first, int64_t count) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, static_cast<const float*>(data) + first, static_cast<size_t>(count) * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = widen(from[i]);
  }
}

inline void narrow_from(const float* x, void* data, DType dtype, int64_t first, int64_t count) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + first, x, static_cast<size_t>(count) * 4);
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = narrow(x[i]);
  }
}

// The physical page of a row's logical page, checked.
inline int64_t physical(const Pages& p, const char* op, int64_t row, int64_t page) {
  const int64_t id = p.page_table[row * p.row_pages + page];
  if (id < 0 || id >= p.pages) {
    refuse(op, "page_table[" + std::to_string(row) + ", " + std::to_string(page) + "] is " +
                   std::to_string(id) + ", but the pool's pages are 0.." +
                   std::to_string(p.pages - 1));
  }
  return id;
}

// The same for a row's first `count` pages.
inline void check_pages(const Pages& p, const char* op, int64_t row, int64_t count) {
  const int32_t* id = p.page_table + row * p.row_pages;
  const uint32_t limit = static_cast<uint32_t>(p.pages < INT32_MAX ? p.pages : INT32_MAX);
  uint32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= static_cast<uint32_t>(id[i]) >= limit ? 1u : 0u;
  for (int64_t i = 0; wrong != 0 && i < count; ++i) physical(p, op, row, i);
}

// Lengths must lie in [1, P * S].
inline void check_lengths(const Pages& p, const char* op, const int32_t* lengths) {
  for (int64_t r = 0; r < p.rows; ++r) {
    if (lengths[r] < 1 || lengths[r] > p.row_pages * p.page_size) {
      refuse(op, "lengths[" + std::to_string(r) + "] is " + std::to_string(lengths[r]) +
                     ", but a row of page_table holds 1.." +
                     std::to_string(p.row_pages * p.page_size) + " tokens");
    }
  }
}

// In units of D elements of kv: the key of slot 0 of a page's kv head; its value is S further.
inline int64_t key_row(const Pages& p, int64_t page, int64_t kv_head) {
  return (page * p.kv_heads + kv_head) * 2 * p.page_size;
}

// A vector of a thread's own that only grows: no allocation once warm.
template <typename T>
T* scratch(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

}  // namespace cpu
}  // namespace quest
