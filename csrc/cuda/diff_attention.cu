// Launches of the kernels of differential attention, and their registration as private operators.
#include <torch/csrc/stable/library.h>

#include "diff_attention_bwd.cuh"
#include "diff_attention_fwd.cuh"
#include "launch.h"

namespace rdfkern {
namespace {

Coefficient coefficient_of(const Tensor& tensor) {
  return {static_cast<const float*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

Problem problem_of(const Tensor& q1, const Tensor& k1, const std::optional<Tensor>& q2,
                   const std::optional<Tensor>& k2, const Tensor& v,
                   const std::optional<Tensor>& lam, const Tensor& alpha,
                   const std::optional<Tensor>& attn_mask,
                   const std::optional<Tensor>& key_padding_mask,
                   const std::optional<Tensor>& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_k,
                   const std::optional<Tensor>& norm_weight, int64_t left, int64_t right,
                   double scale, double norm_eps, double out_scale, double dropout_p,
                   int64_t seed) {
  STD_TORCH_CHECK(q1.size(3) <= kMaxWidth && v.size(3) <= kMaxWidth, "head dims go up to 256");
  Problem problem{q2 ? 2 : 1,
                  {rows_of(q1), rows_of(q2)},
                  {rows_of(k1), rows_of(k2)},
                  rows_of(v),
                  lam ? coefficient_of(*lam) : Coefficient{},
                  coefficient_of(alpha)};
  if (attn_mask)
    problem.mask = {static_cast<char*>(attn_mask->data_ptr()), kind_of(*attn_mask),
                    attn_mask->stride(0), attn_mask->stride(1), attn_mask->stride(2),
                    attn_mask->stride(3)};
  if (key_padding_mask) {
    problem.padding = data_of<const bool>(key_padding_mask);
    problem.padding_batch_stride = cu_seqlens_k ? 0 : key_padding_mask->stride(0);
    problem.padding_row_stride = key_padding_mask->stride(key_padding_mask->dim() - 1);
  }
  problem.norm_weight = data_of<const float>(norm_weight);
  problem.norm_eps = float(norm_eps);
  problem.out_scale = float(out_scale);
  problem.scale = float(scale);
  problem.left = left;
  problem.right = right;
  problem.dropout = {dropout_p, uint64_t(seed)};
  problem.cu_seqlens_q = data_of<const int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = data_of<const int32_t>(cu_seqlens_k);
  problem.batch = q1.size(0);
  problem.heads = q1.size(1);
  problem.kv_heads = k1.size(1);
  problem.total_queries = q1.size(2);
  problem.total_keys = k1.size(2);
  problem.head_dim = int(q1.size(3));
  problem.value_dim = int(v.size(3));
  return problem;
}

int64_t sequences_of(const Problem& problem, const std::optional<Tensor>& cu_seqlens) {
  return cu_seqlens ? cu_seqlens->size(0) - 1 : problem.batch;
}

template <int ROWS, int WIDTH>
void launch_forward(const Launcher& launcher, const Problem& problem, const Outputs& outputs,
                    int64_t sequences, int64_t longest) {
  const int64_t tiles = tiles_of(longest, ROWS), blocks = tiles * problem.heads * sequences;
  if (problem.maps == 1)
    launcher.run<ForwardMemory<ROWS, WIDTH, 1>>(forward_kernel<ROWS, WIDTH, 1>, blocks, problem,
                                                outputs, int(tiles));
  else
    launcher.run<ForwardMemory<ROWS, WIDTH, 2>>(forward_kernel<ROWS, WIDTH, 2>, blocks, problem,
                                                outputs, int(tiles));
}

template <int ROWS, int WIDTH>
void launch_query_gradients(const Launcher& launcher, const Problem& problem,
                            const Gradients& gradients, int64_t sequences, int64_t longest) {
  const int64_t tiles = tiles_of(longest, ROWS);
  launcher.run<QueryMemory<ROWS, WIDTH>>(
      problem.maps == 1 ? query_gradients_kernel<ROWS, WIDTH, 1>
                        : query_gradients_kernel<ROWS, WIDTH, 2>,
      tiles * problem.heads * sequences, problem, gradients, int(tiles));
}

template <int ROWS, int HEAD_WIDTH, int VALUE_WIDTH>
void launch_key_gradients(const Launcher& launcher, const Problem& problem,
                          const Gradients& gradients, int64_t sequences, int64_t longest) {
  constexpr int WIDTH = HEAD_WIDTH > VALUE_WIDTH ? HEAD_WIDTH : VALUE_WIDTH;
  const int64_t tiles = tiles_of(longest, ROWS);
  launcher.run<KeyMemory<ROWS, WIDTH>>(
      problem.maps == 1 ? key_gradients_kernel<ROWS, HEAD_WIDTH, VALUE_WIDTH, 1>
                        : key_gradients_kernel<ROWS, HEAD_WIDTH, VALUE_WIDTH, 2>,
      tiles * problem.kv_heads * sequences, problem, gradients, int(tiles));
}

// Sums live in registers, so a wide head leaves room for fewer rows.
void forward(const Tensor& q1, const Tensor& k1, const std::optional<Tensor>& q2,
             const std::optional<Tensor>& k2, const Tensor& v, const std::optional<Tensor>& lam,
             const Tensor& alpha,
             const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
             const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
             const std::optional<Tensor>& norm_weight, int64_t left, int64_t right, double scale,
             double norm_eps, double out_scale, double dropout_p, int64_t seed,
             int64_t longest_queries, const Tensor& out, const Tensor& lse,
             const std::optional<Tensor>& o2, const std::optional<Tensor>& o) {
  const Problem problem = problem_of(q1, k1, q2, k2, v, lam, alpha, attn_mask, key_padding_mask,
                                     cu_seqlens_q, cu_seqlens_k, norm_weight, left, right, scale,
                                     norm_eps, out_scale, dropout_p, seed);
  const Outputs outputs{rows_of(out), rows_of(o2), rows_of(o),
                        static_cast<float*>(lse.data_ptr())};
  const Launcher launcher(q1);
  const auto launch = problem.value_dim <= 64    ? launch_forward<64, 64>
                      : problem.value_dim <= 128 ? launch_forward<64, 128>
                                                 : launch_forward<32, 256>;
  launch(launcher, problem, outputs, sequences_of(problem, cu_seqlens_q), longest_queries);
}

// Returns the partial sums of dnorm_weight, (parts, value_dim); (0) without a norm_weight.
Tensor backward(const Tensor& grad_out, const Tensor& q1, const Tensor& k1,
                const std::optional<Tensor>& q2, const std::optional<Tensor>& k2, const Tensor& v,
                const std::optional<Tensor>& lam, const Tensor& alpha,
                const std::optional<Tensor>& attn_mask,
                const std::optional<Tensor>& key_padding_mask,
                const std::optional<Tensor>& cu_seqlens_q,
                const std::optional<Tensor>& cu_seqlens_k,
                const std::optional<Tensor>& norm_weight, int64_t left, int64_t right,
                double scale, double norm_eps, double out_scale, double dropout_p, int64_t seed,
                int64_t longest_queries, int64_t longest_keys, const Tensor& lse,
                const std::optional<Tensor>& o2, const Tensor& o, const Tensor& dq1,
                const Tensor& dk1, const std::optional<Tensor>& dq2,
                const std::optional<Tensor>& dk2, const Tensor& dv,
                const std::optional<Tensor>& dlam, const Tensor& dalpha) {
  const Problem problem = problem_of(q1, k1, q2, k2, v, lam, alpha, attn_mask, key_padding_mask,
                                     cu_seqlens_q, cu_seqlens_k, norm_weight, left, right, scale,
                                     norm_eps, out_scale, dropout_p, seed);
  const int64_t rows = problem.batch * problem.heads * problem.total_queries;
  const int64_t parts = tiles_of(rows, kRowsPerBlock);
  const Tensor terms = torch::stable::new_empty(lse, {2 * kTerms * rows});
  const Tensor partials =
      norm_weight ? torch::stable::new_empty(lse, {parts, problem.value_dim})
                  : torch::stable::new_empty(lse, {0});
  std::optional<Tensor> grad_o;
  if (norm_eps >= 0)
    grad_o = torch::stable::new_empty(
        lse, {problem.batch, problem.heads, problem.total_queries, problem.value_dim});
  const Saved saved{rows_of(grad_out), rows_of(o2), rows_of(o),
                    static_cast<const float*>(lse.data_ptr())};
  const Gradients gradients{{rows_of(dq1), rows_of(dq2)},
                            {rows_of(dk1), rows_of(dk2)},
                            rows_of(dv),
                            rows_of(grad_o ? *grad_o : grad_out),
                            data_of<float>(dlam),
                            static_cast<float*>(dalpha.data_ptr()),
                            norm_weight ? static_cast<float*>(partials.data_ptr()) : nullptr,
                            static_cast<float*>(terms.data_ptr())};
  const Launcher launcher(q1);
  launcher.run<RowsMemory>(rows_kernel, parts, problem, saved, gradients);
  const int head = problem.head_dim, value = problem.value_dim;
  const auto launch_queries = head <= 64    ? launch_query_gradients<64, 64>
                              : head <= 128 ? launch_query_gradients<64, 128>
                                            : launch_query_gradients<32, 256>;
  launch_queries(launcher, problem, gradients, sequences_of(problem, cu_seqlens_q),
                 longest_queries);
  const auto launch_keys = head > 128                  ? launch_key_gradients<32, 256, 256>
                           : head > 64 && value > 128  ? launch_key_gradients<32, 128, 256>
                           : head > 64                 ? launch_key_gradients<64, 128, 128>
                           : value > 128               ? launch_key_gradients<32, 64, 256>
                           : value > 64                ? launch_key_gradients<64, 64, 128>
                                                       : launch_key_gradients<64, 64, 64>;
  launch_keys(launcher, problem, gradients, sequences_of(problem, cu_seqlens_q), longest_keys);
  return partials;
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_diff_attention_fwd_cuda(Tensor q1, Tensor k1, Tensor? q2, Tensor? k2, Tensor v, "
      "Tensor? lam, Tensor alpha, Tensor? attn_mask, Tensor? key_padding_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? norm_weight, int left, int right, "
      "float scale, float norm_eps, float out_scale, float dropout_p, int seed, "
      "int longest_queries, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? o2, Tensor(d!)? o) -> ()");
  m.def(
      "_diff_attention_bwd_cuda(Tensor grad_out, Tensor q1, Tensor k1, Tensor? q2, Tensor? k2, "
      "Tensor v, Tensor? lam, Tensor alpha, Tensor? attn_mask, Tensor? key_padding_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? norm_weight, int left, int right, "
      "float scale, float norm_eps, float out_scale, float dropout_p, int seed, "
      "int longest_queries, int longest_keys, Tensor lse, Tensor? o2, Tensor o, Tensor(a!) dq1, "
      "Tensor(b!) dk1, Tensor(c!)? dq2, Tensor(d!)? dk2, Tensor(e!) dv, Tensor(f!)? dlam, "
      "Tensor(g!) dalpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CUDA, m) {
  m.impl("_diff_attention_fwd_cuda", TORCH_BOX(&rdfkern::forward));
  m.impl("_diff_attention_bwd_cuda", TORCH_BOX(&rdfkern::backward));
}
