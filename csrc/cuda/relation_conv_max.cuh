// Gradients of relation convolution's elementwise maximum, for a few relations at a time: targets
// leave every maximum and what each edge that attains it gets of its gradient; sources and edges
// collect from there. No two threads write to one place.
#pragma once

#include "relation_conv.cuh"
#include "relation_warps.cuh"

namespace rdfkern {

// Relations [first, end).
struct Maxima {
  Rows x;
  float *maxima, *shares;  // (relation - first, target, blocks * width_in)
  int64_t targets;
  int first, end, width;  // blocks * width_in

  __device__ int64_t at(int relation, int64_t target) const {
    return (int64_t(relation - first) * targets + target) * width;
  }
  // What an edge's element gets. Where the maximum is not a number there is no edge to share with,
  // and times 0 the infinite share is not a number either.
  __device__ float share(int64_t place, float message) const {
    return (message == maxima[place] ? 1.0f : 0.0f) * shares[place];
  }
};

struct MaximaMemory {
  BackProductMemory product;
  FoundRuns found;
};

// A block has kTileRows targets and kGradientSide columns of one relation.
template <class View>
__global__ void __launch_bounds__(kThreads, 1)
    maxima_kernel(const __grid_constant__ View view, const __grid_constant__ Maxima given,
                  const __grid_constant__ BackProduct back) {
  auto& memory = shared_memory<MaximaMemory>();
  constexpr int COLUMNS = kGradientSide / kSide;
  const int across = (back.width_in + kGradientSide - 1) / kGradientSide;
  const int first_in = int(blockIdx.x % across) * kGradientSide;
  const int block = blockIdx.x / across % back.blocks;
  const int relation = given.first + blockIdx.x / across / back.blocks % (given.end - given.first);
  const int64_t first_row =
      int64_t(blockIdx.x / across / back.blocks / (given.end - given.first)) * kTileRows;
  if (!memory.found.find(view, first_row, relation)) return;
  multiply_back(view, first_row, memory.found.runs, relation, back, block, first_in,
                memory.product);
  const int64_t first_column = int64_t(block) * back.width_in + first_in + thread_x();
  const int width = back.width_in - first_in - thread_x();
#pragma unroll 1
  for (int local = thread_y(); local < kTileRows; local += kSide) {
    const Run& run = memory.found.runs[local];
    if (run.relation != relation) continue;
    const int64_t row = first_row + local;
    float highest[COLUMNS], ties[COLUMNS] = {};
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) highest[n] = kLowest;
    const auto for_each_message = [&](const auto& body) {
      view.for_each_neighbour(row, run, [&](int64_t node, float weight) {
        const int64_t at = node * given.x.row_stride + first_column;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
          if (kSide * n < width) body(n, weight * read(given.x.data, given.x.kind, at + kSide * n));
      });
    };
    for_each_message([&](int n, float message) { highest[n] = larger(highest[n], message); });
    for_each_message([&](int n, float message) { ties[n] += message == highest[n] ? 1.0f : 0.0f; });
    const int64_t place = given.at(relation, view.node(row)) + first_column;
    const float* const gradients = memory.product.stage.whole[local] + thread_x();
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
      if (kSide * n < width) {
        given.maxima[place + kSide * n] = highest[n];
        given.shares[place + kSide * n] = gradients[kSide * n] / ties[n];
      }
  }
}

// dx (source, column) += what the sources get through maxima; the first relations overwrite it. A
// block has kTileRows rows of the view of the sources, and kGradientSide columns.
template <class View>
__global__ void __launch_bounds__(kThreads, 1)
    collect_maxima_kernel(const __grid_constant__ View view, const __grid_constant__ Maxima given,
                          float* dx) {
  constexpr int COLUMNS = kGradientSide / kSide;
  const int across = (given.width + kGradientSide - 1) / kGradientSide;
  const int first_column = int(blockIdx.x % across) * kGradientSide + thread_x();
  const int width = given.width - first_column;
  const int64_t first_row = int64_t(blockIdx.x / across) * kTileRows;
#pragma unroll 1
  for (int64_t row = first_row + thread_y(); row < min(first_row + kTileRows, view.rows);
       row += kSide) {
    const int64_t node = view.node(row);
    float values[COLUMNS] = {}, sums[COLUMNS] = {};
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
      if (kSide * n < width) {
        const int column = first_column + kSide * n;
        values[n] = read(given.x.data, given.x.kind, node * given.x.row_stride + column);
        if (given.first) sums[n] = dx[node * given.width + column];
      }
    Run run = next_run(view, row, first_entry_from(view, row, given.first));
#pragma unroll 1
    for (; run.relation < given.end; run = next_run(view, row, run.end))
      view.for_each_neighbour(row, run, [&](int64_t target, float weight) {
        const int64_t place = given.at(run.relation, target) + first_column;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
          if (kSide * n < width)
            sums[n] = fmaf(given.share(place + kSide * n, weight * values[n]), weight, sums[n]);
      });
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
      if (kSide * n < width) dx[node * given.width + first_column + kSide * n] = sums[n];
  }
}

// edges[e] of these relations; the view is that of the targets. A warp has a target.
__global__ void __launch_bounds__(kThreads, 1)
    edge_maxima_kernel(const __grid_constant__ EdgeView view, const __grid_constant__ Maxima given,
                       float* edges) {
  const int64_t row = warp_of_grid();
  if (row >= view.rows) return;
  const int64_t end = view.end_entry(row);
#pragma unroll 1
  for (int64_t entry = first_entry_from(view, row, given.first);
       entry < end && view.relation_of(entry) < given.end; ++entry) {
    const int64_t source = view.other.at(entry) * given.x.row_stride;
    const int64_t place = given.at(view.relation_of(entry), row);
    const float weight = view.weight_of(entry);
    float sum = 0.0f;
#pragma unroll 1
    for (int column = lane_of_thread(); column < given.width; column += kLanes) {
      const float value = read(given.x.data, given.x.kind, source + column);
      sum = fmaf(given.share(place + column, weight * value), value, sum);
    }
    sum = sum_of_warp(sum);
    if (lane_of_thread() == 0) edges[view.edge.at(entry)] = sum;
  }
}

}  // namespace rdfkern
