// Implicit graphs: what a row hears of one group of rows and one direction is a contiguous range.
#pragma once

#include <limits>

#include "relation_band_graph.h"

namespace rdfkern {

// The graph as seen by its targets, or `transposed` by its sources.
class BandView {
 public:
  using Tile = BandTile;

  BandView(const BandGraph& graph, bool transposed)
      : graph_(graph), transposed_(transposed), behind_(transposed ? graph.future : graph.past),
        ahead_(transposed ? graph.past : graph.future), tile_rows_(tile_rows(graph.rows())) {
    cut_into_tiles();
    for_each_task(tiles_.size(), [&](auto next) {
      for (int64_t t = next(); t >= 0; t = next()) find_bands(tiles_[t]);
    });
  }

  const std::vector<BandTile>& tiles() const { return tiles_; }
  int64_t largest_tile() const { return tile_rows_; }
  int64_t size_of(const BandTile& tile) const { return tile.count; }
  int64_t row(const BandTile& tile, int64_t local) const { return tile.first + local; }
  int64_t node(int64_t row) const { return graph_.order[row]; }
  int64_t relations() const { return graph_.relations; }

  // f(relation, number of the other group, first, last) for what a group hears.
  template <class F>
  void for_each_band(const Group& group, const F& f) const {
    for (int64_t other : graph_.of_dialogue[group.dialogue]) {
      const int64_t key = graph_.groups[other].key;
      for (int first = 0; first < 3;) {
        const int64_t relation = relation_of(group.key, key, first);
        int last = first;
        while (last < 2 && relation_of(group.key, key, last + 1) == relation) ++last;
        if (relation >= 0) f(relation, other, first, last);
        first = last + 1;
      }
    }
  }

  // Where the ranges of the rows [begin, end) start and end among the other group's rows. There is
  // room for kLongs more in both lists.
  void ranges(const Group& other, int first, int last, int64_t begin, int64_t end, int64_t* low,
              int64_t* high) const {
    // Rows at a distance above `to_low` lie before the range, and above `to_high` not behind it.
    using Limits = std::numeric_limits<int64_t>;
    const int64_t furthest_behind = behind_ == kUnlimited ? Limits::max() : behind_;
    const int64_t furthest_ahead = ahead_ == kUnlimited ? Limits::min() : -ahead_ - 1;
    const int64_t to_low = first == 0 ? furthest_behind : 1 - first;
    const int64_t to_high = last == 2 ? furthest_ahead : -last;
    const int64_t* const position = graph_.position.data();
    if (other.size() <= kCounted) {
      for (int64_t row = begin; row < end; row += kLongs) {
        const Longs mine = load_longs(position + row);
        Longs lows = Longs{} + other.begin, highs = lows;
        for (int64_t at = other.begin; at < other.end; ++at) {
          const Longs distance = mine - position[at];
          lows -= distance > to_low;  // where true, it is -1
          highs -= distance > to_high;
        }
        std::memcpy(low + row - begin, &lows, sizeof(Longs));
        std::memcpy(high + row - begin, &highs, sizeof(Longs));
      }
      return;
    }
    auto find = [&](int64_t* found, int64_t distance) {
      int64_t at = other.begin;
      for (int64_t bound = other.end; at < bound;) {
        const int64_t middle = (at + bound) / 2;
        if (position[begin] - position[middle] > distance) at = middle + 1;
        else bound = middle;
      }
      for (int64_t row = begin; row < end; ++row) {
        while (at < other.end && position[row] - position[at] > distance) ++at;
        found[row - begin] = at;
      }
    };
    find(low, to_low);
    find(high, to_high);
  }

  // The sums of columns [column, column + width) of x over the neighbours of one relation: that of
  // row rows[n] of the tile is z row sum_of[n]. Rows that follow each other and hear the same share
  // one, where that spares an eighth. Rows without neighbours are left out, unless they are few
  // and no sum is shared: then sums are 0 there, and `rows` are consecutive.
  template <class Op>
  Found aggregate(const BandTile& tile, const Work& work, const Block& x, int64_t column,
                  int64_t width, bool mean, float* z, int64_t ldz, int32_t* rows,
                  int32_t* sum_of) const {
    const int64_t tile_size = tile.count, parts = work.end - work.begin;
    thread_local Lists lists;
    lists.resize(parts, tile_size);
    int64_t* __restrict__ counts = lists.counts.data();
    int64_t* __restrict__ place = lists.place.data();
    int64_t* __restrict__ part_place = lists.part_place.data();
    char* __restrict__ repeats = lists.repeats.data();  // the row before it
    std::fill_n(counts, tile_size, 0);
    std::fill_n(repeats, tile_size, std::is_same_v<Op, Sum>);
    for (int64_t p = 0; p < parts; ++p) {
      const Band& band = tile.parts[work.begin + p];
      const Piece& piece = tile.pieces[band.piece];
      const int64_t size = piece.end - piece.begin;
      int64_t* low = lists.low(p, piece);
      int64_t* high = lists.high(p, piece);
      ranges(graph_.groups[band.other], band.first, band.last, piece.begin, piece.end, low, high);
      for (int64_t i = 0; i < size; ++i) counts[piece.local + i] += high[i] - low[i];
      repeats[piece.local] = 0;
      for (int64_t i = 1; i < size; ++i)
        repeats[piece.local + i] &= (low[i] == low[i - 1]) & (high[i] == high[i - 1]);
    }
    Found found{0, 0};
    int64_t repeated = 0, first = tile_size, end = 0;
    for (int64_t i = 0; i < tile_size; ++i) {
      const bool hears = counts[i] != 0;
      first = hears ? std::min(first, i) : first;
      end = hears ? i + 1 : end;
      found.rows += hears;
      repeated += hears & repeats[i];
    }
    if (found.rows == 0) return found;
    if (8 * repeated < found.rows) {
      std::fill_n(repeats, tile_size, 0);
      repeated = 0;
    }
    const bool fills_gaps = std::is_same_v<Op, Sum> && repeated == 0 &&
                            8 * (end - first - found.rows) <= end - first;
    found = {0, 0};
    for (int64_t i = first; i < end; ++i) {
      const bool taken = (counts[i] != 0) | fills_gaps;
      found.sums += taken & !repeats[i];
      place[i] = found.sums - 1;
      sum_of[found.rows] = int32_t(place[i]);
      rows[found.rows] = int32_t(i);
      found.rows += taken;
    }
    for (int64_t n = 0; n < found.sums; ++n) std::fill_n(z + n * ldz, width, Op::kStart);
    for (int64_t p = 0; p < parts; ++p) {
      const Band& band = tile.parts[work.begin + p];
      const Piece& piece = tile.pieces[band.piece];
      int64_t* low = lists.low(p, piece);
      int64_t* high = lists.high(p, piece);
      int64_t count = 0;
      for (int64_t i = 0; i < piece.end - piece.begin; ++i) {
        const int64_t local = piece.local + i;
        low[count] = low[i];
        high[count] = high[i];
        part_place[count] = place[local];
        count += (counts[local] != 0) & !repeats[local];
      }
      const Target target{low, high, part_place, count, z, ldz};
      if (band.weights) add_ranges<Op, true>(band, target, x, column, width);
      else add_ranges<Op, false>(band, target, x, column, width);
    }
    for (int64_t i = first; mean && i < end; ++i)
      if (counts[i] > 1 && !repeats[i]) scale_row(z + place[i] * ldz, width, 1.0f / counts[i]);
    return found;
  }

  // f(row of the tile, other sorted row, 1, -1) for every pair of one relation.
  template <class F>
  void for_each_pair(const BandTile& tile, const Work& work, const F& f) const {
    thread_local std::vector<int64_t> low, high;
    for (int64_t p = work.begin; p < work.end; ++p) {
      const Band& band = tile.parts[p];
      const Piece& piece = tile.pieces[band.piece];
      const int64_t count = piece.end - piece.begin;
      low.resize(count + kLongs);
      high.resize(count + kLongs);
      ranges(graph_.groups[band.other], band.first, band.last, piece.begin, piece.end, low.data(),
             high.data());
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = low[i]; j < high[i]; ++j) f(piece.local + i, j, 1.0f, int64_t(-1));
    }
  }

  // Sums of whole blocks of rows, for ranges that span many; to be called before `aggregate`.
  template <class Op>
  void prepare_totals(const Block& x, int64_t width);

  // The means' weights for the transposed view: those that `targets` gives to the other rows.
  void weigh_by_counts(const BandView& targets, const Block& x, int64_t width);

 private:
  // Of one tile and relation, by row of the tile; the ranges by part as well.
  struct Lists {
    std::vector<int64_t> ends, counts, place, part_place;
    std::vector<char> repeats;
    int64_t stride;

    void resize(int64_t parts, int64_t rows) {
      stride = rows + kLongs;
      ends.resize(2 * parts * stride);
      for (auto* list : {&counts, &place, &part_place}) list->resize(rows);
      repeats.resize(rows);
    }
    int64_t* low(int64_t part, const Piece& piece) {
      return ends.data() + 2 * part * stride + piece.local;
    }
    int64_t* high(int64_t part, const Piece& piece) { return low(part, piece) + stride; }
  };

  struct Target {
    const int64_t *low, *high, *place;
    int64_t count;
    float* z;
    int64_t ldz;
  };

  int64_t relation_of(int64_t key, int64_t other, int direction) const {
    if ((direction == 0 && behind_ == 0) || (direction == 2 && ahead_ == 0)) return -1;
    return transposed_ ? graph_.table[(other * graph_.keys + key) * 3 + 2 - direction]
                       : graph_.table[(key * graph_.keys + other) * 3 + direction];
  }

  bool has_long_ranges() const {
    constexpr int64_t kLong = 4 * kTotal;
    return (behind_ == kUnlimited || behind_ > kLong || ahead_ == kUnlimited || ahead_ > kLong);
  }

  // The rows of a key, which hear the same relations, are cut into even tiles. A key that follows on
  // a tile less than half full, as keys of few rows leave it, fills that one first.
  void cut_into_tiles() {
    int64_t most = 0;
    for (size_t g = 0; g < graph_.groups.size(); ++g) {
      const Group& group = graph_.groups[g];
      if (g == 0 || group.key != graph_.groups[g - 1].key) {
        most = tile_rows_;
        if (g == 0 || 2 * tiles_.back().count > tile_rows_) {
          const int64_t rows = rows_of_key_from(g), parts = (rows + most - 1) / most;
          most = (rows + parts - 1) / parts;
          tiles_.push_back({.first = group.begin, .count = 0});
        }
      }
      for (int64_t begin = group.begin; begin < group.end;) {
        if (tiles_.back().count >= most) tiles_.push_back({.first = begin, .count = 0});
        BandTile& tile = tiles_.back();
        const int64_t end = std::min(group.end, begin + most - tile.count);
        tile.pieces.push_back({int64_t(g), begin, end, tile.count});
        tile.count += end - begin;
        begin = end;
      }
    }
  }

  int64_t rows_of_key_from(size_t first) const {
    size_t last = first;
    while (last + 1 < graph_.groups.size() && graph_.groups[last + 1].key == graph_.groups[first].key)
      ++last;
    return graph_.groups[last].end - graph_.groups[first].begin;
  }

  void find_bands(BandTile& tile) const {
    for (size_t p = 0; p < tile.pieces.size(); ++p)
      for_each_band(graph_.groups[tile.pieces[p].group],
                    [&](int64_t relation, int64_t other, int first, int last) {
                      tile.parts.push_back({int64_t(p), relation, other, first, last});
                    });
    std::stable_sort(tile.parts.begin(), tile.parts.end(),
                     [](const Band& a, const Band& b) { return a.relation < b.relation; });
    for (int64_t p = 0; p < int64_t(tile.parts.size()); ++p) {
      const int64_t relation = tile.parts[p].relation;
      if (tile.works.empty() || tile.works.back().relation != relation)
        tile.works.push_back({relation, p, p});
      tile.works.back().end = p + 1;
    }
  }

  template <class Op, bool WEIGHTED>
  static void add_ranges(const Band& band, const Target& target, const Block& x, int64_t column,
                         int64_t width) {
    const int64_t *low = target.low, *high = target.high;
    // Rows whose ranges share a core are summed together: once the core, and outwards from it.
    for (int64_t begin = 0, end; begin < target.count; begin = end) {
      int64_t separately = 0;
      for (end = begin; end < target.count && low[end] <= high[begin]; ++end)
        separately += high[end] - low[end];
      if (separately == 0) continue;
      const bool shares = separately > high[end - 1] - low[begin] + 2 * (end - begin);
      for_each_columns(width, [&](int64_t at, auto vectors) {
        constexpr int VECTORS = decltype(vectors)::value;
        if (shares)
          add_shared<Op, WEIGHTED, VECTORS>(band, target, x, column + at, at, begin, end);
        else
          add_each<Op, WEIGHTED, VECTORS>(band, target, x, column + at, at, begin, end);
      });
    }
  }

  template <class Op, bool WEIGHTED, int VECTORS>
  static void join(const Band& band, const Block& x, int64_t column, int64_t row,
                   Running<Op, VECTORS>& running) {
    const float* source = x.data + row * x.stride + column;
    if constexpr (WEIGHTED) running.join(source, band.weights[row]);
    else running.join(source);
  }

  template <class Op, bool WEIGHTED, int VECTORS>
  static void add_each(const Band& band, const Target& target, const Block& x, int64_t column,
                       int64_t at, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (target.low[i] == target.high[i]) continue;
      Running<Op, VECTORS> running;
      running.start();
      for (int64_t j = target.low[i]; j < target.high[i]; ++j)
        join<Op, WEIGHTED>(band, x, column, j, running);
      running.join_into(target.z + target.place[i] * target.ldz + at);
    }
  }

  template <class Op, bool WEIGHTED, int VECTORS>
  static void add_shared(const Band& band, const Target& target, const Block& x, int64_t column,
                         int64_t at, int64_t begin, int64_t end) {
    const int64_t core_begin = target.low[end - 1], core_end = target.high[begin];
    Running<Op, VECTORS> running;
    running.start();
    int64_t row = core_begin;
    for (int64_t i = end - 1; i >= begin; --i) {
      while (row > target.low[i]) join<Op, WEIGHTED>(band, x, column, --row, running);
      if (row < core_begin) running.join_into(target.z + target.place[i] * target.ldz + at);
    }
    running.start();
    for (row = core_begin; row < core_end;) {
      if (band.totals && row % kTotal == 0 && row + kTotal <= core_end) {
        running.join(band.totals + row / kTotal * x.stride + column);
        row += kTotal;
      } else {
        join<Op, WEIGHTED>(band, x, column, row++, running);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      while (row < target.high[i]) join<Op, WEIGHTED>(band, x, column, row++, running);
      if (row > core_begin) running.join_into(target.z + target.place[i] * target.ldz + at);
    }
  }

  const BandGraph& graph_;
  bool transposed_;
  int64_t behind_, ahead_, tile_rows_;
  std::vector<BandTile> tiles_;
  Buffer totals_, weights_;
  std::vector<Slot> slots_;
};

}  // namespace rdfkern

#include "relation_band_totals.h"
