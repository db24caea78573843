// select_top: one block a list.
#include "launch.h"
#include "select.cuh"

namespace quest {
namespace cuda {
namespace {

constexpr int kBlock = 512;
// Digits of 11, 11 and 10 bits: the first holds sign, exponent and two bits more, so that scores of
// one magnitude do not all count in one bin.
constexpr int kBits = 11;

struct SelectArgs {
  const float* scores;
  const int32_t *items, *keep;
  int64_t lists, items_max, width;
  bool force_last;
  int32_t *index, *count;
  int64_t* fault;
};

// All of a list's keys, made of its scores at each look.
struct AllKeys {
  static constexpr int kWindow = 0x7fffffff;
  const float* scores;
  __device__ __forceinline__ void hold(int) const {}
  __device__ __forceinline__ unsigned operator()(int i) const { return ordered(scores[i]); }
};

__global__ void __launch_bounds__(kBlock, 1)
    select_top_kernel(const __grid_constant__ SelectArgs a) {
  __shared__ Selecting<kBlock, kBits> s;
  const int64_t task = blockIdx.x, r = blockIdx.x / static_cast<unsigned>(a.lists);
  int items = a.items[r];
  if (items < 0 || items > a.items_max) {
    if (threadIdx.x == 0) raise(a.fault, Fault::kItems, r, 0);
    items = items < 0 ? 0 : static_cast<int>(a.items_max);
  }
  const int keep = a.keep[r];
  if (a.force_last && keep == 0 && items > 0 && threadIdx.x == 0) {
    raise(a.fault, Fault::kKeep, r, 0);
  }
  const bool all = keep < 0 || keep >= items;
  const int kept = all ? 0 : static_cast<int>(keep < a.width ? keep : a.width);
  const int forced = a.force_last && kept > 0 ? 1 : 0;
  const int wanted = kept - forced, competing = items - forced;
  const float* scores = a.scores + task * a.items_max;
  int32_t* index = a.index + task * a.width;

  if (wanted > 0) {
    AllKeys keys{scores};
    const Threshold t = threshold(keys, competing, wanted, s);
    ascending(keys, competing, t, s, [&](int position, int i) { index[position] = i; });
  }
  if (threadIdx.x == 0) {
    a.count[task] = all ? -1 : kept;
    if (forced) index[kept - 1] = items - 1;
  }
  for (int64_t i = kept + threadIdx.x; i < a.width; i += kBlock) index[i] = -1;
}

}  // namespace

void select_top(const Launch& launch, const float* scores, const int32_t* items,
                const int32_t* keep, int64_t rows, int64_t lists, int64_t items_max,
                bool force_last, int32_t* index, int64_t width, int32_t* count) {
  if (items_max > 0x7fff0000) refuse("select_top", "scores is of 2^31 a row");
  const SelectArgs args{scores, items,      keep,  lists, items_max,
                        width,  force_last, index, count, launch.fault};
  start(launch, "select_top", rows * lists, [&](unsigned grid, cudaStream_t stream) {
    select_top_kernel<<<grid, kBlock, 0, stream>>>(args);
  });
}

void load_select() { load(select_top_kernel); }

}  // namespace cuda
}  // namespace quest
