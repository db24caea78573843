// Linear layers whose weights are in 4 bits; ops.h says how those lie.
//
// linear4: a block has one tile of 16 outputs and up to kRows rows; its warps share out the groups.
// A lane takes four outputs of every eighth line, so a warp reads eight lines at once, 512 bytes in
// a row. Sums of a group are of code - 8, which fp32 holds exactly, and become the output's with
// scale and zero at the group's end; lanes and warps are added in a fixed order, so a row's bits
// depend neither on the other rows nor on the run.
#include "launch.h"

namespace quest {
namespace cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / 32;
constexpr int kOutputs = 4;  // of a lane
constexpr int kTile = static_cast<int>(kTileOutputs);

struct LinearArgs {
  Int4 w;
  const void* x;
  void* out;
  int64_t rows;
};

// A word's code of an input, less 8. The bits are the fraction of 2^23.
__device__ __forceinline__ float code_of(uint32_t word, int input) {
  const uint32_t code = word >> (16 * (input % 2) + 4 * (input / 2)) & 15u;
  return __uint_as_float(0x4b000000u | code) - 8388616.0f;
}

struct Head {
  float scale[kOutputs], offset[kOutputs];  // offset is scale (8 - zero)

  __device__ __forceinline__ void load(const uint8_t* head, int part) {
    const uint2 half = __ldg(reinterpret_cast<const uint2*>(head) + part);
    const uint32_t zero = __ldg(reinterpret_cast<const uint32_t*>(head + 2 * kTile) + part);
    const uint32_t pair[2] = {half.x, half.y};
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      scale[o] = widen(Float16{static_cast<uint16_t>(pair[o / 2] >> (16 * (o % 2)) & 0xffffu)});
      const float byte = __uint_as_float(0x4b000000u | (zero >> (8 * o) & 255u)) - 8388608.0f;
      offset[o] = scale[o] * (8.0f - byte);
    }
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kBlock, 2) linear4_kernel(const __grid_constant__ LinearArgs a) {
  __shared__ float parts[kWarps][kRows][kTile];
  const Int4& w = a.w;
  const int64_t tiles = (w.outputs + kTileOutputs - 1) / kTileOutputs;
  const int64_t tile = blockIdx.x % tiles, row = blockIdx.x / tiles * kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % kOutputs;
  const int per_group = static_cast<int>(w.group / kLineInputs);
  const int lines = static_cast<int>(w.inputs / kLineInputs);
  const int groups = (lines + per_group - 1) / per_group;
  const uint8_t* base = w.data + tile * (kLine * (lines + groups));
  float total[kRows][kOutputs];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) total[r][o] = 0.0f;
  }
  for (int g = warp; g < groups; g += kWarps) {
    const uint8_t* head = base + static_cast<int64_t>(g) * (per_group + 1) * kLine;
    const int many = min(per_group, lines - g * per_group);
    Head of;
    of.load(head, part);
    float sum[kRows][kOutputs], all[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      all[r] = 0.0f;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) sum[r][o] = 0.0f;
    }
#pragma unroll(kRows == 1 ? 2 : 1)
    for (int line = lane / kOutputs; line < many; line += 8) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(head + (line + 1) * kLine) + part);
      const uint32_t word[kOutputs] = {four.x, four.y, four.z, four.w};
      float code[kOutputs][8];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < 8; ++i) code[o][i] = code_of(word[o], i);
      }
      const int64_t input = (static_cast<int64_t>(g) * per_group + line) * kLineInputs;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = min(row + r, a.rows - 1);  // rows beyond the last are not stored
        Eight<T> eight;
        eight.load_constant(static_cast<const T*>(a.x) + at * w.inputs + input);
        float x[8];
        eight.unpack(x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          all[r] += x[i];
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) sum[r][o] = fmaf(code[o][i], x[i], sum[r][o]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        total[r][o] = fmaf(of.scale[o], sum[r][o], total[r][o]);
        total[r][o] = fmaf(of.offset[o], all[r], total[r][o]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int offset = 16; offset >= kOutputs; offset /= 2) {
        total[r][o] += __shfl_xor_sync(kAll, total[r][o], offset);
      }
      if (lane < kOutputs) parts[warp][r][lane * kOutputs + o] = total[r][o];
    }
  }
  __syncthreads();
  const int r = threadIdx.x / kTile, o = threadIdx.x % kTile;
  const int64_t output = tile * kTileOutputs + o;
  if (r >= kRows || row + r >= a.rows || output >= w.outputs) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += parts[i][r][o];
  narrow(sum, static_cast<T*>(a.out)[(row + r) * w.outputs + output]);
}

struct WidenArgs {
  Int4 w;
  void* out;
  int64_t first, count;
};

// A block has one tile; a thread takes a word, eight inputs of an output, at a time.
template <typename T>
__global__ void __launch_bounds__(kBlock) widen4_kernel(const __grid_constant__ WidenArgs a) {
  const Int4& w = a.w;
  const int per_group = static_cast<int>(w.group / kLineInputs);
  const int lines = static_cast<int>(w.inputs / kLineInputs);
  const int groups = (lines + per_group - 1) / per_group;
  const int64_t tile = a.first / kTileOutputs + blockIdx.x;
  const uint8_t* base = w.data + tile * (kLine * (lines + groups));
  const int o = threadIdx.x % kTile;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kTileOutputs + o;
  if (output >= a.count) return;
  for (int line = threadIdx.x / kTile; line < lines; line += kBlock / kTile) {
    const int g = line / per_group;
    const uint8_t* head = base + static_cast<int64_t>(g) * (per_group + 1) * kLine;
    Head of;
    of.load(head, o / kOutputs);
    const uint8_t* at = base + static_cast<int64_t>(line + g + 1) * kLine;
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(at) + o);
    float scale = of.scale[0], offset = of.offset[0];
#pragma unroll
    for (int i = 1; i < kOutputs; ++i) {
      if (o % kOutputs == i) {
        scale = of.scale[i];
        offset = of.offset[i];
      }
    }
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = fmaf(code_of(word, i), scale, offset);
    Eight<T> eight;
    eight.pack(x);
    eight.store(static_cast<T*>(a.out) + output * w.inputs + line * kLineInputs);
  }
}

template <typename Call>
void for_every_type(Call&& call) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    by_dtype(dtype, call);
  }
}

}  // namespace

void linear4(const Launch& launch, const Int4& w, const void* x, DType dtype, int64_t rows,
             void* out) {
  const LinearArgs args{w, x, out, rows};
  const int64_t tiles = (w.outputs + kTileOutputs - 1) / kTileOutputs;
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto begin = [&](auto many) {
      constexpr int kRows = decltype(many)::value;
      start(launch, "linear4", tiles * ((rows + kRows - 1) / kRows),
            [&](unsigned grid, cudaStream_t stream) {
              linear4_kernel<T, kRows><<<grid, kBlock, 0, stream>>>(args);
            });
    };
    if (rows == 1) return begin(std::integral_constant<int, 1>{});
    return begin(std::integral_constant<int, 4>{});
  });
}

void widen4(const Launch& launch, const Int4& w, int64_t first, int64_t count, DType dtype,
            void* out) {
  const WidenArgs args{w, out, first, count};
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    start(launch, "widen4", (count + kTileOutputs - 1) / kTileOutputs,
          [&](unsigned grid, cudaStream_t stream) {
            widen4_kernel<T><<<grid, kBlock, 0, stream>>>(args);
          });
  });
}

void load_int4() {
  for_every_type([](auto element) {
    load(linear4_kernel<decltype(element), 1>);
    load(linear4_kernel<decltype(element), 4>);
    load(widen4_kernel<decltype(element)>);
  });
}

}  // namespace cuda
}  // namespace quest
