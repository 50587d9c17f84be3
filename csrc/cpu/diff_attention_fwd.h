// What both ways of the forward pass share: their tasks, their outputs, and how a row ends.
#pragma once

#include "ahead.h"
#include "diff_attention.h"

namespace rdfkern {

constexpr int64_t kTaskPanels = 2;

struct ForwardTask {
  int64_t sequence, head, first, count, keys_begin, keys_end;

  int64_t panels() const { return (count + kPanel - 1) / kPanel; }
  int64_t cost() const { return std::max<int64_t>(1, keys_end - keys_begin) * padded(count); }
  Panel panel(const Problem& problem, int64_t index) const {
    return {problem, problem.sequences[sequence], sequence, head, first + index * kPanel,
            std::min(kPanel, count - index * kPanel)};
  }
};

struct Outputs {
  Rows out;
  std::optional<Rows> o2, o;  // what backward needs, and forward alone does not
  float* lse;
  int64_t lse_map_stride, lse_batch_stride, lse_head_stride;

  void write_lse(const Panel& panel, int map, int64_t i, float base, float total) const {
    lse[map * lse_map_stride + panel.sequence.batch * lse_batch_stride +
        panel.head * lse_head_stride + panel.row(i)] =
        base == -kInfinity ? -kInfinity : float(kLn2 * (base + std::log2(double(total))));
  }

  // The row before the norm becomes the output.
  void write_out(const Panel& panel, int64_t i, float* row) const {
    const Problem& problem = panel.problem;
    const int64_t batch = panel.sequence.batch, at = panel.row(i);
    if (o) write_row(o->at(batch, panel.head, at), o->type, problem.value_dim, row);
    if (problem.has_norm()) {
      Vec squares = {};
      for (int64_t d = 0; d < problem.value_width; d += kLanes)
        squares += load(row + d) * load(row + d);
      const double mean = double(sum(squares)) / double(problem.value_dim);
      const double factor = problem.out_scale / std::sqrt(mean + problem.norm_eps);
      for (int64_t d = 0; d < problem.value_dim; ++d)
        row[d] = float(row[d] * factor * (problem.norm_weight ? problem.norm_weight[d] : 1.0f));
    }
    write_row(out.at(batch, panel.head, at), out.type, problem.value_dim, row);
  }
};

// Any number of keys, block by block.
void attend_blocks(const Problem& problem, const Outputs& outputs, const ForwardTask& task,
                   Ahead& ahead);
// At most kWholeKeys of them.
void attend_whole(const Problem& problem, const Outputs& outputs, const ForwardTask& task,
                  Ahead& ahead);

// Whether a sequence belongs to attend_few, which computes all that do.
bool has_few_queries(const Problem& problem, const Sequence& sequence);
void attend_few(const Problem& problem, const Outputs& outputs);

}  // namespace rdfkern
