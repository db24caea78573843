// Counting what lists name, for attend.
#pragma once

#include "ops.h"

namespace quest {
namespace cuda {

// read [R, G] for lists of each query head.
void count_union(const Launch& launch, const Pages& pages, int64_t group, const int32_t* lengths,
                 const Selection& selection, int32_t* read);

}  // namespace cuda
}  // namespace quest
