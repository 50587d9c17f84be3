// out = norm(alpha softmax(q1 k1ᵀ) v - lam softmax(q2 k2ᵀ) v), or of the first map alone: tasks, and
// who computes them.
#include <torch/csrc/stable/library.h>

#include "diff_attention_fwd.h"
#include "diff_attention_whole.h"

namespace rdfkern {
namespace {

std::vector<ForwardTask> tasks_of(const Problem& problem) {
  std::vector<ForwardTask> tasks;
  for (size_t s = 0; s < problem.sequences.size(); ++s) {
    const Sequence& sequence = problem.sequences[s];
    if (has_few_queries(problem, sequence)) continue;
    for (int64_t first = 0; first < sequence.queries; first += kTaskPanels * kPanel) {
      const int64_t count = std::min(sequence.queries - first, kTaskPanels * kPanel);
      const Panel all{problem, sequence, int64_t(s), 0, first, count};
      for (int64_t head = 0; head < problem.heads; ++head)
        tasks.push_back({int64_t(s), head, first, count, all.keys_begin(), all.keys_end()});
    }
  }
  // The longest first, so that no thread is left with a long one at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const ForwardTask& a, const ForwardTask& b) {
    return a.cost() > b.cost();
  });
  return tasks;
}

int64_t keys_of(const ForwardTask& task) { return task.keys_end - task.keys_begin; }

void foresee(const Problem& problem, const ForwardTask& task, Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  auto add_keys = [&](const Rows& rows, int64_t size) {
    ahead.add(rows, sequence.batch, problem.kv_head(task.head),
              sequence.first_key + task.keys_begin, task.keys_end - task.keys_begin, size);
  };
  for (int map = 0; map < problem.maps; ++map) add_keys(problem.k[map], problem.head_dim);
  for (int64_t part = 0; part < problem.value_parts; ++part)
    add_keys(problem.values(part), problem.part_dim);
  for (int map = 0; map < problem.maps; ++map)
    ahead.add(problem.q[map], sequence.batch, task.head, sequence.first_query + task.first,
              task.count, problem.head_dim);
}

// Of the products of a task, about.
int64_t tiles_of(const Problem& problem, const ForwardTask& task) {
  const int64_t key_tiles = keys_of(task) / kTileRows, query_tiles = task.count / kTileRows;
  return problem.maps * key_tiles * task.panels() +
         query_tiles * (problem.value_width / kTileColumns);
}

void run(const Problem& problem, const Outputs& outputs) {
  const std::vector<ForwardTask> tasks = tasks_of(problem);
  for_each_task_ahead(tasks.size(), problem.heads, [&](int64_t index, int64_t following) {
    const ForwardTask& task = tasks[index];
    const Sequence& sequence = problem.sequences[task.sequence];
    Ahead ahead;
    // Of a long sequence few rows are needed at a time.
    if (keys_of(task) <= kBlockKeys)
      ahead.add(outputs.out, sequence.batch, task.head, sequence.first_query + task.first,
                task.count, problem.value_dim);
    if (following >= 0 && keys_of(tasks[following]) <= kBlockKeys)
      foresee(problem, tasks[following], ahead);
    ahead.spread(tiles_of(problem, task));
    (keys_of(task) <= kWholeKeys ? attend_whole : attend_blocks)(problem, outputs, task, ahead);
    ahead.finish();
  });
}

void forward(const Tensor& q1, const Tensor& k1, const std::optional<Tensor>& q2,
             const std::optional<Tensor>& k2, const Tensor& v, const std::optional<Tensor>& lam,
             const Tensor& alpha,
             const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
             const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
             const std::optional<Tensor>& norm_weight, int64_t left, int64_t right, double scale,
             double norm_eps, double out_scale, double dropout_p, int64_t seed, const Tensor& out,
             const Tensor& lse, const std::optional<Tensor>& o2, const std::optional<Tensor>& o) {
  const Problem problem(q1, k1, q2, k2, v, lam, alpha, attn_mask, key_padding_mask, cu_seqlens_q,
                        cu_seqlens_k, norm_weight, left, right, scale, norm_eps, out_scale,
                        dropout_p, seed);
  Outputs outputs{Rows(out), std::nullopt, std::nullopt, static_cast<float*>(lse.data_ptr()),
                  lse.stride(0), lse.stride(1), lse.stride(2)};
  if (o2) outputs.o2.emplace(*o2);
  if (o) outputs.o.emplace(*o);
  ask_for_huge_pages({out, o2, o});
  run(problem, outputs);
  attend_few(problem, outputs);
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_diff_attention_fwd_cpu(Tensor q1, Tensor k1, Tensor? q2, Tensor? k2, Tensor v, "
      "Tensor? lam, Tensor alpha, Tensor? attn_mask, Tensor? key_padding_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? norm_weight, int left, int right, "
      "float scale, float norm_eps, float out_scale, float dropout_p, int seed, Tensor(a!) out, "
      "Tensor(b!) lse, Tensor(c!)? o2, Tensor(d!)? o) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_diff_attention_fwd_cpu", TORCH_BOX(&rdfkern::forward));
}
