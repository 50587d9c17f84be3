// What a panel of queries brings to its backward pass: rows, transposed rows and constants of rows.
#pragma once

#include "diff_attention_bwd.h"

namespace rdfkern {

class PanelRows {
 public:
  Block queries[2];                          // [kPanel][head_width]
  float *queries_t[2], *grad_t;              // [width][kPanelStride]
  float* grad_natural;                       // [kPanel][value_width]
  // A weight is exp2(score - lse) * unrounded: float holds lse too coarsely for its exponential.
  float lse[2][kPanel], unrounded[2][kPanel];
  float delta[2][kPanel], alpha[kPanel], lam[kPanel];
  float dalpha[kPanel];

  static int64_t floats(const Problem& problem) {
    return (2 * problem.head_width + problem.value_width) * (kPanelStride + kPanel) +
           2 * problem.value_width;
  }

  PanelRows(const Problem& problem, const Saved& saved, Scratch& scratch)
      : problem_(problem), saved_(saved) {
    for (int map = 0; map < 2; ++map) {
      queries_t[map] = scratch.take(problem.head_width * kPanelStride);
      queries_natural_[map] = scratch.take(kPanel * problem.head_width);
    }
    grad_t = scratch.take(problem.value_width * kPanelStride);
    grad_natural = scratch.take(kPanel * problem.value_width);
    o_ = scratch.take(problem.value_width);
    o2_ = scratch.take(problem.value_width);
  }

  // Of a panel that is whole, delta and lse come with its weights, and nothing saved is read but
  // what a norm needs.
  void prepare(const Panel& panel, bool whole, float* norm_partial) {
    const int64_t value_dim = problem_.value_dim, value_width = problem_.value_width;
    for (int64_t i = 0; i < panel.count; ++i) {
      float* grad = grad_natural + i * value_width;
      auto read = [&](const Rows& source, float* target) {
        read_row(source.at(panel.sequence.batch, panel.head, panel.row(i)), source.type, value_dim,
                 target);
      };
      read(saved_.grad_out, grad);
      if (problem_.has_norm() || !whole) read(*saved_.o, o_);
      if (problem_.has_norm()) normalise(grad, o_, norm_partial);
      alpha[i] = panel.alpha(i);
      lam[i] = panel.lam(i);
      if (whole) continue;
      if (problem_.maps == 2) read(*saved_.o2, o2_);
      read_saved(panel, i);
    }
    for (int64_t i = panel.count; i < panel.columns(); ++i) {
      alpha[i] = lam[i] = 0.0f;
      clear(i);
    }
    if (whole)
      for (int64_t i = 0; i < panel.count; ++i) clear(i);
    fill_zeros(dalpha, kPanel);
    transpose_rows({grad_natural, value_width}, panel.count, value_width, 1.0f, grad_t,
                   kPanelStride);
    for (int map = 0; map < problem_.maps; ++map)
      queries[map] = panel.read_queries(read_rows, map, queries_natural_[map], queries_t[map]);
  }

 private:
  void clear(int64_t i) {
    delta[0][i] = delta[1][i] = 0.0f;
    lse[0][i] = lse[1][i] = kInfinity;
    unrounded[0][i] = unrounded[1][i] = 1.0f;
  }

  // D1 = dO . (alpha O1) and D2 = dO . O2 of a row, and the logarithms of its sums.
  void read_saved(const Panel& panel, int64_t i) {
    const float* grad = grad_natural + i * problem_.value_width;
    Vec first = {}, second = {};
    for (int64_t d = 0; d < problem_.value_width; d += kLanes) {
      first += load(grad + d) * load(o_ + d);
      if (problem_.maps == 2) second += load(grad + d) * load(o2_ + d);
    }
    delta[1][i] = sum(second);
    delta[0][i] = sum(first) + lam[i] * delta[1][i];
    for (int map = 0; map < problem_.maps; ++map) {
      const float natural =
          saved_.lse[map * saved_.lse_map_stride + panel.sequence.batch * saved_.lse_batch_stride +
                     panel.head * saved_.lse_head_stride + panel.row(i)];
      // A dead row's +inf makes every one of its weights zero.
      const double binary = natural == -kInfinity ? double(kInfinity) : natural / kLn2;
      lse[map][i] = float(binary);
      unrounded[map][i] =
          natural == -kInfinity ? 1.0f : float(std::exp2(lse[map][i] - binary));
    }
  }

  // grad of the normed row -> grad of the row o; the weight's share goes to norm_partial.
  void normalise(float* grad, const float* o, float* norm_partial) const {
    const int64_t value_dim = problem_.value_dim;
    double squares = 0, overlap = 0;
    for (int64_t d = 0; d < value_dim; ++d) squares += double(o[d]) * o[d];
    const double inverse = 1.0 / std::sqrt(squares / value_dim + problem_.norm_eps);
    for (int64_t d = 0; d < value_dim; ++d) {
      const float scaled = problem_.out_scale * grad[d];
      if (norm_partial) norm_partial[d] += float(scaled * (o[d] * inverse));
      grad[d] = problem_.norm_weight ? scaled * problem_.norm_weight[d] : scaled;
      overlap += double(grad[d]) * o[d];
    }
    const double shared = inverse * inverse * (overlap / value_dim);
    for (int64_t d = 0; d < value_dim; ++d) grad[d] = float(inverse * (grad[d] - o[d] * shared));
  }

  const Problem& problem_;
  const Saved& saved_;
  float *queries_natural_[2], *o_, *o2_;
};

}  // namespace rdfkern
