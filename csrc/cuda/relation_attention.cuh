// out_i = sum over edges e = (j -> i) of softmax_e(logits) value_j, and its gradients. A softmax is
// one over all edges into i, or one within each relation. A warp has a row and head: a lane for
// every edge while weights are made, one for every column while rows are summed.
#pragma once

#include <limits>

#include "relation_pairs.cuh"

namespace rdfkern {

constexpr int kLaneColumns = 4;
constexpr int kWarpColumns = kLanes * kLaneColumns;  // of a row that are summed at a time
constexpr float kHiddenLogit = -std::numeric_limits<float>::infinity();

// The additive form has one element per row and head in dst and src, and depth 0.
struct Attention {
  Rows value, dst, src, rel;
  int heads, value_dim, depth;
  float scale, negative_slope;
  bool within;
  Dropout dropout;

  __device__ static float element(const Rows& rows, int64_t row, int head, int column) {
    return read(rows.data, rows.kind, rows.at(0, head, row) + column);
  }
  __device__ static float product(const Rows& a, int64_t row_a, const Rows& b, int64_t row_b,
                                  int head, int width) {
    constexpr int STEP = 16;
    float sum = 0.0f;
#pragma unroll 1
    for (int start = 0; start < width; start += STEP) {
      const int end = min(start + STEP, width);
      float part = 0.0f;
#pragma unroll 4
      for (int column = start; column < end; ++column)
        part = fmaf(element(a, row_a, head, column), element(b, row_b, head, column), part);
      sum += part;
    }
    return sum;
  }
  __device__ float before_activation(const Heard& pair, int head) const {
    const float added = element(rel, pair.relation, head, 0);
    if (depth)
      return scale * product(dst, pair.target, src, pair.source, head, depth) + added;
    return element(dst, pair.target, head, 0) + element(src, pair.source, head, 0) + added;
  }
  __device__ float slope(float before) const { return before > 0.0f ? 1.0f : negative_slope; }
};

struct AttentionGradients {
  Rows grad_out;
  // (place, head): of every softmax what is subtracted from its logits, the inverse of the sum of
  // exp, and the sum of weight times its gradient. A softmax across relations stands at its target.
  float *base, *inverse, *delta;
  float* drel;  // (chunks, relation, head) partial sums, zeros at first
  Rows dvalue, ddst, dsrc;
  int chunks, relations;
};

// A softmax over logits that come 32 at a time.
struct OnlineSoftmax {
  float top = kHiddenLogit, total = 0.0f;

  // What the lane's logit weighs, and by what older weights shrink.
  __device__ float weight(float logit, float& rescale) {
    const float highest = maximum_of_warp(fmaxf(top, logit));
    const float base = highest == kHiddenLogit ? 0.0f : highest;
    rescale = expf(top - base);
    const float weight = expf(logit - base);
    total = fmaf(total, rescale, sum_of_warp(weight));
    top = highest;
    return weight;
  }
  __device__ float inverse() const { return total == 0.0f ? 0.0f : 1.0f / total; }
};

__device__ inline void add_row(float weight, const Rows& rows, int64_t row, int head, int first,
                               int width, float (&sums)[kLaneColumns]) {
#pragma unroll
  for (int n = 0; n < kLaneColumns; ++n) {
    const int column = first + lane_of_thread() + kLanes * n;
    if (column < width)
      sums[n] = fmaf(weight, Attention::element(rows, row, head, column), sums[n]);
  }
}

__device__ inline void write_row(const float (&sums)[kLaneColumns], float factor, const Rows& rows,
                                 int64_t row, int head, int first, int width) {
#pragma unroll
  for (int n = 0; n < kLaneColumns; ++n) {
    const int column = first + lane_of_thread() + kLanes * n;
    if (column < width)
      write(rows.data, rows.kind, rows.at(0, head, row) + column, sums[n] * factor);
  }
}

template <class Pairs>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_kernel(const __grid_constant__ Pairs pairs,
                             const __grid_constant__ Attention given,
                             const __grid_constant__ Rows out) {
  const int64_t row = warp_of_grid() / given.heads;
  const int head = warp_of_grid() % given.heads;
  if (row >= pairs.rows) return;
#pragma unroll 1
  for (int first = 0; first < given.value_dim; first += kWarpColumns) {
    float sums[kLaneColumns] = {};
    for_each_softmax(pairs, row, given.within, [&](const Group& group) {
      OnlineSoftmax softmax;
      float parts[kLaneColumns] = {};
#pragma unroll 1
      for (int64_t slot = group.begin; slot < group.end; slot += kLanes) {
        const Heard pair = own_pair(pairs, row, slot, group);
        float logit = kHiddenLogit, rescale;
        if (pair.exists()) {
          logit = given.before_activation(pair, head);
          logit *= given.slope(logit);
        }
        float weight = softmax.weight(logit, rescale);
        if (given.dropout.probability > 0 && pair.exists())
          weight *= pairs.kept(given.dropout, head, pair);
#pragma unroll
        for (int n = 0; n < kLaneColumns; ++n) parts[n] *= rescale;
        for_each_lane(pair.exists() ? pair.source : -1, [&](int lane, int64_t source) {
          add_row(__shfl_sync(kAllLanes, weight, lane), given.value, source, head, first,
                  given.value_dim, parts);
        });
      }
#pragma unroll
      for (int n = 0; n < kLaneColumns; ++n) sums[n] = fmaf(parts[n], softmax.inverse(), sums[n]);
    });
    write_row(sums, 1.0f, out, row, head, first, given.value_dim);
  }
}

// What backward makes of one edge again.
struct EdgeTerms {
  float logit = kHiddenLogit, slope = 0.0f, kept = 1.0f;
  float reaching = 0.0f;  // the gradient of its weight

  template <class Pairs>
  __device__ EdgeTerms(const Pairs& pairs, const Attention& given, const Rows& grad_out,
                       const Heard& pair, int head) {
    if (!pair.exists()) return;
    const float before = given.before_activation(pair, head);
    slope = given.slope(before);
    logit = before * slope;
    if (given.dropout.probability > 0) kept = pairs.kept(given.dropout, head, pair);
    reaching = kept * Attention::product(grad_out, pair.target, given.value, pair.source, head,
                                         given.value_dim);
  }
};

// Weight of an edge before dropout, and gradient of its logit before activation.
struct EdgeWeight {
  float probability = 0.0f, gradient = 0.0f;

  template <class Pairs>
  __device__ EdgeWeight(const Pairs& pairs, const Attention& given,
                        const AttentionGradients& gradients, const Heard& pair, int head,
                        const EdgeTerms& terms) {
    if (!pair.exists()) return;
    const int64_t place = given.within ? pairs.place_within(pair) : pair.target;
    const int64_t at = place * given.heads + head;
    const float inverse = gradients.inverse[at];
    probability = inverse == 0.0f ? 0.0f : expf(terms.logit - gradients.base[at]) * inverse;
    gradient = probability * (terms.reaching - gradients.delta[at]) * terms.slope;
  }
};

// partials[relation][head] += gradient, summed over the lanes of a relation: one warp writes there.
__device__ inline void add_to_relations(float gradient, int relation, float* partials, int heads) {
  int left = relation < 0 ? kNoRelation : relation;
#pragma unroll 1
  while (true) {
    const int lowest = minimum_of_warp(left);
    if (lowest == kNoRelation) return;
    const float sum = sum_of_warp(left == lowest ? gradient : 0.0f);
    if (lane_of_thread() == 0) partials[int64_t(lowest) * heads] += sum;
    if (left == lowest) left = kNoRelation;
  }
}

// base, inverse and delta of every softmax of a target.
template <class Pairs>
__device__ inline void keep_softmaxes(const Pairs& pairs, const Attention& given,
                                      const AttentionGradients& gradients, int64_t row, int head) {
  for_each_softmax(pairs, row, given.within, [&](const Group& group) {
    OnlineSoftmax softmax;
    float delta = 0.0f;
#pragma unroll 1
    for (int64_t slot = group.begin; slot < group.end; slot += kLanes) {
      const Heard pair = own_pair(pairs, row, slot, group);
      const EdgeTerms terms(pairs, given, gradients.grad_out, pair, head);
      float rescale;
      const float weight = softmax.weight(terms.logit, rescale);
      delta = fmaf(delta, rescale, weight * terms.reaching);
    }
    delta = sum_of_warp(delta) * softmax.inverse();
    const auto keep = [&](int64_t place) {
      const int64_t at = place * given.heads + head;
      gradients.base[at] = softmax.top;
      gradients.inverse[at] = softmax.inverse();
      gradients.delta[at] = delta;
    };
    const int lane = lane_of_thread();
    if (given.within && Pairs::kSoftmaxByEdge) {
#pragma unroll 1
      for (int64_t slot = group.begin + lane; slot < group.end; slot += kLanes)
        keep(pairs.place_within(pairs.at(row, slot)));
    } else if (lane == 0) {
      keep(given.within ? pairs.place_within({row, -1, -1, group.relation}) : row);
    }
  });
  __syncwarp();
}

// A warp has every chunks-th target: its softmaxes, ddst, and its own part of drel.
template <class Pairs>
__global__ void __launch_bounds__(kThreads, 1)
    attention_targets_kernel(const __grid_constant__ Pairs pairs,
                             const __grid_constant__ Attention given,
                             const __grid_constant__ AttentionGradients gradients) {
  const int64_t chunk = warp_of_grid() / given.heads;
  const int head = warp_of_grid() % given.heads;
  if (chunk >= gradients.chunks) return;
  float* const partials = gradients.drel + chunk * gradients.relations * given.heads + head;
#pragma unroll 1
  for (int64_t row = chunk; row < pairs.rows; row += gradients.chunks) {
    const int64_t end = pairs.end_of(row);
    keep_softmaxes(pairs, given, gradients, row, head);
#pragma unroll 1
    for (int first = 0; first < max(given.depth, 1); first += kWarpColumns) {
      float total = 0.0f, sums[kLaneColumns] = {};
#pragma unroll 1
      for (int64_t slot = pairs.begin_of(row); slot < end; slot += kLanes) {
        const Heard pair = own_pair(pairs, row, slot, end);
        const EdgeTerms terms(pairs, given, gradients.grad_out, pair, head);
        const EdgeWeight weight(pairs, given, gradients, pair, head, terms);
        total += weight.gradient;
        if (first == 0) add_to_relations(weight.gradient, pair.relation, partials, given.heads);
        if (given.depth)
          for_each_lane(pair.exists() ? pair.source : -1, [&](int lane, int64_t source) {
            add_row(__shfl_sync(kAllLanes, weight.gradient, lane), given.src, source, head, first,
                    given.depth, sums);
          });
      }
      if (given.depth)
        write_row(sums, given.scale, gradients.ddst, row, head, first, given.depth);
      else
        write_row({sum_of_warp(total)}, 1.0f, gradients.ddst, row, head, 0, 1);
    }
  }
}

template <class Pairs>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sources_kernel(const __grid_constant__ Pairs pairs,
                             const __grid_constant__ Attention given,
                             const __grid_constant__ AttentionGradients gradients) {
  const int64_t row = warp_of_grid() / given.heads;
  const int head = warp_of_grid() % given.heads;
  if (row >= pairs.rows) return;
  const int64_t end = pairs.end_of(row);
#pragma unroll 1
  for (int first = 0; first < max(given.value_dim, given.depth); first += kWarpColumns) {
    float total = 0.0f, values[kLaneColumns] = {}, keys[kLaneColumns] = {};
#pragma unroll 1
    for (int64_t slot = pairs.begin_of(row); slot < end; slot += kLanes) {
      const Heard pair = own_pair(pairs, row, slot, end);
      const EdgeTerms terms(pairs, given, gradients.grad_out, pair, head);
      const EdgeWeight weight(pairs, given, gradients, pair, head, terms);
      const float kept = weight.probability * terms.kept;
      total += weight.gradient;
      for_each_lane(pair.exists() ? pair.target : -1, [&](int lane, int64_t target) {
        add_row(__shfl_sync(kAllLanes, kept, lane), gradients.grad_out, target, head, first,
                given.value_dim, values);
        add_row(__shfl_sync(kAllLanes, weight.gradient, lane), given.dst, target, head, first,
                given.depth, keys);
      });
    }
    write_row(values, 1.0f, gradients.dvalue, row, head, first, given.value_dim);
    if (given.depth)
      write_row(keys, given.scale, gradients.dsrc, row, head, first, given.depth);
    else if (first == 0)
      write_row({sum_of_warp(total)}, 1.0f, gradients.dsrc, row, head, 0, 1);
  }
}

}  // namespace rdfkern
