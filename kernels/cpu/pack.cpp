// Packs keys by channels of a block and values by tokens, from the pool's pages.
//
// Every division and rounding is that of quest_dist/packing.py, in fp32: codes are its bits.
#include <algorithm>
#include <cmath>

#include "packed.h"
#include "threads.h"

namespace quest {
namespace cpu {
namespace {

constexpr float kLargestHalf = 65504.0f;

// Nearest fp16, ties to even, of |x| <= kLargestHalf; NaN stays NaN.
uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits < 0x38800000u) {  // below the smallest normal: adding 0.5 leaves units of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

float from_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  if ((half & 0x7c00u) == 0x7c00u) x = std::nanf("");  // no infinity is ever written
  return (half & 0x8000u) != 0 ? -x : x;
}

float bounded(float x) { return std::min(std::max(x, -kLargestHalf), kLargestHalf); }

// How a group is packed.
struct Group {
  uint16_t scale, minimum;
  float step, low, most;

  Group() = default;
  Group(float smallest, float largest, int bits) {
    most = static_cast<float>((1 << bits) - 1);
    scale = to_half(bounded((largest - smallest) / most));
    minimum = to_half(bounded(smallest));
    step = from_half(scale);
    low = from_half(minimum);
  }
  uint32_t code(float x) const {
    if (step == 0.0f) return 0;
    float n = (x - low) / step;
    n = n > 0.0f ? (n < most ? n : most) : 0.0f;
    return static_cast<uint32_t>(std::nearbyint(n));
  }
};

void put_part(uint8_t* plane, int64_t vector, int64_t place, int bits, uint32_t part) {
  const int64_t each = 16 / bits;
  uint16_t word;
  uint8_t* at = plane + vector / each * 64 + place * 2;
  std::memcpy(&word, at, 2);
  const int shift = static_cast<int>(vector % each) * bits;
  const uint32_t cleared = word & ~(((1u << bits) - 1u) << shift);
  word = static_cast<uint16_t>(cleared | part << shift);
  std::memcpy(at, &word, 2);
}

void put_code(const PackedLayout& l, uint8_t* tile, int64_t vector, int64_t place, uint32_t code) {
  if (l.bits != 3) {
    put_part(tile, vector, place, l.bits, code);
  } else {
    put_part(tile, vector, place, 2, code & 3u);
    put_part(tile + l.high_plane, vector, place, 1, code >> 2);
  }
}

struct Job {
  const Pages& p;
  const Packed& packed;
  const PackedLayout layout;

  // Key or value of one token as fp32.
  void read(int64_t row, int64_t head, int64_t token, bool value, float* out) const {
    const int64_t page = physical(p, "pack", row, token / p.page_size);
    const int64_t at = key_row(p, page, head) + token % p.page_size + (value ? p.page_size : 0);
    widen_to(out, p.kv, p.dtype, at * p.dim, p.dim);
  }
  uint8_t* block(int64_t row, int64_t head, int64_t number) const {
    return packed_block(packed, layout, "pack", p.kv_heads, row, number) + head * layout.bytes;
  }
  void put_half(uint8_t* at, int64_t index, uint16_t half) const {
    std::memcpy(at + 2 * index, &half, 2);
  }

  void keys(int64_t row, int64_t head, int64_t number) const {
    const PackedLayout& l = layout;
    static thread_local std::vector<float> space;
    float* rows = scratch(space, (l.group + 2) * l.dim);
    float *low = rows + l.group * l.dim, *high = low + l.dim;
    for (int64_t t = 0; t < l.group; ++t) {
      float* x = rows + t * l.dim;
      read(row, head, number * l.group + t, false, x);
      if (t == 0) {
        std::copy(x, x + l.dim, low);
        std::copy(x, x + l.dim, high);
      }
      for (int64_t c = 0; c < l.dim; ++c) {
        low[c] = x[c] < low[c] ? x[c] : low[c];
        high[c] = x[c] > high[c] ? x[c] : high[c];
      }
    }
    uint8_t* to = block(row, head, number);
    for (int64_t c = 0; c < l.dim; ++c) {
      const Group g(low[c], high[c], l.bits);
      put_half(to, c, g.scale);
      put_half(to, l.dim + c, g.minimum);
      for (int64_t t = 0; t < l.group; ++t) {
        put_code(l, to + l.key_codes + t / kBlock * l.tile_bytes, c / 2, t % kBlock * 2 + c % 2,
                 g.code(rows[t * l.dim + c]));
      }
    }
  }

  void value(int64_t row, int64_t head, int64_t token) const {
    const PackedLayout& l = layout;
    static thread_local std::vector<float> space;
    float* x = scratch(space, l.dim);
    read(row, head, token, true, x);
    uint8_t* to = block(row, head, token / l.group);
    const int64_t t = token % l.group;
    uint8_t* tile = to + l.value_codes + t / kBlock * l.tile_bytes;
    for (int64_t first = 0; first < l.dim; first += l.width) {
      float low = x[first], high = low;
      for (int64_t c = first; c < first + l.width; ++c) {
        low = x[c] < low ? x[c] : low;
        high = x[c] > high ? x[c] : high;
      }
      const Group g(low, high, l.bits);
      const int64_t at = first / l.width * l.group + t;
      put_half(to + l.value_scales, at, g.scale);
      put_half(to + l.value_minima, at, g.minimum);
      for (int64_t c = first; c < first + l.width; ++c) {
        put_code(l, tile, c / 16 * 8 + t % kBlock / 2, c % 16 * 2 + t % 2, g.code(x[c]));
      }
    }
  }
};

// One block of one row: some of its keys' groups, some of its values.
struct Task {
  int64_t row, block;
  bool keys;
  int64_t first, last;  // values of tokens [first, last)
};

}  // namespace

void pack(const Pages& p, const Packed& packed, const int32_t* keys, const int32_t* values,
          int threads) {
  const Job job{p, packed, layout_of(packed, p.dim)};
  const int64_t group = packed.group;
  check_packed(packed, "pack", p.rows, p.row_pages * p.page_size, nullptr);
  std::vector<Task> tasks;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (keys[r] < 0 || values[r] < 0 || keys[r] % group != 0) {
      refuse("pack", "keys and values of row " + std::to_string(r) + " begin at " +
                         std::to_string(keys[r]) + " and " + std::to_string(values[r]) +
                         "; expected a multiple of " + std::to_string(group) + " and no negative");
    }
    const int64_t end = std::max(packed.keys[r], packed.values[r]);
    for (int64_t b = std::min(keys[r], values[r]) / group; b * group < end; ++b) {
      const bool whole = keys[r] <= b * group && b * group < packed.keys[r];
      const int64_t first = std::max<int64_t>(values[r], b * group);
      const int64_t last = std::min<int64_t>(packed.values[r], (b + 1) * group);
      if (whole || first < last) tasks.push_back({r, b, whole, first, last});
    }
  }
  const int64_t heads = p.kv_heads;
  parallel(static_cast<int64_t>(tasks.size()) * heads, threads, [&](int64_t i) {
    const Task& t = tasks[static_cast<size_t>(i / heads)];
    if (t.keys) job.keys(t.row, i % heads, t.block);
    for (int64_t token = t.first; token < t.last; ++token) job.value(t.row, i % heads, token);
  });
}

}  // namespace cpu
}  // namespace quest
