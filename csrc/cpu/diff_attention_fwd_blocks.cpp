// Differential attention in one pass over blocks of keys, with running maxima.
#include "diff_attention_fwd.h"

namespace rdfkern {
namespace {

constexpr int64_t kKeys = 128;

// Running maxima, sums and products of one panel and one map.
struct Softmax {
  float maxima[kPanel], bases[kPanel], sums[kPanel], rescale[kPanel];

  void start() {
    std::fill(maxima, maxima + kPanel, -kInfinity);
    std::fill(bases, bases + kPanel, -kInfinity);
    std::fill(sums, sums + kPanel, 0.0f);
  }

  // scores become exp2(factor * (scores - new maxima)); rescale is what earlier products shrink by.
  void update(float* scores, int64_t keys, int64_t columns, float factor) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= columns; i += 4 * kLanes) update_vectors<4>(scores, keys, i, factor);
    for (; i < columns; i += kLanes) update_vectors<1>(scores, keys, i, factor);
  }

 private:
  template <int VECTORS>
  void update_vectors(float* scores, int64_t keys, int64_t first, float factor) {
    Vec top[VECTORS], base[VECTORS], total[VECTORS] = {};
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) top[n] = load(maxima + first + n * kLanes);
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n)
        top[n] = maximum(top[n], load(scores + j * kPanelStride + first + n * kLanes));
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      const int64_t at = first + n * kLanes;
      base[n] = top[n] == -kInfinity ? Vec{} : top[n] * factor;
      const Vec shrink = exp2(load(bases + at) - base[n]);
      store(rescale + at, shrink);
      store(maxima + at, top[n]);
      store(bases + at, top[n] == -kInfinity ? top[n] : base[n]);
      store(sums + at, load(sums + at) * shrink);
    }
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) {
        float* at = scores + j * kPanelStride + first + n * kLanes;
        const Vec weight = exp2(load(at) * factor - base[n]);
        total[n] += weight;
        store(at, weight);
      }
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      float* at = sums + first + n * kLanes;
      store(at, load(at) + total[n]);
    }
  }
};

struct PanelState {
  std::optional<Panel> panel;
  float *queries[2], *products[2];
  Softmax softmax[2];
};

void multiply(float* scores, const float* factors, int64_t keys, const Panel& panel) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < panel.columns(); i += kLanes) {
      const int64_t at = j * kPanelStride + i;
      store(scores + at, load(scores + at) * load(factors + at));
    }
}

void finish(const Outputs& outputs, const PanelState& state, float* row) {
  const Panel& panel = *state.panel;
  const Problem& problem = panel.problem;
  for (int64_t i = 0; i < panel.count; ++i) {
    float inverse[2] = {};
    for (int map = 0; map < problem.maps; ++map) {
      const Softmax& softmax = state.softmax[map];
      inverse[map] = softmax.maxima[i] == -kInfinity ? 0.0f : 1.0f / softmax.sums[i];
      outputs.write_lse(panel, map, i, softmax.bases[i], softmax.sums[i]);
    }
    const float alpha = panel.alpha(i) * inverse[0], lam = panel.lam(i);
    const float* first = state.products[0] + i * problem.value_width;
    float* second = state.products[1] + i * problem.value_width;
    for (int64_t d = 0; d < problem.value_width; d += kLanes) {
      const Vec o2 = load(second + d) * inverse[1];
      store(row + d, load(first + d) * alpha - o2 * lam);
      store(second + d, o2);
    }
    if (outputs.o2)
      write_row(outputs.o2->at(panel.sequence.batch, panel.head, panel.row(i)), outputs.o2->type,
                problem.value_dim, second);
    outputs.write_out(panel, i, row);
  }
}

}  // namespace

void attend_blocks(const Problem& problem, const Outputs& outputs, const ForwardTask& task,
                   Ahead& ahead) {
  const Sequence& sequence = problem.sequences[task.sequence];
  const int64_t head_width = problem.head_width, value_width = problem.value_width;
  Scratch scratch(2 * kTaskPanels * (head_width * kPanelStride + kPanel * value_width) +
                  kPanel * head_width + kKeys * (2 * head_width + value_width) +
                  3 * kKeys * kPanelStride + value_width);
  float* natural = scratch.take(kPanel * head_width);
  float* key_rows[2] = {scratch.take(kKeys * head_width), scratch.take(kKeys * head_width)};
  float* value_rows = scratch.take(kKeys * value_width);
  float* scores = scratch.take(kKeys * kPanelStride);
  float* dropped[2] = {scratch.take(kKeys * kPanelStride), scratch.take(kKeys * kPanelStride)};
  float* row = scratch.take(value_width);
  PanelState states[kTaskPanels];
  for (int64_t p = 0; p < task.panels(); ++p) {
    PanelState& state = states[p];
    state.panel.emplace(task.panel(problem, p));
    for (int map = 0; map < 2; ++map) {
      state.queries[map] = scratch.take(head_width * kPanelStride);
      state.products[map] =
          fill_zeros(scratch.take(kPanel * value_width), state.panel->count * value_width);
      state.panel->read_queries(view_rows, map, natural, state.queries[map]);
      state.softmax[map].start();
    }
  }
  const int64_t kv_head = problem.kv_head(task.head);
  for (int64_t first = task.keys_begin; first < task.keys_end; first += kKeys) {
    const int64_t count = std::min(kKeys, task.keys_end - first);
    const int64_t row = sequence.first_key + first;
    Block keys[2];
    for (int map = 0; map < problem.maps; ++map)
      keys[map] = read_rows(problem.k[map], sequence.batch, kv_head, row, count, problem.head_dim,
                            key_rows[map]);
    const Block values = problem.read_values(sequence.batch, kv_head, row, count, value_rows);
    for (int64_t p = 0; p < task.panels(); ++p) {
      const Panel& panel = *states[p].panel;
      const int64_t from = std::max(first, panel.keys_begin());
      const int64_t seen = std::min(first + count, panel.keys_end()) - from;
      if (seen <= 0) continue;
      if (problem.has_dropout())
        problem.dropout.fill(panel.sequence_index * problem.heads + panel.head, panel.first,
                             panel.columns(), from, seen, dropped, kPanelStride);
      for (int map = 0; map < problem.maps; ++map) {
        panel.scores(states[p].queries[map], keys[map].from(from - first), from, seen, scores,
                     ahead);
        Softmax& softmax = states[p].softmax[map];
        softmax.update(scores, seen, panel.columns(), panel.factor());
        if (problem.has_dropout()) multiply(scores, dropped[map], seen, panel);
        const Block block = values.from(from - first);
        gemm<Order::kColumns, Update::kRescale>(
            panel.count, value_width, seen, scores, kPanelStride, block.data, block.stride,
            states[p].products[map], value_width, softmax.rescale, AskFor{ahead});
      }
    }
  }
  for (int64_t p = 0; p < task.panels(); ++p) finish(outputs, states[p], row);
}

}  // namespace rdfkern
