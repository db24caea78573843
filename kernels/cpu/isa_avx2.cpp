// clang-format off: the vectors come before the loops over them
#include "vec_avx2.h"
#include "inner.h"
#include "block.h"
#include "int4.h"
#include "packed_block.h"
// clang-format on

namespace quest {
namespace cpu {

extern const Isa kAvx2;
const Isa kAvx2 = {
    "avx2",
    int4_rows,
    nullptr,
    {keys_widened<float>, keys_widened<uint16_t>},
    {page_dots<float>, page_dots<uint16_t>},
    page_dots_int8,
    nullptr,
    nullptr,
    nullptr,
    {extremes<float>, extremes<uint16_t>},
    {attend_block<float, keys_widened<float>, weigh<float>>,
     attend_block<uint16_t, keys_widened<uint16_t>, weigh<uint16_t>>},
    {nullptr, nullptr},
    probabilities,
    nullptr,
    nullptr,
    unpack,
    unpack_nuq,
    nullptr,
};

}  // namespace cpu
}  // namespace quest
