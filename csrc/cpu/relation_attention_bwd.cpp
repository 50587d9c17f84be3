// Gradients of relation attention on implicit graphs in one pass over the panels of targets. What
// goes to sources adds up in memory that one task owns, and tasks add up in a fixed order.
#include <torch/csrc/stable/library.h>

#include "relation_attention_panel_bwd.h"
#include "relation_attention_plan.h"

namespace rdfkern::relation_attention {
namespace {

constexpr int64_t kPartRows = 64;

// What flows through logits that are products with the values: the rest of the values' gradients,
// and those of the vectors, in short sums that join a long one.
class ThroughProducts {
 public:
  explicit ThroughProducts(const Problem& problem)
      : problem_(problem), width_(problem.value_width), room_(width_), part_(kSides * width_) {}

  // totals: [side][value_width]
  void begin(int64_t head, double* totals) {
    head_ = head;
    totals_ = totals;
  }

  // dv: [value_width], of one row.
  void add(int64_t row, float to_target, float to_source, float* dv) {
    const float* const value =
        read_head(problem_.values, head_, row, 1, problem_.value_dim, room_.data()).data;
    const float* const target = problem_.vector(kTarget, head_);
    const float* const source = problem_.vector(kSource, head_);
    for (int64_t d = 0; d < width_; d += kLanes) {
      const Vec own = load(value + d);
      store(dv + d, load(dv + d) + load(target + d) * to_target + load(source + d) * to_source);
      float* const sums[] = {part_.data() + d, part_.data() + width_ + d};
      store(sums[kTarget], load(sums[kTarget]) + own * to_target);
      store(sums[kSource], load(sums[kSource]) + own * to_source);
    }
    if (++rows_ == kPartRows) finish();
  }

  void finish() {
    for (int64_t d = 0; d < kSides * width_; ++d) totals_[d] += part_[d];
    fill(part_.data(), kSides * width_, 0.0f);
    rows_ = 0;
  }

 private:
  const Problem& problem_;
  const int64_t width_;
  int64_t head_ = 0, rows_ = 0;
  double* totals_ = nullptr;
  std::vector<float> room_, part_;
};

class Backward {
 public:
  Backward(const Problem& problem, const Saved& saved, const Gradients& gradients)
      : problem_(problem), saved_(saved), gradients_(gradients), plan_(problem),
        sums_(plan_.floats ? new float[plan_.floats] : nullptr),
        rel_(plan_.chunks.size() * problem.heads * problem.relations) {
    widest_ = widest_range(problem, plan_.panels);
    for (const Chunk& chunk : plan_.chunks)
      if (chunk.owns_sources) owned_ = std::max(owned_, chunk.sources.count);
    parts_ = plan_.chunks.size();
    for (const Shared& shared : plan_.shared) parts_ += blocks_of(shared);
    if (problem.of_values) vectors_.resize(parts_ * problem.heads * kSides * problem.value_width);
  }

  void run() {
    for_each_task(plan_.chunks.size() * problem_.heads, [&](auto next) {
      PanelGradients worker(problem_, saved_, gradients_, widest_, owned_ * plan_.width());
      ThroughProducts products(problem_);
      for (int64_t task = next(); task >= 0; task = next())
        differentiate(worker, products, task / problem_.heads, task % problem_.heads);
    });
    size_t part = plan_.chunks.size();
    for (const Shared& shared : plan_.shared) {
      add_shared(shared, part);
      part += blocks_of(shared);
    }
    for (int64_t head = 0; head < problem_.heads; ++head)
      for (int64_t relation = 0; relation < problem_.relations; ++relation) {
        double total = 0;
        for (size_t chunk = 0; chunk < plan_.chunks.size(); ++chunk)
          total += rel_[(chunk * problem_.heads + head) * problem_.relations + relation];
        gradients_.rel.at(relation, head) = float(total);
      }
    if (problem_.of_values) add_vectors();
  }

 private:
  static int64_t blocks_of(const Shared& shared) {
    return (shared.rows.count + kSources - 1) / kSources;
  }

  // [side][value_width], of one task.
  double* vectors_of(size_t part, int64_t head) {
    return vectors_.data() + (part * problem_.heads + head) * kSides * problem_.value_width;
  }

  void add_vectors() {
    for (int64_t head = 0; head < problem_.heads; ++head)
      for (const Side side : {kTarget, kSource})
        for (int64_t d = 0; d < problem_.value_dim; ++d) {
          double total = 0;
          for (size_t part = 0; part < parts_; ++part)
            total += vectors_of(part, head)[side * problem_.value_width + d];
          gradients_.vectors[side][head * problem_.value_dim + d] = float(total);
        }
  }

  void differentiate(PanelGradients& worker, ThroughProducts& products, int64_t at, int64_t head) {
    const Chunk& chunk = plan_.chunks[at];
    const int64_t count = chunk.sources.count, first = chunk.sources.first;
    float* memory = chunk.owns_sources ? worker.beside() : sums_.get() + plan_.sums_of(chunk, head);
    const int64_t own_width = std::max<int64_t>(1, problem_.depth_width);
    const Rows& values = gradients_.values;
    const bool in_place = chunk.owns_sources && values.type == ScalarType::Float &&
                          problem_.value_dim == problem_.value_width;
    const Sums sums{first, in_place ? values.floats(0, head, first) : memory,
                    in_place ? values.row_stride : problem_.value_width,
                    memory + count * problem_.value_width,
                    rel_.data() + (at * problem_.heads + head) * problem_.relations};
    fill(sums.to_source, count * own_width, 0.0f);
    for (int64_t j = 0; j < count; ++j)
      fill(sums.values + j * sums.stride, problem_.value_width, 0.0f);
    for (size_t p = chunk.first_panel; p < chunk.end_panel; ++p)
      worker.add(plan_.panels[p], head, sums);
    if (!chunk.owns_sources) return;
    if (problem_.of_values) {
      products.begin(head, vectors_of(at, head));
      for (int64_t j = 0; j < count; ++j)
        products.add(first + j, gradients_.dst.at(first + j, head), sums.to_source[j],
                     sums.values + j * sums.stride);
      products.finish();
    }
    for (int64_t j = 0; j < count; ++j)
      write_source(head, first + j, in_place ? nullptr : sums.values + j * sums.stride,
                   sums.to_source + j * own_width);
  }

  // dv is null where it is in place.
  void write_source(int64_t head, int64_t source, const float* dv, const float* own) const {
    if (dv)
      write_row(gradients_.values.at(0, head, source), gradients_.values.type, problem_.value_dim,
                dv);
    if (problem_.is_dot)
      write_row(gradients_.keys.at(0, head, source), gradients_.keys.type, problem_.depth, own);
    else if (!problem_.of_values)
      gradients_.src.at(source, head) = *own;
  }

  // The chunks' sums of every source, one chunk after the other.
  void add_shared(const Shared& shared, size_t first_part) {
    const int64_t own_width = std::max<int64_t>(1, problem_.depth_width);
    for_each_task(blocks_of(shared) * problem_.heads, [&](auto next) {
      std::vector<float> row(plan_.width());
      ThroughProducts products(problem_);
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t head = task % problem_.heads, block = task / problem_.heads;
        const int64_t first = shared.rows.first + block * kSources;
        if (problem_.of_values) products.begin(head, vectors_of(first_part + block, head));
        for (int64_t source = first; source < std::min(first + kSources, shared.rows.end());
             ++source) {
          fill(row.data(), plan_.width(), 0.0f);
          for (size_t at = shared.first_chunk; at < shared.end_chunk; ++at) {
            const Chunk& chunk = plan_.chunks[at];
            const int64_t j = source - chunk.sources.first;
            if (j < 0 || j >= chunk.sources.count) continue;
            const float* dv = sums_.get() + plan_.sums_of(chunk, head);
            const float* own = dv + chunk.sources.count * problem_.value_width + j * own_width;
            dv += j * problem_.value_width;
            for (int64_t d = 0; d < problem_.value_width; ++d) row[d] += dv[d];
            for (int64_t d = 0; d < own_width; ++d) row[problem_.value_width + d] += own[d];
          }
          const float* const own = row.data() + problem_.value_width;
          if (problem_.of_values)
            products.add(source, gradients_.dst.at(source, head), *own, row.data());
          write_source(head, source, row.data(), own);
        }
        if (problem_.of_values) products.finish();
      }
    });
  }

  const Problem& problem_;
  const Saved& saved_;
  const Gradients& gradients_;
  const Plan plan_;
  const std::unique_ptr<float[]> sums_;
  std::vector<double> rel_;  // [chunk][head][relation]
  std::vector<double> vectors_;  // [part][head][side][value_width]
  size_t parts_ = 0;  // the chunks, then the blocks of rows of segments that chunks share
  int64_t widest_ = 0, owned_ = 0;
};

void backward(const Tensor& grad_out, const Tensor& value, const Tensor& dst, const Tensor& src,
              const Tensor& rel, const Tensor& key, const Tensor& ranges, const Tensor& table,
              bool of_values, double scale, double negative_slope, bool within, double dropout_p,
              int64_t seed, const Tensor& out, const Tensor& softmax, const Tensor& dvalue,
              const Tensor& ddst, const Tensor& dsrc, const Tensor& drel) {
  const Problem problem(value, dst, src, rel, key, ranges, table, of_values, scale, negative_slope,
                        within, dropout_p, seed);
  const Saved saved{head_rows(grad_out), head_rows(out),
                    KeptSoftmax(problem, static_cast<float*>(softmax.data_ptr()))};
  ask_for_huge_pages({dvalue, ddst, dsrc});
  std::vector<float> to_targets;
  Gradients gradients;
  gradients.values = head_rows(dvalue);
  gradients.rel = Logits(drel);
  if (problem.is_dot) {
    gradients.queries = head_rows(ddst);
    gradients.keys = head_rows(dsrc);
  } else if (of_values) {
    to_targets.resize(problem.nodes * problem.heads);
    gradients.dst.data = to_targets.data();
    gradients.dst.row_stride = problem.heads;
    gradients.dst.head_stride = 1;
    gradients.vectors[kTarget] = static_cast<float*>(ddst.data_ptr());
    gradients.vectors[kSource] = static_cast<float*>(dsrc.data_ptr());
  } else {
    gradients.dst = Logits(ddst);
    gradients.src = Logits(dsrc);
  }
  Backward(problem, saved, gradients).run();
}

}  // namespace
}  // namespace rdfkern::relation_attention

STABLE_TORCH_LIBRARY_FRAGMENT(rdfkern, m) {
  m.def(
      "_relation_attention_bwd_cpu(Tensor grad_out, Tensor value, Tensor dst, Tensor src, "
      "Tensor rel, Tensor key, Tensor ranges, Tensor table, bool of_values, float scale, "
      "float negative_slope, bool within, float dropout_p, int seed, Tensor out, Tensor softmax, "
      "Tensor(a!) dvalue, Tensor(b!) ddst, Tensor(c!) dsrc, Tensor(d!) drel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rdfkern, CPU, m) {
  m.impl("_relation_attention_bwd_cpu", TORCH_BOX(&rdfkern::relation_attention::backward));
}
