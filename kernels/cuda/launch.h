// Starting kernels: the device, the choice of an instance by dtype and D, and errors as exceptions,
// which device.cu makes: each file that knew <string> would compile for a third of a second longer.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "ops.h"
#include "rows.cuh"

namespace quest {
namespace cuda {

// What went wrong in CUDA, as std::runtime_error.
void expect(cudaError_t status, const char* op);

// What an op cannot do, as std::invalid_argument.
[[noreturn]] void refuse(const char* op, const char* what);
[[noreturn]] void refuse_grid(const char* op, int64_t blocks);
void check_shape(const Pages& p, const char* op);

// Makes a launch's device current, and the one before it current again.
class OnDevice {
 public:
  OnDevice(int device, const char* op) {
    expect(cudaGetDevice(&before_), op);
    if (device != before_) {
      expect(cudaSetDevice(device), op);
      changed_ = true;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Calls launch(grid, stream) where there is anything to do.
template <typename Start>
void start(const Launch& launch, const char* op, int64_t blocks, Start&& begin) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) refuse_grid(op, blocks);
  const OnDevice on(launch.device, op);
  begin(static_cast<unsigned>(blocks), static_cast<cudaStream_t>(launch.stream));
  expect(cudaGetLastError(), op);
}

// Whether kernels may be chained (chain.cuh) on a device: it can, and their code there waits. That
// depends on QUEST_CUDA_ARCHS alone, so any kernel that is to be chained tells.
bool can_chain(int device, const void* kernel);

// Starts a kernel that takes one argument, before the kernel ahead of it in the stream has ended if
// it is `chained` and may be.
template <typename Args>
void start_chained(const Launch& launch, const char* op, int64_t blocks, void (*kernel)(Args),
                   const Args& args, bool chained) {
  start(launch, op, blocks, [&](unsigned grid, cudaStream_t stream) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs =
        chained && can_chain(launch.device, reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    expect(cudaLaunchKernelEx(&config, kernel, args), op);
  });
}

template <typename Call>
void by_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(float{});
    case DType::kBFloat16:
      return call(BFloat16{});
    case DType::kFloat16:
      return call(Float16{});
  }
}

// call(T, std::integral_constant<int, lanes that hold a row>).
template <typename Call>
void by_row(DType dtype, int64_t dim, Call&& call) {
  by_dtype(dtype, [&](auto element) {
    if (dim <= 64) return call(element, std::integral_constant<int, 8>{});
    if (dim <= 128) return call(element, std::integral_constant<int, 16>{});
    return call(element, std::integral_constant<int, 32>{});
  });
}

// Every instance: call(T, lanes).
template <typename Call>
void for_every_row(Call&& call) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t dim : {64, 128, 256}) by_row(dtype, dim, call);
  }
}

// Has the driver load a kernel's code.
template <typename Kernel>
void load(Kernel* kernel) {
  cudaFuncAttributes attributes;
  expect(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "warm_up");
}

// One for each file of kernels; warm_up calls them.
void load_append();
void load_scores();
void load_select();
void load_attend();
void load_decode_scores();
void load_decode_attend();
void load_lists();
void load_int4();
void load_pack();
void load_attend_packed();

}  // namespace cuda
}  // namespace quest
