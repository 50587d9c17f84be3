// Gradients of differential attention in one pass: both maps share dP = dO vᵀ and dV. Queries run
// outside, keys inside: dQ stays in the cache and dK, dV add up in memory that one task owns.
#include <torch/csrc/stable/library.h>

#include "diff_attention.h"

namespace rdfkern {
namespace {

constexpr int64_t kKeys = 64;
constexpr int64_t kWholeKeys = 256;  // so many are kept in one block, which then needs nothing saved

struct Saved {
  Rows grad_out, o2, o;  // o is the output itself where there is no norm
  const float* lse;
  int64_t lse_map_stride, lse_batch_stride, lse_head_stride;
};

struct Gradients {
  Rows q[2], k[2], v;
  float *lam, *alpha;  // (batch, head, row), contiguous
  int64_t row_batch_stride, row_head_stride;
  float* norm_weight;  // (value_dim) or null
};

struct Task {
  int64_t sequence, kv_head, chunk;
  int64_t cost;
};

// What one panel of queries brings along: rows, transposed rows, and per-row constants.
struct PanelRows {
  float *queries_t[2], *grad_t;                 // [width][kPanelStride]
  float *queries_natural[2], *grad_natural;     // [kPanel][width]
  float* dq[2];                                 // [kPanel][head_width]
  Block queries[2];
  // A weight is exp2(score - lse) * unrounded: float holds lse too coarsely for its exponential.
  float lse[2][kPanel], unrounded[2][kPanel];
  float delta[2][kPanel], alpha[kPanel], lam[kPanel];
  float dalpha[kPanel];
};

// Where a gradient of keys or values adds up.
struct Sum {
  float* data;
  int64_t stride;

  Sum from(int64_t row) const { return {data + row * stride, stride}; }
};

struct KeyBlock {
  Block keys[2], values;
  Sum dk[2], dv;
  int64_t first, count;
  bool whole;  // these are all the keys that the panel sees
};

class Backward {
 public:
  Backward(const Problem& problem, const Saved& saved, const Gradients& gradients, int64_t chunks)
      : problem_(problem), saved_(saved), gradients_(gradients), chunks_(chunks) {
    for (size_t s = 0; s < problem.sequences.size(); ++s) {
      const Sequence& sequence = problem.sequences[s];
      longest_ = std::max(longest_, sequence.keys);
      for (int64_t head = 0; head < problem.kv_heads; ++head)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          tasks_.push_back({int64_t(s), head, chunk, sequence.queries * (sequence.keys + 64)});
    }
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const Task& a, const Task& b) { return a.cost > b.cost; });
    if (gradients.norm_weight) norm_weight_partials_.assign(tasks_.size() * problem.value_dim, 0);
  }

  // With chunks > 1, phase p pairs key chunk c with query chunk c + p: in one phase no two tasks
  // touch the same gradient, and the order of every sum is fixed.
  void run() {
    for (int64_t phase = 0; phase < chunks_; ++phase)
      for_each_task(tasks_.size(), [&](auto next) {
        for (int64_t task = next(); task >= 0; task = next()) run_task(task, phase);
      });
    if (!gradients_.norm_weight) return;
    fill_zeros(gradients_.norm_weight, problem_.value_dim);
    for (size_t i = 0; i < norm_weight_partials_.size(); ++i)
      gradients_.norm_weight[i % problem_.value_dim] += norm_weight_partials_[i];
  }

 private:
  static int64_t chunk_begin(int64_t length, int64_t chunk, int64_t chunks) {
    const int64_t panels = (length + kPanel - 1) / kPanel;
    return std::min(length, panels * chunk / chunks * kPanel);
  }

  // Several tasks may add to one row then, so the caller has padded the rows.
  bool in_place(const Rows& rows, int64_t size) const {
    return chunks_ > 1 || (rows.type == ScalarType::Float && padded(size) == size);
  }

  void run_task(int64_t index, int64_t phase) {
    const Task& task = tasks_[index];
    const Sequence& sequence = problem_.sequences[task.sequence];
    const int64_t head_width = problem_.head_width, value_width = problem_.value_width;
    const bool in_place_k = in_place(gradients_.k[0], problem_.head_dim);
    const bool in_place_v = in_place(gradients_.v, problem_.value_dim);
    const int64_t key_begin = chunk_begin(sequence.keys, task.chunk, chunks_);
    const int64_t key_end = chunk_begin(sequence.keys, task.chunk + 1, chunks_);
    const int64_t keys = key_end - key_begin;
    Scratch scratch((4 * head_width + 2 * value_width) * kPanelStride +
                    2 * kPanel * head_width + kWholeKeys * (2 * head_width + value_width) +
                    5 * kWholeKeys * kPanelStride + 2 * value_width +
                    longest_ * ((in_place_k ? 0 : 2 * head_width) + (in_place_v ? 0 : value_width)));
    PanelRows rows;
    for (int map = 0; map < 2; ++map) {
      rows.queries_t[map] = scratch.take(head_width * kPanelStride);
      rows.queries_natural[map] = scratch.take(kPanel * head_width);
      rows.dq[map] = scratch.take(kPanel * head_width);
    }
    rows.grad_t = scratch.take(value_width * kPanelStride);
    rows.grad_natural = scratch.take(kPanel * value_width);
    float* key_rows[2] = {scratch.take(kWholeKeys * head_width),
                          scratch.take(kWholeKeys * head_width)};
    float* value_rows = scratch.take(kWholeKeys * value_width);
    float* tiles[5];
    for (float*& tile : tiles) tile = scratch.take(kWholeKeys * kPanelStride);
    float* normed = scratch.take(2 * value_width);

    const int64_t batch = sequence.batch, first_row = sequence.first_key + key_begin;
    auto sum_of = [&](const Rows& rows, bool rows_in_place, int64_t width) {
      const Sum sum = rows_in_place
                          ? Sum{rows.floats(batch, task.kv_head, first_row), rows.row_stride}
                          : Sum{scratch.take(keys * width), width};
      if (phase == 0)
        for (int64_t j = 0; j < keys; ++j) fill_zeros(sum.data + j * sum.stride, width);
      return sum;
    };
    const Sum dk[2] = {sum_of(gradients_.k[0], in_place_k, head_width),
                       sum_of(gradients_.k[1], in_place_k, head_width)};
    const Sum dv = sum_of(gradients_.v, in_place_v, value_width);

    const int64_t query_chunk = (task.chunk + phase) % chunks_;
    const int64_t query_begin = chunk_begin(sequence.queries, query_chunk, chunks_);
    const int64_t query_end = chunk_begin(sequence.queries, query_chunk + 1, chunks_);
    const int64_t group = problem_.heads / problem_.kv_heads;
    float* norm_partial = phase == 0 && gradients_.norm_weight
                              ? norm_weight_partials_.data() + index * problem_.value_dim
                              : nullptr;
    for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head)
      for (int64_t first = query_begin; first < query_end; first += kPanel) {
        const Panel panel{problem_, sequence, task.sequence, head, first,
                          std::min(kPanel, query_end - first)};
        prepare(panel, rows, normed, norm_partial);
        const int64_t begin = std::max(panel.keys_begin(), key_begin);
        const int64_t end = std::min(panel.keys_end(), key_end);
        const bool whole = end - begin <= kWholeKeys && begin == panel.keys_begin() &&
                           end == panel.keys_end();
        const int64_t step = whole ? kWholeKeys : kKeys;
        for (int64_t key = begin; key < end; key += step) {
          const int64_t count = std::min(step, end - key);
          auto read = [&](const Rows& source, int64_t size, float* target) {
            return read_rows(source, batch, task.kv_head, sequence.first_key + key, count, size,
                             target);
          };
          const KeyBlock block{
              {read(problem_.k[0], problem_.head_dim, key_rows[0]),
               read(problem_.k[1], problem_.head_dim, key_rows[1])},
              read(problem_.v, problem_.value_dim, value_rows),
              {dk[0].from(key - key_begin), dk[1].from(key - key_begin)},
              dv.from(key - key_begin), key, count, whole};
          add_block(panel, rows, block, tiles);
        }
        write_query_gradients(panel, rows, phase);
      }

    auto write = [&](const Rows& target, int64_t size, const Sum& sum) {
      for (int64_t j = 0; j < keys; ++j)
        write_row(target.at(batch, task.kv_head, first_row + j), target.type, size,
                  sum.from(j).data);
    };
    if (!in_place_k)
      for (int map = 0; map < 2; ++map) write(gradients_.k[map], problem_.head_dim, dk[map]);
    if (!in_place_v) write(gradients_.v, problem_.value_dim, dv);
  }

  // dO behind the norm, D1 = dO . (alpha O1) and D2 = dO . O2 of every row.
  void prepare(const Panel& panel, PanelRows& rows, float* normed, float* norm_partial) const {
    const int64_t value_width = problem_.value_width, batch = panel.sequence.batch;
    float *o = normed, *o2 = normed + value_width;
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t at = panel.row(i);
      float* grad = rows.grad_natural + i * value_width;
      auto read = [&](const Rows& source, float* target) {
        read_row(source.at(batch, panel.head, at), source.type, problem_.value_dim, target);
      };
      read(saved_.grad_out, grad);
      read(saved_.o2, o2);
      read(saved_.o, o);
      if (problem_.has_norm()) normalise(grad, o, norm_partial);
      Vec first = {}, second = {};
      for (int64_t d = 0; d < value_width; d += kLanes) {
        first += load(grad + d) * load(o + d);
        second += load(grad + d) * load(o2 + d);
      }
      rows.alpha[i] = panel.alpha(i);
      rows.lam[i] = panel.lam(i);
      rows.delta[1][i] = sum(second);
      rows.delta[0][i] = sum(first) + rows.lam[i] * rows.delta[1][i];
      for (int map = 0; map < 2; ++map) {
        const float lse = saved_.lse[map * saved_.lse_map_stride + batch * saved_.lse_batch_stride +
                                     panel.head * saved_.lse_head_stride + at];
        // A dead row's +inf makes every one of its weights zero.
        const double binary = lse == -kInfinity ? double(kInfinity) : lse / kLn2;
        rows.lse[map][i] = float(binary);
        rows.unrounded[map][i] =
            lse == -kInfinity ? 1.0f : float(std::exp2(rows.lse[map][i] - binary));
      }
    }
    for (int64_t i = panel.count; i < panel.columns(); ++i) {
      rows.alpha[i] = rows.lam[i] = rows.delta[0][i] = rows.delta[1][i] = 0.0f;
      rows.lse[0][i] = rows.lse[1][i] = kInfinity;
      rows.unrounded[0][i] = rows.unrounded[1][i] = 1.0f;
    }
    fill_zeros(rows.dalpha, kPanel);
    transpose_rows({rows.grad_natural, value_width}, panel.count, value_width, 1.0f, rows.grad_t,
                   kPanelStride);
    for (int map = 0; map < 2; ++map) {
      fill_zeros(rows.dq[map], panel.count * problem_.head_width);
      rows.queries[map] = panel.read_queries(map, rows.queries_natural[map], rows.queries_t[map]);
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

  void add_block(const Panel& panel, PanelRows& rows, const KeyBlock& block,
                 float* const (&tiles)[5]) const {
    const int64_t head_width = problem_.head_width, value_width = problem_.value_width;
    for (int map = 0; map < 2; ++map)
      panel.scores(rows.queries_t[map], block.keys[map], block.first, block.count, tiles[map]);
    gemm<Order::kRows, Update::kOverwrite>(
        block.count, panel.columns(), problem_.value_dim, block.values.data, block.values.stride,
        rows.grad_t, kPanelStride, tiles[2], kPanelStride);
    const bool dropout = problem_.dropout.probability > 0;
    if (dropout) {
      float* const factors[2] = {tiles[3], tiles[4]};
      problem_.dropout.fill(panel.sequence_index * problem_.heads + panel.head, panel.first,
                            panel.columns(), block.first, block.count, factors, kPanelStride);
    }
    if (block.whole)
      dropout ? differentiate_whole<true>(panel, rows, block.count, tiles)
              : differentiate_whole<false>(panel, rows, block.count, tiles);
    else
      dropout ? differentiate<true>(panel, rows, block.count, tiles)
              : differentiate<false>(panel, rows, block.count, tiles);
    gemm<Order::kRows, Update::kAdd>(block.count, value_width, panel.count, tiles[2], kPanelStride,
                                     rows.grad_natural, value_width, block.dv.data, block.dv.stride);
    for (int map = 0; map < 2; ++map) {
      gemm<Order::kRows, Update::kAdd>(block.count, head_width, panel.count, tiles[map],
                                       kPanelStride, rows.queries[map].data,
                                       rows.queries[map].stride, block.dk[map].data,
                                       block.dk[map].stride);
      gemm<Order::kColumns, Update::kAdd>(panel.count, head_width, block.count, tiles[map],
                                          kPanelStride, block.keys[map].data,
                                          block.keys[map].stride, rows.dq[map], head_width);
    }
  }

  // tiles: scores 1, scores 2, dP (and dropout factors) -> scale * dS1, scale * dS2,
  // alpha P1 - lam P2.
  template <bool DROPOUT>
  void differentiate(const Panel& panel, PanelRows& rows, int64_t keys,
                     float* const (&tiles)[5]) const {
    const float factor = panel.factor();
    for (int64_t i = 0; i < panel.columns(); i += kLanes) {
      const Vec lse1 = load(rows.lse[0] + i), lse2 = load(rows.lse[1] + i);
      const Vec unrounded1 = load(rows.unrounded[0] + i), unrounded2 = load(rows.unrounded[1] + i);
      const Vec alpha = load(rows.alpha + i) * unrounded1, lam = load(rows.lam + i) * unrounded2;
      const Vec scaled_alpha = alpha * problem_.scale, scaled_lam = lam * problem_.scale;
      const Vec delta1 = load(rows.delta[0] + i) * unrounded1 * problem_.scale;
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

  // In parts, which rounds less than one long sum.
  template <class Term>
  static Vec sum_over(int64_t count, const Term& term) {
    Vec total = {};
    for (int64_t first = 0; first < count; first += 16) {
      Vec part = {};
      for (int64_t j = first; j < std::min(count, first + 16); ++j) part += term(j);
      total += part;
    }
    return total;
  }

  // The same where every key is at hand: softmax and D anew, by the arithmetic of plain softmax. With
  // few keys dP - D nearly cancels, and a D from saved rows would leave their rounding.
  template <bool DROPOUT>
  void differentiate_whole(const Panel& panel, PanelRows& rows, int64_t keys,
                           float* const (&tiles)[5]) const {
    const float factor = panel.factor();
    for (int64_t i = 0; i < panel.columns(); i += kLanes) {
      Vec inverse[2], delta[2];
      for (int map = 0; map < 2; ++map) {
        float* const column = tiles[map] + i;
        Vec top = broadcast(-kInfinity);
        for (int64_t j = 0; j < keys; ++j) top = maximum(top, load(column + j * kPanelStride));
        const Vec base = top == -kInfinity ? Vec{} : top * factor;
        const Vec total = sum_over(keys, [&](int64_t j) {
          const Vec p = exp2(load(column + j * kPanelStride) * factor - base);
          store(column + j * kPanelStride, p);
          return p;
        });
        inverse[map] = top == -kInfinity ? Vec{} : 1.0f / total;
        delta[map] = sum_over(keys, [&](int64_t j) {
          const int64_t at = j * kPanelStride + i;
          Vec grad = load(tiles[2] + at);
          if constexpr (DROPOUT) grad *= load(tiles[3 + map] + at);
          return load(tiles[map] + at) * inverse[map] * grad;
        });
      }
      const Vec alpha = load(rows.alpha + i), lam = load(rows.lam + i);
      const Vec scaled_alpha = alpha * problem_.scale, scaled_lam = lam * problem_.scale;
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

  void write_query_gradients(const Panel& panel, PanelRows& rows, int64_t phase) const {
    const int64_t batch = panel.sequence.batch, head_width = problem_.head_width;
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t at = panel.row(i);
      for (int map = 0; map < 2; ++map) {
        float* row = rows.dq[map] + i * head_width;
        if (phase > 0) {
          const float* earlier = gradients_.q[map].floats(batch, panel.head, at);
          for (int64_t d = 0; d < problem_.head_dim; ++d) row[d] += earlier[d];
        }
        write_row(gradients_.q[map].at(batch, panel.head, at), gradients_.q[map].type,
                  problem_.head_dim, row);
      }
      const int64_t flat = batch * gradients_.row_batch_stride +
                           panel.head * gradients_.row_head_stride + at;
      gradients_.lam[flat] = -rows.delta[1][i];
      gradients_.alpha[flat] = rows.dalpha[i] + (phase > 0 ? gradients_.alpha[flat] : 0.0f);
    }
  }

  const Problem& problem_;
  const Saved& saved_;
  const Gradients& gradients_;
  const int64_t chunks_;
  int64_t longest_ = 0;
  std::vector<Task> tasks_;
  std::vector<float> norm_weight_partials_;
};

void backward(const Tensor& grad_out, const Tensor& q1, const Tensor& k1, const Tensor& q2,
              const Tensor& k2, const Tensor& v, const Tensor& lam, const Tensor& alpha,
              const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
              const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
              const std::optional<Tensor>& norm_weight, int64_t left, int64_t right, double scale,
              double norm_eps, double out_scale, double dropout_p, int64_t seed, const Tensor& lse,
              const Tensor& o2, const Tensor& o, int64_t chunks, const Tensor& dq1,
              const Tensor& dk1, const Tensor& dq2, const Tensor& dk2, const Tensor& dv,
              const Tensor& dlam, const Tensor& dalpha,
              const std::optional<Tensor>& dnorm_weight) {
  const Problem problem(q1, k1, q2, k2, v, lam, alpha, attn_mask, key_padding_mask, cu_seqlens_q,
                        cu_seqlens_k, norm_weight, left, right, scale, norm_eps, out_scale,
                        dropout_p, seed);
  const Saved saved{Rows(grad_out), Rows(o2), Rows(o), static_cast<const float*>(lse.data_ptr()),
                    lse.stride(0), lse.stride(1), lse.stride(2)};
  const Gradients gradients{
      {Rows(dq1), Rows(dq2)}, {Rows(dk1), Rows(dk2)}, Rows(dv),
      static_cast<float*>(dlam.data_ptr()), static_cast<float*>(dalpha.data_ptr()),
      dlam.stride(0), dlam.stride(1),
      dnorm_weight ? static_cast<float*>(dnorm_weight->data_ptr()) : nullptr};
  Backward(problem, saved, gradients, chunks).run();
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_diff_attention_bwd_cpu(Tensor grad_out, Tensor q1, Tensor k1, Tensor q2, Tensor k2, "
      "Tensor v, Tensor lam, Tensor alpha, Tensor? attn_mask, Tensor? key_padding_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? norm_weight, int left, int right, "
      "float scale, float norm_eps, float out_scale, float dropout_p, int seed, Tensor lse, "
      "Tensor o2, Tensor o, int chunks, Tensor(a!) dq1, Tensor(b!) dk1, Tensor(c!) dq2, "
      "Tensor(d!) dk2, Tensor(e!) dv, Tensor(f!) dlam, Tensor(g!) dalpha, "
      "Tensor(h!)? dnorm_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_diff_attention_bwd_cpu", TORCH_BOX(&rdfkern::backward));
}
