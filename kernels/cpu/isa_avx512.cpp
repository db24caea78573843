// clang-format off: the vectors come before the loops over them
#include "vec_avx512.h"
#include "inner.h"
// clang-format on

namespace quest {
namespace cpu {

extern const Isa kAvx512;
const Isa kAvx512 = {
    "avx512",
    {dot<float>, dot<uint16_t>},
    {dot<float>, dot<uint16_t>},
    {weigh<float>, weigh<uint16_t>},
    {extremes<float>, extremes<uint16_t>},
    exponentials,
    nullptr,
};

}  // namespace cpu
}  // namespace quest
