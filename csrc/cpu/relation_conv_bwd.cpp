// Gradients of relation convolution: dx by the same convolution of grad_out over the transposed
// graph, dW_r = sum over rows of (aggregate of r)ᵀ grad_out with the aggregates made again.
#include <torch/csrc/stable/library.h>

#include "relation_bands.h"
#include "relation_conv_max.h"
#include "relation_conv_order.h"

namespace rdfkern {
namespace {

// dW_r = sum over rows of the view of (aggregate of x)ᵀ (grad_out of the row) or, where the view is
// that of the sources, of (x of the row)ᵀ (aggregate of grad_out). One task sums a part of one matrix
// over all tiles in order: the same bits for any number of threads.
template <class Op, bool OF_X, class View>
void weight_gradient(const View& view, const Gradients& given) {
  const Matrices dweight(*given.dweight);
  const int64_t relations = dweight.relations, blocks = dweight.blocks;
  const int64_t height = dweight.rows, columns = dweight.columns;
  const Block& aggregated = OF_X ? given.x : given.grad_out;
  const Block& taken = OF_X ? given.grad_out : given.x;
  const int64_t whole = OF_X ? height : columns, other = OF_X ? columns : height;
  const int64_t part = relations * blocks >= 16 ? std::min<int64_t>(whole, 256) : 128;
  const int64_t parts = (whole + part - 1) / part, size = view.largest_tile();
  const int64_t ldz = padded(part), ldt = padded(other);
  const ScalarType type = dweight.type;
  const bool in_place = type == ScalarType::Float && columns % kLanes == 0;
  const int64_t ldc = in_place ? columns : OF_X ? ldt : ldz;
  const WorksOfRelations<View> works(view);
  for_each_task(relations * blocks * parts, [&](auto next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t relation = task / (blocks * parts), block = task / parts % blocks;
      const int64_t first = task % parts * part, count = std::min(part, whole - first);
      const int64_t rows_of_sums = OF_X ? count : height;
      const int64_t sum_width = OF_X ? ldt : padded(count);
      const int64_t to_block = (relation * blocks + block) * height * columns;
      char* target =
          dweight.data + (to_block + (OF_X ? first * columns : first)) * bytes_of(type);
      Scratch scratch(size * (ldz + ldt) + (in_place ? 0 : rows_of_sums * ldc) + 2 * size + 80);
      float* z = scratch.take(size * ldz);
      float* gathered = scratch.take(size * ldt);
      float* sums =
          in_place ? reinterpret_cast<float*>(target) : scratch.take(rows_of_sums * ldc);
      auto rows = reinterpret_cast<int32_t*>(scratch.take(size));
      auto sum_of = reinterpret_cast<int32_t*>(scratch.take(size));
      bool is_first = true;
      for (auto at = works.begin(relation); at != works.end(relation); ++at) {
        const Found found =
            view.template aggregate<Op>(*at->tile, *at->work, aggregated, block * whole + first,
                                        padded(count), OF_X && given.mean(), z, ldz, rows, sum_of);
        if (found.rows == 0) continue;
        Block own{taken.data + view.row(*at->tile, rows[0]) * taken.stride + block * other,
                  taken.stride};
        if (!found.apart() || rows[found.rows - 1] - rows[0] != found.rows - 1) {
          for (int64_t n = 0; n < found.rows; ++n) {
            const float* const row = own.data + (rows[n] - rows[0]) * own.stride;
            float* const target = gathered + sum_of[n] * ldt;
            if (n > 0 && sum_of[n] == sum_of[n - 1]) add_row(row, ldt, target);
            else std::copy_n(row, ldt, target);
          }
          own = {gathered, ldt};
        }
        const Block sum_of{z, ldz}, &left = OF_X ? sum_of : own, &right = OF_X ? own : sum_of;
        (is_first ? gemm<Order::kColumns, Update::kOverwrite, kLargestTile>
                  : gemm<Order::kColumns, Update::kAdd, kLargestTile>)(
            rows_of_sums, sum_width, found.sums, left.data, left.stride, right.data, right.stride,
            sums, ldc, nullptr, Nothing{}, kTileColumns);
        is_first = false;
      }
      for (int64_t i = 0; is_first && i < rows_of_sums; ++i)
        std::fill_n(sums + i * ldc, sum_width, 0.0f);
      if (in_place) continue;
      for (int64_t i = 0; i < rows_of_sums; ++i)
        write_row(target + i * columns * bytes_of(type), type, OF_X ? columns : count,
                  sums + i * ldc);
    }
  });
}

// droot = xᵀ grad_out. One task sums some rows of it over all rows of x.
void root_gradient(const Gradients& given, int64_t count, const Tensor& droot) {
  constexpr int64_t kPart = 64;
  const int64_t width_out = padded(given.width_out);
  for_each_task((given.width_in + kPart - 1) / kPart, [&](auto next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t first = task * kPart, rows = std::min(kPart, given.width_in - first);
      Scratch scratch(rows * width_out);
      float* sums = scratch.take(rows * width_out);
      std::fill_n(sums, rows * width_out, 0.0f);
      gemm<Order::kColumns, Update::kAdd>(rows, width_out, count, given.x.data + first,
                                          given.x.stride, given.grad_out.data,
                                          given.grad_out.stride, sums, width_out);
      float* target = static_cast<float*>(droot.data_ptr()) + first * given.width_out;
      for (int64_t i = 0; i < rows; ++i)
        std::copy_n(sums + i * width_out, given.width_out, target + i * given.width_out);
    }
  });
}

// dbias = the sum of the rows of grad_out, of many of them by sums of 4096: a long one rounds more.
void bias_gradient(const Gradients& given, int64_t count, const Tensor& dbias) {
  constexpr int64_t kPart = kTileColumns, kRows = 4096;
  const auto add_up = [&](int64_t part) {
    const int64_t first = part * kPart, columns = std::min(kPart, given.width_out - first);
    const float one = 1.0f;
    float total[kPart] = {};
    for (int64_t row = 0; row < count; row += kRows) {
      float sums[kPart] = {};
      gemm<Order::kColumns, Update::kAdd>(1, padded(columns), std::min(kRows, count - row), &one, 0,
                                          given.grad_out.from(row).data + first,
                                          given.grad_out.stride, sums, kPart);
      add_row(sums, kPart, total);
    }
    std::copy_n(total, columns, static_cast<float*>(dbias.data_ptr()) + first);
  };
  const int64_t parts = (given.width_out + kPart - 1) / kPart;
  if (count <= kRows) {  // less time than to wake a thread
    for (int64_t part = 0; part < parts; ++part) add_up(part);
    return;
  }
  for_each_task(parts, [&](auto next) {
    for (int64_t part = next(); part >= 0; part = next()) add_up(part);
  });
}

void bands(const Tensor& grad_out, const Tensor& x, const Tensor& weight_of,
           const std::optional<Tensor>& root, const Tensor& order, const Tensor& position,
           const Tensor& start, const Tensor& table, int64_t past, int64_t future,
           int64_t aggregation, const std::optional<Tensor>& dx,
           const std::optional<Tensor>& dweight, const std::optional<Tensor>& droot,
           const std::optional<Tensor>& dbias) {
  ask_for_huge_pages({dx, dweight});
  const Matrices weight(weight_of);
  const BandGraph graph(order, position, start, table, weight.relations, past, future);
  const FloatRows x_rows(Table(x), graph.order.data(), false);
  const FloatRows grad_rows(Table(grad_out), graph.order.data(), false);
  const Gradients given{x_rows.block(), grad_rows.block(), x.size(1), grad_out.size(1), weight,
                        Aggregation(aggregation), dx, dweight};
  BandView targets(graph, false);
  if (dbias) bias_gradient(given, grad_out.size(0), *dbias);
  if (given.aggregation == Aggregation::kMax) {
    targets.prepare_totals<Max>(given.x, given.width_in);
    if (dx)
      pass_through_maxima(targets, BandView(graph, true), given, x.size(0), x.size(0), nullptr);
    if (dweight) weight_gradient<Max, true>(targets, given);
    return;
  }
  if (dx) {
    BandView sources(graph, true);
    const Weights transposed(weight, uses_of_relations(sources), true);
    if (given.mean()) sources.weigh_by_counts(targets, given.grad_out, given.width_out);
    else sources.prepare_totals<Sum>(given.grad_out, given.width_out);
    const RootWeight root_weight(root, x.size(0), grad_out.size(0), sources.tiles().size(), true);
    convolve<Sum>(sources, given.grad_out, given.width_out, transposed, root_weight.get(), false,
                  nullptr, Table(*dx));
  }
  if (droot) root_gradient(given, x.size(0), *droot);
  if (dweight) {
    targets.prepare_totals<Sum>(given.x, given.width_in);
    weight_gradient<Sum, true>(targets, given);
  }
}

// dedge_weight_e = <x of its source, what reaches the aggregate of its target and relation>.
void edge_gradients(const EdgeView& targets, const Gradients& given, float* edge_gradient) {
  const Weights transposed(given.weight, uses_of_relations(targets), true);
  const int64_t size = targets.largest_tile(), ldp = transposed.width();
  for_each_task(targets.tiles().size(), [&](auto next) {
    for (int64_t t = next(); t >= 0; t = next()) {
      const EdgeTile& tile = targets.tiles()[t];
      Scratch scratch(size * (padded(given.width_out) + ldp + 2) + 128);
      float* gathered = scratch.take(size * padded(given.width_out));
      float* products = scratch.take(size * ldp);
      auto rows = reinterpret_cast<int32_t*>(scratch.take(size));
      auto place = reinterpret_cast<int32_t*>(scratch.take(size));
      for (const Work& work : tile.works) {
        const int64_t found = work.end - work.begin;
        for (int64_t n = 0; n < found; ++n) {
          const EdgeRun& run = tile.parts[work.begin + n];
          rows[n] = int32_t(run.row - tile.first);
          place[rows[n]] = int32_t(n);
        }
        multiply_back(targets, tile, work, given, transposed, found, rows, gathered, products);
        targets.for_each_pair(tile, work, [&](int64_t local, int64_t other, float, int64_t edge) {
          const float* x = given.x.data + other * given.x.stride;
          const float* reaching = products + place[local] * ldp;
          const EdgeRun& run = tile.parts[work.begin + place[local]];
          const float share = given.mean() ? 1.0f / float(run.end - run.begin) : 1.0f;
          edge_gradient[edge] = share * sum_over(padded(given.width_in), [&](int64_t d) {
            return load(x + d) * load(reaching + d);
          });
        });
      }
    }
  });
}

void edges(const Tensor& grad_out, const Tensor& x, const Tensor& weight_of,
           const std::optional<Tensor>& root, const std::optional<Tensor>& edge_weight,
           const Tensor& dst_start, const Tensor& dst_source, const Tensor& dst_relation,
           const Tensor& dst_edge, const Tensor& dst_count, const Tensor& src_start,
           const Tensor& src_target, const Tensor& src_relation, const Tensor& src_edge,
           const Tensor& src_count, int64_t aggregation, const std::optional<Tensor>& dx,
           const std::optional<Tensor>& dweight, const std::optional<Tensor>& droot,
           const std::optional<Tensor>& dbias, const std::optional<Tensor>& dedge_weight) {
  ask_for_huge_pages({dx, dweight});
  const Edges by_target{Indices(dst_start), Indices(dst_source), Indices(dst_relation),
                        Indices(dst_edge), Indices(dst_count)};
  const Edges by_source{Indices(src_start), Indices(src_target), Indices(src_relation),
                        Indices(src_edge), Indices(src_count)};
  const Matrices weight(weight_of);
  const bool in_place = weight.blocks == 1;
  const FloatRows x_rows(Table(x), nullptr, in_place);
  const FloatRows grad_rows(Table(grad_out), nullptr, in_place);
  const Gradients given{x_rows.block(), grad_rows.block(), x.size(1), grad_out.size(1), weight,
                        Aggregation(aggregation), dx, dweight};
  float* edge_gradient =
      dedge_weight ? static_cast<float*>(dedge_weight->data_ptr()) : nullptr;
  const int64_t relations = weight.relations;
  const EdgeView targets(by_target, relations, edge_weight, false);
  if (dbias) bias_gradient(given, grad_out.size(0), *dbias);
  if (given.aggregation == Aggregation::kMax) {
    if (dx || dedge_weight)
      pass_through_maxima(targets, EdgeView(by_source, relations, edge_weight, false), given,
                          grad_out.size(0), x.size(0), edge_gradient);
    if (dweight) weight_gradient<Max, true>(targets, given);
    return;
  }
  const EdgeView sources(by_source, relations, edge_weight, given.mean());
  if (dx) {
    const Weights transposed(weight, uses_of_relations(sources), true);
    const RootWeight root_weight(root, x.size(0), grad_out.size(0), sources.tiles().size(), true);
    if (transforms_first(targets, sources, transposed))
      convolve_products(targets, sources, given.grad_out, transposed, root_weight.get(), false,
                        nullptr, Table(*dx));
    else
      convolve<Sum>(sources, given.grad_out, given.width_out, transposed, root_weight.get(), false,
                    nullptr, Table(*dx));
  }
  if (droot) root_gradient(given, x.size(0), *droot);
  if (dweight) {
    const int64_t entries = given.width_in * weight.columns;
    const double of_x = operations(targets, given.width_in, entries);
    if (operations(sources, given.width_out, entries) < of_x)
      weight_gradient<Sum, false>(sources, given);
    else
      weight_gradient<Sum, true>(targets, given);
  }
  if (dedge_weight) edge_gradients(targets, given, edge_gradient);
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_conv_bands_bwd_cpu(Tensor grad_out, Tensor x, Tensor weight, Tensor? root, "
      "Tensor order, Tensor position, Tensor start, Tensor table, int past, int future, "
      "int aggregation, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? droot, "
      "Tensor(d!)? dbias) -> ()");
  m.def(
      "_relation_conv_edges_bwd_cpu(Tensor grad_out, Tensor x, Tensor weight, Tensor? root, "
      "Tensor? edge_weight, Tensor dst_start, Tensor dst_source, Tensor dst_relation, "
      "Tensor dst_edge, Tensor dst_count, Tensor src_start, Tensor src_target, "
      "Tensor src_relation, Tensor src_edge, Tensor src_count, int aggregation, "
      "Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? droot, Tensor(d!)? dbias, "
      "Tensor(e!)? dedge_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_conv_bands_bwd_cpu", TORCH_BOX(&rdfkern::bands));
  m.impl("_relation_conv_edges_bwd_cpu", TORCH_BOX(&rdfkern::edges));
}
