// What gradients of relation convolution share, and those of the elementwise maximum.
#pragma once

#include <optional>

#include "relation_conv.h"

namespace rdfkern {

// What both graphs' gradients need: x and grad_out by rows of the views, and the tensors to fill.
struct Gradients {
  Block x, grad_out;
  int64_t width_in, width_out;
  Matrices weight;
  Aggregation aggregation;
  const std::optional<Tensor>& dx;
  const std::optional<Tensor>& dweight;

  bool mean() const { return aggregation == Aggregation::kMean; }
};

// Row n becomes what reaches the aggregate n of a tile and relation: grad_out of its row times W_rᵀ.
// `gathered` holds a row of grad_out for each of them.
template <class View>
void multiply_back(const View& view, const typename View::Tile& tile, const Work& work,
                   const Gradients& given, const Weights& transposed, int64_t count,
                   const int32_t* rows, float* gathered, float* products) {
  const int64_t ld_out = padded(given.width_out), width = transposed.width();
  for (int64_t n = 0; n < count; ++n)
    std::copy_n(given.grad_out.data + view.row(tile, rows[n]) * given.grad_out.stride, ld_out,
                gathered + n * ld_out);
  Ahead nothing;
  transposed.multiply<Update::kOverwrite>(work.relation, count, gathered, ld_out, products,
                                          nothing);
  for (int64_t n = 0; n < count; ++n) {
    transposed.close_up(products + n * width);
    std::fill(products + n * width + given.width_in, products + (n + 1) * width, 0.0f);
  }
}

// Adds up body(offset) over whole vectors of a row.
template <class Body>
inline float sum_over(int64_t width, const Body& body) {
  Vec total = {};
  for (int64_t d = 0; d < width; d += kLanes) total += body(d);
  return sum(total);
}

inline Vec where(IntVec chosen, Vec value) { return bits<Vec>(bits<IntVec>(value) & chosen); }

// dx and dedge_weight of the maximum, one relation after the other: the targets leave their maxima
// and what each of those passes on, divided by the number of edges that attain it; the sources
// collect. `edge_gradient` is indexed by the number of the edge, or null.
template <class View>
void pass_through_maxima(const View& targets, const View& sources, const Gradients& given,
                         int64_t target_rows, int64_t source_rows, float* edge_gradient) {
  const Weights transposed(given.weight, uses_of_relations(targets), true);
  const WorksOfRelations<View> heard(targets), hearing(sources);
  const int64_t width = padded(given.width_in), ldp = transposed.width();
  const int64_t size = targets.largest_tile();
  const Buffer maxima(target_rows * width), shares(target_rows * width);
  const Buffer collected(given.dx ? source_rows * width : 0);
  if (given.dx) std::fill_n(collected.data(), source_rows * width, 0.0f);
  for (int64_t relation = 0; relation < targets.relations(); ++relation) {
    const auto* places = heard.begin(relation);
    for_each_task(heard.end(relation) - places, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const auto& tile = *places[task].tile;
        const Work& work = *places[task].work;
        Scratch scratch(size * (2 * width + padded(given.width_out) + ldp) + 2 * size + 128);
        float* z = scratch.take(size * width);
        float* ties = scratch.take(size * width);
        float* gathered = scratch.take(size * padded(given.width_out));
        float* products = scratch.take(size * ldp);
        auto rows = reinterpret_cast<int32_t*>(scratch.take(size));
        auto place = reinterpret_cast<int32_t*>(scratch.take(size));
        // Maxima are never shared: `place`, overwritten below, would say so.
        const int64_t found =
            targets
                .template aggregate<Max>(tile, work, given.x, 0, width, false, z, width, rows, place)
                .rows;
        if (found == 0) continue;
        multiply_back(targets, tile, work, given, transposed, found, rows, gathered, products);
        for (int64_t n = 0; n < found; ++n) place[rows[n]] = int32_t(n);
        std::fill_n(ties, found * width, 0.0f);
        targets.for_each_pair(tile, work, [&](int64_t local, int64_t other, float factor, int64_t) {
          const float* x = given.x.data + other * given.x.stride;
          const int64_t at = place[local] * width;
          for (int64_t d = 0; d < width; d += kLanes)
            store(ties + at + d, load(ties + at + d) +
                                     where(load(x + d) * factor == load(z + at + d), Vec{} + 1.0f));
        });
        for (int64_t n = 0; n < found; ++n) {
          const int64_t row = targets.row(tile, rows[n]);
          for (int64_t d = 0; d < width; d += kLanes) {
            const Vec share =
                load(products + n * ldp + d) / maximum(Vec{} + 1.0f, load(ties + n * width + d));
            store(shares.data() + row * width + d, share);
            store(maxima.data() + row * width + d, load(z + n * width + d));
          }
        }
        if (!edge_gradient) continue;
        targets.for_each_pair(tile, work, [&](int64_t local, int64_t other, float factor,
                                              int64_t edge) {
          const float* x = given.x.data + other * given.x.stride;
          const int64_t row = targets.row(tile, local) * width;
          edge_gradient[edge] = sum_over(width, [&](int64_t d) {
            const Vec value = load(x + d);
            return where(value * factor == load(maxima.data() + row + d),
                         value * load(shares.data() + row + d));
          });
        });
      }
    });
    if (!given.dx) continue;
    places = hearing.begin(relation);
    for_each_task(hearing.end(relation) - places, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const auto& tile = *places[task].tile;
        sources.for_each_pair(tile, *places[task].work, [&](int64_t local, int64_t other,
                                                            float factor, int64_t) {
          const int64_t row = sources.row(tile, local);
          const float* x = given.x.data + row * given.x.stride;
          float* target = collected.data() + row * width;
          for (int64_t d = 0; d < width; d += kLanes) {
            const Vec attains = where(load(x + d) * factor == load(maxima.data() + other * width + d),
                                      load(shares.data() + other * width + d));
            store(target + d, load(target + d) + attains * factor);
          }
        });
      }
    });
  }
  if (!given.dx) return;
  const Table dx(*given.dx);
  torch::stable::parallel_for(0, source_rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      write_row(dx.at(sources.node(row)), dx.type, dx.width, collected.data() + row * width);
  });
}

}  // namespace rdfkern
