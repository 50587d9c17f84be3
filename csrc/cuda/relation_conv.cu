// Launches of the kernels of relation convolution, and their registration as private operators.
#include "relation_conv.cuh"
#include "relation_conv_max.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>

#include "relation_launch.h"

namespace rdfkern {
namespace {

constexpr int64_t kUnlimited = -1;
constexpr int64_t kBeyondEveryDistance = int64_t(1) << 62;

Rows matrix_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), kind_of(tensor), 0, 0, tensor.stride(0)};
}

Aggregation aggregation_of(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number <= int64_t(Aggregation::kMax), "no such aggregation");
  return Aggregation(number);
}

int width_of(int64_t width) {
  STD_TORCH_CHECK(width <= std::numeric_limits<int>::max() / 2, "too wide");
  return int(width);
}

BandView view_of_bands(const Tensor& order, const Tensor& position, const Tensor& group,
                       const Tensor& start, const Tensor& relations, const Tensor& entries,
                       int64_t behind, int64_t ahead, const std::optional<Tensor>& inverse) {
  auto distance = [](int64_t limit) {
    return limit == kUnlimited ? kBeyondEveryDistance : std::min(limit, kBeyondEveryDistance);
  };
  return {indices_of(order), indices_of(position), indices_of(group), indices_of(start),
          ints_of(relations), ints_of(entries), data_of<const float>(inverse), order.size(0),
          relations.size(0), distance(behind), distance(ahead)};
}

EdgeView view_of_edges(const Tensor& start, const Tensor& other, const Tensor& relation,
                       const Tensor& edge, const Tensor& count,
                       const std::optional<Tensor>& edge_weight, bool shares) {
  return {indices_of(start),
          indices_of(other),
          indices_of(relation),
          indices_of(edge),
          indices_of(count),
          data_of<const char>(edge_weight),
          edge_weight ? kind_of(*edge_weight) : Kind::kFloat,
          edge_weight ? edge_weight->stride(0) : 0,
          shares,
          start.size(0) - 1};
}

template <class View, int WIDTH>
void launch_convolve(const View& view, const Convolution& given, const Launcher& launcher) {
  const int64_t parts = tiles_of(given.width_out, WIDTH) * given.blocks;
  launcher.run<ConvolveMemory<WIDTH>>(convolve_kernel<View, WIDTH>,
                                      tiles_of(view.rows, kTileRows) * parts, view, given);
}

template <class View>
void convolve(const View& view, const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& addend, int64_t aggregation, const Tensor& out) {
  const Convolution given{matrix_of(x),
                          rows_of(weight),
                          addend ? matrix_of(*addend) : Rows{},
                          matrix_of(out),
                          width_of(weight.size(1)),
                          width_of(weight.size(2)),
                          width_of(weight.size(3)),
                          aggregation_of(aggregation)};
  const Launcher launcher(x);
  if (given.width_out <= 64) launch_convolve<View, 64>(view, given, launcher);
  else launch_convolve<View, 128>(view, given, launcher);
}

template <class View>
void weight_gradient(const View& view, const Tensor& x, const Tensor& grad_out,
                     int64_t aggregation, const Tensor& partials) {
  const WeightGradient given{matrix_of(x),
                             matrix_of(grad_out),
                             static_cast<float*>(partials.data_ptr()),
                             width_of(partials.size(0)),
                             width_of(partials.size(1)),
                             width_of(partials.size(2)),
                             width_of(partials.size(3)),
                             width_of(partials.size(4)),
                             aggregation_of(aggregation)};
  const int64_t squares =
      tiles_of(given.width_in, kGradientSide) * tiles_of(given.width_out, kGradientSide);
  Launcher(x).run<WeightGradientMemory>(
      weight_gradient_kernel<View>,
      squares * given.chunks * given.relations * given.blocks, view, given);
}

void convolve_bands(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& addend,
                    const Tensor& order, const Tensor& position, const Tensor& group,
                    const Tensor& start, const Tensor& relations, const Tensor& entries,
                    int64_t behind, int64_t ahead, const std::optional<Tensor>& inverse,
                    int64_t aggregation, const Tensor& out) {
  convolve(view_of_bands(order, position, group, start, relations, entries, behind, ahead, inverse),
           x, weight, addend, aggregation, out);
}

void convolve_edges(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& addend,
                    const Tensor& start, const Tensor& other, const Tensor& relation,
                    const Tensor& edge, const Tensor& count,
                    const std::optional<Tensor>& edge_weight, bool shares, int64_t aggregation,
                    const Tensor& out) {
  convolve(view_of_edges(start, other, relation, edge, count, edge_weight, shares), x, weight,
           addend, aggregation, out);
}

void weight_gradient_bands(const Tensor& x, const Tensor& grad_out, const Tensor& order,
                           const Tensor& position, const Tensor& group, const Tensor& start,
                           const Tensor& relations, const Tensor& entries, int64_t behind,
                           int64_t ahead, int64_t aggregation, const Tensor& partials) {
  weight_gradient(view_of_bands(order, position, group, start, relations, entries, behind, ahead,
                                std::nullopt),
                  x, grad_out, aggregation, partials);
}

void weight_gradient_edges(const Tensor& x, const Tensor& grad_out, const Tensor& start,
                           const Tensor& other, const Tensor& relation, const Tensor& edge,
                           const Tensor& count, const std::optional<Tensor>& edge_weight,
                           int64_t aggregation, const Tensor& partials) {
  weight_gradient(view_of_edges(start, other, relation, edge, count, edge_weight, false), x,
                  grad_out, aggregation, partials);
}

BackProduct back_product(const Tensor& grad_out, const Tensor& weight) {
  return {matrix_of(grad_out), rows_of(weight), width_of(weight.size(1)), width_of(weight.size(3)),
          width_of(weight.size(2))};
}

void inverse_counts(const Tensor& order, const Tensor& position, const Tensor& group,
                    const Tensor& start, const Tensor& relations, const Tensor& entries,
                    int64_t behind, int64_t ahead, const Tensor& inverse) {
  const BandView view = view_of_bands(order, position, group, start, relations, entries, behind,
                                      ahead, std::nullopt);
  Launcher(order).run<NoMemory>(inverse_counts_kernel, tiles_of(view.rows, kThreads), view,
                                static_cast<float*>(inverse.data_ptr()));
}

void edge_gradient(const Tensor& x, const Tensor& grad_out, const Tensor& weight,
                   const Tensor& start, const Tensor& other, const Tensor& relation,
                   const Tensor& edge, const Tensor& count, bool mean, const Tensor& edges) {
  const EdgeView view = view_of_edges(start, other, relation, edge, count, std::nullopt, false);
  const EdgeGradient given{matrix_of(x), back_product(grad_out, weight),
                           static_cast<float*>(edges.data_ptr()), mean};
  Launcher(x).run<EdgeGradientMemory>(edge_gradient_kernel, tiles_of(view.rows, kTileRows), view,
                                      given);
}

// `kept` is (2, relations, targets, width), for the relations from `first` on.
Maxima maxima_of(const Tensor& x, const Tensor& kept, int64_t first, int64_t relations) {
  auto maxima = static_cast<float*>(kept.data_ptr());
  return {matrix_of(x),
          maxima,
          maxima + kept.stride(0),
          kept.size(2),
          int(first),
          int(std::min(first + kept.size(1), relations)),
          width_of(kept.size(3))};
}

template <class View>
void back_through_maxima(const View& targets, const View& sources, const Tensor& x,
                         const Tensor& grad_out, const Tensor& weight, int64_t first,
                         const Tensor& kept, const std::optional<Tensor>& dx,
                         const std::optional<Tensor>& edges) {
  const Maxima given = maxima_of(x, kept, first, weight.size(0));
  const BackProduct back = back_product(grad_out, weight);
  const Launcher launcher(x);
  launcher.run<MaximaMemory>(maxima_kernel<View>,
                             tiles_of(targets.rows, kTileRows) * (given.end - given.first) *
                                 back.blocks * tiles_of(back.width_in, kGradientSide),
                             targets, given, back);
  if (dx)
    launcher.run<NoMemory>(
        collect_maxima_kernel<View>,
        tiles_of(sources.rows, kTileRows) * tiles_of(given.width, kGradientSide), sources, given,
        static_cast<float*>(dx->data_ptr()));
  if constexpr (std::is_same_v<View, EdgeView>) {
    if (edges)
      launcher.run<NoMemory>(edge_maxima_kernel, tiles_of(targets.rows, kThreads / kLanes),
                             targets, given, static_cast<float*>(edges->data_ptr()));
  }
}

void maxima_bands(const Tensor& x, const Tensor& grad_out, const Tensor& weight,
                  const Tensor& order, const Tensor& position, const Tensor& group,
                  const Tensor& start, const Tensor& relations, const Tensor& entries,
                  const Tensor& heard_relations, const Tensor& heard_entries, int64_t past,
                  int64_t future, int64_t first, const Tensor& kept, const Tensor& dx) {
  back_through_maxima(view_of_bands(order, position, group, start, relations, entries, past,
                                    future, std::nullopt),
                      view_of_bands(order, position, group, start, heard_relations, heard_entries,
                                    future, past, std::nullopt),
                      x, grad_out, weight, first, kept, dx, std::nullopt);
}

void maxima_edges(const Tensor& x, const Tensor& grad_out, const Tensor& weight,
                  const Tensor& dst_start, const Tensor& dst_source, const Tensor& dst_relation,
                  const Tensor& dst_edge, const Tensor& dst_count, const Tensor& src_start,
                  const Tensor& src_target, const Tensor& src_relation, const Tensor& src_edge,
                  const Tensor& src_count, const std::optional<Tensor>& edge_weight, int64_t first,
                  const Tensor& kept, const std::optional<Tensor>& dx,
                  const std::optional<Tensor>& edges) {
  back_through_maxima(view_of_edges(dst_start, dst_source, dst_relation, dst_edge, dst_count,
                                    edge_weight, false),
                      view_of_edges(src_start, src_target, src_relation, src_edge, src_count,
                                    edge_weight, false),
                      x, grad_out, weight, first, kept, dx, edges);
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_conv_bands_cuda(Tensor x, Tensor weight, Tensor? addend, Tensor order, "
      "Tensor position, Tensor group, Tensor start, Tensor relations, Tensor entries, int behind, "
      "int ahead, Tensor? inverse, int aggregation, Tensor(a!) out) -> ()");
  m.def(
      "_relation_conv_edges_cuda(Tensor x, Tensor weight, Tensor? addend, Tensor start, "
      "Tensor other, Tensor relation, Tensor edge, Tensor count, Tensor? edge_weight, "
      "bool shares, int aggregation, Tensor(a!) out) -> ()");
  m.def(
      "_relation_conv_bands_dweight_cuda(Tensor x, Tensor grad_out, Tensor order, "
      "Tensor position, Tensor group, Tensor start, Tensor relations, Tensor entries, int behind, "
      "int ahead, int aggregation, Tensor(a!) partials) -> ()");
  m.def(
      "_relation_conv_edges_dweight_cuda(Tensor x, Tensor grad_out, Tensor start, Tensor other, "
      "Tensor relation, Tensor edge, Tensor count, Tensor? edge_weight, "
      "int aggregation, Tensor(a!) partials) -> ()");
  m.def(
      "_relation_conv_inverse_counts_cuda(Tensor order, Tensor position, Tensor group, "
      "Tensor start, Tensor relations, Tensor entries, int behind, int ahead, "
      "Tensor(a!) inverse) -> ()");
  m.def(
      "_relation_conv_dedge_cuda(Tensor x, Tensor grad_out, Tensor weight, Tensor start, "
      "Tensor other, Tensor relation, Tensor edge, Tensor count, bool mean, "
      "Tensor(a!) edges) -> ()");
  m.def(
      "_relation_conv_bands_maxima_cuda(Tensor x, Tensor grad_out, Tensor weight, Tensor order, "
      "Tensor position, Tensor group, Tensor start, Tensor relations, Tensor entries, "
      "Tensor heard_relations, Tensor heard_entries, int past, int future, int first, "
      "Tensor(a!) kept, Tensor(b!) dx) -> ()");
  m.def(
      "_relation_conv_edges_maxima_cuda(Tensor x, Tensor grad_out, Tensor weight, "
      "Tensor dst_start, Tensor dst_source, Tensor dst_relation, Tensor dst_edge, "
      "Tensor dst_count, Tensor src_start, Tensor src_target, Tensor src_relation, "
      "Tensor src_edge, Tensor src_count, Tensor? edge_weight, int first, Tensor(a!) kept, "
      "Tensor(b!)? dx, Tensor(c!)? edges) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CUDA, m) {
  m.impl("_relation_conv_bands_cuda", TORCH_BOX(&rdfkern::convolve_bands));
  m.impl("_relation_conv_edges_cuda", TORCH_BOX(&rdfkern::convolve_edges));
  m.impl("_relation_conv_bands_dweight_cuda", TORCH_BOX(&rdfkern::weight_gradient_bands));
  m.impl("_relation_conv_edges_dweight_cuda", TORCH_BOX(&rdfkern::weight_gradient_edges));
  m.impl("_relation_conv_inverse_counts_cuda", TORCH_BOX(&rdfkern::inverse_counts));
  m.impl("_relation_conv_dedge_cuda", TORCH_BOX(&rdfkern::edge_gradient));
  m.impl("_relation_conv_bands_maxima_cuda", TORCH_BOX(&rdfkern::maxima_bands));
  m.impl("_relation_conv_edges_maxima_cuda", TORCH_BOX(&rdfkern::maxima_edges));
}
