// Starting kernels: the device, the choice of an instance by dtype and D, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "element.cuh"
#include "ops.h"

namespace quest {
namespace cuda {

inline void expect(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

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
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) +
                                " blocks are more than a grid holds; split the rows");
  }
  const OnDevice on(launch.device, op);
  begin(static_cast<unsigned>(blocks), static_cast<cudaStream_t>(launch.stream));
  expect(cudaGetLastError(), op);
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

inline void check_shape(const Pages& p, const char* op) {
  if (p.dim < 8 || p.dim % 8 != 0 || p.dim > kLargestDim) {
    throw std::invalid_argument(std::string(op) + ": head dimension is " + std::to_string(p.dim) +
                                "; expected a multiple of 8 up to " + std::to_string(kLargestDim));
  }
  if (p.row_pages * p.page_size > 0x7fffffff || p.rows >= 1 << 20) {
    throw std::invalid_argument(std::string(op) + ": page_table is of " + std::to_string(p.rows) +
                                " rows of " + std::to_string(p.row_pages * p.page_size) +
                                " slots; expected fewer than 2^20 rows of 2^31");
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
void load_lists();

}  // namespace cuda
}  // namespace quest
