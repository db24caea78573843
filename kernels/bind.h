// What both modules are told of tensors, as the ops take it: addresses and sizes that
// quest_dist/arguments.py has checked.
#pragma once

#include "ops.h"

namespace quest {
namespace bind {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Pages make_pages(Address kv, Address meta, Address page_table, int dtype, int64_t pages,
                        int64_t kv_heads, int64_t page_size, int64_t dim, int64_t rows,
                        int64_t row_pages) {
  return {at<void>(kv),
          at<void>(meta),
          at<const int32_t>(page_table),
          static_cast<DType>(dtype),
          pages,
          kv_heads,
          page_size,
          dim,
          rows,
          row_pages};
}

inline Strided make_strided(Address data, int64_t row, int64_t head, int64_t token) {
  return {at<const void>(data), row, head, token};
}

inline Selection make_selection(Address index, Address count, int64_t lists, int64_t width,
                                int unit) {
  return {at<const int32_t>(index), at<const int32_t>(count), lists, width,
          static_cast<Unit>(unit)};
}

inline Angles make_angles(Address cos, Address sin, int64_t cos_row, int64_t sin_row, bool wide) {
  return {at<const void>(cos), at<const void>(sin), cos_row, sin_row, wide};
}

inline Nuq make_nuq(Address keys, Address values, Address starts, Address outliers, Address cos,
                    Address sin, int64_t outlier_count, int64_t positions, int64_t sinks) {
  return {at<const float>(keys),
          at<const uint16_t>(values),
          at<const int32_t>(starts),
          at<const uint16_t>(outliers),
          at<const float>(cos),
          at<const float>(sin),
          outlier_count,
          positions,
          sinks};
}

inline Packed make_packed(Address data, Address table, Address keys, Address values, Address levels,
                          int64_t blocks, int64_t row_blocks, int64_t bits, int64_t group,
                          const Nuq& nuq) {
  return {at<uint8_t>(data),
          at<const int32_t>(table),
          at<const int32_t>(keys),
          at<const int32_t>(values),
          at<const float>(levels),
          blocks,
          row_blocks,
          bits,
          group,
          nuq};
}

inline Int4 make_int4(Address data, int64_t outputs, int64_t inputs, int64_t group) {
  return {at<const uint8_t>(data), outputs, inputs, group};
}

}  // namespace bind
}  // namespace quest
