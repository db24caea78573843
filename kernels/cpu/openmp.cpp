#include "openmp.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace quest {
namespace cpu {
namespace {

OpenMp find() {
  OpenMp found{nullptr, nullptr};
#ifdef __linux__
  // Through torch's library, which must be loaded already: a process may hold several runtimes.
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return found;
  void* parallel = dlsym(torch, "GOMP_parallel");
  void* max_threads = dlsym(torch, "omp_get_max_threads");
  if (parallel == nullptr || max_threads == nullptr) return found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(parallel);
  found.max_threads = reinterpret_cast<decltype(found.max_threads)>(max_threads);
#endif
  return found;
}

}  // namespace

const OpenMp& torch_openmp() {
  static const OpenMp found = find();
  return found;
}

}  // namespace cpu
}  // namespace quest
