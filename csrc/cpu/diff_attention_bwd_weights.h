// Weights and their gradients: from saved rows, block by block, or anew where all keys are at hand.
#pragma once

#include "diff_attention_bwd_rows.h"
#include "diff_attention_whole.h"

namespace rdfkern {

// [key][query]
struct Tiles {
  float* kept[3];     // scores 1, scores 2, dP -> scale * dS1, scale * dS2, alpha P1 - lam P2
  float* factors[2];  // of the dropout, of one block of keys

  Tiles from(int64_t key) const {
    const int64_t at = key * kPanelStride;
    return {{kept[0] + at, kept[1] + at, kept[2] + at}, {factors[0], factors[1]}};
  }
};

template <int MAPS, bool DROPOUT>
inline void differentiate(const Panel& panel, PanelRows& rows, int64_t keys, const Tiles& tiles) {
  const float factor = panel.factor();
  for (int64_t i = 0; i < panel.columns(); i += kLanes) {
    const Vec lse1 = load(rows.lse[0] + i), lse2 = load(rows.lse[1] + i);
    const Vec unrounded1 = load(rows.unrounded[0] + i), unrounded2 = load(rows.unrounded[1] + i);
    const Vec alpha = load(rows.alpha + i) * unrounded1, lam = load(rows.lam + i) * unrounded2;
    const Vec scaled_alpha = alpha * panel.problem.scale, scaled_lam = lam * panel.problem.scale;
    const Vec delta1 = load(rows.delta[0] + i) * unrounded1 * panel.problem.scale;
    const Vec delta2 = load(rows.delta[1] + i) * scaled_lam;
    Vec dalpha = {};
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kPanelStride + i;
      const Vec grad = load(tiles.kept[2] + at);
      const Vec p1 = exp2(load(tiles.kept[0] + at) * factor - lse1);
      const Vec factor1 = DROPOUT ? load(tiles.factors[0] + at) : Vec{} + 1.0f;
      const Vec grad1 = grad * factor1;
      Vec applied = alpha * (p1 * factor1);
      dalpha += p1 * grad1;
      store(tiles.kept[0] + at, p1 * (scaled_alpha * grad1 - delta1));
      if constexpr (MAPS == 2) {
        const Vec p2 = exp2(load(tiles.kept[1] + at) * factor - lse2);
        const Vec factor2 = DROPOUT ? load(tiles.factors[1] + at) : Vec{} + 1.0f;
        applied -= lam * (p2 * factor2);
        store(tiles.kept[1] + at, p2 * (delta2 - scaled_lam * (grad * factor2)));
      }
      store(tiles.kept[2] + at, applied);
    }
    store(rows.dalpha + i, load(rows.dalpha + i) + dalpha * unrounded1);
  }
}

// The same where every key is at hand: softmax and D anew, by the arithmetic of plain softmax. With
// few keys dP - D nearly cancels, and a D from saved rows would leave their rounding.
class WholePanel {
 public:
  // tiles: the same with weights before normalisation in the place of scores
  void add(int64_t block, const Panel& panel, int64_t keys, const Tiles& tiles, bool dropout) {
    for (int64_t i = 0; i < panel.columns(); i += kLanes)
      for (int map = 0; map < panel.problem.maps; ++map) {
        float* const column = tiles.kept[map] + i;
        const Vec inverse = softmax_[map].add(block, column, keys, i, panel.factor());
        const Vec delta = sum_over(keys, [&](int64_t j) {
          const int64_t at = j * kPanelStride;
          const Vec term = load(column + at) * inverse * load(tiles.kept[2] + i + at);
          return dropout ? term * load(tiles.factors[map] + i + at) : term;
        });
        store(deltas_[map][block] + i, delta);
      }
  }

  void merge(const Panel& panel, PanelRows& rows, int64_t blocks) {
    for (int64_t i = 0; i < panel.columns(); i += kLanes)
      for (int map = 0; map < panel.problem.maps; ++map) {
        softmax_[map].merge(blocks, i);
        Vec delta = {};
        for (int64_t b = 0; b < blocks; ++b)
          delta += load(deltas_[map][b] + i) * softmax_[map].mass(b, i);
        store(rows.delta[map] + i, delta);
        if (map == 0) store(rows.dalpha + i, delta);
      }
  }

  template <int MAPS, bool DROPOUT>
  void differentiate(int64_t block, const Panel& panel, const PanelRows& rows, int64_t keys,
                     const Tiles& tiles) const {
    float* const(&kept)[3] = tiles.kept;
    for (int64_t i = 0; i < panel.columns(); i += kLanes) {
      const Vec share1 = softmax_[0].share(block, i);
      const Vec share2 = MAPS == 2 ? softmax_[1].share(block, i) : Vec{};
      const Vec delta1 = load(rows.delta[0] + i), delta2 = load(rows.delta[1] + i);
      const Vec alpha = load(rows.alpha + i), lam = load(rows.lam + i);
      const Vec scaled_alpha = alpha * panel.problem.scale, scaled_lam = lam * panel.problem.scale;
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * kPanelStride + i;
        const Vec grad = load(kept[2] + at);
        const Vec p1 = load(kept[0] + at) * share1;
        const Vec factor1 = DROPOUT ? load(tiles.factors[0] + at) : Vec{} + 1.0f;
        Vec applied = alpha * (p1 * factor1);
        store(kept[0] + at, scaled_alpha * (p1 * (grad * factor1 - delta1)));
        if constexpr (MAPS == 2) {
          const Vec p2 = load(kept[1] + at) * share2;
          const Vec factor2 = DROPOUT ? load(tiles.factors[1] + at) : Vec{} + 1.0f;
          applied -= lam * (p2 * factor2);
          store(kept[1] + at, scaled_lam * (p2 * (delta2 - grad * factor2)));
        }
        store(kept[2] + at, applied);
      }
    }
  }

 private:
  WholeSoftmax softmax_[2];
  float deltas_[2][kBlocks][kPanel];
};

}  // namespace rdfkern
