// The two kernels of decode, one after the other on a stream.
#pragma once

#include "ops.h"

namespace quest {
namespace cuda {

// Rotates and appends the new token's k and v and, where lists are chosen, scores closed pages:
// scores [R, Hs, P], of which only what competes is written. Launches nothing where neither is to
// be done, and says whether it did.
bool start_decode_scores(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
                         float* scores);

// Chooses pages by the scores and attends to them; `chained` where it follows the kernel above.
void start_decode_attend(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
                         const float* scores, const Attended& result, int32_t* counters,
                         void* workspace, bool chained);

}  // namespace cuda
}  // namespace quest
