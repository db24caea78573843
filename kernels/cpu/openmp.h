// The OpenMP threads that torch computes with, so that our ops can share them.
#pragma once

namespace quest {
namespace cpu {

// A second pool would fight for the cores: OpenMP's threads go on spinning after torch's own ops.
// Both functions are the runtime's own and null where torch, or OpenMP in it, is not to be found.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  int (*max_threads)();  // what the calling thread's regions have if not told otherwise
};

const OpenMp& torch_openmp();

}  // namespace cpu
}  // namespace quest
