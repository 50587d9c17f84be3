// Differential attention where all keys of a query fit one tile: the maps are subtracted before
// they meet the values, which leaves one product of the two.
#include "diff_attention_fwd.h"
#include "diff_attention_whole.h"

namespace rdfkern {
namespace {

// tiles: scores 1, scores 2 (and dropout factors) -> alpha A1 - lam A2, A2.
template <bool DROPOUT>
void subtract(const Outputs& outputs, const Panel& panel, int64_t keys, float* const* tiles) {
  float alpha[kPanel] = {}, lam[kPanel] = {}, bases[2][kPanel], totals[2][kPanel];
  for (int64_t i = 0; i < panel.count; ++i) {
    alpha[i] = panel.alpha(i);
    lam[i] = panel.lam(i);
  }
  for (int64_t i = 0; i < panel.columns(); i += kLanes) {
    auto softmax = [&](int map) {
      const WholeSoftmax result = softmax_whole(tiles[map] + i, keys, kPanelStride, panel.factor());
      store(bases[map] + i, result.base);
      store(totals[map] + i, result.total);
      return result.inverse;
    };
    const Vec factor1 = softmax(0) * load(alpha + i), factor2 = load(lam + i);
    const Vec inverse2 = softmax(1);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kPanelStride + i;
      Vec first = load(tiles[0] + at) * factor1, second = load(tiles[1] + at) * inverse2;
      if constexpr (DROPOUT) {
        first *= load(tiles[2] + at);
        second *= load(tiles[3] + at);
      }
      store(tiles[0] + at, first - second * factor2);
      store(tiles[1] + at, second);
    }
  }
  for (int map = 0; map < 2; ++map)
    for (int64_t i = 0; i < panel.count; ++i)
      outputs.write_lse(panel, map, i, bases[map][i], totals[map][i]);
}

}  // namespace

void attend_whole(const Problem& problem, const Outputs& outputs, const ForwardTask& task,
                  Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  const int64_t head_width = problem.head_width, value_width = problem.value_width;
  const bool dropout = problem.dropout.probability > 0;
  const bool in_place = !problem.has_norm() && !outputs.o && outputs.out.type == ScalarType::Float &&
                        value_width == problem.value_dim;
  Scratch scratch(kPanel * head_width + 2 * head_width * kPanelStride +
                  kWholeKeys * (2 * head_width + value_width + 4 * kPanelStride) +
                  kPanel * value_width);
  float* natural = scratch.take(kPanel * head_width);
  float* queries[2] = {scratch.take(head_width * kPanelStride),
                       scratch.take(head_width * kPanelStride)};
  float* key_rows[2] = {scratch.take(kWholeKeys * head_width),
                        scratch.take(kWholeKeys * head_width)};
  float* value_rows = scratch.take(kWholeKeys * value_width);
  float* products = scratch.take(kPanel * value_width);
  float* tiles[4];
  for (float*& tile : tiles) tile = scratch.take(kWholeKeys * kPanelStride);

  const int64_t begin = task.keys_begin, keys = std::max<int64_t>(0, task.keys_end - begin);
  const int64_t kv_head = problem.kv_head(task.head), first_key = sequence.first_key + begin;
  Block blocks[2];
  for (int map = 0; map < 2; ++map)
    blocks[map] = view_rows(problem.k[map], sequence.batch, kv_head, first_key, keys,
                            problem.head_dim, key_rows[map]);
  const Block values = read_rows(problem.v, sequence.batch, kv_head, first_key, keys,
                                 problem.value_dim, value_rows);
  for (int64_t p = 0; p < task.panels(); ++p) {
    const Panel panel = task.panel(problem, p);
    const int64_t from = panel.keys_begin();
    const int64_t seen = std::max<int64_t>(0, panel.keys_end() - from);
    for (int map = 0; map < 2; ++map) {
      panel.read_queries(view_rows, map, natural, queries[map]);
      panel.scores(queries[map], blocks[map].from(from - begin), from, seen, tiles[map], ahead);
    }
    if (dropout) {
      problem.dropout.fill(panel.sequence_index * problem.heads + panel.head, panel.first,
                           panel.columns(), from, seen, {tiles[2], tiles[3]}, kPanelStride);
      subtract<true>(outputs, panel, seen, tiles);
    } else {
      subtract<false>(outputs, panel, seen, tiles);
    }
    auto multiply = [&](int map, float* target, int64_t stride) {
      const Block block = values.from(from - begin);
      gemm_anew<Order::kColumns>(panel.count, value_width, seen, tiles[map], kPanelStride,
                                 block.data, block.stride, target, stride, ahead);
    };
    if (outputs.o2) {
      multiply(1, products, value_width);
      for (int64_t i = 0; i < panel.count; ++i)
        write_row(outputs.o2->at(sequence.batch, panel.head, panel.row(i)), outputs.o2->type,
                  problem.value_dim, products + i * value_width);
    }
    if (in_place) {
      multiply(0, outputs.out.floats(sequence.batch, panel.head, panel.row(0)),
               outputs.out.row_stride);
      continue;
    }
    multiply(0, products, value_width);
    for (int64_t i = 0; i < panel.count; ++i)
      outputs.write_out(panel, i, products + i * value_width);
  }
}

}  // namespace rdfkern
