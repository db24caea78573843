// AVX-512 with the dot product of pairs of bf16.
// clang-format off: the vectors come before the loops over them
#include "vec_avx512.h"
#include "inner.h"
#include "block.h"
#include "int4.h"
#include "int4_avx512bf16.h"
#include "fold_avx512.h"
#include "largest_avx512.h"
#include "pages_avx512bf16.h"
#include "pairs_avx512bf16.h"
#include "prefill_avx512bf16.h"
#include "packed_block_avx512.h"
#include "packed_avx512bf16.h"
// clang-format on

namespace quest {
namespace cpu {

extern const Isa kAvx512Bf16;
const Isa kAvx512Bf16 = {
    "avx512bf16",
    int4_rows,
    int4_pairs,
    {keys_widened<float>, keys_pairs},
    {page_dots<float>, page_dots<uint16_t>},
    page_dots_int8,
    page_pairs<int8_t>,
    page_pairs<uint16_t>,
    fold,
    {extremes<float>, extremes<uint16_t>},
    {attend_block<float, keys_widened<float>, weigh<float>>,
     attend_block<uint16_t, keys_pairs, weigh_pairs>},
    {nullptr, settle_pairs},
    probabilities,
    largest,
    prefill,
    unpack_sixteens,
    unpack_nuq_sixteens,
    packed_chunk,
};

}  // namespace cpu
}  // namespace quest
