// pack: a block of threads packs one packed block of one kv head, a thread a channel or a token's
// group for scales and minima, then a thread a word of codes. Codes are the CPU's bits.
#include "launch.h"
#include "packed.cuh"

namespace quest {
namespace cuda {
namespace {

struct PackArgs {
  Pages p;
  Packed packed;
  PackedLayout layout;
  const int32_t *keys, *values;
  int64_t* fault;
};

// NaN stays NaN, which fminf and fmaxf would drop.
__device__ __forceinline__ float bounded(float x) {
  return x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;
}

// Writes scale and minimum of a group from its smallest and largest number.
__device__ __forceinline__ void put_group(float low, float high, int bits, uint8_t* scale,
                                          uint8_t* minimum) {
  Float16 rounded;
  narrow(bounded(__fdiv_rn(high - low, static_cast<float>((1 << bits) - 1))), rounded);
  *reinterpret_cast<uint16_t*>(scale) = rounded.bits;
  narrow(bounded(low), rounded);
  *reinterpret_cast<uint16_t*>(minimum) = rounded.bits;
}

__device__ __forceinline__ uint32_t code_of(float x, float scale, float minimum, int bits) {
  if (scale == 0.0f) return 0;
  const float most = static_cast<float>((1 << bits) - 1);
  float n = __fdiv_rn(x - minimum, scale);
  n = n > 0.0f ? (n < most ? n : most) : 0.0f;
  return static_cast<uint32_t>(rintf(n));
}

// A key or value of the row's pages, NaN where there is none.
template <typename T>
__device__ __forceinline__ float number_at(const PackArgs& a, int row, int kv_head, int token,
                                           bool value, int channel) {
  const int size = static_cast<int>(a.p.page_size), page = token / size;
  const int64_t at = row_of(a.p, row, kv_head, page, token - page * size, a.fault);
  if (at < 0) return __int_as_float(0x7fffffff);
  return widen(static_cast<const T*>(a.p.kv)[(at + (value ? size : 0)) * a.p.dim + channel]);
}

// Codes of tokens [first, last) of a packed block: of all its keys, or of some values.
template <typename T, bool values>
__device__ __forceinline__ void put_codes(const PackArgs& a, int row, int kv_head, int start,
                                          uint8_t* block, int first, int last) {
  const PackedLayout& l = a.layout;
  const int group = static_cast<int>(l.group), width = static_cast<int>(l.width);
  const int tiles = group / 16, planes = l.bits == 3 ? 2 : 1;
  for (int plane = 0; plane < planes; ++plane) {
    const int bits = l.bits == 3 ? 2 - plane : l.bits, each = 16 / bits;
    const int words = (static_cast<int>(l.vectors) + each - 1) / each * 32;
    for (int i = threadIdx.x; i < tiles * words; i += kThreads) {
      const int tile = i / words, strip = i % words / 32, place = i % 32;
      uint16_t* to = reinterpret_cast<uint16_t*>(block + (values ? l.value_codes : l.key_codes) +
                                                 tile * l.tile_bytes + plane * l.high_plane +
                                                 strip * 64 + place * 2);
      uint32_t word = *to;
      for (int j = 0; j < each; ++j) {
        const int vector = strip * each + j;
        const int t = tile * 16 + (values ? vector % 8 * 2 + place % 2 : place / 2);
        const int c = values ? vector / 8 * 16 + place / 2 : vector * 2 + place % 2;
        if (c >= l.dim || t < first || t >= last) continue;
        const int number = c / width * group + t;
        const uint8_t* scale = block + (values ? l.value_scales + 2 * number : 2 * c);
        const uint8_t* minimum = block + (values ? l.value_minima + 2 * number : 2 * (l.dim + c));
        const float x = number_at<T>(a, row, kv_head, start + t, values, c);
        const uint32_t code = code_of(x, half_at(scale), half_at(minimum), l.bits);
        const uint32_t mask = (1u << bits) - 1u;
        word = (word & ~(mask << j * bits)) | (code >> 2 * plane & mask) << j * bits;
      }
      *to = static_cast<uint16_t>(word);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 8) pack_kernel(const __grid_constant__ PackArgs a) {
  const PackedLayout& l = a.layout;
  const Place place = place_of(a.p, static_cast<unsigned>(a.packed.row_blocks));
  const int row = place.row, kv_head = place.head, number = place.tile;
  const int group = static_cast<int>(l.group), start = number * group;
  const int slots = static_cast<int>(a.p.row_pages * a.p.page_size);
  const int keys = packed_end(a.packed, a.packed.keys, row, slots, group, Fault::kKeys, a.fault);
  const int values = packed_end(a.packed, a.packed.values, row, slots, 1, Fault::kValues, a.fault);
  const bool whole = a.keys[row] <= start && start < keys;
  const int from = a.values[row] - start, to = values - start;
  const int first = from > 0 ? from : 0, last = to < group ? to : group;
  if (!whole && first >= last) return;
  const int id = block_of(a.packed, row, number, a.fault);
  if (id < 0) return;
  uint8_t* block = data_of(a.packed, l, a.p.kv_heads, kv_head, id);

  const int dim = static_cast<int>(l.dim), width = static_cast<int>(l.width);
  for (int c = threadIdx.x; whole && c < dim; c += kThreads) {
    float low = number_at<T>(a, row, kv_head, start, false, c), high = low;
    for (int t = 1; t < group; ++t) {
      const float x = number_at<T>(a, row, kv_head, start + t, false, c);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    put_group(low, high, l.bits, block + 2 * c, block + 2 * (dim + c));
  }
  const int groups = dim / width, some = last > first ? last - first : 0;
  for (int i = threadIdx.x; i < some * groups; i += kThreads) {
    const int g = i % groups, t = first + i / groups;
    float low = number_at<T>(a, row, kv_head, start + t, true, g * width), high = low;
    for (int c = 1; c < width; ++c) {
      const float x = number_at<T>(a, row, kv_head, start + t, true, g * width + c);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    const int at = 2 * (g * group + t);
    put_group(low, high, l.bits, block + l.value_scales + at, block + l.value_minima + at);
  }
  __syncthreads();  // a block's threads see each other's writes to memory
  if (whole) put_codes<T, false>(a, row, kv_head, start, block, 0, group);
  if (some > 0) put_codes<T, true>(a, row, kv_head, start, block, first, last);
}

}  // namespace

void pack(const Launch& launch, const Pages& p, const Packed& packed, const PackedLayout& layout,
          const int32_t* keys, const int32_t* values) {
  check_shape(p, "pack");
  const PackArgs args{p, packed, layout, keys, values, launch.fault};
  by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    start(launch, "pack", p.rows * packed.row_blocks * p.kv_heads,
          [&](unsigned grid, cudaStream_t stream) {
            pack_kernel<T><<<grid, kThreads, 0, stream>>>(args);
          });
  });
}

void load_pack() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    by_dtype(dtype, [](auto element) { load(pack_kernel<decltype(element)>); });
  }
}

}  // namespace cuda
}  // namespace quest
