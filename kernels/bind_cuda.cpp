// quest_dist._cuda: the ops on a GPU for Python. Tensors come as device addresses and sizes that
// quest_dist/ops.py has checked. Every call only launches, so the GIL stays. The classes are local
// to this module: quest_dist._cpu has its own of the same names.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "cuda/ops.h"
#include "packed_layout.h"

namespace py = pybind11;

namespace {

using namespace quest::bind;
using quest::Angles;
using quest::Pages;
using quest::Selection;
using quest::Strided;
using quest::Token;
using quest::cuda::Launch;

Launch make_launch(int device, Address stream, Address fault) {
  return {device, at<void>(stream), at<int64_t>(fault)};
}

void append(const Launch& launch, const Pages& pages, const Strided& k, const Strided& v,
            Address starts, int64_t tokens) {
  quest::cuda::append(launch, pages, k, v, at<const int32_t>(starts), tokens);
}

void page_scores(const Launch& launch, const Pages& pages, Address q, int64_t heads,
                 Address lengths, float radius_scale, int reduce, bool score_open, Address out) {
  quest::cuda::page_scores(launch, pages, at<const void>(q), heads, at<const int32_t>(lengths),
                           radius_scale, static_cast<quest::Reduce>(reduce), score_open,
                           at<float>(out));
}

void select_top(const Launch& launch, Address scores, Address items, Address keep, int64_t rows,
                int64_t lists, int64_t items_max, bool force_last, Address index, int64_t width,
                Address count) {
  quest::cuda::select_top(launch, at<const float>(scores), at<const int32_t>(items),
                          at<const int32_t>(keep), rows, lists, items_max, force_last,
                          at<int32_t>(index), width, at<int32_t>(count));
}

void attend(const Launch& launch, const Pages& pages, Address q, Address rolled_query,
            int64_t rolled, int64_t heads, Address lengths, const Selection& selection, float scale,
            Address out, Address attended, Address read, Address lse, Address probabilities,
            int64_t probability_width, Address counters, Address workspace) {
  const quest::Attended result{at<void>(out),  at<int32_t>(attended),    at<int32_t>(read),
                               at<float>(lse), at<float>(probabilities), probability_width};
  quest::cuda::attend(launch, pages, at<const void>(q), at<const void>(rolled_query), rolled, heads,
                      at<const int32_t>(lengths), selection, scale, result, at<int32_t>(counters),
                      at<void>(workspace));
}

void check_lists(const Launch& launch, const Pages& pages, Address lengths,
                 const Selection& selection) {
  quest::cuda::check_lists(launch, pages, at<const int32_t>(lengths), selection);
}

void decode(const Launch& launch, const Pages& pages, const Strided& q, const Strided& k,
            const Strided& v, const Angles& angles, int64_t heads, Address lengths, Address keep,
            float radius_scale, int reduce, float scale, Address out, Address attended,
            Address read, Address lse, Address counters, Address workspace) {
  const Token token{q,
                    k,
                    v,
                    angles,
                    at<const int32_t>(lengths),
                    at<const int32_t>(keep),
                    radius_scale,
                    static_cast<quest::Reduce>(reduce),
                    scale};
  const quest::Attended result{
      at<void>(out), at<int32_t>(attended), at<int32_t>(read), at<float>(lse), nullptr, 0};
  quest::cuda::decode(launch, pages, token, heads, result, at<int32_t>(counters),
                      at<void>(workspace));
}

void pack(const Launch& launch, const Pages& pages, const quest::Packed& packed, Address keys,
          Address values) {
  quest::cuda::pack(launch, pages, packed, quest::layout_of(packed, pages.dim),
                    at<const int32_t>(keys), at<const int32_t>(values));
}

void attend_packed(const Launch& launch, const Pages& pages, const quest::Packed& packed, Address q,
                   int64_t heads, Address lengths, const Selection& selection, float scale,
                   Address out, Address attended, Address read, Address lse, Address counters,
                   Address workspace) {
  const quest::Attended result{
      at<void>(out), at<int32_t>(attended), at<int32_t>(read), at<float>(lse), nullptr, 0};
  quest::cuda::attend_packed(launch, pages, packed, quest::layout_of(packed, pages.dim),
                             at<const void>(q), heads, at<const int32_t>(lengths), selection, scale,
                             result, at<int32_t>(counters), at<void>(workspace));
}

void token_scores(const Launch& launch, const Pages& pages, Address q, int64_t heads,
                  Address lengths, float scale, Address out, int64_t width) {
  quest::cuda::token_scores(launch, pages, at<const void>(q), heads, at<const int32_t>(lengths),
                            scale, at<float>(out), width);
}

void gather(const Launch& launch, const Pages& pages, int64_t length, Address k, Address v) {
  quest::cuda::gather(launch, pages, length, at<void>(k), at<void>(v));
}

void linear4(const Launch& launch, const quest::Int4& weights, Address x, int dtype, int64_t rows,
             Address out) {
  quest::cuda::linear4(launch, weights, at<const void>(x), static_cast<quest::DType>(dtype), rows,
                       at<void>(out));
}

void widen4(const Launch& launch, const quest::Int4& weights, int64_t first, int64_t count,
            int dtype, Address out) {
  quest::cuda::widen4(launch, weights, first, count, static_cast<quest::DType>(dtype),
                      at<void>(out));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::class_<Launch>(m, "Launch", py::module_local()).def(py::init(&make_launch));
  py::class_<Pages>(m, "Pages", py::module_local()).def(py::init(&make_pages));
  py::class_<Strided>(m, "Strided", py::module_local()).def(py::init(&make_strided));
  py::class_<Selection>(m, "Selection", py::module_local()).def(py::init(&make_selection));
  py::class_<Angles>(m, "Angles", py::module_local()).def(py::init(&make_angles));
  py::class_<quest::Int4>(m, "Int4", py::module_local()).def(py::init(&make_int4));
  py::class_<quest::Nuq>(m, "Nuq", py::module_local()).def(py::init(&make_nuq));
  py::class_<quest::Packed>(m, "Packed", py::module_local()).def(py::init(&make_packed));
  m.def("append", &append);
  m.def("pack", &pack);
  m.def("attend_packed", &attend_packed);
  m.def("page_scores", &page_scores);
  m.def("select_top", &select_top);
  m.def("attend", &attend);
  m.def("attend_workspace_bytes", &quest::cuda::attend_workspace_bytes);
  m.def("decode", &decode);
  m.def("decode_workspace_bytes", [](const Pages& pages, int64_t heads, int reduce) {
    return quest::cuda::decode_workspace_bytes(pages, heads, static_cast<quest::Reduce>(reduce));
  });
  m.def("check_lists", &check_lists);
  m.def("token_scores", &token_scores);
  m.def("gather", &gather);
  m.def("linear4", &linear4);
  m.def("widen4", &widen4);
  m.def("device_count", &quest::cuda::device_count);
  m.def("capture_id", [](Address stream) { return quest::cuda::capture_id(at<void>(stream)); });
  m.def("warm_up", &quest::cuda::warm_up);
  m.attr("LARGEST_DIM") = quest::cuda::kLargestDim;
  m.attr("NO_FAULT") = quest::cuda::kNoFault;
}
