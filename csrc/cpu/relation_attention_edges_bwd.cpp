// Gradients of relation attention on explicit graphs: by target for slopes, targets and relations,
// then by source for what flows back to sources.
#include <torch/csrc/stable/library.h>

#include "relation_attention_edges.h"

namespace rdfkern::relation_attention {
namespace {

constexpr int64_t kPartsOfManyRelations = 8, kManyRelations = 1 << 14;

template <class Index>
struct Results {
  Rows values, queries, keys;
  Logits dst, src, rel;
  float *weights, *slopes;  // (E, H), by number of the edge
};

// Slopes of every edge's logit, and what flows back to targets and relations.
template <class Index>
void differentiate_targets(const Arguments<Index>& arguments, const Matrix& grad,
                           const Results<Index>& results) {
  const Edges<Index>& edges = arguments.edges;
  const int64_t parts = arguments.relations > kManyRelations ? kPartsOfManyRelations : kParts;
  const std::vector<int64_t> bounds = parts_of(edges.dst_start, edges.num_dst, parts);
  const int64_t size = arguments.heads * arguments.relations;
  std::vector<double> rel((bounds.size() - 1) * size);
  for_each_part(bounds, [&](int64_t part, int64_t begin, int64_t end) {
    Row<Index> row(arguments);
    std::vector<float> slopes, sums(arguments.keys.width);
    for (int64_t target = begin; target < end; ++target) {
      row.open(target);
      slopes.resize(row.count);
      for (int64_t head = 0; head < arguments.heads; ++head) {
        row.attend(head);
        const float* own = grad.at(target, head);
        for (int64_t e = 0; e < row.count; ++e)
          slopes[e] = row.factors[e] *
                      dot(own, arguments.values.at(row.source(e), head), grad.width);
        row.for_each_group([&](int64_t begin, int64_t end) {
          double total = 0;
          for (int64_t e = begin; e < end; ++e) total += row.weights[e] * slopes[e];
          const float delta = float(total);
          for (int64_t e = begin; e < end; ++e)
            slopes[e] = row.weights[e] * (slopes[e] - delta);
        });
        double total = 0;
        double* to_relation = rel.data() + part * size + head * arguments.relations;
        for (int64_t e = 0; e < row.count; ++e) {
          if (!arguments.is_dot && row.falls[e]) slopes[e] *= arguments.negative_slope;
          total += slopes[e];
          to_relation[row.relation(e)] += slopes[e];
          const int64_t at = int64_t(row.edge(e)) * arguments.heads + head;
          results.slopes[at] = slopes[e];
          results.weights[at] = row.weights[e] * row.factors[e];
        }
        if (!arguments.is_dot) {
          results.dst.at(target, head) = float(total);
          continue;
        }
        weighted_sum(
            row.count, arguments.keys.width,
            [&](int64_t e) { return slopes[e] * arguments.scale; },
            [&](int64_t e) { return arguments.keys.at(row.source(e), head); }, sums.data());
        write_row(results.queries.at(0, head, target), results.queries.type, arguments.depth,
                  sums.data());
      }
    }
  });
  for (int64_t at = 0; at < size; ++at) {
    double total = 0;
    for (size_t part = 0; part + 1 < bounds.size(); ++part) total += rel[part * size + at];
    results.rel.at(at % arguments.relations, at / arguments.relations) = float(total);
  }
}

template <class Index>
void differentiate_sources(const Arguments<Index>& arguments, const Matrix& grad,
                           const Results<Index>& results) {
  const Edges<Index>& edges = arguments.edges;
  for_each_part(parts_of(edges.src_start, edges.num_src, kParts),
                [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> sums(std::max(grad.width, arguments.keys.width));
    for (int64_t source = begin; source < end; ++source) {
      const int64_t first = edges.src_start[source], count = edges.src_start[source + 1] - first;
      for (int64_t head = 0; head < arguments.heads; ++head) {
        auto of_edge = [&](const float* values, int64_t e) {
          return values[int64_t(edges.src_edge[first + e]) * arguments.heads + head];
        };
        weighted_sum(
            count, grad.width, [&](int64_t e) { return of_edge(results.weights, e); },
            [&](int64_t e) { return grad.at(edges.target[first + e], head); }, sums.data());
        write_row(results.values.at(0, head, source), results.values.type, arguments.value_dim,
                  sums.data());
        if (arguments.is_dot) {
          weighted_sum(
              count, arguments.keys.width,
              [&](int64_t e) { return of_edge(results.slopes, e) * arguments.scale; },
              [&](int64_t e) { return arguments.queries.at(edges.target[first + e], head); },
              sums.data());
          write_row(results.keys.at(0, head, source), results.keys.type, arguments.depth,
                    sums.data());
        } else {
          double total = 0;
          for (int64_t e = 0; e < count; ++e) total += of_edge(results.slopes, e);
          results.src.at(source, head) = float(total);
        }
      }
    }
  });
}

void backward(const Tensor& grad_out, const std::vector<Tensor>& lists, const Tensor& value,
              const Tensor& dst, const Tensor& src, const Tensor& rel, int64_t value_dim,
              int64_t depth, double scale, double negative_slope, bool within, double dropout_p,
              int64_t seed, const Tensor& weights, const Tensor& slopes, const Tensor& dvalue,
              const Tensor& ddst, const Tensor& dsrc, const Tensor& drel) {
  ask_for_huge_pages({weights, slopes, dvalue, ddst, dsrc});
  with_index(lists, [&](auto index) {
    const auto arguments =
        arguments_of<decltype(index)>(lists, value, dst, src, rel, value_dim, depth, scale,
                                      negative_slope, within, dropout_p, seed);
    auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
    Results<decltype(index)> results;
    results.values = head_rows(dvalue);
    if (arguments.is_dot) {
      results.queries = head_rows(ddst);
      results.keys = head_rows(dsrc);
    } else {
      results.dst = Logits(ddst);
      results.src = Logits(dsrc);
    }
    results.rel = Logits(drel);
    results.weights = floats(weights);
    results.slopes = floats(slopes);
    const Matrix grad(grad_out);
    differentiate_targets(arguments, grad, results);
    differentiate_sources(arguments, grad, results);
  });
}

}  // namespace
}  // namespace rdfkern::relation_attention

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_attention_edges_bwd_cpu(Tensor grad_out, Tensor[] lists, Tensor value, "
      "Tensor dst, Tensor src, Tensor rel, int value_dim, int depth, float scale, "
      "float negative_slope, bool within, float dropout_p, int seed, Tensor(a!) weights, "
      "Tensor(b!) slopes, Tensor(c!) dvalue, Tensor(d!) ddst, Tensor(e!) dsrc, "
      "Tensor(f!) drel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_attention_edges_bwd_cpu", TORCH_BOX(&rdfkern::relation_attention::backward));
}
