// Gradients of differential attention in one pass: both maps share dP = dO vᵀ and dV. Queries run
// outside, keys inside: dQ stays in the cache and dK, dV add up in memory that one task owns.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "diff_attention_bwd_weights.h"

namespace rdfkern {
namespace {

constexpr int64_t kKeys = 64;

struct KeyBlock {
  Block keys[2], values;
  Sum dk[2], dv;
  int64_t first, count;
  int64_t summed;  // so many of its rows of dk and dv hold sums already, the rest holds nothing
};

class Backward {
 public:
  Backward(const Problem& problem, const Saved& saved, const Gradients& gradients, int64_t chunks)
      : problem_(problem), saved_(saved), gradients_(gradients), chunks_(chunks) {
    for (size_t s = 0; s < problem.sequences.size(); ++s) {
      const Sequence& sequence = problem.sequences[s];
      const bool has_rows = saved.o && (problem.maps == 1 || saved.o2);
      if (!has_rows && (sequence.keys > kWholeKeys || chunks > 1))
        throw std::invalid_argument("max_seqlen_k is below the longest sequence of keys");
      longest_ = std::max(longest_, sequence.keys);
      for (int64_t head = 0; head < problem.kv_heads; ++head)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          tasks_.push_back({int64_t(s), head, chunk, sequence.queries * (sequence.keys + 64)});
    }
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [](const BackwardTask& a, const BackwardTask& b) { return a.cost > b.cost; });
    if (gradients.norm_weight) norm_weight_partials_.assign(tasks_.size() * problem.value_dim, 0);
  }

  // With chunks > 1, phase p pairs key chunk c with query chunk c + p: in one phase no two tasks
  // touch the same gradient, and the order of every sum is fixed.
  void run() {
    const int64_t group = problem_.kv_heads * chunks_;  // tasks of one sequence
    for (int64_t phase = 0; phase < chunks_; ++phase)
      for_each_task_ahead(tasks_.size(), group, [&](int64_t task, int64_t following) {
        Ahead ahead;
        foresee_sums(problem_, gradients_, tasks_[task], ahead);
        if (following >= 0) foresee_rows(problem_, saved_, tasks_[following], ahead);
        ahead.spread(tiles_of(tasks_[task]));
        run_task(task, phase, ahead);
        ahead.finish();
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

  // Of the products of a task, about.
  int64_t tiles_of(const BackwardTask& task) const {
    const Sequence& sequence = problem_.sequences[task.sequence];
    const int64_t panels = (sequence.queries + kPanel - 1) / kPanel;
    const int64_t key_tiles = sequence.keys / kTileRows, query_tiles = sequence.queries / kTileRows;
    return panels * key_tiles * (2 * problem_.maps + 1 + problem_.value_width / kTileColumns) +
           query_tiles * problem_.maps;
  }

  // Several tasks may add to one row then, so the caller has padded the rows.
  bool in_place(const Rows& rows, int64_t size) const {
    return chunks_ > 1 || (rows.type == ScalarType::Float && padded(size) == size);
  }

  void run_task(int64_t index, int64_t phase, Ahead& ahead) {
    const BackwardTask& task = tasks_[index];
    const Sequence& sequence = problem_.sequences[task.sequence];
    const int64_t head_width = problem_.head_width, value_width = problem_.value_width;
    const bool in_place_q = in_place(gradients_.q[0], problem_.head_dim);
    const bool in_place_k = in_place(gradients_.k[0], problem_.head_dim);
    const bool in_place_v = in_place(gradients_.v, problem_.value_dim);
    const int64_t key_begin = chunk_begin(sequence.keys, task.chunk, chunks_);
    const int64_t key_end = chunk_begin(sequence.keys, task.chunk + 1, chunks_);
    const int64_t keys = key_end - key_begin;
    constexpr int64_t kRounding = 128;  // what take() adds where vectors are narrow
    const int64_t kept = std::max(kBlockKeys, std::min(kWholeKeys, keys));
    Scratch scratch(PanelRows::floats(problem_) + 2 * kPanel * head_width + kRounding +
                    kBlockKeys * (2 * head_width + value_width + 2 * kPanelStride) +
                    3 * kept * kPanelStride +
                    longest_ * ((in_place_k ? 0 : 2 * head_width) + (in_place_v ? 0 : value_width)));
    PanelRows rows(problem_, saved_, scratch);
    float* dq_rows[2] = {scratch.take(kPanel * head_width), scratch.take(kPanel * head_width)};
    float* key_rows[2] = {scratch.take(kBlockKeys * head_width),
                          scratch.take(kBlockKeys * head_width)};
    float* value_rows = scratch.take(kBlockKeys * value_width);
    Tiles tiles;
    for (float*& tile : tiles.kept) tile = scratch.take(kept * kPanelStride);
    for (float*& tile : tiles.factors) tile = scratch.take(kBlockKeys * kPanelStride);
    WholePanel statistics;

    const int64_t batch = sequence.batch, first_row = sequence.first_key + key_begin;
    auto sum_of = [&](const Rows& rows, bool rows_in_place, int64_t width) {
      return rows_in_place ? Sum{rows.floats(batch, task.kv_head, first_row), rows.row_stride}
                           : Sum{scratch.take(keys * width), width};
    };
    const Sum dk[2] = {sum_of(gradients_.k[0], in_place_k, head_width),
                       sum_of(gradients_.k[1], in_place_k, head_width)};
    const Sum dv = sum_of(gradients_.v, in_place_v, value_width);
    // Rows of dk and dv before this one hold sums. Later panels of a head never begin earlier.
    int64_t summed = phase == 0 ? 0 : keys;
    auto clear_up_to = [&](int64_t row) {
      for (int map = 0; map < problem_.maps; ++map) dk[map].clear(summed, row, head_width);
      dv.clear(summed, row, value_width);
      summed = std::max(summed, row);
    };

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
        const int64_t begin = std::max(panel.keys_begin(), key_begin);
        const int64_t end = std::min(panel.keys_end(), key_end);
        const bool whole = end - begin <= kWholeKeys && begin == panel.keys_begin() &&
                           end == panel.keys_end();
        rows.prepare(panel, whole, norm_partial);
        Sum dq[2];
        for (int map = 0; map < problem_.maps; ++map) {
          const Rows& target = gradients_.q[map];
          dq[map] = in_place_q
                        ? Sum{target.floats(batch, head, panel.row(0)), target.row_stride}
                        : Sum{dq_rows[map], head_width};
          if (phase == 0 && begin >= end) dq[map].clear(0, panel.count, head_width);
        }
        auto read_block = [&](int64_t key, int64_t count) {
          const int64_t at = key - key_begin, from = sequence.first_key + key;
          clear_up_to(at);
          KeyBlock block{{},
                         view_rows(problem_.v, batch, task.kv_head, from, count,
                                   problem_.value_dim, value_rows),
                         {}, dv.from(at), key, count, std::min(count, summed - at)};
          for (int map = 0; map < problem_.maps; ++map) {
            block.keys[map] = read_rows(problem_.k[map], batch, task.kv_head, from, count,
                                        problem_.head_dim, key_rows[map]);
            block.dk[map] = dk[map].from(at);
          }
          return block;
        };
        auto add = [&](const KeyBlock& block, const Tiles& differentiated) {
          add_block(panel, rows, block, differentiated, dq, phase == 0 && block.first == begin,
                    ahead);
          summed = std::max(summed, block.first - key_begin + block.count);
        };
        if (whole) {
          std::optional<KeyBlock> block;
          for_each_block(end - begin, [&](int64_t number, int64_t first, int64_t count) {
            block = read_block(begin + first, count);
            const Tiles of_block = tiles.from(first);
            fill_tiles(panel, rows, *block, of_block, ahead);
            statistics.add(number, panel, count, of_block, problem_.has_dropout());
          });
          statistics.merge(panel, rows, blocks_of(end - begin));
          for_each_block(end - begin, [&](int64_t number, int64_t first, int64_t count) {
            const Tiles of_block = tiles.from(first);
            if (end - begin > kBlockKeys) {
              block = read_block(begin + first, count);
              drop(panel, *block, of_block);
            }
            with_options(problem_, [&](auto maps, auto dropout) {
              statistics.differentiate<maps(), dropout()>(number, panel, rows, count, of_block);
            });
            add(*block, of_block);
          });
        } else {
          for (int64_t key = begin; key < end; key += kKeys) {
            const KeyBlock block = read_block(key, std::min(kKeys, end - key));
            fill_tiles(panel, rows, block, tiles, ahead);
            with_options(problem_, [&](auto maps, auto dropout) {
              differentiate<maps(), dropout()>(panel, rows, block.count, tiles);
            });
            add(block, tiles);
          }
        }
        write_query_gradients(panel, rows, dq, in_place_q, phase);
      }

    clear_up_to(keys);
    auto write = [&](const Rows& target, int64_t size, const Sum& sum) {
      for (int64_t j = 0; j < keys; ++j)
        write_row(target.at(batch, task.kv_head, first_row + j), target.type, size,
                  sum.from(j).data);
    };
    if (!in_place_k)
      for (int map = 0; map < problem_.maps; ++map)
        write(gradients_.k[map], problem_.head_dim, dk[map]);
    if (!in_place_v) write(gradients_.v, problem_.value_dim, dv);
  }

  void drop(const Panel& panel, const KeyBlock& block, const Tiles& tiles) const {
    if (problem_.has_dropout())
      problem_.dropout.fill(panel.sequence_index * problem_.heads + panel.head, panel.first,
                            panel.columns(), block.first, block.count, tiles.factors,
                            kPanelStride);
  }

  // Scores of both maps, dP and factors.
  void fill_tiles(const Panel& panel, const PanelRows& rows, const KeyBlock& block,
                  const Tiles& tiles, Ahead& ahead) const {
    for (int map = 0; map < problem_.maps; ++map)
      panel.scores(rows.queries_t[map], block.keys[map], block.first, block.count,
                   tiles.kept[map], ahead);
    gemm<Order::kRows, Update::kOverwrite>(
        block.count, panel.columns(), problem_.value_dim, block.values.data, block.values.stride,
        rows.grad_t, kPanelStride, tiles.kept[2], kPanelStride, nullptr, AskFor{ahead});
    drop(panel, block, tiles);
  }

  void add_block(const Panel& panel, const PanelRows& rows, const KeyBlock& block,
                 const Tiles& tiles, const Sum (&dq)[2], bool first_of_dq, Ahead& ahead) const {
    const int64_t head_width = problem_.head_width, value_width = problem_.value_width;
    add_keys(block, panel.count, tiles.kept[2], {rows.grad_natural, value_width}, value_width,
             block.dv, ahead);
    for (int map = 0; map < problem_.maps; ++map) {
      const float* const slopes = tiles.kept[map];
      add_keys(block, panel.count, slopes, rows.queries[map], head_width, block.dk[map], ahead);
      (first_of_dq ? gemm_anew<Order::kColumns> : gemm_add<Order::kColumns>)(
          panel.count, head_width, block.count, slopes, kPanelStride, block.keys[map].data,
          block.keys[map].stride, dq[map].data, dq[map].stride, ahead);
    }
  }

  static void add_keys(const KeyBlock& block, int64_t queries, const float* weights,
                       const Block& rows, int64_t width, const Sum& target, Ahead& ahead) {
    const Sum anew = target.from(block.summed);
    gemm_add<Order::kRows>(block.summed, width, queries, weights, kPanelStride, rows.data,
                           rows.stride, target.data, target.stride, ahead);
    gemm_anew<Order::kRows>(block.count - block.summed, width, queries,
                            weights + block.summed * kPanelStride, kPanelStride, rows.data,
                            rows.stride, anew.data, anew.stride, ahead);
  }

  void write_query_gradients(const Panel& panel, const PanelRows& rows, const Sum (&dq)[2],
                             bool in_place_q, int64_t phase) const {
    const int64_t batch = panel.sequence.batch;
    for (int64_t i = 0; i < panel.count; ++i) {
      const int64_t at = panel.row(i);
      if (!in_place_q)
        for (int map = 0; map < problem_.maps; ++map)
          write_row(gradients_.q[map].at(batch, panel.head, at), gradients_.q[map].type,
                    problem_.head_dim, dq[map].from(i).data);
      if (gradients_.lam) gradients_.lam->at(batch, panel.head, at) = -rows.delta[1][i];
      float& dalpha = gradients_.alpha.at(batch, panel.head, at);
      dalpha = rows.dalpha[i] + (phase > 0 ? dalpha : 0.0f);
    }
  }

  const Problem& problem_;
  const Saved& saved_;
  const Gradients& gradients_;
  const int64_t chunks_;
  int64_t longest_ = 0;
  std::vector<BackwardTask> tasks_;
  std::vector<float> norm_weight_partials_;
};

void backward(const Tensor& grad_out, const Tensor& q1, const Tensor& k1,
              const std::optional<Tensor>& q2, const std::optional<Tensor>& k2, const Tensor& v,
              const std::optional<Tensor>& lam, const Tensor& alpha,
              const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
              const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
              const std::optional<Tensor>& norm_weight, int64_t left, int64_t right, double scale,
              double norm_eps, double out_scale, double dropout_p, int64_t seed, const Tensor& lse,
              const std::optional<Tensor>& o2, const std::optional<Tensor>& o, int64_t chunks,
              const Tensor& dq1, const Tensor& dk1, const std::optional<Tensor>& dq2,
              const std::optional<Tensor>& dk2, const Tensor& dv,
              const std::optional<Tensor>& dlam, const Tensor& dalpha,
              const std::optional<Tensor>& dnorm_weight) {
  const Problem problem(q1, k1, q2, k2, v, lam, alpha, attn_mask, key_padding_mask, cu_seqlens_q,
                        cu_seqlens_k, norm_weight, left, right, scale, norm_eps, out_scale,
                        dropout_p, seed);
  Saved saved{Rows(grad_out), std::nullopt, std::nullopt,
              static_cast<const float*>(lse.data_ptr()), lse.stride(0), lse.stride(1),
              lse.stride(2)};
  if (o2) saved.o2.emplace(*o2);
  if (o) saved.o.emplace(*o);
  const Gradients gradients{
      {Rows(dq1), dq2 ? Rows(*dq2) : Rows()}, {Rows(dk1), dk2 ? Rows(*dk2) : Rows()}, Rows(dv),
      dlam ? std::optional(Coefficient(*dlam)) : std::nullopt, Coefficient(dalpha),
      dnorm_weight ? static_cast<float*>(dnorm_weight->data_ptr()) : nullptr};
  ask_for_huge_pages({dq1, dk1, dq2, dk2, dv});
  Backward(problem, saved, gradients, chunks).run();
}

}  // namespace
}  // namespace rdfkern

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_diff_attention_bwd_cpu(Tensor grad_out, Tensor q1, Tensor k1, Tensor? q2, Tensor? k2, "
      "Tensor v, Tensor? lam, Tensor alpha, Tensor? attn_mask, Tensor? key_padding_mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? norm_weight, int left, int right, "
      "float scale, float norm_eps, float out_scale, float dropout_p, int seed, Tensor lse, "
      "Tensor? o2, Tensor? o, int chunks, Tensor(a!) dq1, Tensor(b!) dk1, Tensor(c!)? dq2, "
      "Tensor(d!)? dk2, Tensor(e!) dv, Tensor(f!)? dlam, Tensor(g!) dalpha, "
      "Tensor(h!)? dnorm_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_diff_attention_bwd_cpu", TORCH_BOX(&rdfkern::backward));
}
