// Transform, then aggregate: the order for explicit graphs that have fewer (source, relation) than
// (target, relation), or edges so many and outputs so narrow that their sums decide.
#pragma once

#include "relation_conv.h"
#include "relation_edges.h"

namespace rdfkern {

// Multiplications and additions that sum rows of `width` over all edges and multiply every
// (row, relation) of a view by a matrix that has `entries`.
inline double operations(const EdgeView& view, int64_t width, int64_t entries) {
  return double(view.num_edges()) * double(width) + double(view.num_runs()) * double(entries);
}

// Whether it takes fewer operations to multiply the rows of `from` and to add up the products at
// the rows of `to` than the other way round; a tenth fewer, as products go through memory.
inline bool transforms_first(const EdgeView& from, const EdgeView& to, const Weights& weights) {
  const int64_t width_in = weights.blocks * weights.rows;
  const int64_t width_out = weights.blocks * weights.columns;
  const int64_t entries = width_in * weights.columns;
  return operations(from, width_out, entries) < 0.9 * operations(to, width_in, entries);
}

// As `convolve` of sums and means over `to`, one relation after the other.
inline void convolve_products(const EdgeView& from, const EdgeView& to, const Block& x,
                              const Weights& weights, const Weights* root, bool mean,
                              const Table* addend, const Table& out) {
  const WorksOfRelations<EdgeView> sending(from), hearing(to);
  const int64_t width = weights.width(), ldz = padded(weights.blocks * weights.rows);
  const Buffer products(from.num_rows() * width), sums(out.rows * width);
  torch::stable::parallel_for(0, out.rows, 64, [&](int64_t begin, int64_t end) {
    Ahead nothing;
    Scratch scratch(padded(out.width) + 16);
    float* row = scratch.take(padded(out.width));
    std::fill(sums.data() + begin * width, sums.data() + end * width, 0.0f);
    for (int64_t i = begin; addend && i < end; ++i) {
      read_row(addend->at(i), addend->type, out.width, row);
      weights.spread(row, sums.data() + i * width);
    }
    if (root)
      root->multiply<Update::kAdd>(0, end - begin, x.data + begin * x.stride, x.stride,
                                   sums.data() + begin * width, nothing);
  });
  for (int64_t relation = 0; relation < to.relations(); ++relation) {
    const auto* places = sending.begin(relation);
    for_each_task(sending.end(relation) - places, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const EdgeRun* runs = places[task].tile->parts.data() + places[task].work->begin;
        const int64_t count = places[task].work->end - places[task].work->begin;
        Scratch scratch(count * (ldz + width) + 64);
        float* gathered = scratch.take(count * ldz);
        float* made = scratch.take(count * width);
        for (int64_t n = 0; n < count; ++n)
          std::copy_n(x.data + runs[n].row * x.stride, ldz, gathered + n * ldz);
        Ahead nothing;
        weights.multiply<Update::kOverwrite>(relation, count, gathered, ldz, made, nothing);
        for (int64_t n = 0; n < count; ++n)
          std::copy_n(made + n * width, width, products.data() + runs[n].row * width);
      }
    });
    places = hearing.begin(relation);
    for_each_task(hearing.end(relation) - places, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const EdgeTile& tile = *places[task].tile;
        Scratch scratch(to.largest_tile() * (width + 2) + 80);
        float* z = scratch.take(to.largest_tile() * width);
        auto rows = reinterpret_cast<int32_t*>(scratch.take(to.largest_tile()));
        auto sum_of = reinterpret_cast<int32_t*>(scratch.take(to.largest_tile()));
        const Found found = to.aggregate<Sum>(tile, *places[task].work, {products.data(), width},
                                              0, width, mean, z, width, rows, sum_of);
        for (int64_t n = 0; n < found.rows; ++n)
          add_row(z + sum_of[n] * width, width, sums.data() + to.row(tile, rows[n]) * width);
      }
    });
  }
  torch::stable::parallel_for(0, out.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      write_row(out.at(i), out.type, out.width, weights.close_up(sums.data() + i * width));
  });
}

}  // namespace rdfkern
