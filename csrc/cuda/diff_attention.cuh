// What the kernels of differential attention share: the arguments, which keys a query sees, and the
// scores of a tile. A block of threads has up to ROWS rows of one head and runs along the columns.
#pragma once

#include <cmath>
#include <limits>

#include "dropout.cuh"
#include "tiles.cuh"

namespace rdfkern {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kHidden = -1e30f;  // an additive mask at or below this hides its key

// One value per (batch, head, query).
struct Coefficient {
  const float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  __device__ float at(int64_t batch, int64_t head, int64_t row) const {
    return data[batch * batch_stride + head * head_stride + row * row_stride];
  }
};

struct Mask {
  char* data = nullptr;  // null: no mask
  Kind kind = Kind::kBool;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, column_stride = 0;
};

struct Sequence {
  int64_t index, batch, first_query, first_key;
  int queries, keys;
};

// With one map, out = norm(alpha softmax(q1 k1ᵀ) v), and of what has two entries the second is idle.
struct Problem {
  int maps = 2;
  Rows q[2], k[2], v;
  Coefficient lam, alpha;
  Mask mask;
  const bool* padding = nullptr;
  int64_t padding_batch_stride = 0, padding_row_stride = 0;
  const float* norm_weight = nullptr;
  float norm_eps = -1, out_scale = 1, scale = 1;
  int64_t left = -1, right = -1;
  Dropout dropout;
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // null: not packed
  int64_t batch = 0, heads = 0, kv_heads = 0, total_queries = 0, total_keys = 0;
  int head_dim = 0, value_dim = 0;

  __device__ Sequence sequence(int64_t index) const {
    if (!cu_seqlens_q) return {index, index, 0, 0, int(total_queries), int(total_keys)};
    return {index, 0, cu_seqlens_q[index], cu_seqlens_k[index],
            cu_seqlens_q[index + 1] - cu_seqlens_q[index],
            cu_seqlens_k[index + 1] - cu_seqlens_k[index]};
  }
  __device__ int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
  __device__ bool tensor_cores() const { return fits_tensor_cores(v.kind); }
  __device__ bool has_norm() const { return norm_eps >= 0; }
  __device__ bool has_bias() const { return mask.data && mask.kind != Kind::kBool; }
  // Not quite 0 for a scale of 0, which would make NaN of a hidden key's -inf.
  __device__ float score_factor() const { return fmaxf(fabsf(scale) * kLog2e, 1e-30f); }
  // exp2(factor() * score) is the weight before it is normalised.
  __device__ float factor() const { return has_bias() ? 1.0f : score_factor(); }
  // Where (batch, head, row) stands in contiguous per-row results.
  __device__ int64_t flat(const Sequence& sequence, int64_t head, int query) const {
    return (sequence.batch * heads + head) * total_queries + sequence.first_query + query;
  }
  __device__ int64_t rows() const { return batch * heads * total_queries; }

  // Keys that a query may see lie in [first_seen(query), end_seen(query)).
  __device__ int first_seen(const Sequence& sequence, int64_t query) const {
    if (left < 0) return 0;
    const int64_t seen = query + sequence.keys - sequence.queries - left;
    return int(min(max(seen, int64_t(0)), int64_t(sequence.keys)));
  }
  __device__ int end_seen(const Sequence& sequence, int64_t query) const {
    if (right < 0) return sequence.keys;
    const int64_t seen = query + sequence.keys - sequence.queries + right + 1;
    return int(min(max(seen, int64_t(0)), int64_t(sequence.keys)));
  }

  // The score in units of 1 / factor(), from the product of query and key; -inf for a hidden key.
  __device__ float score(const Sequence& sequence, int64_t head, int query, int key,
                         float product) const {
    if (query >= sequence.queries || key < first_seen(sequence, query) ||
        key >= end_seen(sequence, query))
      return -kInfinity;
    if (padding && padding[sequence.batch * padding_batch_stride +
                           (sequence.first_key + key) * padding_row_stride])
      return -kInfinity;
    const float score = scale < 0 ? -product : product;
    if (!mask.data) return score;
    const int64_t at = sequence.batch * mask.batch_stride + head * mask.head_stride +
                       query * mask.row_stride + key * mask.column_stride;
    if (mask.kind == Kind::kBool)
      return reinterpret_cast<const bool*>(mask.data)[at] ? score : -kInfinity;
    const float added = read(mask.data, mask.kind, at);
    if (added <= kHidden) return -kInfinity;
    return fmaf(score, score_factor(), added * kLog2e);
  }
};

// The rows of one block of threads: which sequence, which head, from where on.
struct Place {
  Sequence sequence;
  int64_t head;
  int first;

  // Blocks run through the tiles of a sequence first, then through `heads`, then the sequences.
  __device__ Place(const Problem& problem, int64_t heads, int tiles, int rows)
      : sequence(problem.sequence(blockIdx.x / tiles / heads)),
        head(blockIdx.x / tiles % heads), first(int(blockIdx.x % tiles) * rows) {}
};

}  // namespace rdfkern
