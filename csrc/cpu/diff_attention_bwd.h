// What the backward pass reads and writes, its tasks, and the rows that a task will need.
#pragma once

#include "diff_attention.h"
#include "diff_attention_whole.h"

namespace rdfkern {

struct Saved {
  Rows grad_out;
  // Where a task may see a part of its keys, both, with one map o alone; o also for a norm.
  std::optional<Rows> o2, o;
  const float* lse;
  int64_t lse_map_stride, lse_batch_stride, lse_head_stride;
};

struct Gradients {
  Rows q[2], k[2], v;
  std::optional<Coefficient> lam;
  Coefficient alpha;
  float* norm_weight;  // (value_dim) or null
};

struct BackwardTask {
  int64_t sequence, kv_head, chunk;
  int64_t cost;
};

// The rows of a task's keys, of long sequences none: there, few of them are needed at a time.
inline void foresee_keys(const Problem& problem, const BackwardTask& task, const Rows (&k)[2],
                         const Rows& v, Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  if (sequence.keys > kBlockKeys) return;
  auto add = [&](const Rows& rows, int64_t size) {
    ahead.add(rows, sequence.batch, task.kv_head, sequence.first_key, sequence.keys, size);
  };
  for (int map = 0; map < problem.maps; ++map) add(k[map], problem.head_dim);
  add(v, problem.value_dim);
}

// Those of the queries of its first head.
inline void foresee_queries(const Problem& problem, const BackwardTask& task, const Rows& rows,
                            int64_t size, Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  if (sequence.keys <= kBlockKeys)
    ahead.add(rows, sequence.batch, task.kv_head * (problem.heads / problem.kv_heads),
              sequence.first_query, std::min(sequence.queries, 2 * kPanel), size);
}

inline void foresee_rows(const Problem& problem, const Saved& saved, const BackwardTask& task,
                         Ahead& ahead) {
  foresee_keys(problem, task, problem.k, problem.v, ahead);
  if (problem.has_norm()) foresee_queries(problem, task, *saved.o, problem.value_dim, ahead);
  foresee_queries(problem, task, saved.grad_out, problem.value_dim, ahead);
  for (int map = 0; map < problem.maps; ++map)
    foresee_queries(problem, task, problem.q[map], problem.head_dim, ahead);
}

inline void foresee_sums(const Problem& problem, const Gradients& gradients,
                         const BackwardTask& task, Ahead& ahead) {
  foresee_keys(problem, task, gradients.k, gradients.v, ahead);
  for (int map = 0; map < problem.maps; ++map)
    foresee_queries(problem, task, gradients.q[map], problem.head_dim, ahead);
}

}  // namespace rdfkern
