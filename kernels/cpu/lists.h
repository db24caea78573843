// The lists of a selection: validity, and how much of a row they touch.
#pragma once

#include "rows.h"

namespace quest {
namespace cpu {

// Refuses counts out of range. Cheap: one look at each list's count.
void check_counts(const Pages& pages, const Selection& selection);

// Whether every list of a row selects everything.
bool selects_all(const Selection& selection, int64_t row);

// Tokens that list `list` of row `row` names (the row's length for count -1), unchecked entries.
int64_t named_tokens(const Pages& pages, const int32_t* lengths, const Selection& selection,
                     int64_t row, int64_t list);

// Refuses entries of the lists that serve one kv head which are out of range or named twice, and
// returns how many different tokens they name together.
int64_t check_lists(const Pages& pages, const int32_t* lengths, const Selection& selection,
                    int64_t row, int64_t first_list, int64_t lists);

// read [R, G]: tokens of the union over each kv head's lists; refuses what check_lists refuses.
void count_read(const Pages& pages, const int32_t* lengths, const Selection& selection,
                int32_t* read, int threads);

}  // namespace cpu
}  // namespace quest
