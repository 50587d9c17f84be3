// The terms of a row that the gradients need, the kernel that computes them, and the derivative of
// one entry.
#pragma once

#include "diff_attention.cuh"

namespace rdfkern {

struct Saved {
  Rows grad_out, o2, o;  // o is the output itself where there is no norm
  const float* lse;      // (map, batch, head, row), contiguous
};

struct Gradients {
  Rows q[2], k[2], v;
  Rows grad_o;           // dO behind the norm: grad_out itself where there is no norm
  float *lam, *alpha;    // (batch, head, row), contiguous
  float* norm_partials;  // (block of rows_kernel, value_dim) or null
  float* terms;          // (term, map, batch, head, row), contiguous
};

// Of a row and map: a weight is exp2((score - base) * factor) * weight, so base may be rounded;
// delta is the row's sum of weight times gradient of the weight.
enum Term { kBase, kWeight, kDelta, kTerms };

__device__ inline float& term_of(const Problem& problem, const Gradients& gradients, int term,
                                 int map, int64_t flat) {
  return gradients.terms[(2 * term + map) * problem.rows() + flat];
}

// The terms of up to SIZE rows in shared memory.
template <int SIZE>
struct RowTerms {
  float values[kTerms][2][SIZE], alpha[SIZE], lam[SIZE];

  // Rows that are not there get zeros, and so do all their gradients.
  __device__ void load(const Problem& problem, const Gradients& gradients,
                       const Sequence& sequence, int64_t head, int first) {
#pragma unroll 1
    for (int at = threadIdx.x; at < SIZE; at += kThreads) {
      const int query = first + at;
      const bool exists = query < sequence.queries;
      const int64_t flat = problem.flat(sequence, head, exists ? query : 0);
      const int64_t row = sequence.first_query + (exists ? query : 0);
      for (int term = 0; term < kTerms; ++term)
        for (int map = 0; map < problem.maps; ++map)
          values[term][map][at] =
              exists ? term_of(problem, gradients, term, map, flat) : 0.0f;
      alpha[at] = exists ? problem.alpha.at(sequence.batch, head, row) : 0.0f;
      if (problem.maps == 2)
        lam[at] = exists ? problem.lam.at(sequence.batch, head, row) : 0.0f;
    }
  }
  __device__ float weight(int map, int at, float score, float factor) const {
    return exp2f((score - values[kBase][map][at]) * factor) * values[kWeight][map][at];
  }
};

__device__ inline void dropout_factors(const Problem& problem, const Sequence& sequence,
                                       int64_t head, int query, int key, float (&kept)[2]) {
  kept[0] = kept[1] = 1.0f;
  if (problem.dropout.probability > 0)
    problem.dropout.factors(uint32_t(sequence.index * problem.heads + head), query, key, kept);
}

struct Derivative {
  float scores[2];  // scale * dS1, scale * dS2
  float applied;    // alpha P1 - lam P2, what v is multiplied with
  float alpha;      // the share of dalpha
};

// Of one entry, from its scores and dP = dO . v; `at` is the query's place in the terms.
template <int MAPS, int SIZE>
__device__ inline Derivative differentiate(const Problem& problem, const Sequence& sequence,
                                           int64_t head, int query, int key,
                                           const RowTerms<SIZE>& terms, int at, float score1,
                                           float score2, float grad) {
  const float factor = problem.factor(), alpha = terms.alpha[at];
  const float p1 = terms.weight(0, at, score1, factor);
  float kept[2];
  dropout_factors(problem, sequence, head, query, key, kept);
  const float grad1 = grad * kept[0];
  // Only differences inside the brackets: where dP and D are equal, as with one key, it is 0.
  Derivative derivative{{problem.scale * alpha * (p1 * (grad1 - terms.values[kDelta][0][at]))},
                        alpha * (p1 * kept[0]), p1 * grad1};
  if constexpr (MAPS == 2) {
    const float lam = terms.lam[at], p2 = terms.weight(1, at, score2, factor);
    const float grad2 = grad * kept[1];
    derivative.scores[1] = problem.scale * lam * (p2 * (terms.values[kDelta][1][at] - grad2));
    derivative.applied -= lam * (p2 * kept[1]);
  }
  return derivative;
}

constexpr int kRowsPerBlock = 64;
constexpr int kMaxWidth = 256;

struct RowsMemory {
  float norm_partials[kWarps][kMaxWidth];
};

__device__ inline float sum_of_warp(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// One warp per row: dO behind the norm, the row's terms, partial sums of dnorm_weight.
__global__ void __launch_bounds__(kThreads, 1)
    rows_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Saved saved,
                const __grid_constant__ Gradients gradients) {
  auto& memory = shared_memory<RowsMemory>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, value_dim = problem.value_dim;
  for (int d = lane; d < value_dim; d += 32) memory.norm_partials[warp][d] = 0.0f;
#pragma unroll 1
  for (int i = warp; i < kRowsPerBlock; i += kWarps) {
    const int64_t flat = int64_t(blockIdx.x) * kRowsPerBlock + i;
    if (flat >= problem.rows()) break;
    const int64_t row = flat % problem.total_queries;
    const int64_t head = flat / problem.total_queries % problem.heads;
    const int64_t batch = flat / problem.total_queries / problem.heads;
    auto at = [&](const Rows& rows, int d) {
      return read(rows.data, rows.kind, rows.at(batch, head, row) + d);
    };
    float inverse = 0.0f, shared = 0.0f;
    if (problem.has_norm()) {
      float squares = 0.0f, overlap = 0.0f;
#pragma unroll 1
      for (int d = lane; d < value_dim; d += 32) {
        const float o = at(saved.o, d), weight = problem.norm_weight ? problem.norm_weight[d] : 1;
        squares = fmaf(o, o, squares);
        overlap = fmaf(problem.out_scale * at(saved.grad_out, d) * weight, o, overlap);
      }
      inverse = 1.0f / sqrtf(sum_of_warp(squares) / value_dim + problem.norm_eps);
      shared = inverse * inverse * (sum_of_warp(overlap) / value_dim);
    }
    float overlaps[2] = {};
#pragma unroll 1
    for (int d = lane; d < value_dim; d += 32) {
      float grad = at(saved.grad_out, d);
      const float o = at(saved.o, d), o2 = problem.maps == 2 ? at(saved.o2, d) : 0.0f;
      if (problem.has_norm()) {
        grad *= problem.out_scale;
        memory.norm_partials[warp][d] += grad * (o * inverse);
        if (problem.norm_weight) grad *= problem.norm_weight[d];
        grad = inverse * (grad - o * shared);
        const Rows& target = gradients.grad_o;
        write(target.data, target.kind, target.at(batch, head, row) + d, grad);
      }
      overlaps[0] = fmaf(grad, o, overlaps[0]);
      overlaps[1] = fmaf(grad, o2, overlaps[1]);
    }
    for (float& overlap : overlaps) overlap = sum_of_warp(overlap);
    if (lane >= problem.maps) continue;
    const int map = lane;
    const float alpha = problem.alpha.at(batch, head, row);
    const float lam = problem.maps == 2 ? problem.lam.at(batch, head, row) : 0.0f;
    // O = alpha O1 - lam O2. Below that alpha, dS1 is as good as 0 and needs no D1.
    const float delta1 =
        fabsf(alpha) < 1e-30f ? 0.0f : (overlaps[0] + lam * overlaps[1]) / alpha;
    const float lse = saved.lse[map * problem.rows() + flat];
    const bool alive = lse != -kInfinity;
    const double exponent = alive ? lse / kLn2 : 0.0;
    const float base = float(exponent / problem.factor());
    term_of(problem, gradients, kBase, map, flat) = base;
    term_of(problem, gradients, kWeight, map, flat) =
        alive ? float(exp2(double(base) * problem.factor() - exponent)) : 0.0f;
    term_of(problem, gradients, kDelta, map, flat) = map == 0 ? delta1 : overlaps[1];
  }
  __syncthreads();
  if (!gradients.norm_partials) return;
  for (int d = threadIdx.x; d < value_dim; d += kThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += memory.norm_partials[w][d];
    gradients.norm_partials[int64_t(blockIdx.x) * value_dim + d] = sum;
  }
}

}  // namespace rdfkern
