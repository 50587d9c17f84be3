// Aggregate, then transform, tile by tile: what both directions of relation convolution consist of.
#pragma once

#include <numeric>
#include <stdexcept>

#include "ahead.h"
#include "gemm.h"
#include "relation.h"

namespace rdfkern {

enum class Aggregation : int64_t { kSum, kMean, kMax };

template <class View>
std::vector<int64_t> uses_of_relations(const View& view) {
  std::vector<int64_t> uses(view.relations(), 0);
  for (const auto& tile : view.tiles())
    for (const Work& work : tile.works) ++uses[work.relation];
  return uses;
}

// The works of every relation, tile by tile.
template <class View>
class WorksOfRelations {
 public:
  struct Place {
    const typename View::Tile* tile;
    const Work* work;
  };

  explicit WorksOfRelations(const View& view) : begin_(view.relations() + 1, 0) {
    for (const auto& tile : view.tiles())
      for (const Work& work : tile.works) ++begin_[work.relation + 1];
    for (size_t r = 1; r < begin_.size(); ++r) begin_[r] += begin_[r - 1];
    places_.resize(begin_.back());
    std::vector<int64_t> at(begin_.begin(), begin_.end() - 1);
    for (const auto& tile : view.tiles())
      for (const Work& work : tile.works) places_[at[work.relation]++] = {&tile, &work};
  }
  const Place* begin(int64_t relation) const { return places_.data() + begin_[relation]; }
  const Place* end(int64_t relation) const { return places_.data() + begin_[relation + 1]; }

 private:
  std::vector<int64_t> begin_;
  std::vector<Place> places_;
};

// A tensor (R, NB, rows, columns) whose last stride is 1; without blocks it is (R, rows, columns), and
// for one relation (rows, columns).
struct Matrices {
  char* data;
  ScalarType type;
  int64_t rows, columns, row_stride;
  int64_t relations = 1, relation_stride = 0, blocks = 1, block_stride = 0;

  explicit Matrices(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())), type(tensor.scalar_type()),
        rows(tensor.size(tensor.dim() - 2)), columns(tensor.size(tensor.dim() - 1)),
        row_stride(tensor.stride(tensor.dim() - 2)) {
    if (tensor.dim() > 2) relations = tensor.size(0), relation_stride = tensor.stride(0);
    if (tensor.dim() > 3) blocks = tensor.size(1), block_stride = tensor.stride(1);
  }
};

// Float matrices (R, NB, rows, columns), columns in whole vectors; `transposed` swaps the last two
// dimensions of the given ones. They are the memory of these, or copies in panels of kTileColumns
// columns, as few of many long rows find room in the cache: copies of all relations in use or, where
// each has few uses, one made for each use.
class Weights {
 public:
  Weights(const Matrices& given, const std::vector<int64_t>& uses, bool transposed)
      : blocks(given.blocks), rows(transposed ? given.columns : given.rows),
        columns(transposed ? given.rows : given.columns), padded_columns(padded(columns)),
        data_(reinterpret_cast<const float*>(given.data)), relation_stride_(given.relation_stride),
        block_stride_(given.block_stride), row_stride_(given.row_stride), transposed_(transposed) {
    constexpr int64_t kLong = 256, kFew = 3, kSmall = 1 << 16;
    copies_ = transposed || columns % kLanes != 0 || columns >= kLong;
    if (!copies_) return;
    const int64_t floats = (columns + kTileColumns - 1) / kTileColumns * panel();
    const int64_t in_use = uses.size() - std::count(uses.begin(), uses.end(), 0);
    const int64_t all_uses = std::accumulate(uses.begin(), uses.end(), int64_t(0));
    if (floats <= kSmall && all_uses <= kFew * in_use) return;
    copy_of_block_ = floats;
    buffer_ = Buffer(given.relations * blocks * floats);
    torch::stable::parallel_for(0, given.relations * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        if (uses[at / blocks]) copy(at / blocks, at % blocks, buffer_.data() + at * floats);
    });
  }

  // Floats of a row of products: every block's columns in whole vectors.
  int64_t width() const { return blocks * padded_columns; }

  // Asks for the blocks of a relation, unless they would take much of the cache.
  void foresee(int64_t relation, Ahead& ahead) const {
    if (copy_of_block_ || blocks > 1 || rows * columns > kForeseen) return;
    const float* matrix = data_ + relation * relation_stride_;
    const int64_t lines = transposed_ ? columns : rows, length = transposed_ ? rows : columns;
    ahead.add(reinterpret_cast<const char*>(matrix), row_stride_ * sizeof(float),
              length * sizeof(float), lines);
  }

  // products row n = z row n times the blocks of one relation, or, for kAdd, that is added to it.
  template <Update UPDATE>
  void multiply(int64_t relation, int64_t count, const float* z, int64_t ldz, float* products,
                Ahead& ahead) const {
    thread_local std::vector<float> copied;
    ahead.spread((count / kTileRows + 1) * (padded_columns / kTileColumns));
    for (int64_t block = 0; block < blocks; ++block) {
      const float* matrix = data_ + relation * relation_stride_ + block * block_stride_;
      if (copy_of_block_) {
        matrix = buffer_.data() + (relation * blocks + block) * copy_of_block_;
      } else if (copies_) {
        copied.resize((columns + kTileColumns - 1) / kTileColumns * panel());
        copy(relation, block, copied.data());
        matrix = copied.data();
      }
      const int64_t ldb = copies_ ? copied_stride() : row_stride_;
      const auto run = [&](auto update, int64_t first, int64_t inner) {
        gemm<Order::kRows, decltype(update)::value, kLongInner>(
            count, padded_columns, inner, z + block * rows + first, ldz, matrix + first * ldb, ldb,
            products + block * padded_columns, width(), nullptr, AskFor{ahead},
            copies_ ? panel() : kTileColumns);
      };
      const int64_t first = std::min(rows, kLongInner);
      run(std::integral_constant<Update, UPDATE>(), 0, first);
      if (first < rows) run(std::integral_constant<Update, Update::kAdd>(), first, rows - first);
    }
  }

  // Between rows of blocks in whole vectors and rows without gaps.
  void spread(const float* dense, float* apart) const {
    for (int64_t block = 0; block < blocks; ++block) {
      float* target = apart + block * padded_columns;
      std::copy_n(dense + block * columns, columns, target);
      std::fill(target + columns, target + padded_columns, 0.0f);
    }
  }
  const float* close_up(float* apart) const {
    for (int64_t block = 1; block < blocks && columns < padded_columns; ++block)
      std::copy_n(apart + block * padded_columns, columns, apart + block * columns);
    return apart;
  }

  int64_t blocks, rows, columns, padded_columns;

 private:
  // As plain torch's products sum them.
  static constexpr int64_t kLongInner = 256;
  static constexpr int64_t kForeseen = 1 << 15;  // floats

  int64_t copied_stride() const { return std::min<int64_t>(kTileColumns, padded_columns); }
  int64_t panel() const { return rows * copied_stride(); }

  void copy(int64_t relation, int64_t block, float* target) const {
    const float* matrix = data_ + relation * relation_stride_ + block * block_stride_;
    for (int64_t first = 0; first < columns; first += kTileColumns, target += panel()) {
      const int64_t count = std::min(kTileColumns, columns - first);
      if (!transposed_)
        for (int64_t i = 0; i < rows; ++i)
          read_row(reinterpret_cast<const char*>(matrix + i * row_stride_ + first),
                   ScalarType::Float, count, target + i * copied_stride());
      else if (rows % kLanes == 0)
        transpose_rows({matrix + first * row_stride_, row_stride_}, count, rows, 1.0f, target,
                       copied_stride());
      else
        for (int64_t i = 0; i < rows; ++i) {
          float* row = target + i * copied_stride();
          for (int64_t j = 0; j < count; ++j) row[j] = matrix[(first + j) * row_stride_ + i];
          std::fill(row + count, row + padded(count), 0.0f);
        }
    }
  }

  const float* data_;
  int64_t relation_stride_, block_stride_, row_stride_;
  bool transposed_, copies_;
  int64_t copy_of_block_ = 0;  // floats, or 0 where every use makes its own
  Buffer buffer_;
};

// The weight (in, out) of every row's own features, or none; the targets are the sources then.
class RootWeight {
 public:
  RootWeight(const std::optional<Tensor>& tensor, int64_t sources, int64_t targets, int64_t uses,
             bool transposed) {
    if (!tensor) return;
    if (sources != targets) throw std::invalid_argument("root needs targets that are the sources");
    weights_.emplace(Matrices(*tensor), std::vector<int64_t>{uses}, transposed);
  }
  const Weights* get() const { return weights_ ? &*weights_ : nullptr; }

 private:
  std::optional<Weights> weights_;
};

// out_i = addend_i + x_i root + sum over relations of (aggregate of x over the row's neighbours)
// times weight. A root, where there is one, has one block.
template <class Op, class View>
void convolve(const View& view, const Block& x, int64_t width_in, const Weights& weights,
              const Weights* root, bool mean, const Table* addend, const Table& out) {
  const int64_t size = view.largest_tile(), ldz = padded(width_in), width = weights.width();
  const int64_t row_width = std::max(width, padded(out.width));
  const int64_t floats = size * (ldz + 2 * width) + row_width + 2 * size + 80;
  for_each_task(view.tiles().size(), [&](auto next) {
    for (int64_t t = next(); t >= 0; t = next()) {
      const auto& tile = view.tiles()[t];
      const int64_t count = view.size_of(tile);
      Scratch scratch(floats);
      float* z = scratch.take(size * ldz);
      float* sums = scratch.take(size * width);
      float* products = scratch.take(size * width);
      float* row = scratch.take(row_width);
      auto rows = reinterpret_cast<int32_t*>(scratch.take(size));
      auto sum_of = reinterpret_cast<int32_t*>(scratch.take(size));
      for (int64_t i = 0; i < count; ++i) {
        if (!addend) {
          std::fill_n(sums + i * width, width, 0.0f);
          continue;
        }
        read_row(addend->at(view.node(view.row(tile, i))), addend->type, out.width, row);
        weights.spread(row, sums + i * width);
      }
      Ahead nothing;
      if (root)
        root->multiply<Update::kAdd>(0, count, x.data + view.row(tile, 0) * x.stride, x.stride,
                                     sums, nothing);
      for (size_t w = 0; w < tile.works.size(); ++w) {
        const Work& work = tile.works[w];
        Ahead ahead;
        if (w + 1 < tile.works.size()) weights.foresee(tile.works[w + 1].relation, ahead);
        const Found found =
            view.template aggregate<Op>(tile, work, x, 0, ldz, mean, z, ldz, rows, sum_of);
        if (found.rows == 0) continue;
        if (found.apart() && rows[found.rows - 1] - rows[0] == found.rows - 1) {
          weights.multiply<Update::kAdd>(work.relation, found.rows, z, ldz,
                                         sums + rows[0] * width, ahead);
          continue;
        }
        weights.multiply<Update::kOverwrite>(work.relation, found.sums, z, ldz, products, ahead);
        for (int64_t n = 0; n < found.rows; ++n)
          add_row(products + sum_of[n] * width, width, sums + rows[n] * width);
      }
      for (int64_t i = 0; i < count; ++i)
        write_row(out.at(view.node(view.row(tile, i))), out.type, out.width,
                  weights.close_up(sums + i * width));
    }
  });
}

}  // namespace rdfkern
