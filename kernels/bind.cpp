// quest_dist._cpu: the ops for Python. Tensors come as addresses and sizes that quest_dist/ops.py
// has checked; the GIL is released while an op runs. std::invalid_argument becomes ValueError.
#include "bind.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

using namespace quest::bind;

quest::ByteMeta make_bytes(Address values, Address scale, Address offset) {
  return {at<const int8_t>(values), at<const float>(scale), at<const float>(offset)};
}

void append(const quest::Pages& pages, const quest::Strided& k, const quest::Strided& v,
            Address starts, int64_t tokens, int threads) {
  quest::cpu::append(pages, k, v, at<const int32_t>(starts), tokens, threads);
}

void page_scores(const quest::Pages& pages, const quest::ByteMeta& bytes, Address q, int64_t heads,
                 Address lengths, float radius_scale, int reduce, bool score_open, Address out,
                 int threads) {
  quest::cpu::page_scores(pages, bytes, at<const void>(q), heads, at<const int32_t>(lengths),
                          radius_scale, static_cast<quest::Reduce>(reduce), score_open,
                          at<float>(out), threads);
}

void select_top(Address scores, Address items, Address keep, int64_t rows, int64_t lists,
                int64_t items_max, bool force_last, Address index, int64_t width, Address count,
                int threads) {
  quest::cpu::select_top(at<const float>(scores), at<const int32_t>(items), at<const int32_t>(keep),
                         rows, lists, items_max, force_last, at<int32_t>(index), width,
                         at<int32_t>(count), threads);
}

int64_t listed_tokens(const quest::Pages& pages, Address lengths,
                      const quest::Selection& selection) {
  return quest::cpu::listed_tokens(pages, at<const int32_t>(lengths), selection);
}

void attend(const quest::Pages& pages, Address q, Address rolled_query, int64_t rolled,
            int64_t heads, Address lengths, const quest::Selection& selection, float scale,
            Address out, Address attended, Address read, Address lse, Address probabilities,
            int64_t probability_width, int threads) {
  const quest::Attended result{at<void>(out),  at<int32_t>(attended),    at<int32_t>(read),
                               at<float>(lse), at<float>(probabilities), probability_width};
  quest::cpu::attend(pages, at<const void>(q), at<const void>(rolled_query), rolled, heads,
                     at<const int32_t>(lengths), selection, scale, result, threads);
}

void decode(const quest::Pages& pages, const quest::Strided& q, const quest::Strided& k,
            const quest::Strided& v, const quest::Angles& angles, int64_t heads, Address lengths,
            Address keep, float radius_scale, int reduce, float scale, Address out,
            Address attended, Address read, Address lse, int threads) {
  const quest::Token token{q,
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
  quest::cpu::decode(pages, token, heads, result, threads);
}

void pack(const quest::Pages& pages, const quest::Packed& packed, Address keys, Address values,
          int threads) {
  quest::cpu::pack(pages, packed, at<const int32_t>(keys), at<const int32_t>(values), threads);
}

void attend_packed(const quest::Pages& pages, const quest::Packed& packed, Address q, int64_t heads,
                   Address lengths, const quest::Selection& selection, float scale, Address out,
                   Address attended, Address read, Address lse, int threads) {
  const quest::Attended result{
      at<void>(out), at<int32_t>(attended), at<int32_t>(read), at<float>(lse), nullptr, 0};
  quest::cpu::attend_packed(pages, packed, at<const void>(q), heads, at<const int32_t>(lengths),
                            selection, scale, result, threads);
}

void token_scores(const quest::Pages& pages, Address q, int64_t heads, Address lengths, float scale,
                  Address out, int64_t width, int threads) {
  quest::cpu::token_scores(pages, at<const void>(q), heads, at<const int32_t>(lengths), scale,
                           at<float>(out), width, threads);
}

void gather(const quest::Pages& pages, int64_t length, Address k, Address v, int threads) {
  quest::cpu::gather(pages, length, at<void>(k), at<void>(v), threads);
}

void prefill_attend(const quest::Strided& q, const quest::Strided& k, const quest::Strided& v,
                    int64_t rows, int64_t heads, int64_t kv_heads, int64_t queries, int64_t length,
                    int64_t dim, float scale, Address out, Address workspace, int threads) {
  quest::cpu::prefill_attend(q, k, v, rows, heads, kv_heads, queries, length, dim, scale,
                             at<void>(out), at<void>(workspace), threads);
}

void linear4(const quest::Int4& weights, Address x, int dtype, int64_t rows, Address out,
             int threads) {
  quest::cpu::linear4(weights, at<const void>(x), static_cast<quest::DType>(dtype), rows,
                      at<void>(out), threads);
}

void widen4(const quest::Int4& weights, int64_t first, int64_t count, int dtype, Address out,
            int threads) {
  quest::cpu::widen4(weights, first, count, static_cast<quest::DType>(dtype), at<void>(out),
                     threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<quest::Pages>(m, "Pages").def(py::init(&make_pages));
  py::class_<quest::Strided>(m, "Strided").def(py::init(&make_strided));
  py::class_<quest::ByteMeta>(m, "ByteMeta").def(py::init(&make_bytes));
  py::class_<quest::Selection>(m, "Selection").def(py::init(&make_selection));
  py::class_<quest::Angles>(m, "Angles").def(py::init(&make_angles));
  py::class_<quest::Int4>(m, "Int4").def(py::init(&make_int4));
  py::class_<quest::Nuq>(m, "Nuq").def(py::init(&make_nuq));
  py::class_<quest::Packed>(m, "Packed").def(py::init(&make_packed));
  m.def("append", &append, no_gil);
  m.def("pack", &pack, no_gil);
  m.def("attend_packed", &attend_packed, no_gil);
  m.def("page_scores", &page_scores, no_gil);
  m.def("select_top", &select_top, no_gil);
  m.def("listed_tokens", &listed_tokens, no_gil);
  m.def("attend", &attend, no_gil);
  m.def("decode", &decode, no_gil);
  m.def("token_scores", &token_scores, no_gil);
  m.def("gather", &gather, no_gil);
  m.def("prefer_huge_pages",
        [](Address data, int64_t bytes) { quest::cpu::prefer_huge_pages(at<void>(data), bytes); });
  m.def("prefill_attend", &prefill_attend, no_gil);
  m.def("prefill_workspace", &quest::cpu::prefill_workspace);
  m.def("linear4", &linear4, no_gil);
  m.def("widen4", &widen4, no_gil);
  m.def("has_prefill", &quest::cpu::has_prefill);
  m.def("isa", &quest::cpu::isa);
  m.def("isas", &quest::cpu::isas);
  m.def("set_isa", &quest::cpu::set_isa);
  // An unusable QUEST_ISA is said at import, not in the middle of a run.
  quest::cpu::isa();
}
