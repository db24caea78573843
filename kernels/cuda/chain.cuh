// Kernels that start before the one before them in their stream has ended (compute capability 9 on;
// `chained` in launch.h starts them so).
//
// A chained kernel calls wait_for_earlier() in every block that has anything to do, and only after
// that let_next_start(). So when a kernel starts, all but its direct predecessor have ended, and
// what they wrote has reached the second-level cache. What is read before the wait must not be
// written by a direct predecessor, and is read past the first-level cache (__ldcg), which may hold
// what stood there before. What a predecessor writes is read after the wait and by plain loads: the
// read-only path (__ldg) is for memory that nothing writes from a kernel's start on.
//
// A .cu file includes this by itself, which is how setup.py knows that it needs code for 9.0 on.
#pragma once

namespace quest {
namespace cuda {

__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace cuda
}  // namespace quest
