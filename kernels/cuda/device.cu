// What is there, and loading the kernels ahead of a capture.
#include <atomic>

#include "launch.h"

namespace quest {
namespace cuda {

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
