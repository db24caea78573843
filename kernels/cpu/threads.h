// Threads that share out numbered tasks: torch's own where it computes with as many (see openmp.h),
// else a pool of ours, which spins briefly for the next round and then sleeps.
#pragma once

#include <cstdint>
#include <type_traits>

namespace quest {
namespace cpu {

// Calls task(context, i) for every i in [0, tasks) on up to `threads` threads, the caller included.
// Tasks are taken in order from one counter. The exception of the lowest failing task is rethrown
// after all have ended. A call made while another runs does its tasks alone.
void run_tasks(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context);

template <typename F>
void parallel(int64_t tasks, int threads, F&& body) {
  using Body = typename std::remove_reference<F>::type;
  run_tasks(
      tasks, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace cpu
}  // namespace quest
