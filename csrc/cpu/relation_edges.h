// Explicit graphs: edges by target or by source (`EdgeLists` in rdfkern/ops/relation_mp/bands.py).
#pragma once

#include <optional>

#include "relation.h"

namespace rdfkern {

// Integers of either width, read one by one.
class Indices {
 public:
  explicit Indices(const Tensor& tensor)
      : narrow_(tensor.scalar_type() == ScalarType::Int), data_(tensor.data_ptr()),
        size_(tensor.numel()) {}
  int64_t operator[](int64_t at) const {
    return narrow_ ? static_cast<const int32_t*>(data_)[at]
                   : static_cast<const int64_t*>(data_)[at];
  }
  int64_t size() const { return size_; }

 private:
  bool narrow_;
  const void* data_;
  int64_t size_;
};

// One order of the edges: those of row i are start[i] to start[i + 1], by relation; `other` is
// their other end, `count` how many edges share target and relation.
struct Edges {
  Indices start, other, relation, edge, count;
};

// The edges [begin, end) of one row and one relation.
struct EdgeRun {
  int64_t row, begin, end;
};

struct EdgeTile {
  std::vector<EdgeRun> parts;  // by relation, then by row
  std::vector<Work> works;
  int64_t first;
};

class EdgeView {
 public:
  using Tile = EdgeTile;

  // `edge_weight` is in the edges' own numbering; `over_counts` divides it by the edge's count.
  EdgeView(const Edges& edges, int64_t relations, const std::optional<Tensor>& edge_weight,
           bool over_counts)
      : edges_(edges), relations_(relations), rows_(edges.start.size() - 1),
        tile_rows_(tile_rows(rows_)), tiles_((rows_ + tile_rows_ - 1) / tile_rows_) {
    find_factors(edge_weight, over_counts);
    for_each_task(tiles_.size(), [&](auto next) {
      for (int64_t t = next(); t >= 0; t = next()) find_runs(t);
    });
  }

  const std::vector<EdgeTile>& tiles() const { return tiles_; }
  int64_t largest_tile() const { return tile_rows_; }
  int64_t size_of(const EdgeTile& tile) const { return std::min(tile_rows_, rows_ - tile.first); }
  int64_t row(const EdgeTile& tile, int64_t local) const { return tile.first + local; }
  int64_t node(int64_t row) const { return row; }
  int64_t relations() const { return relations_; }
  int64_t num_rows() const { return rows_; }
  int64_t num_edges() const { return edges_.edge.size(); }
  // The number of (row, relation) that have edges.
  int64_t num_runs() const {
    int64_t runs = 0;
    for (const EdgeTile& tile : tiles_) runs += tile.parts.size();
    return runs;
  }

  template <class Op>
  void prepare_totals(const Block&, int64_t) {}

  // As BandView's; no sum is shared.
  template <class Op>
  Found aggregate(const EdgeTile& tile, const Work& work, const Block& x, int64_t column,
                  int64_t width, bool mean, float* z, int64_t ldz, int32_t* rows,
                  int32_t* sum_of) const {
    for (int64_t p = work.begin; p < work.end; ++p) {
      const EdgeRun& run = tile.parts[p];
      if (p + kRunsAhead < work.end) foresee(tile.parts[p + kRunsAhead], x, column, width);
      float* target = z + (p - work.begin) * ldz;
      rows[p - work.begin] = int32_t(run.row - tile.first);
      sum_of[p - work.begin] = int32_t(p - work.begin);
      for_each_columns(width, [&](int64_t at, auto vectors) {
        constexpr int VECTORS = decltype(vectors)::value;
        Running<Op, VECTORS> running;
        running.start();
        for (int64_t e = run.begin; e < run.end; ++e) {
          const float* source = x.data + edges_.other[e] * x.stride + column + at;
          if (factors_.empty()) running.join(source);
          else running.join(source, factors_[e]);
        }
        for (int n = 0; n < VECTORS; ++n) store(target + at + n * kLanes, running.values[n]);
      });
      if (mean) scale_row(target, width, 1.0f / float(run.end - run.begin));
    }
    return {work.end - work.begin, work.end - work.begin};
  }

  // f(row of the tile, other row, factor, number of the edge) for every edge of one relation.
  template <class F>
  void for_each_pair(const EdgeTile& tile, const Work& work, const F& f) const {
    for (int64_t p = work.begin; p < work.end; ++p) {
      const EdgeRun& run = tile.parts[p];
      for (int64_t e = run.begin; e < run.end; ++e)
        f(run.row - tile.first, edges_.other[e], factors_.empty() ? 1.0f : factors_[e],
          edges_.edge[e]);
    }
  }

 private:
  static constexpr int64_t kRunsAhead = 4;

  // Asks for the rows of a run: no processor foresees them.
  void foresee(const EdgeRun& run, const Block& x, int64_t column, int64_t width) const {
    for (int64_t e = run.begin; e < run.end; ++e) {
      const float* const row = x.data + edges_.other[e] * x.stride + column;
      for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(row + at);
    }
  }

  void find_factors(const std::optional<Tensor>& edge_weight, bool over_counts) {
    if (!edge_weight && !over_counts) return;
    factors_.resize(edges_.edge.size());
    torch::stable::parallel_for(0, factors_.size(), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        float factor = 1.0f;
        if (edge_weight) {
          const ScalarType type = edge_weight->scalar_type();
          factor = to_float(static_cast<const char*>(edge_weight->data_ptr()) +
                                edges_.edge[e] * edge_weight->stride(0) * bytes_of(type),
                            type);
        }
        factors_[e] = over_counts ? factor / float(edges_.count[e]) : factor;
      }
    });
  }

  void find_runs(int64_t number) {
    EdgeTile& tile = tiles_[number];
    tile.first = number * tile_rows_;
    struct Found {
      int64_t relation;
      EdgeRun run;
    };
    std::vector<Found> found;
    for (int64_t row = tile.first; row < std::min(tile.first + tile_rows_, rows_); ++row)
      for (int64_t begin = edges_.start[row], end; begin < edges_.start[row + 1]; begin = end) {
        const int64_t relation = edges_.relation[begin];
        for (end = begin; end < edges_.start[row + 1] && edges_.relation[end] == relation;) ++end;
        found.push_back({relation, {row, begin, end}});
      }
    std::stable_sort(found.begin(), found.end(),
                     [](const Found& a, const Found& b) { return a.relation < b.relation; });
    for (const Found& one : found) {
      const int64_t at = tile.parts.size();
      if (tile.works.empty() || tile.works.back().relation != one.relation)
        tile.works.push_back({one.relation, at, at});
      tile.works.back().end = at + 1;
      tile.parts.push_back(one.run);
    }
  }

  const Edges& edges_;
  int64_t relations_, rows_, tile_rows_;
  std::vector<EdgeTile> tiles_;
  std::vector<float> factors_;
};

}  // namespace rdfkern
