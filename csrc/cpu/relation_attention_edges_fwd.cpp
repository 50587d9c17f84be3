// out_i = sum over the edges into target i of their softmax times the sources' values, on explicit
// graphs.
#include <torch/csrc/stable/library.h>

#include "relation_attention_edges.h"

namespace rdfkern::relation_attention {
namespace {

template <class Index>
void attend(const Arguments<Index>& arguments, const Rows& out) {
  const Edges<Index>& edges = arguments.edges;
  const Matrix& values = arguments.values;
  for_each_part(parts_of(edges.dst_start, edges.num_dst, kParts),
                [&](int64_t, int64_t begin, int64_t end) {
    Row<Index> row(arguments);
    std::vector<float> sums(values.width);
    for (int64_t target = begin; target < end; ++target) {
      row.open(target);
      for (int64_t head = 0; head < arguments.heads; ++head) {
        row.attend(head);
        weighted_sum(
            row.count, values.width, [&](int64_t e) { return row.weights[e] * row.factors[e]; },
            [&](int64_t e) { return values.at(row.source(e), head); }, sums.data());
        write_row(out.at(0, head, target), out.type, arguments.value_dim, sums.data());
      }
    }
  });
}

void forward(const std::vector<Tensor>& lists, const Tensor& value, const Tensor& dst,
             const Tensor& src, const Tensor& rel, int64_t value_dim, int64_t depth, double scale,
             double negative_slope, bool within, double dropout_p, int64_t seed, const Tensor& out) {
  ask_for_huge_pages({out});
  with_index(lists, [&](auto index) {
    const auto arguments =
        arguments_of<decltype(index)>(lists, value, dst, src, rel, value_dim, depth, scale,
                                      negative_slope, within, dropout_p, seed);
    attend(arguments, head_rows(out));
  });
}

}  // namespace
}  // namespace rdfkern::relation_attention

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_attention_edges_fwd_cpu(Tensor[] lists, Tensor value, Tensor dst, Tensor src, "
      "Tensor rel, int value_dim, int depth, float scale, float negative_slope, bool within, "
      "float dropout_p, int seed, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_attention_edges_fwd_cpu", TORCH_BOX(&rdfkern::relation_attention::forward));
}
