// Differential attention of few queries and many keys, as in decoding: the queries of all heads that
// share keys stand side by side, so that keys and values are read once, and the keys are cut into
// parts, so that all threads have some.
#include "diff_attention_fwd.h"
#include "diff_attention_whole.h"

namespace rdfkern {
namespace {

constexpr int64_t kPart = 256;  // keys; the cut depends on nothing else, and so do results
constexpr int64_t kFewQueries = kLanes / 2;  // more of them fill vectors by themselves

// The queries of a head of keys: row r of them is one query of one head.
struct Group {
  const Problem& problem;
  int64_t sequence_index, kv_head;

  const Sequence& sequence() const { return problem.sequences[sequence_index]; }
  int64_t rows() const { return problem.heads / problem.kv_heads * sequence().queries; }
  Panel row(int64_t r) const {
    const int64_t queries = sequence().queries, head = r / queries;
    return {problem, sequence(), sequence_index,
            kv_head * (problem.heads / problem.kv_heads) + head, r % queries, 1};
  }

  // Of both maps; where they fit, one vector holds both.
  bool is_one_vector() const { return problem.maps * rows() <= kLanes; }
  int64_t second_map() const { return is_one_vector() ? rows() : padded(rows()); }
  int64_t all_rows() const { return (problem.maps - 1) * second_map() + rows(); }
  int64_t columns() const { return padded(all_rows()); }
};

// Of one part of the keys.
struct PartTask {
  Group group;
  int64_t first_key, keys;
  float* results;  // bases, sums and products [row][value_width] of all rows
};

struct GroupTask {
  Group group;
  int64_t first_part, parts;
};

class FewQueries {
 public:
  FewQueries(const Problem& problem, const Outputs& outputs)
      : problem_(problem), outputs_(outputs) {
    int64_t floats = 0;
    for (size_t s = 0; s < problem.sequences.size(); ++s) {
      if (!has_few_queries(problem, problem.sequences[s])) continue;
      for (int64_t head = 0; head < problem.kv_heads; ++head) {
        const Group group{problem, int64_t(s), head};
        // The first row sees the first key that any does, the last row the last one.
        const int64_t begin = group.row(0).keys_begin();
        const int64_t end = group.row(group.rows() - 1).keys_end();
        groups_.push_back({group, int64_t(parts_.size()), 0});
        for (int64_t first = begin; first < end; first += kPart, ++groups_.back().parts)
          parts_.push_back({group, first, std::min(kPart, end - first), nullptr});
        floats += groups_.back().parts * results_of(group);
      }
    }
    results_.reset(new float[floats]);
    float* next = results_.get();
    for (PartTask& part : parts_) {
      part.results = next;
      next += results_of(part.group);
    }
  }

  void run() const {
    for_each_task(parts_.size(), [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) attend(parts_[task]);
    });
    for_each_task(groups_.size(), [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) combine(groups_[task]);
    });
  }

 private:
  int64_t results_of(const Group& group) const {
    return 2 * group.columns() + group.all_rows() * problem_.value_width;
  }

  void attend(const PartTask& task) const {
    const Group& group = task.group;
    const Sequence& sequence = group.sequence();
    const int64_t rows = group.rows(), columns = group.columns(), keys = task.keys;
    const int64_t head_width = problem_.head_width, value_width = problem_.value_width;
    Scratch scratch((2 * (rows + keys) + padded(rows)) * head_width +
                    keys * (columns + value_width) + 7 * 16);
    float* queries[2];
    Block key_blocks[2];
    Ahead ahead;
    const int64_t first_key = sequence.first_key + task.first_key;
    for (int map = 0; map < problem_.maps; ++map) {
      queries[map] = scratch.take(rows * head_width);
      for (int64_t r = 0; r < rows; ++r) {
        const Panel row = group.row(r);
        read_row(problem_.q[map].at(sequence.batch, row.head, row.row(0)), problem_.q[map].type,
                 problem_.head_dim, queries[map] + r * head_width);
      }
      key_blocks[map] = view_rows(problem_.k[map], sequence.batch, group.kv_head, first_key, keys,
                                  problem_.head_dim, scratch.take(keys * head_width));
    }
    for (int64_t part = 0; part < problem_.value_parts; ++part)
      ahead.add(problem_.values(part), sequence.batch, group.kv_head, first_key, keys,
                problem_.part_dim);
    ahead.spread(problem_.maps * keys / (2 * kTileRows));

    float* const scores = scratch.take(keys * columns);  // [key][row]
    if (group.is_one_vector())
      score_by_rows(group, queries, key_blocks, keys, scores, ahead);
    else
      score_by_products(group, queries, key_blocks, keys, scores,
                        scratch.take(padded(rows) * head_width), ahead);
    for (int map = 0; map < problem_.maps; ++map)
      for (int64_t r = 0; r < rows; ++r)
        group.row(r).mask(task.first_key, keys, scores + map * group.second_map() + r, columns);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const auto [base, total] = exponentiate(scores + i, columns, keys, group.row(0).factor());
      store(task.results + i, base);
      store(task.results + columns + i, total);
    }
    float* const value_rows = scratch.take(keys * value_width);
    for (int64_t part = 0; part < problem_.value_parts; ++part) {
      const Block values = view_rows(problem_.values(part), sequence.batch, group.kv_head,
                                     first_key, keys, problem_.part_dim, value_rows);
      gemm_anew<Order::kColumns>(group.all_rows(), padded(problem_.part_dim), keys, scores, columns,
                                 values.data, values.stride,
                                 task.results + 2 * columns + part * problem_.part_dim, value_width,
                                 ahead);
    }
  }

  float sign() const { return problem_.scale < 0 ? -1.0f : 1.0f; }

  // One product of rows after the other: as a product of matrices most lanes would be idle.
  void score_by_rows(const Group& group, float* const (&queries)[2], const Block (&keys)[2],
                     int64_t count, float* scores, Ahead& ahead) const {
    const int64_t rows = group.rows(), width = problem_.head_width;
    for (int64_t j = 0; j < count; j += kLanes, ahead.end_tile()) {
      const int64_t here = std::min<int64_t>(kLanes, count - j);
      Vec products[kLanes];
      Vec* next = products;
      for (int map = 0; map < problem_.maps; ++map)
        for (int64_t r = 0; r < rows; ++r)
          *next++ =
              row_products(queries[map] + r * width, keys[map].from(j), here, width) * sign();
      while (next != products + kLanes) *next++ = Vec{};
      transpose(products);
      for (int64_t lane = 0; lane < here; ++lane)
        store(scores + (j + lane) * kLanes, products[lane]);
    }
  }

  void score_by_products(const Group& group, float* const (&queries)[2], const Block (&keys)[2],
                         int64_t count, float* scores, float* transposed, Ahead& ahead) const {
    const int64_t width = padded(group.rows());
    for (int map = 0; map < problem_.maps; ++map) {
      transpose_rows({queries[map], problem_.head_width}, group.rows(), problem_.head_width, sign(),
                     transposed, width);
      gemm<Order::kRows, Update::kOverwrite>(count, width, problem_.head_dim, keys[map].data,
                                             keys[map].stride, transposed, width,
                                             scores + map * group.second_map(), group.columns(),
                                             nullptr, AskFor{ahead});
    }
  }

  // Rows of all parts, weighed by their sums.
  void combine(const GroupTask& task) const {
    const Group& group = task.group;
    const int64_t columns = group.columns(), width = problem_.value_width;
    std::vector<float> sums[2] = {std::vector<float>(width), std::vector<float>(width)};
    std::vector<float> factors(task.parts);
    for (int64_t r = 0; r < group.rows(); ++r) {
      const Panel row = group.row(r);
      for (int map = 0; map < problem_.maps; ++map) {
        const int64_t at = map * group.second_map() + r;
        const auto results = [&](int64_t part) { return parts_[task.first_part + part].results; };
        float base = -kInfinity, total = 0.0f;
        for (int64_t p = 0; p < task.parts; ++p) base = std::max(base, results(p)[at]);
        for (int64_t p = 0; p < task.parts && base > -kInfinity; ++p) {
          factors[p] = std::exp2(results(p)[at] - base);
          total += factors[p] * results(p)[columns + at];
        }
        outputs_.write_lse(row, map, 0, base, total);
        float* const sum = fill_zeros(sums[map].data(), width);
        for (int64_t p = 0; p < task.parts && base > -kInfinity; ++p) {
          const float* const product = results(p) + 2 * columns + at * width;
          const float share = factors[p] / total;
          for (int64_t d = 0; d < width; d += kLanes)
            store(sum + d, load(sum + d) + load(product + d) * share);
        }
      }
      float *const out = sums[0].data(), *const o2 = sums[1].data();
      const float alpha = row.alpha(0), lam = row.lam(0);
      for (int64_t d = 0; d < width; d += kLanes)
        store(out + d, load(out + d) * alpha - load(o2 + d) * lam);
      if (outputs_.o2)
        write_row(outputs_.o2->at(row.sequence.batch, row.head, row.row(0)), outputs_.o2->type,
                  problem_.value_dim, o2);
      outputs_.write_out(row, 0, out);
    }
  }

  const Problem& problem_;
  const Outputs& outputs_;
  std::vector<PartTask> parts_;
  std::vector<GroupTask> groups_;
  std::unique_ptr<float[]> results_;
};

}  // namespace

bool has_few_queries(const Problem& problem, const Sequence& sequence) {
  const int64_t rows = problem.heads / problem.kv_heads * sequence.queries;
  return !problem.has_dropout() && rows > 0 && sequence.queries <= kFewQueries &&
         rows <= kPanel && sequence.keys > kPart;
}

void attend_few(const Problem& problem, const Outputs& outputs) {
  FewQueries(problem, outputs).run();
}

}  // namespace rdfkern
