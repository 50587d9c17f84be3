// Implicit graphs: groups of sorted rows, and the parts of them that a task works on.
#pragma once

#include "relation.h"

namespace rdfkern {

constexpr int64_t kTotal = 64;  // rows that one total stands for

// Positions are compared kLongs at a time, with groups of up to kCounted rows: searches would guess
// wrong at every turn.
constexpr int64_t kLongs = 8, kCounted = 32;
using Longs = int64_t __attribute__((vector_size(kLongs * sizeof(int64_t))));

inline Longs load_longs(const int64_t* source) {
  Longs longs;
  std::memcpy(&longs, source, sizeof(longs));
  return longs;
}

// Sorted rows of one dialogue and key. They are sorted by key first here, so that the rows of a tile,
// which mostly hear the same relations, are neighbours in memory.
struct Group {
  int64_t dialogue, key, begin, end;
  int64_t size() const { return end - begin; }
};

// What follows from order, position, start and table (rdfkern/ops/relation_mp/bands.py).
struct BandGraph {
  std::vector<int64_t> order, position;          // positions with room for kLongs behind them
  std::vector<Group> groups;                     // not empty; by key, then by dialogue
  std::vector<std::vector<int64_t>> of_dialogue;  // their numbers
  const int32_t* table;
  int64_t keys, relations, past, future;

  BandGraph(const Tensor& order_of, const Tensor& positions, const Tensor& start,
            const Tensor& table_of, int64_t relations_of, int64_t past_of, int64_t future_of)
      : table(static_cast<const int32_t*>(table_of.data_ptr())), keys(table_of.size(0)),
        relations(relations_of), past(past_of), future(future_of) {
    const std::vector<int64_t> starts = integers(start);
    const std::vector<int64_t> order_by_dialogue = integers(order_of);
    const std::vector<int64_t> position_by_dialogue = integers(positions);
    const int64_t dialogues = (int64_t(starts.size()) - 1) / keys;
    of_dialogue.resize(dialogues);
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t dialogue = 0; dialogue < dialogues; ++dialogue) {
        const int64_t at = dialogue * keys + key;
        if (starts[at] == starts[at + 1]) continue;
        of_dialogue[dialogue].push_back(groups.size());
        const int64_t begin = order.size();
        auto append = [&](std::vector<int64_t>& target, const std::vector<int64_t>& source) {
          target.insert(target.end(), source.begin() + starts[at], source.begin() + starts[at + 1]);
        };
        append(order, order_by_dialogue);
        append(position, position_by_dialogue);
        groups.push_back({dialogue, key, begin, int64_t(order.size())});
      }
    position.resize(position.size() + kLongs);
  }

  int64_t rows() const { return order.size(); }

  static std::vector<int64_t> integers(const Tensor& tensor) {
    const int64_t count = tensor.numel();
    std::vector<int64_t> values(count);
    if (tensor.scalar_type() == ScalarType::Int)
      std::copy_n(static_cast<const int32_t*>(tensor.data_ptr()), count, values.begin());
    else
      std::copy_n(static_cast<const int64_t*>(tensor.data_ptr()), count, values.begin());
    return values;
  }
};

// Rows [begin, end) of a tile's group; they are the tile's rows from `local` on.
struct Piece {
  int64_t group, begin, end, local;
};

// What a piece hears of another group: rows of the directions from `first` to `last`, where 0 are
// earlier rows, 1 rows at the same position and 2 later ones. `weights` belong to absolute rows,
// `totals` to absolute blocks of kTotal rows; either may be missing.
struct Band {
  int64_t piece, relation, other;
  int first, last;
  const float *weights = nullptr, *totals = nullptr;
};

struct BandTile {
  std::vector<Piece> pieces;
  std::vector<Band> parts;  // by relation, then by piece
  std::vector<Work> works;
  int64_t first, count;  // sorted rows
};

// Row weights 1 / count of one relation, of the rows of one group.
struct Slot {
  int64_t relation, group;
  float *weights = nullptr, *totals = nullptr;
};

}  // namespace rdfkern
