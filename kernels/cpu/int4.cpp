// Linear layers whose weights are in 4 bits.
#include <algorithm>

#include "rows.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // of weights

// Of fp16 that is not negative.
float half_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value * 0x1p112f;
}

float sum_of(const float* x, int64_t count) {
  float part[kLineInputs] = {};
  for (int64_t i = 0; i < count; i += kLineInputs) {
    for (int64_t j = 0; j < kLineInputs; ++j) part[j] += x[i + j];
  }
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

template <typename T>
T as(float x);
template <>
float as<float>(float x) {
  return x;
}
template <>
uint16_t as<uint16_t>(float x) {
  return narrow(x);
}

// out [16 or fewer outputs, inputs]
template <typename T>
void widen_tile(const Int4& w, const uint8_t* at, int64_t outputs, T* out) {
  for (int64_t first = 0; first < w.inputs; first += w.group) {
    const int64_t lines = std::min(w.group, w.inputs - first) / kLineInputs;
    const uint8_t* head = at;
    at += kLine;
    for (int64_t o = 0; o < outputs; ++o) {
      uint16_t half;
      std::memcpy(&half, head + 2 * o, 2);
      const float scale = half_to_float(half);
      const int zero = head[32 + o];
      T value[16];
      for (int code = 0; code < 16; ++code) {
        value[code] = as<T>(static_cast<float>(code - zero) * scale);
      }
      T* to = out + o * w.inputs + first;
      for (int64_t l = 0; l < lines; ++l, to += kLineInputs) {
        uint32_t word;
        std::memcpy(&word, at + l * kLine + 4 * o, 4);
        for (int n = 0; n < 4; ++n) {
          to[2 * n] = value[word >> (4 * n) & 15u];
          to[2 * n + 1] = value[word >> (4 * n + 16) & 15u];
        }
      }
    }
    at += lines * kLine;
  }
}

}  // namespace

void linear4(const Int4& w, const void* x, DType dtype, int64_t rows, void* out, int threads) {
  const Isa& isa = current_isa();
  const int64_t groups = (w.inputs + w.group - 1) / w.group;
  static thread_local std::vector<float> kept_wide, kept_sums;
  float* wide = scratch(kept_wide, rows * w.inputs);
  float* sums = scratch(kept_sums, rows * groups);
  for (int64_t r = 0; r < rows; ++r) {
    widen_to(wide + r * w.inputs, x, dtype, r * w.inputs, w.inputs);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * w.group;
      const int64_t many = std::min(w.group, w.inputs - first);
      sums[r * groups + g] = sum_of(wide + r * w.inputs + first, many);
    }
  }
  const bool pairs = dtype == DType::kBFloat16 && isa.int4_pairs != nullptr;
  const int64_t bytes = tile_bytes(w), tiles = (w.outputs + kTileOutputs - 1) / kTileOutputs;
  const int64_t some = std::max<int64_t>(4, kTaskBytes / bytes / 4 * 4);
  parallel((tiles + some - 1) / some, threads, [&](int64_t task) {
    static thread_local std::vector<float> kept;
    Int4Block b;
    b.tiles = w.data + task * some * bytes;
    b.count = std::min(some, tiles - task * some);
    b.bytes = bytes;
    b.inputs = w.inputs;
    b.group = w.group;
    b.x = pairs ? x : wide;
    b.rows = rows;
    b.sums = sums;
    b.out = scratch(kept, rows * b.count * kTileOutputs);
    (pairs ? isa.int4_pairs : isa.int4_rows)(b);
    const int64_t first = task * some * kTileOutputs;
    const int64_t width = b.count * kTileOutputs, many = std::min(width, w.outputs - first);
    for (int64_t r = 0; r < rows; ++r) {
      narrow_from(b.out + r * width, out, dtype, r * w.outputs + first, many);
    }
  });
}

void widen4(const Int4& w, int64_t first, int64_t count, DType dtype, void* out, int threads) {
  const int64_t bytes = tile_bytes(w), tiles = (count + kTileOutputs - 1) / kTileOutputs;
  parallel(tiles, threads, [&](int64_t task) {
    const uint8_t* at = w.data + (first / kTileOutputs + task) * bytes;
    const int64_t many = std::min(kTileOutputs, count - task * kTileOutputs);
    const int64_t to = task * kTileOutputs * w.inputs;
    if (dtype == DType::kBFloat16) {
      widen_tile(w, at, many, static_cast<uint16_t*>(out) + to);
    } else {
      widen_tile(w, at, many, static_cast<float*>(out) + to);
    }
  });
}

}  // namespace cpu
}  // namespace quest
