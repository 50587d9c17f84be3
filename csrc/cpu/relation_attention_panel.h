// A panel of consecutive targets on implicit graphs, the relations between them and the sources in
// their windows, and the logits of a panel, stored transposed: [source][target], targets in the
// lanes.
#pragma once

#include "relation_attention.h"

namespace rdfkern::relation_attention {

enum Direction { kEarlier, kSame, kLater, kDirections };  // of the source, as seen from the target

inline Vec select(IntVec mask, Vec chosen, Vec otherwise) {
  return bits<Vec>((bits<IntVec>(chosen) & mask) | (bits<IntVec>(otherwise) & ~mask));
}

inline IntVec lanes_from(int64_t first) {
  IntVec lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes + int32_t(first);
}

// Per (source key, direction), one value for every target of a panel.
inline int64_t row_of(int64_t slot, int direction) {
  return (slot * kDirections + direction) * kPanel;
}

// Targets that hear a source are lanes [begin, end); those before `before` stand at an earlier
// position than the source, those from `after` on at a later one.
struct Lanes {
  int64_t begin, end, before, after;

  bool reach(int64_t first) const { return begin < first + kLanes && end > first; }
  bool cover(int64_t first) const { return begin <= first && end >= first + kLanes; }
  IntVec inside(int64_t first) const {
    const IntVec lane = lanes_from(first);
    return (lane >= int32_t(begin)) & (lane < int32_t(end));
  }
  // What the lanes from `first` on find in the three rows of a source's key.
  Vec pick(const float* rows, int64_t first) const {
    if (before >= first + kLanes) return load(rows + kLater * kPanel + first);
    if (after <= first) return load(rows + kEarlier * kPanel + first);
    const IntVec lane = lanes_from(first);
    const Vec differs = select(lane < int32_t(before), load(rows + kLater * kPanel + first),
                               load(rows + kEarlier * kPanel + first));
    return select((lane >= int32_t(before)) & (lane < int32_t(after)),
                  load(rows + kSame * kPanel + first), differs);
  }
  template <class Change>
  void change(float* rows, int64_t first, Vec value, const Change& combine) const {
    auto part = [&](int direction, IntVec mask) {
      float* at = rows + direction * kPanel + first;
      store(at, select(mask, combine(load(at), value), load(at)));
    };
    const IntVec all = IntVec{} == IntVec{};
    if (before >= first + kLanes) return part(kLater, all);
    if (after <= first) return part(kEarlier, all);
    const IntVec lane = lanes_from(first);
    part(kLater, lane < int32_t(before));
    part(kSame, (lane >= int32_t(before)) & (lane < int32_t(after)));
    part(kEarlier, lane >= int32_t(after));
  }
};

// Up to kPanel targets; one object serves a thread's panels one after the other.
class Panel {
 public:
  Panel(const Problem& problem, int64_t widest)
      : problem_(problem), slot_of_(problem.num_keys, -1),
        slots_(std::min(problem.num_keys, widest)), relation_(rows() * kPanel),
        base_(rows() * kPanel), src_(problem.is_dot ? 0 : padded(widest)),
        room_(problem.of_values ? kLanes * problem.value_width : 0),
        leader_of_(problem.within ? problem.relations : 0, -1) {}

  // Rows of per-(key, direction) values that may be in use.
  int64_t rows() const { return slots_ * kDirections; }
  int64_t rows_in_use() const { return int64_t(keys_.size()) * kDirections; }

  void open(Span targets) {
    for (int32_t key : keys_) slot_of_[key] = -1;
    keys_.clear();
    this->targets = targets;
    sources = sources_of(problem_, targets);
    for (int64_t j = sources.first; j < sources.end(); ++j) {
      int32_t& slot = slot_of_[problem_.key[j]];
      if (slot >= 0) continue;
      slot = int32_t(keys_.size());
      keys_.push_back(problem_.key[j]);
      for (int64_t i = 0; i < columns(); ++i)
        for (int direction = 0; direction < kDirections; ++direction)
          relation_[row_of(slot, direction) + i] =
              i < targets.count
                  ? problem_.table[(problem_.key[targets.first + i] * problem_.num_keys +
                                    problem_.key[j]) * kDirections + direction]
                  : -1;
    }
  }

  // What every logit has apart from its source: dst_i (or 0) + rel_r, or -inf for no edge.
  void choose_head(int64_t head_) {
    head = head_;
    float own[kPanel] = {};
    if (problem_.of_values) {
      value_products(problem_, kTarget, head, targets, room_.data(), own);
      value_products(problem_, kSource, head, sources, room_.data(), src_.data());
    } else if (!problem_.is_dot) {
      for (int64_t i = 0; i < targets.count; ++i) own[i] = problem_.dst.at(targets.first + i, head);
      for (int64_t j = 0; j < sources.count; ++j)
        src_[j] = problem_.src.at(sources.first + j, head);
    }
    for (int64_t row = 0; row < rows_in_use(); ++row)
      for (int64_t i = 0; i < columns(); ++i) {
        const int32_t relation = relation_[row * kPanel + i];
        base_[row * kPanel + i] =
            relation < 0 ? -kInfinity : own[i] + problem_.rel.at(relation, head);
      }
  }

  int64_t columns() const { return padded(targets.count); }
  int64_t slot(int64_t source) const { return slot_of_[problem_.key[source]]; }
  const int32_t* relations() const { return relation_.data(); }
  const float* base(int64_t source) const { return base_.data() + row_of(slot(source), 0); }

  Lanes lanes(int64_t source) const {
    auto lane = [&](const int32_t* ranges) {
      return std::clamp<int64_t>(ranges[source] - targets.first, 0, targets.count);
    };
    return {lane(problem_.heard_first), lane(problem_.heard_end), lane(problem_.same_first),
            lane(problem_.same_end)};
  }

  // tile[j][i] = logit of (target i, source first + j), -inf where there is no edge. With a dot
  // form, `queries` are the transposed rows [depth][kStride] and `keys` those of the block.
  void logits(Span block, const float* queries, const Block& keys, float* tile) const {
    if (problem_.is_dot)
      gemm<Order::kRows, Update::kOverwrite>(block.count, columns(), problem_.depth, keys.data,
                                             keys.stride, queries, kStride, tile, kStride);
    const Vec hidden = broadcast(-kInfinity);
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t source = block.first + j;
      const Lanes lanes = this->lanes(source);
      const float* rows = base(source);
      for (int64_t i = 0; i < columns(); i += kLanes) {
        float* at = tile + j * kStride + i;
        if (!lanes.reach(i)) {
          store(at, hidden);
          continue;
        }
        const Vec row = lanes.pick(rows, i);
        IntVec shown = row != hidden;
        if (!lanes.cover(i)) shown &= lanes.inside(i);
        const Vec logit = problem_.is_dot ? load(at) * problem_.scale + row
                                          : activated(before_activation(source, row));
        store(at, select(shown, logit, hidden));
      }
    }
  }

  Vec before_activation(int64_t source, Vec row) const {
    return row + src_[source - sources.first];
  }
  Vec activated(Vec x) const { return select(x > 0.0f, x, x * problem_.negative_slope); }

  // factors[j][i] = 0 or 1 / (1 - p) of (target i, source first + j).
  void dropout(Span block, float* factors) const {
    const double probability = problem_.dropout.probability;
    const uint32_t threshold = uint32_t(probability * 4294967296.0);
    const Vec kept = broadcast(float(1.0 / (1.0 - probability)));
    for (int64_t four = block.first / 4; four <= (block.end() - 1) / 4; ++four)
      for (int64_t i = 0; i < columns(); i += kLanes) {
        UintVec words[4] = {bits<UintVec>(lanes_from(targets.first + i)),
                            UintVec{} + uint32_t(four), UintVec{} + uint32_t(head), UintVec{}};
        philox(words, problem_.dropout.seed);
        for (int word = 0; word < 4; ++word) {
          const int64_t j = 4 * four + word - block.first;
          if (j < 0 || j >= block.count) continue;
          const IntVec keep = words[word] >= threshold;
          store(factors + j * kStride + i, bits<Vec>(bits<IntVec>(kept) & keep));
        }
      }
  }

  // rows[r] of every target becomes merge over all rows of r's relation.
  template <class Merge>
  void merge_relations(float* rows, const Merge& merge) {
    for (int64_t i = 0; i < targets.count; ++i) {
      for (int64_t row = 0; row < rows_in_use(); ++row) {
        const int32_t relation = relation_[row * kPanel + i];
        if (relation < 0) continue;
        int32_t& leader = leader_of_[relation];
        float& value = rows[row * kPanel + i];
        if (leader < 0)
          leader = int32_t(row);
        else
          rows[leader * kPanel + i] = merge(rows[leader * kPanel + i], value);
      }
      for (int64_t row = 0; row < rows_in_use(); ++row) {
        const int32_t relation = relation_[row * kPanel + i];
        if (relation >= 0) rows[row * kPanel + i] = rows[leader_of_[relation] * kPanel + i];
      }
      for (int64_t row = 0; row < rows_in_use(); ++row)
        if (relation_[row * kPanel + i] >= 0) leader_of_[relation_[row * kPanel + i]] = -1;
    }
  }

  Span targets{0, 0}, sources{0, 0};
  int64_t head = 0;

 private:
  const Problem& problem_;
  std::vector<int32_t> slot_of_, keys_;
  int64_t slots_;
  std::vector<int32_t> relation_;  // [slot][direction][target]
  std::vector<float> base_, src_, room_;
  std::vector<int32_t> leader_of_;
};

inline float* fill(float* target, int64_t count, float value) {
  std::fill(target, target + count, value);
  return target;
}

}  // namespace rdfkern::relation_attention
