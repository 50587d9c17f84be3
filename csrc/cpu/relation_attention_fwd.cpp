// out_i = sum over the sources j in the window of target i of softmax(logit_ij) value_j, on implicit
// graphs: logits and weights exist for one panel of targets and one block of sources at a time.
#include <torch/csrc/stable/library.h>

#include "relation_attention_panel.h"

namespace rdfkern::relation_attention {
namespace {

constexpr int64_t kSources = 128;

// Running maxima, sums and rescaling of a panel's softmax over all relations.
struct Softmax {
  float maxima[kPanel], sums[kPanel], rescale[kPanel];

  void start() {
    fill(maxima, kPanel, -kInfinity);
    fill(sums, kPanel, 0.0f);
  }

  // Logits become exp(logit - new maxima); rescale is what earlier products shrink by.
  void update(float* tile, int64_t sources, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Vec before = load(maxima + i);
      Vec top = before;
      for (int64_t j = 0; j < sources; ++j) top = maximum(top, load(tile + j * kStride + i));
      // Subtracted before it is multiplied, the largest logit gives exactly 1.
      const Vec base = select(top == -kInfinity, Vec{}, top);
      const Vec shrink = exp2((before - base) * kLog2e);
      Vec total = {};
      for (int64_t j = 0; j < sources; ++j) {
        float* at = tile + j * kStride + i;
        const Vec weight = exp2((load(at) - base) * kLog2e);
        total += weight;
        store(at, weight);
      }
      store(sums + i, load(sums + i) * shrink + total);
      store(rescale + i, shrink);
      store(maxima + i, top);
    }
  }
};

class Forward {
 public:
  Forward(const Problem& problem, const Rows& out, float* softmax)
      : problem_(problem), out_(out), kept_(problem, softmax) {
    for (int64_t row = 0; row < problem.nodes;) {
      const Span segment{row, segment_end(problem, row) - row};
      for (const Span& panel : panels_of(problem, segment)) panels_.push_back(panel);
      row = segment.end();
    }
    widest_ = widest_range(problem, panels_);
  }

  void run() const {
    for_each_task(panels_.size() * problem_.heads, [&](auto next) {
      Worker worker(problem_, widest_);
      int64_t opened = -1;
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t at = task / problem_.heads;
        if (at != opened) worker.panel.open(panels_[at]);
        opened = at;
        worker.panel.choose_head(task % problem_.heads);
        attend(worker);
      }
    });
  }

 private:
  struct Worker {
    const Problem& problem;
    Panel panel;
    Scratch scratch;
    Softmax softmax;
    float *natural, *queries, *key_rows, *value_rows, *tile, *factors, *room;
    float* products = nullptr;
    int64_t products_stride = 0;
    float *bases, *inverses;  // within relations: [slot][direction][target]

    Worker(const Problem& problem, int64_t widest)
        : problem(problem), panel(problem, widest),
          scratch((kPanel + kSources + kStride) * problem.depth_width +
                  (kSources + kPanel) * problem.value_width + 2 * kSources * kStride +
                  2 * rows_of_statistics() * kPanel + 9 * 16) {
      natural = scratch.take(kPanel * problem.depth_width);
      queries = scratch.take(problem.depth_width * kStride);
      key_rows = scratch.take(kSources * problem.depth_width);
      value_rows = scratch.take(kSources * problem.value_width);
      tile = scratch.take(kSources * kStride);
      factors = scratch.take(kSources * kStride);
      room = scratch.take(kPanel * problem.value_width);
      bases = scratch.take(rows_of_statistics() * kPanel);
      inverses = scratch.take(rows_of_statistics() * kPanel);
    }

    int64_t rows_of_statistics() const { return problem.within ? panel.rows() : 0; }

    // Fills `rows`, whose width is padded. Under a softmax across relations they are still to be
    // divided by its sums.
    void attend(float* rows, int64_t stride) {
      products = rows;
      products_stride = stride;
      if (problem.is_dot) {
        const Block own = read_head(problem.queries, panel.head, panel.targets.first,
                                    panel.targets.count, problem.depth, natural);
        transpose_rows(own, panel.targets.count, problem.depth_width, 1.0f, queries, kStride);
      }
      if (problem.within) return attend_within();
      softmax.start();
      for_each_block([&](Span block) {
        read_logits(block);
        softmax.update(tile, block.count, panel.columns());
        add_products<Update::kRescale>(block);
      });
    }

    // The softmax of every relation first, then the products.
    void attend_within() {
      const int64_t size = panel.rows_in_use() * kPanel;
      const bool whole = panel.sources.count <= kSources;
      fill(bases, size, -kInfinity);
      fill(inverses, size, 0.0f);
      for_each_block([&](Span block) {
        read_logits(block);
        for_each_vector(block, [&](const Lanes& lanes, int64_t row, int64_t i, Vec logit) {
          lanes.change(bases + row, i, logit, [](Vec a, Vec b) { return maximum(a, b); });
          return logit;
        });
      });
      panel.merge_relations(bases, [](float a, float b) { return b > a || b != b ? b : a; });
      for (int64_t at = 0; at < size; ++at)
        if (bases[at] == -kInfinity) bases[at] = 0.0f;
      for_each_block([&](Span block) {
        if (!whole) read_logits(block);
        for_each_vector(block, [&](const Lanes& lanes, int64_t row, int64_t i, Vec logit) {
          const Vec weight = exp2((logit - lanes.pick(bases + row, i)) * kLog2e);
          lanes.change(inverses + row, i, weight, [](Vec a, Vec b) { return a + b; });
          return weight;
        });
      });
      panel.merge_relations(inverses, [](float a, float b) { return a + b; });
      for (int64_t at = 0; at < size; ++at)
        inverses[at] = inverses[at] == 0.0f ? 0.0f : 1.0f / inverses[at];
      for_each_block([&](Span block) {
        if (!whole) read_logits(block);
        for_each_vector(block, [&](const Lanes& lanes, int64_t row, int64_t i, Vec weight) {
          if (!whole) weight = exp2((weight - lanes.pick(bases + row, i)) * kLog2e);
          return weight * lanes.pick(inverses + row, i);
        });
        add_products<Update::kAdd>(block);
      });
    }

    template <class Body>
    void for_each_block(const Body& body) {
      for (int64_t first = panel.sources.first; first < panel.sources.end(); first += kSources)
        body(Span{first, std::min(kSources, panel.sources.end() - first)});
    }

    template <class Body>
    void for_each_vector(Span block, const Body& body) {
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t source = block.first + j, row = row_of(panel.slot(source), 0);
        const Lanes lanes = panel.lanes(source);
        for (int64_t i = 0; i < panel.columns(); i += kLanes) {
          float* at = tile + j * kStride + i;
          store(at, lanes.reach(i) ? body(lanes, row, i, load(at)) : Vec{});
        }
      }
    }

    void read_logits(Span block) {
      Block keys{nullptr, 0};
      if (problem.is_dot)
        keys = read_head(problem.keys, panel.head, block.first, block.count, problem.depth,
                         key_rows);
      panel.logits(block, queries, keys, tile);
    }

    // The first block's products start the sums.
    template <Update UPDATE>
    void add_products(Span block) {
      if (problem.dropout.probability > 0) {
        panel.dropout(block, factors);
        for (int64_t j = 0; j < block.count; ++j)
          for (int64_t i = 0; i < panel.columns(); i += kLanes) {
            const int64_t at = j * kStride + i;
            store(tile + at, load(tile + at) * load(factors + at));
          }
      }
      const Block values = read_head(problem.values, panel.head, block.first, block.count,
                                     problem.value_dim, value_rows);
      const bool is_first = block.first == panel.sources.first;
      (is_first ? gemm<Order::kColumns, Update::kOverwrite> : gemm<Order::kColumns, UPDATE>)(
          panel.targets.count, problem.value_width, block.count, tile, kStride, values.data,
          values.stride, products, products_stride, softmax.rescale, Nothing{}, kTileColumns);
    }
  };

  void attend(Worker& worker) const {
    const Panel& panel = worker.panel;
    const bool in_place =
        out_.type == ScalarType::Float && problem_.value_dim == problem_.value_width;
    float* const rows =
        in_place ? out_.floats(0, panel.head, panel.targets.first) : worker.room;
    const int64_t stride = in_place ? out_.row_stride : problem_.value_width;
    worker.attend(rows, stride);
    const Softmax& softmax = worker.softmax;
    for (int64_t i = 0; i < panel.targets.count; ++i) {
      const int64_t target = panel.targets.first + i;
      if (!problem_.within) {
        const bool alive = softmax.maxima[i] != -kInfinity;
        const float inverse = alive ? 1.0f / softmax.sums[i] : 0.0f;
        float* const row = rows + i * stride;
        for (int64_t d = 0; d < problem_.value_width; d += kLanes)
          store(row + d, load(row + d) * inverse);
        kept_.base(target, panel.head) = alive ? softmax.maxima[i] : kInfinity;
        kept_.factor(target, panel.head) = inverse;
      }
      if (!in_place)
        write_row(out_.at(0, panel.head, target), out_.type, problem_.value_dim, rows + i * stride);
    }
  }

  const Problem& problem_;
  const Rows out_;
  const KeptSoftmax kept_;
  std::vector<Span> panels_;
  int64_t widest_ = 0;
};

void forward(const Tensor& value, const Tensor& dst, const Tensor& src, const Tensor& rel,
             const Tensor& key, const Tensor& ranges, const Tensor& table, bool of_values,
             double scale, double negative_slope, bool within, double dropout_p, int64_t seed,
             const Tensor& out, const Tensor& softmax) {
  const Problem problem(value, dst, src, rel, key, ranges, table, of_values, scale, negative_slope,
                        within, dropout_p, seed);
  ask_for_huge_pages({out});
  Forward(problem, head_rows(out), static_cast<float*>(softmax.data_ptr())).run();
}

}  // namespace
}  // namespace rdfkern::relation_attention

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_attention_fwd_cpu(Tensor value, Tensor dst, Tensor src, Tensor rel, Tensor key, "
      "Tensor ranges, Tensor table, bool of_values, float scale, float negative_slope, "
      "bool within, float dropout_p, int seed, Tensor(a!) out, Tensor(b!) softmax) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_attention_fwd_cpu", TORCH_BOX(&rdfkern::relation_attention::forward));
}
