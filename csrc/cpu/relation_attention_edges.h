// What forward and backward of relation attention share on explicit graphs: edges by target, then by
// source, the softmax of a target's edges, and sums over edges. Rows come as floats with padded
// width.
#pragma once

#include "relation_attention.h"

namespace rdfkern::relation_attention {

constexpr int64_t kParts = 64;

// (row, head, element), rows of padded width that follow each other.
struct Matrix {
  float* data = nullptr;
  int64_t heads = 0, width = 0;

  Matrix() = default;
  explicit Matrix(const Tensor& tensor)
      : data(static_cast<float*>(tensor.data_ptr())), heads(tensor.size(1)),
        width(tensor.size(2)) {}
  float* at(int64_t row, int64_t head) const { return data + (row * heads + head) * width; }
};

inline float dot(const float* a, const float* b, int64_t width) {
  Vec total = {};
  for (int64_t d = 0; d < width; d += kLanes) total += load(a + d) * load(b + d);
  return sum(total);
}

// target = sum of factor(e) * row(e) over the n edges.
template <class Factor, class Row>
void weighted_sum(int64_t n, int64_t width, const Factor& factor, const Row& row, float* target) {
  auto columns = [&]<int VECTORS>(int64_t first, std::integral_constant<int, VECTORS>) {
    Vec sums[VECTORS] = {};
    for (int64_t begin = 0; begin < n; begin += kInner) {
      // Short sums of short sums round less than one long sum.
      Vec parts[VECTORS] = {};
      for (int64_t e = begin; e < std::min(n, begin + kInner); ++e) {
        const float weight = factor(e);
        const float* from = row(e) + first;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) parts[v] += load(from + v * kLanes) * weight;
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[v] += parts[v];
    }
    for (int v = 0; v < VECTORS; ++v) store(target + first + v * kLanes, sums[v]);
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) columns(d, std::integral_constant<int, 4>{});
  for (; d < width; d += kLanes) columns(d, std::integral_constant<int, 1>{});
}

template <class Index>
struct Edges {
  const Index *dst_start, *source, *relation, *edge;  // by (target, relation)
  const Index *src_start, *target, *src_edge;         // by source
  int64_t num_dst, num_src, count;

  explicit Edges(const std::vector<Tensor>& lists)
      : dst_start(index(lists[0])), source(index(lists[1])), relation(index(lists[2])),
        edge(index(lists[3])), src_start(index(lists[4])), target(index(lists[5])),
        src_edge(index(lists[6])), num_dst(lists[0].size(0) - 1), num_src(lists[4].size(0) - 1),
        count(lists[1].size(0)) {}

 private:
  static const Index* index(const Tensor& tensor) {
    return static_cast<const Index*>(tensor.data_ptr());
  }
};

template <class Index>
struct Arguments {
  Edges<Index> edges;
  Matrix values, queries, keys;
  Logits dst, src, rel;
  int64_t heads, relations, value_dim, depth;
  float scale, negative_slope;
  bool is_dot, within;
  Dropout random;

  // factors[e] = 0 or 1 / (1 - p) of the n edges from `first` on.
  void dropout(int64_t head, int64_t first, int64_t n, float* factors) const {
    const uint32_t threshold = uint32_t(random.probability * 4294967296.0);
    const float kept = float(1.0 / (1.0 - random.probability));
    for (int64_t e = 0; e < n; e += kLanes) {
      UintVec words[4] = {UintVec{}, UintVec{}, UintVec{} + uint32_t(head), UintVec{} + 1u};
      for (int lane = 0; lane < kLanes && e + lane < n; ++lane) {
        words[0][lane] = uint32_t(uint64_t(edges.edge[first + e + lane]));
        words[1][lane] = uint32_t(uint64_t(edges.edge[first + e + lane]) >> 32);
      }
      philox(words, random.seed);
      for (int lane = 0; lane < kLanes && e + lane < n; ++lane)
        factors[e + lane] = words[0][lane] >= threshold ? kept : 0.0f;
    }
  }
};

// The edges into one target, and their softmax for one head.
template <class Index>
class Row {
 public:
  explicit Row(const Arguments<Index>& arguments) : arguments_(arguments) {}

  int64_t first = 0, count = 0;
  std::vector<float> weights, factors;
  std::vector<char> falls;      // whether the LeakyReLU's argument is not positive

  void open(int64_t target_) {
    const Edges<Index>& edges = arguments_.edges;
    target = target_;
    first = edges.dst_start[target];
    count = edges.dst_start[target + 1] - first;
    if (int64_t(weights.size()) < padded(count)) {
      weights.resize(padded(count));
      factors.resize(padded(count));
      falls.resize(padded(count));
    }
  }

  // Calls body(begin, end) for every softmax of the target: one, or one per relation.
  template <class Body>
  void for_each_group(const Body& body) const {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = count;
      if (arguments_.within)
        for (end = begin + 1; end < count && relation(end) == relation(begin);) ++end;
      body(begin, end);
    }
  }

  void attend(int64_t head) {
    logits(head);
    std::vector<float>& w = weights;
    for_each_group([&](int64_t begin, int64_t end) {
      float top = -kInfinity;
      for (int64_t e = begin; e < end; ++e) top = w[e] > top || w[e] != w[e] ? w[e] : top;
      const float base = top == -kInfinity ? 0.0f : top;
      for (int64_t e = begin; e < end; ++e) w[e] = (w[e] - base) * kLog2e;
    });
    for (int64_t e = 0; e < count; e += kLanes) store(&w[e], exp2(load(&w[e])));
    for_each_group([&](int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t e = begin; e < end; ++e) total += w[e];
      const float inverse = total == 0 ? 0.0f : float(1.0 / total);
      for (int64_t e = begin; e < end; ++e) w[e] *= inverse;
    });
    if (arguments_.random.probability > 0)
      arguments_.dropout(head, first, count, factors.data());
    else
      std::fill(factors.begin(), factors.begin() + count, 1.0f);
  }

  Index source(int64_t e) const { return arguments_.edges.source[first + e]; }
  Index relation(int64_t e) const { return arguments_.edges.relation[first + e]; }
  Index edge(int64_t e) const { return arguments_.edges.edge[first + e]; }

  int64_t target = 0;

 private:
  void logits(int64_t head) {
    if (arguments_.is_dot) {
      const float* query = arguments_.queries.at(target, head);
      for (int64_t e = 0; e < count; ++e)
        weights[e] = arguments_.scale * dot(query, arguments_.keys.at(source(e), head),
                                            arguments_.keys.width) +
                     arguments_.rel.at(relation(e), head);
      return;
    }
    const float own = arguments_.dst.at(target, head);
    for (int64_t e = 0; e < count; ++e) {
      const float x = own + arguments_.src.at(source(e), head) +
                      arguments_.rel.at(relation(e), head);
      falls[e] = !(x > 0.0f);
      weights[e] = falls[e] ? x * arguments_.negative_slope : x;
    }
  }

  const Arguments<Index>& arguments_;
};

// Nodes in parts of about as many edges each; their bounds do not depend on the threads.
template <class Index>
std::vector<int64_t> parts_of(const Index* start, int64_t nodes, int64_t parts) {
  std::vector<int64_t> bounds{0};
  const int64_t total = start[nodes] + nodes;
  for (int64_t node = 0; node < nodes; ++node)
    if ((start[node + 1] + node + 1) * parts >= total * int64_t(bounds.size()))
      bounds.push_back(node + 1);
  return bounds;
}

template <class Body>
void for_each_part(const std::vector<int64_t>& bounds, const Body& body) {
  for_each_task(bounds.size() - 1, [&](auto next) {
    for (int64_t part = next(); part >= 0; part = next())
      body(part, bounds[part], bounds[part + 1]);
  });
}

template <class Index>
Arguments<Index> arguments_of(const std::vector<Tensor>& lists, const Tensor& value,
                              const Tensor& dst, const Tensor& src, const Tensor& rel,
                              int64_t value_dim, int64_t depth, double scale,
                              double negative_slope, bool within, double dropout_p,
                              int64_t seed) {
  Arguments<Index> arguments{Edges<Index>(lists), Matrix(value)};
  arguments.is_dot = dst.dim() == 3;
  if (arguments.is_dot) {
    arguments.queries = Matrix(dst);
    arguments.keys = Matrix(src);
  } else {
    arguments.dst = Logits(dst);
    arguments.src = Logits(src);
  }
  arguments.rel = Logits(rel);
  arguments.heads = value.size(1);
  arguments.relations = rel.size(0);
  arguments.value_dim = value_dim;
  arguments.depth = depth;
  arguments.scale = float(scale);
  arguments.negative_slope = float(negative_slope);
  arguments.within = within;
  arguments.random = {dropout_p, uint64_t(seed)};
  return arguments;
}

// Calls body with an index of the type of the lists.
template <class Body>
void with_index(const std::vector<Tensor>& lists, const Body& body) {
  lists[0].scalar_type() == ScalarType::Int ? body(int32_t{}) : body(int64_t{});
}

}  // namespace rdfkern::relation_attention
