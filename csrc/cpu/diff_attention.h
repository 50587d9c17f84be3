// What forward and backward of differential attention share: the arguments, which keys a panel of
// queries sees, and the scores of a panel, stored transposed: [key][query], queries in the lanes.
// So neither keys nor values need packing, and the softmax runs along rows without any shuffles.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "ahead.h"
#include "dropout.h"
#include "gemm.h"
#include "pages.h"
#include "rows.h"

namespace rdfkern {

constexpr int64_t kPanel = 64;
// One vector more than the panel: rows a power of two apart would fall into the same cache sets.
constexpr int64_t kPanelStride = kPanel + 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kHidden = -1e30f;  // an additive mask at or below this hides its key

struct Sequence {
  int64_t batch, first_query, queries, first_key, keys;
  int64_t unpadded_begin, unpadded_end;  // keys outside are all padding
};

// One value per (batch, head, query), or packed per (query, head).
struct Coefficient {
  float* data;
  int64_t batch_stride, head_stride, row_stride;

  explicit Coefficient(const Tensor& tensor)
      : data(static_cast<float*>(tensor.data_ptr())), head_stride(tensor.stride(1)) {
    const bool packed = tensor.dim() == 2;
    batch_stride = packed ? 0 : tensor.stride(0);
    row_stride = tensor.stride(packed ? 0 : 2);
  }
  float& at(int64_t batch, int64_t head, int64_t row) const {
    return data[batch * batch_stride + head * head_stride + row * row_stride];
  }
};

struct Mask {
  const char* data;
  ScalarType type;
  int64_t strides[4];

  explicit Mask(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.data_ptr())), type(tensor.scalar_type()) {
    for (int dim = 0; dim < 4; ++dim) strides[dim] = tensor.stride(dim);
  }
};

// With one map, out = norm(alpha softmax(q1 k1ᵀ) v), and of what has two entries the second is idle.
// Values may be (B, Hkv, Lk, P, Dv / P): rows in parts that lie apart, each of whole vectors.
struct Problem {
  int maps;
  Rows q[2], k[2], v;
  Coefficient lam, alpha;
  std::optional<Mask> mask;
  const bool* padding = nullptr;
  int64_t padding_batch_stride = 0, padding_row_stride = 0;
  const float* norm_weight = nullptr;
  double norm_eps;
  float out_scale, scale;
  int64_t left, right;
  Dropout dropout;
  int64_t heads, kv_heads, head_dim, value_parts, part_dim, value_dim, head_width, value_width;
  std::vector<Sequence> sequences;

  Problem(const Tensor& q1, const Tensor& k1, const std::optional<Tensor>& q2,
          const std::optional<Tensor>& k2, const Tensor& values,
          const std::optional<Tensor>& lam_, const Tensor& alpha_,
          const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_padding_mask,
          const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
          const std::optional<Tensor>& norm_weight_, int64_t left_, int64_t right_, double scale_,
          double norm_eps_, double out_scale_, double dropout_p, int64_t seed)
      : maps(q2 ? 2 : 1), q{Rows(q1), Rows(q2 ? *q2 : q1)}, k{Rows(k1), Rows(k2 ? *k2 : k1)},
        v(values), lam(lam_ ? *lam_ : alpha_), alpha(alpha_),
        norm_eps(norm_eps_), out_scale(float(out_scale_)), scale(float(scale_)), left(left_),
        right(right_), dropout{dropout_p, uint64_t(seed)}, heads(q1.size(1)),
        kv_heads(k1.size(1)), head_dim(q1.size(q1.dim() - 1)),
        value_parts(values.dim() == 5 ? values.size(3) : 1),
        part_dim(values.size(values.dim() - 1)), value_dim(value_parts * part_dim),
        head_width(padded(head_dim)), value_width(padded(value_dim)),
        part_stride_(values.dim() == 5 ? values.stride(3) : 0) {
    if (attn_mask) mask.emplace(*attn_mask);
    if (norm_weight_) norm_weight = static_cast<const float*>(norm_weight_->data_ptr());
    if (key_padding_mask) {
      padding = static_cast<const bool*>(key_padding_mask->data_ptr());
      padding_batch_stride = cu_seqlens_k ? 0 : key_padding_mask->stride(0);
      padding_row_stride = key_padding_mask->stride(key_padding_mask->dim() - 1);
    }
    if (cu_seqlens_q) {
      auto cu_q = static_cast<const int32_t*>(cu_seqlens_q->data_ptr());
      auto cu_k = static_cast<const int32_t*>(cu_seqlens_k->data_ptr());
      for (int64_t s = 0; s + 1 < cu_seqlens_q->size(0); ++s)
        add({0, cu_q[s], cu_q[s + 1] - cu_q[s], cu_k[s], cu_k[s + 1] - cu_k[s], 0, 0});
    } else {
      for (int64_t b = 0; b < q1.size(0); ++b) add({b, 0, q1.size(2), 0, k1.size(2), 0, 0});
    }
  }

  bool has_norm() const { return norm_eps >= 0; }
  bool has_dropout() const { return dropout.probability > 0; }
  bool has_bias() const { return mask && mask->type != ScalarType::Bool; }
  // Not quite 0 for a scale of 0, which would make NaN of a hidden key's -inf.
  float score_factor() const { return std::max(std::fabs(scale) * kLog2e, 1e-30f); }
  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
  Rows values(int64_t part) const {
    Rows rows = v;
    rows.data += part * part_stride_ * bytes_of(v.type);
    return rows;
  }
  // As read_rows; of parts, copies side by side.
  Block read_values(int64_t batch, int64_t head, int64_t first, int64_t count,
                    float* scratch) const {
    if (value_parts == 1) return read_rows(v, batch, head, first, count, value_dim, scratch);
    for (int64_t part = 0; part < value_parts; ++part)
      for (int64_t i = 0; i < count; ++i)
        read_row(values(part).at(batch, head, first + i), v.type, part_dim,
                 scratch + i * value_width + part * part_dim);
    return {scratch, value_width};
  }
  bool is_padding(const Sequence& sequence, int64_t key) const {
    return padding[sequence.batch * padding_batch_stride +
                   (sequence.first_key + key) * padding_row_stride];
  }

 private:
  int64_t part_stride_;

  void add(Sequence sequence) {
    int64_t begin = 0, end = sequence.keys;
    if (padding) {
      while (begin < end && is_padding(sequence, begin)) ++begin;
      while (begin < end && is_padding(sequence, end - 1)) --end;
    }
    sequence.unpadded_begin = begin;
    sequence.unpadded_end = end;
    sequences.push_back(sequence);
  }
};

// body(maps, dropout), both as types with a constant value.
template <class Body>
void with_options(const Problem& problem, const Body& body) {
  auto with_maps = [&](auto maps) {
    problem.has_dropout() ? body(maps, std::true_type{}) : body(maps, std::false_type{});
  };
  problem.maps == 1 ? with_maps(std::integral_constant<int, 1>{})
                    : with_maps(std::integral_constant<int, 2>{});
}

// Up to kPanel queries of one head.
struct Panel {
  const Problem& problem;
  const Sequence& sequence;
  int64_t sequence_index, head, first, count;

  int64_t columns() const { return padded(count); }
  int64_t shift() const { return sequence.keys - sequence.queries; }
  int64_t row(int64_t i) const { return sequence.first_query + first + i; }
  float lam(int64_t i) const {
    return problem.maps == 1 ? 0.0f : problem.lam.at(sequence.batch, head, row(i));
  }
  float alpha(int64_t i) const { return problem.alpha.at(sequence.batch, head, row(i)); }

  // Keys outside [keys_begin, keys_end) are hidden from every query of the panel.
  int64_t keys_begin() const {
    const int64_t seen = problem.left < 0 ? 0 : first + shift() - problem.left;
    return std::max(sequence.unpadded_begin, seen);
  }
  int64_t keys_end() const {
    const int64_t seen =
        problem.right < 0 ? sequence.keys : first + count + shift() + problem.right;
    return std::min(sequence.unpadded_end, seen);
  }

  float factor() const { return problem.has_bias() ? 1.0f : problem.score_factor(); }

  // The panel's rows as they are, by read_rows or view_rows; `transposed` gets them with the sign
  // of the scale.
  template <class Read>
  Block read_queries(const Read& read, int map, float* natural, float* transposed) const {
    const Block rows =
        read(problem.q[map], sequence.batch, head, row(0), count, problem.head_dim, natural);
    transpose_rows(rows, count, problem.head_width, problem.scale < 0 ? -1.0f : 1.0f, transposed,
                   kPanelStride);
    return rows;
  }

  // Multiplied by factor(), a score is scale * q_i k_j + mask in units of log2(e); it is -inf where
  // the key is hidden. The factor is left to the exponential, which gets it without rounding.
  void scores(const float* transposed_queries, const Block& keys, int64_t first_key,
              int64_t key_count, float* scores, Ahead& ahead) const {
    gemm<Order::kRows, Update::kOverwrite>(key_count, columns(), problem.head_dim, keys.data,
                                           keys.stride, transposed_queries, kPanelStride, scores,
                                           kPanelStride, nullptr, AskFor{ahead});
    mask(first_key, key_count, scores, kPanelStride);
  }

  void mask(int64_t first_key, int64_t key_count, float* scores, int64_t stride) const {
    hide_outside_band(first_key, key_count, scores, stride);
    if (problem.padding)
      for (int64_t j = 0; j < key_count; ++j)
        if (problem.is_padding(sequence, first_key + j)) hide(scores + j * stride, 0, count);
    if (problem.mask) apply_mask(*problem.mask, first_key, key_count, scores, stride);
  }

 private:
  static void hide(float* row, int64_t begin, int64_t end) {
    if (begin < end) std::fill(row + begin, row + end, -kInfinity);
  }

  void hide_outside_band(int64_t first_key, int64_t key_count, float* scores,
                         int64_t stride) const {
    const int64_t last_key = first_key + key_count - 1;
    const bool right_cuts = problem.right >= 0 && last_key > first + shift() + problem.right;
    const bool left_cuts =
        problem.left >= 0 && first_key < first + count - 1 + shift() - problem.left;
    if (!right_cuts && !left_cuts) return;
    for (int64_t j = 0; j < key_count; ++j) {
      const int64_t aligned = first_key + j - shift() - first;  // the query standing at this key
      float* row = scores + j * stride;
      if (right_cuts) hide(row, 0, std::min(count, aligned - problem.right));
      if (left_cuts) hide(row, std::max<int64_t>(0, aligned + problem.left + 1), count);
    }
  }

  void apply_mask(const Mask& mask, int64_t first_key, int64_t key_count, float* scores,
                  int64_t stride) const {
    const int64_t size = bytes_of(mask.type);
    for (int64_t i = 0; i < count; ++i) {
      const char* row = mask.data + size * (sequence.batch * mask.strides[0] +
                                            head * mask.strides[1] + (first + i) * mask.strides[2] +
                                            first_key * mask.strides[3]);
      for (int64_t j = 0; j < key_count; ++j) {
        const char* element = row + size * j * mask.strides[3];
        float& score = scores[j * stride + i];
        if (mask.type != ScalarType::Bool) {
          const float added = to_float(element, mask.type);
          score = added <= kHidden || score == -kInfinity
                      ? -kInfinity
                      : score * problem.score_factor() + added * kLog2e;
        } else if (!*element) {
          score = -kInfinity;
        }
      }
    }
  }
};

// c += a b
template <Order ORDER>
void gemm_add(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda,
              const float* b, int64_t ldb, float* c, int64_t ldc, Ahead& ahead) {
  gemm<ORDER, Update::kAdd>(rows, columns, inner, a, lda, b, ldb, c, ldc, nullptr,
                            AskFor{ahead});
}

// c = a b, in sums no longer than those of gemm_add.
template <Order ORDER>
void gemm_anew(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda,
               const float* b, int64_t ldb, float* c, int64_t ldc, Ahead& ahead) {
  const int64_t first = std::min(inner, kInner);
  gemm<ORDER, Update::kOverwrite>(rows, columns, first, a, lda, b, ldb, c, ldc, nullptr,
                                  AskFor{ahead});
  if (inner > first)
    gemm_add<ORDER>(rows, columns, inner - first, a + first * (ORDER == Order::kRows ? 1 : lda),
                    lda, b + first * ldb, ldb, c, ldc, ahead);
}

inline float* fill_zeros(float* target, int64_t count) {
  std::fill(target, target + count, 0.0f);
  return target;
}

// Where rows add up.
struct Sum {
  float* data;
  int64_t stride;

  Sum from(int64_t row) const { return {data + row * stride, stride}; }
  void clear(int64_t begin, int64_t end, int64_t width) const {
    for (int64_t row = begin; row < end; ++row) fill_zeros(data + row * stride, width);
  }
};

}  // namespace rdfkern
