// decode: two kernels a layer.
#include "decode.h"
#include "launch.h"

namespace quest {
namespace cuda {

int64_t decode_workspace_bytes(const Pages& p, int64_t heads, Reduce reduce) {
  const int64_t lists = reduce == Reduce::kPerQuery ? heads : p.kv_heads;
  return attend_workspace_bytes(p.rows, heads, p.dim) +
         p.rows * lists * p.row_pages * static_cast<int64_t>(sizeof(float));
}

void decode(const Launch& launch, const Pages& p, const Token& token, int64_t heads,
            const Attended& result, int32_t* counters, void* workspace) {
  check_shape(p, "decode");
  char* behind = static_cast<char*>(workspace) + attend_workspace_bytes(p.rows, heads, p.dim);
  float* scores = reinterpret_cast<float*>(behind);
  const bool chained = start_decode_scores(launch, p, token, heads, scores);
  start_decode_attend(launch, p, token, heads, scores, result, counters, workspace, chained);
}

}  // namespace cuda
}  // namespace quest
