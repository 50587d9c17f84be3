// Differential attention where the scores of all keys are kept: the maps are subtracted before they
// meet the values, which leaves one product of the two.
#include "diff_attention_fwd.h"
#include "diff_attention_whole.h"

namespace rdfkern {
namespace {

struct Maps {
  float* tiles[2];    // scores, then weights before normalisation, then alpha A1 - lam A2 and A2
  float* factors[2];  // of the dropout, of one block
  WholeSoftmax softmax[2];

  void merge(const Outputs& outputs, const Panel& panel, int64_t blocks) {
    for (int map = 0; map < panel.problem.maps; ++map) {
      for (int64_t i = 0; i < panel.columns(); i += kLanes) softmax[map].merge(blocks, i);
      for (int64_t i = 0; i < panel.count; ++i)
        outputs.write_lse(panel, map, i, softmax[map].base[i], softmax[map].total[i]);
    }
  }

  template <int MAPS, bool DROPOUT>
  void subtract(const Panel& panel, int64_t block, int64_t first, int64_t keys) const {
    float alpha[kPanel] = {}, lam[kPanel] = {};
    for (int64_t i = 0; i < panel.count; ++i) {
      alpha[i] = panel.alpha(i);
      lam[i] = panel.lam(i);
    }
    float* const tile1 = tiles[0] + first * kPanelStride;
    float* const tile2 = tiles[1] + first * kPanelStride;
    for (int64_t i = 0; i < panel.columns(); i += kLanes) {
      const Vec factor1 = softmax[0].share(block, i) * load(alpha + i);
      const Vec share2 = MAPS == 2 ? softmax[1].share(block, i) : Vec{}, factor2 = load(lam + i);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * kPanelStride + i;
        Vec first = load(tile1 + at) * factor1;
        if constexpr (DROPOUT) first *= load(factors[0] + at);
        if constexpr (MAPS == 2) {
          Vec second = load(tile2 + at) * share2;
          if constexpr (DROPOUT) second *= load(factors[1] + at);
          first -= second * factor2;
          store(tile2 + at, second);
        }
        store(tile1 + at, first);
      }
    }
  }
};

}  // namespace

void attend_whole(const Problem& problem, const Outputs& outputs, const ForwardTask& task,
                  Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  const int64_t head_width = problem.head_width, value_width = problem.value_width;
  const bool in_place = !problem.has_norm() && !outputs.o && outputs.out.type == ScalarType::Float &&
                        value_width == problem.value_dim;
  const int64_t begin = task.keys_begin, keys = std::max<int64_t>(0, task.keys_end - begin);
  Scratch scratch(kPanel * head_width + 2 * head_width * kPanelStride +
                  keys * (2 * head_width + value_width + 2 * kPanelStride) +
                  2 * kBlockKeys * kPanelStride + 2 * kPanel * value_width + 12 * 16);
  float* natural = scratch.take(kPanel * head_width);
  float* queries[2] = {scratch.take(head_width * kPanelStride),
                       scratch.take(head_width * kPanelStride)};
  float* key_rows[2] = {scratch.take(keys * head_width), scratch.take(keys * head_width)};
  float* value_rows = scratch.take(keys * value_width);
  float* products[2] = {scratch.take(kPanel * value_width), scratch.take(kPanel * value_width)};
  Maps maps;
  for (float*& tile : maps.tiles) tile = scratch.take(keys * kPanelStride);
  for (float*& tile : maps.factors) tile = scratch.take(kBlockKeys * kPanelStride);

  const int64_t kv_head = problem.kv_head(task.head), first_key = sequence.first_key + begin;
  Block blocks[2];
  for (int map = 0; map < problem.maps; ++map)
    blocks[map] = view_rows(problem.k[map], sequence.batch, kv_head, first_key, keys,
                            problem.head_dim, key_rows[map]);
  const Block values = problem.read_values(sequence.batch, kv_head, first_key, keys, value_rows);
  for (int64_t p = 0; p < task.panels(); ++p) {
    const Panel panel = task.panel(problem, p);
    const int64_t from = panel.keys_begin();
    const int64_t seen = std::max<int64_t>(0, panel.keys_end() - from);
    for (int map = 0; map < problem.maps; ++map)
      panel.read_queries(view_rows, map, natural, queries[map]);
    for_each_block(seen, [&](int64_t block, int64_t first, int64_t count) {
      for (int map = 0; map < problem.maps; ++map) {
        float* const tile = maps.tiles[map] + first * kPanelStride;
        panel.scores(queries[map], blocks[map].from(from - begin + first), from + first, count,
                     tile, ahead);
        for (int64_t i = 0; i < panel.columns(); i += kLanes)
          maps.softmax[map].add(block, tile + i, count, i, panel.factor());
      }
    });
    maps.merge(outputs, panel, blocks_of(seen));

    // Of the difference, and where backward needs it, of the second map.
    Sum sums[2] = {{products[0], value_width}, {products[1], value_width}};
    if (in_place)
      sums[0] = {outputs.out.floats(sequence.batch, panel.head, panel.row(0)),
                 outputs.out.row_stride};
    for (int map = 0; map < 2 && seen == 0; ++map) sums[map].clear(0, panel.count, value_width);
    for_each_block(seen, [&](int64_t block, int64_t first, int64_t count) {
      if (problem.has_dropout())
        problem.dropout.fill(panel.sequence_index * problem.heads + panel.head, panel.first,
                             panel.columns(), from + first, count, maps.factors, kPanelStride);
      with_options(problem, [&](auto number, auto dropout) {
        maps.subtract<number(), dropout()>(panel, block, first, count);
      });
      const Block rows = values.from(from - begin + first);
      for (int map = 0; map < (outputs.o2 ? 2 : 1); ++map)
        (block == 0 ? gemm_anew<Order::kColumns> : gemm_add<Order::kColumns>)(
            panel.count, value_width, count, maps.tiles[map] + first * kPanelStride, kPanelStride,
            rows.data, rows.stride, sums[map].data, sums[map].stride, ahead);
    });
    for (int64_t i = 0; i < panel.count; ++i) {
      if (outputs.o2)
        write_row(outputs.o2->at(sequence.batch, panel.head, panel.row(i)), outputs.o2->type,
                  problem.value_dim, products[1] + i * value_width);
      if (!in_place) outputs.write_out(panel, i, products[0] + i * value_width);
    }
  }
}

}  // namespace rdfkern
