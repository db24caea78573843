#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"

namespace quest {
namespace cpu {
namespace {

std::vector<const Isa*> supported() {
  std::vector<const Isa*> found;
#ifdef QUEST_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16);
  if (avx512) found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
  found.push_back(&kScalar);
  return found;
}

const std::vector<const Isa*>& choices() {
  static const std::vector<const Isa*> list = supported();
  return list;
}

const Isa& named(const char* name) {
  for (const Isa* one : choices()) {
    if (std::strcmp(one->name, name) == 0) return *one;
  }
  throw std::invalid_argument("instruction set '" + std::string(name) +
                              "' (QUEST_ISA or set_isa) is unknown or not supported by this "
                              "machine, which has: " +
                              isas());
}

const Isa*& chosen() {
  static const Isa* isa = [] {
    const char* forced = std::getenv("QUEST_ISA");
    return forced != nullptr && *forced != '\0' ? &named(forced) : choices().front();
  }();
  return isa;
}

}  // namespace

const Isa& current_isa() { return *chosen(); }

const char* isa() { return current_isa().name; }

const char* isas() {
  static const std::string text = [] {
    std::string joined;
    for (const Isa* one : choices())
      joined += (joined.empty() ? "" : ", ") + std::string(one->name);
    return joined;
  }();
  return text.c_str();
}

void set_isa(const char* name) { chosen() = &named(name); }

}  // namespace cpu
}  // namespace quest
