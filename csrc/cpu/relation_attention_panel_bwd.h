// Gradients of relation attention through one panel of targets and one head.
#pragma once

#include "relation_attention_panel.h"

namespace rdfkern::relation_attention {

constexpr int64_t kSources = 128;
constexpr int64_t kWholeSources = 256;  // so many fit into one block, which then needs nothing saved

struct Saved {
  Rows grad_out, out;
  KeptSoftmax softmax;
};

struct Gradients {
  Rows queries, keys, values;
  Logits dst, src, rel;
  float* vectors[kSides];  // (H, C) in the place of src
};

// Where gradients of sources and relations add up: rows of values with their stride, rows of keys
// (or src), both from `first_source` on, and relations.
struct Sums {
  int64_t first_source;
  float* values;
  int64_t stride;
  float* to_source;
  double* rel;
};

class PanelGradients {
 public:
  // `beside` floats of the same memory are for the caller.
  PanelGradients(const Problem& problem, const Saved& saved, const Gradients& gradients,
                 int64_t widest, int64_t beside)
      : problem_(problem), saved_(saved), gradients_(gradients), panel_(problem, widest),
        scratch_(2 * kPanel * problem_.depth_width + kStride * problem_.depth_width +
                 (kPanel + kStride) * problem_.value_width +
                 kWholeSources * (problem_.depth_width + problem_.value_width) +
                 3 * kWholeSources * kStride + (panel_.rows() + 3 * statistics()) * kPanel +
                 beside + problem_.value_width + 16 * 16) {
    natural_ = scratch_.take(kPanel * problem_.depth_width);
    queries_t_ = scratch_.take(kStride * problem_.depth_width);
    dq_ = scratch_.take(kPanel * problem_.depth_width);
    grad_ = scratch_.take(kPanel * problem_.value_width);
    grad_t_ = scratch_.take(kStride * problem_.value_width);
    key_rows_ = scratch_.take(kWholeSources * problem_.depth_width);
    value_rows_ = scratch_.take(kWholeSources * problem_.value_width);
    tile_ = scratch_.take(kWholeSources * kStride);
    slopes_ = scratch_.take(kWholeSources * kStride);
    factors_ = scratch_.take(kWholeSources * kStride);
    by_relation_ = scratch_.take(panel_.rows() * kPanel);
    bases_ = scratch_.take(statistics() * kPanel);
    inverses_ = scratch_.take(statistics() * kPanel);
    deltas_ = scratch_.take(statistics() * kPanel);
    row_ = scratch_.take(problem_.value_width);
    beside_ = scratch_.take(beside);
  }

  float* beside() const { return beside_; }

  // Adds what flows through one panel and head; writes the gradients of its targets.
  void add(Span targets, int64_t head, const Sums& sums) {
    sums_ = sums;
    panel_.open(targets);
    panel_.choose_head(head);
    if (problem_.within)
      differentiate<true>();
    else
      differentiate<false>();
  }

 private:
  int64_t statistics() const { return problem_.within ? panel_.rows() : 1; }
  bool whole() const { return panel_.sources.count <= kWholeSources; }
  int64_t head() const { return panel_.head; }

  template <bool WITHIN>
  void differentiate() {
    read_targets();
    fill(by_relation_, panel_.rows_in_use() * kPanel, 0.0f);
    // The tile holds logits, or where all sources fit into it, weights before normalisation.
    if constexpr (WITHIN)
      statistics_within();
    else if (whole())
      for_each_block([&](Span block) {
        read(block);
        statistics_across(block);
      });
    else
      saved_statistics();
    for_each_block([&](Span block) {
      if (!whole()) read(block);
      add_block<WITHIN>(block);
    });
    write_targets();
  }

  template <class Body>
  void for_each_block(const Body& body) {
    const int64_t step = whole() ? kWholeSources : kSources;
    for (int64_t first = panel_.sources.first; first < panel_.sources.end(); first += step)
      body(Span{first, std::min(step, panel_.sources.end() - first)});
  }

  // body(source, lanes, offset of its key's rows, offset in the tiles, first lane)
  template <class Body>
  void for_each_vector(Span block, const Body& body) {
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t source = block.first + j, row = row_of(panel_.slot(source), 0);
      const Lanes lanes = panel_.lanes(source);
      for (int64_t i = 0; i < panel_.columns(); i += kLanes)
        if (lanes.reach(i)) body(source, lanes, row, j * kStride + i, i);
    }
  }

  void read_targets() {
    const Span targets = panel_.targets;
    grads_ = read_head(saved_.grad_out, head(), targets.first, targets.count,
                       problem_.value_dim, grad_);
    transpose_rows(grads_, targets.count, problem_.value_width, 1.0f, grad_t_, kStride);
    if (!problem_.is_dot) return;
    queries_ = read_head(problem_.queries, head(), targets.first, targets.count, problem_.depth,
                         natural_);
    transpose_rows(queries_, targets.count, problem_.depth_width, 1.0f, queries_t_, kStride);
    fill(dq_, targets.count * problem_.depth_width, 0.0f);
  }

  // tile_ = logits, slopes_ = dO . value, factors_ of the dropout.
  void read(Span block) {
    if (problem_.is_dot)
      keys_ = read_head(problem_.keys, head(), block.first, block.count, problem_.depth,
                        key_rows_);
    const Block values = read_head(problem_.values, head(), block.first, block.count,
                                   problem_.value_dim, value_rows_);
    panel_.logits(block, queries_t_, keys_, tile_);
    gemm<Order::kRows, Update::kOverwrite>(block.count, panel_.columns(), problem_.value_dim,
                                           values.data, values.stride, grad_t_, kStride, slopes_,
                                           kStride);
    if (!has_dropout()) return;
    panel_.dropout(block, factors_);
    for (int64_t j = 0; j < block.count; ++j)
      for (int64_t i = 0; i < panel_.columns(); i += kLanes) {
        const int64_t at = j * kStride + i;
        store(slopes_ + at, load(slopes_ + at) * load(factors_ + at));
      }
  }

  bool has_dropout() const { return problem_.dropout.probability > 0; }

  // Softmax and D anew, by the arithmetic of plain softmax: with few sources dP - D nearly
  // cancels, and a D from saved rows would leave their rounding.
  void statistics_across(Span block) {
    for (int64_t i = 0; i < panel_.columns(); i += kLanes) {
      Vec top = broadcast(-kInfinity), total = {}, delta = {};
      for (int64_t j = 0; j < block.count; ++j)
        top = maximum(top, load(tile_ + j * kStride + i));
      const Vec base = select(top == -kInfinity, Vec{}, top);
      for (int64_t j = 0; j < block.count; ++j) {
        float* at = tile_ + j * kStride + i;
        const Vec weight = exp2((load(at) - base) * kLog2e);
        total += weight;
        store(at, weight);
      }
      const Vec inverse = select(top == -kInfinity, Vec{}, 1.0f / total);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t at = j * kStride + i;
        delta += load(tile_ + at) * inverse * load(slopes_ + at);
      }
      store(inverses_ + i, inverse);
      store(deltas_ + i, delta);
    }
  }

  void saved_statistics() {
    for (int64_t i = 0; i < panel_.columns(); ++i) {
      bases_[i] = kInfinity;
      inverses_[i] = 0.0f;
      deltas_[i] = 0.0f;
      if (i >= panel_.targets.count) continue;
      const int64_t target = panel_.targets.first + i;
      bases_[i] = saved_.softmax.base(target, head());
      inverses_[i] = saved_.softmax.factor(target, head());
      if (bases_[i] == kInfinity) continue;
      read_row(saved_.out.at(0, head(), target), saved_.out.type, problem_.value_dim,
               row_);
      Vec delta = {};
      for (int64_t d = 0; d < problem_.value_width; d += kLanes)
        delta += load(row_ + d) * load(grads_.data + i * grads_.stride + d);
      deltas_[i] = sum(delta);
    }
  }

  void statistics_within() {
    const int64_t size = panel_.rows_in_use() * kPanel;
    auto plus = [](auto a, auto b) { return a + b; };
    fill(bases_, size, -kInfinity);
    fill(inverses_, size, 0.0f);
    fill(deltas_, size, 0.0f);
    for_each_block([&](Span block) {
      read(block);
      for_each_vector(block, [&](int64_t, const Lanes& lanes, int64_t row, int64_t at,
                                 int64_t i) {
        lanes.change(bases_ + row, i, load(tile_ + at),
                     [](Vec a, Vec b) { return maximum(a, b); });
      });
    });
    panel_.merge_relations(bases_, [](float a, float b) { return b > a || b != b ? b : a; });
    for (int64_t at = 0; at < size; ++at)
      if (bases_[at] == -kInfinity) bases_[at] = 0.0f;
    auto weight = [&](const Lanes& lanes, int64_t row, int64_t at, int64_t i) {
      return exp2((load(tile_ + at) - lanes.pick(bases_ + row, i)) * kLog2e);
    };
    for_each_block([&](Span block) {
      if (!whole()) read(block);
      for_each_vector(block, [&](int64_t, const Lanes& lanes, int64_t row, int64_t at,
                                 int64_t i) {
        const Vec own = weight(lanes, row, at, i);
        lanes.change(inverses_ + row, i, own, plus);
        if (whole()) store(tile_ + at, own);
      });
    });
    panel_.merge_relations(inverses_, plus);
    for (int64_t at = 0; at < size; ++at)
      inverses_[at] = inverses_[at] == 0.0f ? 0.0f : 1.0f / inverses_[at];
    for_each_block([&](Span block) {
      if (!whole()) read(block);
      for_each_vector(block, [&](int64_t, const Lanes& lanes, int64_t row, int64_t at,
                                 int64_t i) {
        const Vec own = whole() ? load(tile_ + at) : weight(lanes, row, at, i);
        const Vec share = own * lanes.pick(inverses_ + row, i) * load(slopes_ + at);
        lanes.change(deltas_ + row, i, share, plus);
      });
    });
    panel_.merge_relations(deltas_, plus);
  }

  template <bool WITHIN>
  void add_block(Span block) {
    auto statistic = [&](const float* rows, const Lanes& lanes, int64_t row, int64_t i) {
      return WITHIN ? lanes.pick(rows + row, i) : load(rows + i);
    };
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t source = block.first + j, row = row_of(panel_.slot(source), 0);
      const Lanes lanes = panel_.lanes(source);
      Vec over_targets = {};
      for (int64_t i = 0; i < panel_.columns(); i += kLanes) {
        const int64_t at = j * kStride + i;
        if (!lanes.reach(i)) {
          store(tile_ + at, Vec{});
          store(slopes_ + at, Vec{});
          continue;
        }
        Vec weight = load(tile_ + at);
        if (!whole()) weight = exp2((weight - statistic(bases_, lanes, row, i)) * kLog2e);
        weight *= statistic(inverses_, lanes, row, i);
        Vec slope = weight * (load(slopes_ + at) - statistic(deltas_, lanes, row, i));
        if (!problem_.is_dot) {
          const Vec x = panel_.before_activation(source, lanes.pick(panel_.base(source), i));
          slope = select(x > 0.0f, slope, slope * problem_.negative_slope);
        }
        over_targets += slope;
        lanes.change(by_relation_ + row, i, slope, [](Vec a, Vec b) { return a + b; });
        store(slopes_ + at, problem_.is_dot ? slope * problem_.scale : slope);
        store(tile_ + at, has_dropout() ? weight * load(factors_ + at) : weight);
      }
      if (!problem_.is_dot) sums_.to_source[source - sums_.first_source] += sum(over_targets);
    }
    const int64_t first = block.first - sums_.first_source, targets = panel_.targets.count;
    gemm<Order::kRows, Update::kAdd>(block.count, problem_.value_width, targets, tile_, kStride,
                                     grads_.data, grads_.stride, sums_.values + first * sums_.stride,
                                     sums_.stride);
    if (!problem_.is_dot) return;
    gemm<Order::kRows, Update::kAdd>(block.count, problem_.depth_width, targets, slopes_, kStride,
                                     queries_.data, queries_.stride,
                                     sums_.to_source + first * problem_.depth_width,
                                     problem_.depth_width);
    gemm<Order::kColumns, Update::kAdd>(targets, problem_.depth_width, block.count, slopes_,
                                        kStride, keys_.data, keys_.stride, dq_,
                                        problem_.depth_width);
  }

  void write_targets() {
    for (int64_t i = 0; i < panel_.targets.count; ++i) {
      const int64_t target = panel_.targets.first + i;
      float own = 0.0f;
      for (int64_t row = 0; row < panel_.rows_in_use(); ++row) {
        const int32_t relation = panel_.relations()[row * kPanel + i];
        if (relation < 0) continue;
        own += by_relation_[row * kPanel + i];
        sums_.rel[relation] += by_relation_[row * kPanel + i];
      }
      if (problem_.is_dot)
        write_row(gradients_.queries.at(0, head(), target), gradients_.queries.type,
                  problem_.depth, dq_ + i * problem_.depth_width);
      else
        gradients_.dst.at(target, head()) = own;
    }
  }

  const Problem& problem_;
  const Saved& saved_;
  const Gradients& gradients_;
  Panel panel_;
  Scratch scratch_;
  float *natural_, *queries_t_, *dq_, *grad_, *grad_t_, *key_rows_, *value_rows_;
  float *tile_, *slopes_, *factors_;               // [source][target]
  float *by_relation_;                             // [slot][direction][target]
  float *bases_, *inverses_, *deltas_;             // the same within relations, else [target]
  float *row_, *beside_;
  Sums sums_{};
  Block grads_{nullptr, 0}, queries_{nullptr, 0}, keys_{nullptr, 0};
};

}  // namespace rdfkern::relation_attention
