// Launches of the kernels of relation attention, and their registration as private operators.
#include "relation_attention.cuh"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "relation_launch.h"

namespace rdfkern {
namespace {

Rows head_rows_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), kind_of(tensor), 0, tensor.stride(1),
          tensor.stride(0)};
}

Attention attention_of(const Tensor& value, const Tensor& dst, const Tensor& src,
                       const Tensor& rel, double scale, double negative_slope, bool within,
                       double dropout_p, int64_t seed) {
  return {head_rows_of(value),
          head_rows_of(dst),
          head_rows_of(src),
          head_rows_of(rel),
          int(value.size(1)),
          int(value.size(2)),
          dst.dim() == 3 ? int(dst.size(2)) : 0,
          float(scale),
          float(negative_slope),
          within,
          {dropout_p, uint64_t(seed)}};
}

WindowPairs window_pairs(const Tensor& key, const Tensor& ranges, const Tensor& table,
                         int64_t relations, bool of_source) {
  const int64_t rows = key.size(0);
  const int* range = ints_of(ranges);
  return {range + (of_source ? 2 : 0) * rows,
          range + (of_source ? 3 : 1) * rows,
          range + 4 * rows,
          range + 5 * rows,
          ints_of(key),
          ints_of(table),
          rows,
          table.size(0),
          relations,
          of_source};
}

EdgePairs edge_pairs(const Tensor& start, const Tensor& other, const Tensor& relation,
                     const Tensor& edge, bool of_source) {
  return {indices_of(start), indices_of(other),  indices_of(relation),
          indices_of(edge),  start.size(0) - 1, of_source};
}

template <class Pairs>
void forward(const Pairs& pairs, const Attention& given, const Tensor& out) {
  Launcher(out).run<NoMemory>(attention_forward_kernel<Pairs>,
                              tiles_of(pairs.rows * given.heads, kThreads / kLanes), pairs, given,
                              head_rows_of(out));
}

template <class Pairs>
void backward(const Pairs& targets, const Pairs& sources, const Attention& given,
              const Tensor& grad_out, const Tensor& softmax, const Tensor& dvalue,
              const Tensor& ddst, const Tensor& dsrc, const Tensor& drel) {
  auto statistics = static_cast<float*>(softmax.data_ptr());
  const AttentionGradients gradients{head_rows_of(grad_out),
                                     statistics,
                                     statistics + softmax.stride(0),
                                     statistics + 2 * softmax.stride(0),
                                     static_cast<float*>(drel.data_ptr()),
                                     head_rows_of(dvalue),
                                     head_rows_of(ddst),
                                     head_rows_of(dsrc),
                                     int(drel.size(0)),
                                     int(drel.size(1))};
  const Launcher launcher(grad_out);
  launcher.run<NoMemory>(attention_targets_kernel<Pairs>,
                               tiles_of(drel.size(0) * given.heads, kThreads / kLanes), targets,
                               given, gradients);
  launcher.run<NoMemory>(attention_sources_kernel<Pairs>,
                               tiles_of(sources.rows * given.heads, kThreads / kLanes), sources,
                               given, gradients);
}

void forward_windows(const Tensor& value, const Tensor& dst, const Tensor& src, const Tensor& rel,
                     const Tensor& key, const Tensor& ranges, const Tensor& table, double scale,
                     double negative_slope, bool within, double dropout_p, int64_t seed,
                     const Tensor& out) {
  forward(window_pairs(key, ranges, table, rel.size(0), false),
          attention_of(value, dst, src, rel, scale, negative_slope, within, dropout_p, seed), out);
}

void forward_edges(const Tensor& value, const Tensor& dst, const Tensor& src, const Tensor& rel,
                   const Tensor& start, const Tensor& other, const Tensor& relation,
                   const Tensor& edge, double scale, double negative_slope, bool within,
                   double dropout_p, int64_t seed, const Tensor& out) {
  forward(edge_pairs(start, other, relation, edge, false),
          attention_of(value, dst, src, rel, scale, negative_slope, within, dropout_p, seed), out);
}

void backward_windows(const Tensor& grad_out, const Tensor& value, const Tensor& dst,
                      const Tensor& src, const Tensor& rel, const Tensor& key,
                      const Tensor& ranges, const Tensor& table, double scale,
                      double negative_slope, bool within, double dropout_p, int64_t seed,
                      const Tensor& softmax, const Tensor& dvalue, const Tensor& ddst,
                      const Tensor& dsrc, const Tensor& drel) {
  backward(window_pairs(key, ranges, table, rel.size(0), false),
           window_pairs(key, ranges, table, rel.size(0), true),
           attention_of(value, dst, src, rel, scale, negative_slope, within, dropout_p, seed),
           grad_out, softmax, dvalue, ddst, dsrc, drel);
}

void backward_edges(const Tensor& grad_out, const Tensor& value, const Tensor& dst,
                    const Tensor& src, const Tensor& rel, const Tensor& dst_start,
                    const Tensor& dst_source, const Tensor& dst_relation, const Tensor& dst_edge,
                    const Tensor& src_start, const Tensor& src_target, const Tensor& src_relation,
                    const Tensor& src_edge, double scale, double negative_slope, bool within,
                    double dropout_p, int64_t seed, const Tensor& softmax, const Tensor& dvalue,
                    const Tensor& ddst, const Tensor& dsrc, const Tensor& drel) {
  backward(edge_pairs(dst_start, dst_source, dst_relation, dst_edge, false),
           edge_pairs(src_start, src_target, src_relation, src_edge, true),
           attention_of(value, dst, src, rel, scale, negative_slope, within, dropout_p, seed),
           grad_out, softmax, dvalue, ddst, dsrc, drel);
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_attention_windows_fwd_cuda(Tensor value, Tensor dst, Tensor src, Tensor rel, "
      "Tensor key, Tensor ranges, Tensor table, float scale, float negative_slope, bool within, "
      "float dropout_p, int seed, Tensor(a!) out) -> ()");
  m.def(
      "_relation_attention_edges_fwd_cuda(Tensor value, Tensor dst, Tensor src, Tensor rel, "
      "Tensor start, Tensor other, Tensor relation, Tensor edge, float scale, "
      "float negative_slope, bool within, float dropout_p, int seed, Tensor(a!) out) -> ()");
  m.def(
      "_relation_attention_windows_bwd_cuda(Tensor grad_out, Tensor value, Tensor dst, Tensor src, "
      "Tensor rel, Tensor key, Tensor ranges, Tensor table, float scale, float negative_slope, "
      "bool within, float dropout_p, int seed, Tensor(a!) softmax, Tensor(b!) dvalue, "
      "Tensor(c!) ddst, Tensor(d!) dsrc, Tensor(e!) drel) -> ()");
  m.def(
      "_relation_attention_edges_bwd_cuda(Tensor grad_out, Tensor value, Tensor dst, Tensor src, "
      "Tensor rel, Tensor dst_start, Tensor dst_source, Tensor dst_relation, Tensor dst_edge, "
      "Tensor src_start, Tensor src_target, Tensor src_relation, Tensor src_edge, float scale, "
      "float negative_slope, bool within, float dropout_p, int seed, Tensor(a!) softmax, "
      "Tensor(b!) dvalue, Tensor(c!) ddst, Tensor(d!) dsrc, Tensor(e!) drel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CUDA, m) {
  m.impl("_relation_attention_windows_fwd_cuda", TORCH_BOX(&rdfkern::forward_windows));
  m.impl("_relation_attention_edges_fwd_cuda", TORCH_BOX(&rdfkern::forward_edges));
  m.impl("_relation_attention_windows_bwd_cuda", TORCH_BOX(&rdfkern::backward_windows));
  m.impl("_relation_attention_edges_bwd_cuda", TORCH_BOX(&rdfkern::backward_edges));
}
