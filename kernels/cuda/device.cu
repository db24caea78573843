// What is there, and loading the kernels ahead of a capture.
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

void warm_up(int device) {
  const OnDevice on(device, "warm_up");
  load_append();
  load_scores();
  load_select();
  load_attend();
  load_lists();
}

}  // namespace cuda
}  // namespace quest
