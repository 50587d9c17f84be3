// What the kernels of relation attention are given, and how targets are cut into panels. Rows stand
// in the order of dialogues and positions, so that windows, and the targets before, at and after a
// source, are ranges.
#pragma once

#include <cmath>
#include <limits>

#include "dropout.h"
#include "gemm.h"
#include "pages.h"
#include "rows.h"

namespace rdfkern::relation_attention {

constexpr int64_t kPanel = 64;
// One vector more than the panel: rows a power of two apart would fall into the same cache sets.
constexpr int64_t kStride = kPanel + 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A (row, head, element) view as the readers of rows.h take it: its batch has one entry.
inline Rows head_rows(const Tensor& tensor) {
  Rows rows;
  rows.data = static_cast<char*>(tensor.data_ptr());
  rows.type = tensor.scalar_type();
  rows.head_stride = tensor.stride(1);
  rows.row_stride = tensor.stride(0);
  return rows;
}

// One float per (row, head).
struct Logits {
  float* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  Logits() = default;
  explicit Logits(const Tensor& tensor)
      : data(static_cast<float*>(tensor.data_ptr())), row_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)) {}
  float& at(int64_t row, int64_t head) const {
    return data[row * row_stride + head * head_stride];
  }
};

// `count` rows of a head as floats with padded width: in place where they are that already.
inline Block read_head(const Rows& rows, int64_t head, int64_t first, int64_t count, int64_t size,
                       float* scratch) {
  if (rows.type == ScalarType::Float && size == padded(size))
    return {rows.floats(0, head, first), rows.row_stride};
  return read_rows(rows, 0, head, first, count, size, scratch);
}

enum Side { kTarget, kSource, kSides };

struct Problem {
  // Row ranges: a target's sources, a source's targets, the rows at a row's own position.
  const int32_t *first, *end, *heard_first, *heard_end, *same_first, *same_end;
  const int32_t *key, *table;
  Logits dst, src;      // of the additive form, or:
  std::vector<float> vectors;  // whose products with the values they are: [side][head][value_width]
  Rows queries, keys;   // of the dot form
  Rows values;
  Logits rel;
  int64_t nodes, heads, num_keys, relations, depth, depth_width, value_dim, value_width;
  float scale, negative_slope;
  bool is_dot, of_values, within;
  Dropout dropout;

  Problem(const Tensor& value, const Tensor& dst_, const Tensor& src_, const Tensor& rel_,
          const Tensor& key_, const Tensor& ranges, const Tensor& table_, bool of_values_,
          double scale_, double negative_slope_, bool within_, double dropout_p, int64_t seed)
      : key(ints(key_)), table(ints(table_)), values(head_rows(value)),
        rel(rel_), nodes(value.size(0)), heads(value.size(1)), num_keys(table_.size(0)),
        relations(rel_.size(0)), depth(0), depth_width(0), value_dim(value.size(2)),
        value_width(padded(value_dim)),
        scale(float(scale_)), negative_slope(float(negative_slope_)), is_dot(dst_.dim() == 3),
        of_values(of_values_), within(within_), dropout{dropout_p, uint64_t(seed)} {
    const int32_t** targets[] = {&first,     &end,        &heard_first,
                                 &heard_end, &same_first, &same_end};
    for (int at = 0; at < 6; ++at) *targets[at] = ints(ranges) + at * nodes;
    if (is_dot) {
      queries = head_rows(dst_);
      keys = head_rows(src_);
      depth = dst_.size(2);
      depth_width = padded(depth);
    } else if (of_values) {
      vectors.resize(kSides * heads * value_width);
      for (const Side side : {kTarget, kSource})
        for (int64_t head = 0; head < heads; ++head)
          for (int64_t d = 0; d < value_dim; ++d)
            vectors[(side * heads + head) * value_width + d] =
                Logits(side == kTarget ? dst_ : src_).at(head, d);
    } else {
      dst = Logits(dst_);
      src = Logits(src_);
    }
  }

  const float* vector(Side side, int64_t head) const {
    return vectors.data() + (side * heads + head) * value_width;
  }

 private:
  static const int32_t* ints(const Tensor& tensor) {
    return static_cast<const int32_t*>(tensor.data_ptr());
  }
};

// What makes weights of the logits of a (target, head) again: exp(logit - base) * factor.
class KeptSoftmax {
 public:
  KeptSoftmax(const Problem& problem, float* data)
      : data_(data), heads_(problem.heads), size_(problem.nodes * problem.heads) {}
  float& base(int64_t target, int64_t head) const { return data_[target * heads_ + head]; }
  float& factor(int64_t target, int64_t head) const {
    return data_[size_ + target * heads_ + head];
  }

 private:
  float* data_;
  int64_t heads_, size_;
};

struct Span {
  int64_t first, count;
  int64_t end() const { return first + count; }
};

// logits[i] = vector . value of row i, up to whole vectors; `room` is for kLanes rows.
inline void value_products(const Problem& problem, Side side, int64_t head, Span rows, float* room,
                           float* logits) {
  const float* const vector = problem.vector(side, head);
  for (int64_t i = 0; i < rows.count; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, rows.count - i);
    const Block values =
        read_head(problem.values, head, rows.first + i, count, problem.value_dim, room);
    store(logits + i, row_products(vector, values, count, problem.value_width));
  }
}

// The sources that any of these targets hears.
inline Span sources_of(const Problem& problem, Span targets) {
  const int64_t first = problem.first[targets.first];
  return {first, problem.end[targets.end() - 1] - first};
}

// Rows up to the next one where no window reaches across: a dialogue, or less.
inline int64_t segment_end(const Problem& problem, int64_t row) {
  do ++row;
  while (row < problem.nodes && problem.first[row] < problem.end[row - 1]);
  return row;
}

// Targets of one panel: as many as hear about the same sources.
inline std::vector<Span> panels_of(const Problem& problem, Span segment) {
  std::vector<Span> panels;
  for (int64_t row = segment.first; row < segment.end();) {
    Span panel{row, 0};
    for (int64_t most = kPanel; most >= 16; most /= 2) {
      panel.count = std::min(most, segment.end() - row);
      int64_t heard = 0;
      for (int64_t i = row; i < panel.end(); ++i) heard += problem.end[i] - problem.first[i];
      if (5 * sources_of(problem, panel).count * panel.count <= 8 * heard) break;
    }
    panels.push_back(panel);
    row = panel.end();
  }
  return panels;
}

inline int64_t widest_range(const Problem& problem, const std::vector<Span>& panels) {
  int64_t widest = 0;
  for (const Span& panel : panels)
    widest = std::max(widest, sources_of(problem, panel).count);
  return widest;
}

}  // namespace rdfkern::relation_attention
