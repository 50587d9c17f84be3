// Sums of whole blocks of rows, for long ranges, and the weights that means give to rows.
#pragma once

#include "relation_bands.h"

namespace rdfkern {

// totals row b = the sum of x rows [b kTotal, (b + 1) kTotal), for b in [first, last).
template <class Op, bool WEIGHTED>
void total_blocks(const Block& x, int64_t width, const float* weights, int64_t first, int64_t last,
                  float* totals) {
  for (int64_t block = first; block < last; ++block)
    for_each_columns(padded(width), [&](int64_t at, auto vectors) {
      Running<Op, decltype(vectors)::value> running;
      running.start();
      for (int64_t row = block * kTotal; row < (block + 1) * kTotal; ++row) {
        const float* source = x.data + row * x.stride + at;
        if constexpr (WEIGHTED) running.join(source, weights[row]);
        else running.join(source);
      }
      float* target = totals + block * x.stride + at;
      for (int n = 0; n < decltype(vectors)::value; ++n)
        store(target + n * kLanes, running.values[n]);
    });
}

template <class Op>
void BandView::prepare_totals(const Block& x, int64_t width) {
  if (!has_long_ranges()) return;
  const int64_t blocks = graph_.rows() / kTotal;
  totals_ = Buffer(blocks * x.stride);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    total_blocks<Op, false>(x, width, nullptr, begin, end, totals_.data());
  });
  for (BandTile& tile : tiles_)
    for (Band& band : tile.parts) band.totals = totals_.data();
}

inline void BandView::weigh_by_counts(const BandView& targets, const Block& x, int64_t width) {
  std::vector<int64_t> first_slot;
  struct Heard {
    int64_t relation, other;
    int first, last;
  };
  std::vector<std::vector<Heard>> heard(graph_.groups.size());
  int64_t weight_floats = 0, total_blocks_of_slots = 0;
  for (size_t g = 0; g < graph_.groups.size(); ++g) {
    const Group& group = graph_.groups[g];
    targets.for_each_band(group, [&](int64_t relation, int64_t other, int first, int last) {
      heard[g].push_back({relation, other, first, last});
    });
    std::stable_sort(heard[g].begin(), heard[g].end(),
                     [](const Heard& a, const Heard& b) { return a.relation < b.relation; });
    first_slot.push_back(slots_.size());
    for (const Heard& band : heard[g]) {
      if (int64_t(slots_.size()) > first_slot.back() && slots_.back().relation == band.relation)
        continue;
      slots_.push_back({band.relation, int64_t(g)});
      weight_floats += group.size();
      total_blocks_of_slots += group.size() / kTotal + 1;
    }
  }
  first_slot.push_back(slots_.size());
  weights_ = Buffer(weight_floats);
  if (has_long_ranges()) totals_ = Buffer(total_blocks_of_slots * x.stride);
  int64_t weights_at = 0, totals_at = 0;
  for (Slot& slot : slots_) {
    const Group& group = graph_.groups[slot.group];
    slot.weights = weights_.data() + weights_at - group.begin;
    weights_at += group.size();
    if (!has_long_ranges()) continue;
    slot.totals = totals_.data() + (totals_at - group.begin / kTotal) * x.stride;
    totals_at += group.size() / kTotal + 1;
  }
  for_each_task(graph_.groups.size(), [&](auto next) {
    std::vector<int64_t> low, high, counts;
    for (int64_t g = next(); g >= 0; g = next()) {
      const Group& group = graph_.groups[g];
      low.resize(group.size() + kLongs);
      high.resize(group.size() + kLongs);
      auto band = heard[g].begin();
      for (int64_t s = first_slot[g]; s < first_slot[g + 1]; ++s) {
        const Slot& slot = slots_[s];
        counts.assign(group.size(), 0);
        for (; band != heard[g].end() && band->relation == slot.relation; ++band) {
          targets.ranges(graph_.groups[band->other], band->first, band->last, group.begin,
                         group.end, low.data(), high.data());
          for (int64_t i = 0; i < group.size(); ++i) counts[i] += high[i] - low[i];
        }
        for (int64_t i = 0; i < group.size(); ++i)
          slot.weights[group.begin + i] = counts[i] ? 1.0f / counts[i] : 0.0f;
        if (slot.totals)
          total_blocks<Sum, true>(x, width, slot.weights, (group.begin + kTotal - 1) / kTotal,
                                  group.end / kTotal, slot.totals);
      }
    }
  });
  for (BandTile& tile : tiles_)
    for (Band& band : tile.parts) {
      const auto begin = slots_.begin() + first_slot[band.other];
      const auto end = slots_.begin() + first_slot[band.other + 1];
      const auto slot = std::lower_bound(
          begin, end, band.relation,
          [](const Slot& candidate, int64_t relation) { return candidate.relation < relation; });
      band.weights = slot->weights;
      band.totals = slot->totals;
    }
}

}  // namespace rdfkern
