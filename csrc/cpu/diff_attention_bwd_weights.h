// Weights and their gradients: from saved rows, block by block, or anew where all keys are at hand.
#pragma once

#include "diff_attention_bwd_rows.h"
#include "diff_attention_whole.h"

namespace rdfkern {

// tiles: scores 1, scores 2, dP (and dropout factors) -> scale * dS1, scale * dS2,
// alpha P1 - lam P2.
template <bool DROPOUT>
inline void differentiate(const Panel& panel, PanelRows& rows, int64_t keys,
                          float* const (&tiles)[5]) {
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
      const Vec p1 = exp2(load(tiles[0] + at) * factor - lse1);
      const Vec p2 = exp2(load(tiles[1] + at) * factor - lse2);
      const Vec grad = load(tiles[2] + at);
      Vec grad1 = grad, grad2 = grad, kept1 = p1, kept2 = p2;
      if constexpr (DROPOUT) {
        const Vec factor1 = load(tiles[3] + at), factor2 = load(tiles[4] + at);
        grad1 *= factor1;
        grad2 *= factor2;
        kept1 *= factor1;
        kept2 *= factor2;
      }
      dalpha += p1 * grad1;
      store(tiles[0] + at, p1 * (scaled_alpha * grad1 - delta1));
      store(tiles[1] + at, p2 * (delta2 - scaled_lam * grad2));
      store(tiles[2] + at, alpha * kept1 - lam * kept2);
    }
    store(rows.dalpha + i, load(rows.dalpha + i) + dalpha * unrounded1);
  }
}

// The same where every key is at hand: softmax and D anew, by the arithmetic of plain softmax. With
// few keys dP - D nearly cancels, and a D from saved rows would leave their rounding.
template <bool DROPOUT>
inline void differentiate_whole(const Panel& panel, PanelRows& rows, int64_t keys,
                                float* const (&tiles)[5]) {
  for (int64_t i = 0; i < panel.columns(); i += kLanes) {
    Vec inverse[2], delta[2];
    for (int map = 0; map < 2; ++map) {
      inverse[map] = softmax_whole(tiles[map] + i, keys, kPanelStride, panel.factor()).inverse;
      delta[map] = sum_over(keys, [&](int64_t j) {
        const int64_t at = j * kPanelStride + i;
        Vec grad = load(tiles[2] + at);
        if constexpr (DROPOUT) grad *= load(tiles[3 + map] + at);
        return load(tiles[map] + at) * inverse[map] * grad;
      });
      store(rows.delta[map] + i, delta[map]);
    }
    const Vec alpha = load(rows.alpha + i), lam = load(rows.lam + i);
    const Vec scaled_alpha = alpha * panel.problem.scale, scaled_lam = lam * panel.problem.scale;
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kPanelStride + i;
      const Vec p1 = load(tiles[0] + at) * inverse[0], p2 = load(tiles[1] + at) * inverse[1];
      const Vec grad = load(tiles[2] + at);
      Vec grad1 = grad, grad2 = grad, kept1 = p1, kept2 = p2;
      if constexpr (DROPOUT) {
        const Vec factor1 = load(tiles[3] + at), factor2 = load(tiles[4] + at);
        grad1 *= factor1;
        grad2 *= factor2;
        kept1 *= factor1;
        kept2 *= factor2;
      }
      store(tiles[0] + at, scaled_alpha * (p1 * (grad1 - delta[0])));
      store(tiles[1] + at, scaled_lam * (p2 * (delta[1] - grad2)));
      store(tiles[2] + at, alpha * kept1 - lam * kept2);
    }
    store(rows.dalpha + i, delta[0]);
  }
}

}  // namespace rdfkern
