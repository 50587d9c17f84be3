// out_i = addend_i + x_i root + sum over relations r of AGG over the neighbours j of r (x_j) W_r.
#include <torch/csrc/stable/library.h>

#include "relation_bands.h"
#include "relation_conv_order.h"

namespace rdfkern {
namespace {

template <class View>
void forward(View& view, const Block& x, int64_t width_in, const Weights& weights,
             const Weights* root, Aggregation aggregation, const Table* addend, const Tensor& out) {
  auto run = [&](auto op) {
    using Op = decltype(op);
    view.template prepare_totals<Op>(x, width_in);
    convolve<Op>(view, x, width_in, weights, root, aggregation == Aggregation::kMean, addend,
                 Table(out));
  };
  aggregation == Aggregation::kMax ? run(Max{}) : run(Sum{});
}

std::optional<Table> table_of(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Table>(Table(*tensor)) : std::nullopt;
}

void forward_bands(const Tensor& x, const Tensor& weight_of, const std::optional<Tensor>& root,
                   const std::optional<Tensor>& addend, const Tensor& order,
                   const Tensor& position, const Tensor& start, const Tensor& table, int64_t past,
                   int64_t future, int64_t aggregation, const Tensor& out) {
  ask_for_huge_pages({out});
  const Matrices weight(weight_of);
  const BandGraph graph(order, position, start, table, weight.relations, past, future);
  BandView view(graph, false);
  const FloatRows rows(Table(x), graph.order.data(), false);
  const Weights weights(weight, uses_of_relations(view), false);
  const RootWeight root_weight(root, x.size(0), out.size(0), view.tiles().size(), false);
  const std::optional<Table> added = table_of(addend);
  forward(view, rows.block(), x.size(1), weights, root_weight.get(), Aggregation(aggregation),
          added ? &*added : nullptr, out);
}

void forward_edges(const Tensor& x, const Tensor& weight_of, const std::optional<Tensor>& root,
                   const std::optional<Tensor>& addend, const std::optional<Tensor>& edge_weight,
                   const Tensor& dst_start, const Tensor& dst_source, const Tensor& dst_relation,
                   const Tensor& dst_edge, const Tensor& dst_count, const Tensor& src_start,
                   const Tensor& src_target, const Tensor& src_relation, const Tensor& src_edge,
                   const Tensor& src_count, int64_t aggregation, const Tensor& out) {
  ask_for_huge_pages({out});
  const Edges by_target{Indices(dst_start), Indices(dst_source), Indices(dst_relation),
                        Indices(dst_edge), Indices(dst_count)};
  const Edges by_source{Indices(src_start), Indices(src_target), Indices(src_relation),
                        Indices(src_edge), Indices(src_count)};
  const Matrices weight(weight_of);
  EdgeView targets(by_target, weight.relations, edge_weight, false);
  const FloatRows rows(Table(x), nullptr, weight.blocks == 1);
  const Weights weights(weight, uses_of_relations(targets), false);
  const RootWeight root_weight(root, x.size(0), out.size(0), targets.tiles().size(), false);
  const std::optional<Table> added = table_of(addend);
  const Table* first = added ? &*added : nullptr;
  if (Aggregation(aggregation) != Aggregation::kMax) {
    const EdgeView sources(by_source, weight.relations, std::nullopt, false);
    if (transforms_first(sources, targets, weights)) {
      convolve_products(sources, targets, rows.block(), weights, root_weight.get(),
                        Aggregation(aggregation) == Aggregation::kMean, first, Table(out));
      return;
    }
  }
  forward(targets, rows.block(), x.size(1), weights, root_weight.get(), Aggregation(aggregation),
          first, out);
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_conv_bands_fwd_cpu(Tensor x, Tensor weight, Tensor? root, Tensor? addend, "
      "Tensor order, "
      "Tensor position, Tensor start, Tensor table, int past, int future, int aggregation, "
      "Tensor(a!) out) -> ()");
  m.def(
      "_relation_conv_edges_fwd_cpu(Tensor x, Tensor weight, Tensor? root, Tensor? addend, "
      "Tensor? edge_weight, Tensor dst_start, Tensor dst_source, Tensor dst_relation, "
      "Tensor dst_edge, Tensor dst_count, Tensor src_start, Tensor src_target, "
      "Tensor src_relation, Tensor src_edge, Tensor src_count, int aggregation, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_conv_bands_fwd_cpu", TORCH_BOX(&rdfkern::forward_bands));
  m.impl("_relation_conv_edges_fwd_cpu", TORCH_BOX(&rdfkern::forward_edges));
}
