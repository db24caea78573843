// What is there, what is wrong, and loading the kernels ahead of a capture.
#include <atomic>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace quest {
namespace cuda {

void expect(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets it: it would be found after the next launch too
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

void refuse(const char* op, const char* what) {
  throw std::invalid_argument(std::string(op) + ": " + what);
}

void refuse_grid(const char* op, int64_t blocks) {
  const std::string many = std::to_string(blocks);
  refuse(op, (many + " blocks are more than a grid holds; split the rows").c_str());
}

void check_shape(const Pages& p, const char* op) {
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

int device_count() {
  int count = 0;
  // No driver, or one that sees no device: there is none, and that is not an error.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

uint64_t capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  expect(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "capture_id");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

bool can_chain(int device, const void* kernel) {
  // 0: not known yet. Calls hold the GIL, and all would find the same.
  static std::atomic<int> known[64];
  const bool kept = device >= 0 && device < 64;
  if (kept && known[device] != 0) return known[device] == 1;
  int major = 0;
  expect(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "decode");
  cudaFuncAttributes attributes;
  expect(cudaFuncGetAttributes(&attributes, kernel), "decode");
  const bool can = major >= 9 && attributes.ptxVersion >= 90;
  if (kept) known[device] = can ? 1 : 2;
  return can;
}

void warm_up(int device) {
  const OnDevice on(device, "warm_up");
  load_append();
  load_scores();
  load_select();
  load_attend();
  load_decode_scores();
  load_decode_attend();
  load_lists();
  load_int4();
  load_pack();
  load_attend_packed();
}

}  // namespace cuda
}  // namespace quest
