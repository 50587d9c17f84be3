// out_i = addend_i + sum over relations r of the sum (mean, maximum) of x_j over r's neighbours j,
// times W_r, and its gradients. Aggregates pass through shared memory, a relation at a time.
#pragma once

#include <limits>

#include "relation_views.cuh"
#include "tiles.cuh"

namespace rdfkern {

constexpr int kPass = 4 * kColumns;  // elements of x that are summed at a time
constexpr int kGradientSide = 64;    // rows and columns of dweight that one block has

enum class Aggregation : int { kSum, kMean, kMax };

// W_r has `blocks` diagonal blocks of (width_in, width_out): batches and heads of `weight`.
struct Convolution {
  Rows x, weight, addend, out;  // addend.data may be null
  int blocks, width_in, width_out;
  Aggregation aggregation;
};

struct WeightGradient {
  Rows x, grad_out;
  float* partials;  // (chunks, relations, blocks, width_in, width_out)
  int chunks, relations, blocks, width_in, width_out;
  Aggregation aggregation;
};

// What reaches aggregates: grad_out times W_rᵀ.
struct BackProduct {
  Rows grad_out, weight;  // weight: (relations, blocks, width_out, width_in)
  int blocks, width_in, width_out;
};

struct EdgeGradient {
  Rows x;
  BackProduct back;
  float* edges;
  bool mean;
};

template <int WIDTH>
struct ConvolveMemory {
  Tile<kTileRows> z[kPass / kColumns];
  Stage<kTileRows, WIDTH> stage;
  Walk walk;
};

struct WeightGradientMemory {
  Tile<kGradientSide> z;  // transposed: a row per element of x
  Stage<kGradientSide, kGradientSide> stage;
  FoundRuns found;
};

struct BackProductMemory {
  Tile<kTileRows> grad_out;
  Stage<kTileRows, kGradientSide> stage;
};

struct EdgeGradientMemory {
  BackProductMemory product;
  Walk walk;
};

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// What is not a number stays.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// store(row of the tile, column, aggregate of the row's neighbours) for every row and COLUMNS
// columns; zeros for rows without the relation and columns from `width` on.
template <int COLUMNS, class View, class Store>
__device__ inline void gather(const View& view, int64_t first_row, const Run (&runs)[kTileRows],
                              int relation, Aggregation aggregation, const Rows& x,
                              int64_t first_column, int width, const Store& store) {
  const int column = thread_x();
  const bool highest = aggregation == Aggregation::kMax;
#pragma unroll 1
  for (int local = thread_y(); local < kTileRows; local += kSide) {
    const Run& run = runs[local];
    float sums[COLUMNS / kSide] = {};
    if (run.relation == relation) {
#pragma unroll
      for (int n = 0; n < COLUMNS / kSide; ++n)
        if (highest && column + kSide * n < width) sums[n] = kLowest;
      view.for_each_neighbour(first_row + local, run, [&](int64_t node, float weight) {
        const int64_t at = node * x.row_stride + first_column + column;
#pragma unroll
        for (int n = 0; n < COLUMNS / kSide; ++n)
          if (column + kSide * n < width) {
            const float value = read(x.data, x.kind, at + kSide * n);
            sums[n] = highest ? larger(sums[n], weight * value) : fmaf(weight, value, sums[n]);
          }
      });
      const float scale = aggregation == Aggregation::kMean ? 1.0f / float(run.count) : 1.0f;
#pragma unroll
      for (int n = 0; n < COLUMNS / kSide; ++n) sums[n] *= scale;
    }
#pragma unroll
    for (int n = 0; n < COLUMNS / kSide; ++n) store(local, column + kSide * n, sums[n]);
  }
}

__device__ inline Rows from_column(Rows rows, int column) {
  rows.data += int64_t(column) * (rows.kind == Kind::kFloat ? 4 : 2);
  return rows;
}

// A block has kTileRows rows of the view and WIDTH columns of one diagonal block.
template <class View, int WIDTH>
__global__ void __launch_bounds__(kThreads, 1)
    convolve_kernel(const __grid_constant__ View view,
                    const __grid_constant__ Convolution given) {
  auto& memory = shared_memory<ConvolveMemory<WIDTH>>();
  const int parts = (given.width_out + WIDTH - 1) / WIDTH;
  const int first_column = int(blockIdx.x % parts) * WIDTH;
  const int block = blockIdx.x / parts % given.blocks;
  const int64_t first_row = int64_t(blockIdx.x / parts / given.blocks) * kTileRows;
  const Rows weight = from_column(given.weight, first_column);
  const bool tensor_cores = fits_tensor_cores(weight.kind);
  Sums<kTileRows, WIDTH> sums[1];
  memory.walk.start(view, first_row);
#pragma unroll 1
  for (int relation = memory.walk.lowest(); relation != kNoRelation;
       relation = memory.walk.lowest()) {
#pragma unroll 1
    for (int first = 0; first < given.width_in; first += kPass) {
      const int width = min(kPass, given.width_in - first);
      gather<kPass>(view, first_row, memory.walk.runs, relation, given.aggregation, given.x,
                    int64_t(block) * given.width_in + first, width,
                    [&](int local, int column, float sum) {
                      memory.z[column / kColumns][local][column % kColumns] = sum;
                    });
#pragma unroll 1
      for (int start = 0; start < width; start += kColumns) {
        load_whole<WIDTH>(Strip{weight, relation, block, first + start,
                                min(kColumns, width - start), given.width_out - first_column},
                          tensor_cores, memory.stage);
        add_product(&memory.z[start / kColumns], memory.stage, tensor_cores, sums);
      }
      __syncthreads();
    }
    memory.walk.advance(view, first_row, relation);
  }
  sums[0].for_each([&](int local, int column, float sum) {
    if (first_row + local >= view.rows || first_column + column >= given.width_out) return;
    const int64_t node = view.node(first_row + local);
    const int64_t at = int64_t(block) * given.width_out + first_column + column;
    if (given.addend.data)
      sum += read(given.addend.data, given.addend.kind, node * given.addend.row_stride + at);
    write(given.out.data, given.out.kind, node * given.out.row_stride + at, sum);
  });
}

// Partial sums of dweight: a block has a square of one relation's matrix, and every chunks-th tile.
template <class View>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ View view,
                           const __grid_constant__ WeightGradient given) {
  auto& memory = shared_memory<WeightGradientMemory>();
  const int across = (given.width_out + kGradientSide - 1) / kGradientSide;
  const int down = (given.width_in + kGradientSide - 1) / kGradientSide;
  const int first_out = int(blockIdx.x % across) * kGradientSide;
  const int first_in = int(blockIdx.x / across % down) * kGradientSide;
  const int matrix = blockIdx.x / across / down;  // (chunk, relation, block)
  const int block = matrix % given.blocks;
  const int relation = matrix / given.blocks % given.relations;
  const int chunk = matrix / given.blocks / given.relations;
  Sums<kGradientSide, kGradientSide> sums[1];
#pragma unroll 1
  for (int64_t first_row = int64_t(chunk) * kTileRows; first_row < view.rows;
       first_row += int64_t(given.chunks) * kTileRows) {
    if (!memory.found.find(view, first_row, relation)) continue;
    gather<kGradientSide>(view, first_row, memory.found.runs, relation, given.aggregation, given.x,
                          int64_t(block) * given.width_in + first_in, given.width_in - first_in,
                          [&](int local, int column, float sum) { memory.z[column][local] = sum; });
#pragma unroll 1
    for (int at = threadIdx.x; at < kTileRows * kGradientSide; at += kThreads) {
      const int local = at / kGradientSide, column = first_out + at % kGradientSide;
      float value = 0.0f;
      if (memory.found.runs[local].count && column < given.width_out)
        value = read(given.grad_out.data, given.grad_out.kind,
                     view.node(first_row + local) * given.grad_out.row_stride +
                         int64_t(block) * given.width_out + column);
      memory.stage.whole[local][at % kGradientSide] = value;
    }
    __syncthreads();
    add_product(&memory.z, memory.stage, fits_tensor_cores(given.grad_out.kind), sums);
  }
  float* const partials =
      given.partials + int64_t(matrix) * given.width_in * given.width_out;
  sums[0].for_each([&](int i, int j, float sum) {
    const int row = first_in + i, column = first_out + j;
    if (row < given.width_in && column < given.width_out)
      partials[int64_t(row) * given.width_out + column] = sum;
  });
}

// memory.stage.whole = grad_out of the tile's rows with `relation`, times up to kGradientSide
// columns of one diagonal block of W_rᵀ from first_in on; zeros elsewhere. All threads may read it.
template <class View>
__device__ inline void multiply_back(const View& view, int64_t first_row,
                                     const Run (&runs)[kTileRows], int relation,
                                     const BackProduct& given, int block, int first_in,
                                     BackProductMemory& memory) {
  const Rows weight = from_column(given.weight, first_in);
  const bool tensor_cores = fits_tensor_cores(weight.kind);
  Sums<kTileRows, kGradientSide> sums[1];
#pragma unroll 1
  for (int start = 0; start < given.width_out; start += kColumns) {
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < kTileRows * kColumns; at += kThreads) {
      const int local = at / kColumns, column = start + at % kColumns;
      float value = 0.0f;
      if (runs[local].relation == relation && column < given.width_out)
        value = read(given.grad_out.data, given.grad_out.kind,
                     view.node(first_row + local) * given.grad_out.row_stride +
                         int64_t(block) * given.width_out + column);
      memory.grad_out[local][at % kColumns] = value;
    }
    load_whole<kGradientSide>(Strip{weight, relation, block, start,
                                    min(kColumns, given.width_out - start),
                                    given.width_in - first_in},
                              tensor_cores, memory.stage);
    add_product(&memory.grad_out, memory.stage, fits_tensor_cores(weight.kind), sums);
  }
  __syncthreads();
  sums[0].for_each([&](int i, int j, float sum) { memory.stage.whole[i][j] = sum; });
  __syncthreads();
}

// edges[e] = <x of its source, grad_out of its target · W_rᵀ>; the view is that of the targets.
__global__ void __launch_bounds__(kThreads, 1)
    edge_gradient_kernel(const __grid_constant__ EdgeView view,
                         const __grid_constant__ EdgeGradient given) {
  auto& memory = shared_memory<EdgeGradientMemory>();
  const int64_t first_row = int64_t(blockIdx.x) * kTileRows;
  const int x = thread_x(), y = thread_y();
  const unsigned lanes_of_row = 0xffffu << (y % 2 * kSide);
  const BackProduct& back = given.back;
  memory.walk.start(view, first_row);
#pragma unroll 1
  for (int relation = memory.walk.lowest(); relation != kNoRelation;
       relation = memory.walk.lowest()) {
#pragma unroll 1
    for (int first_in = 0; first_in < back.blocks * back.width_in;) {
      const int block = first_in / back.width_in;
      const int width = min(kGradientSide, (block + 1) * back.width_in - first_in);
      multiply_back(view, first_row, memory.walk.runs, relation, back, block,
                    first_in - block * back.width_in, memory.product);
#pragma unroll 1
      for (int local = y; local < kTileRows; local += kSide) {
        const Run& run = memory.walk.runs[local];
        if (run.relation != relation) continue;
        const float* const gradients = memory.product.stage.whole[local] + x;
        const float share = given.mean ? 1.0f / float(run.count) : 1.0f;
#pragma unroll 1
        for (int64_t entry = run.begin; entry < run.end; ++entry) {
          const int64_t source = view.other.at(entry) * given.x.row_stride + first_in + x;
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < kGradientSide / kSide; ++n)
            if (x + kSide * n < width)
              sum = fmaf(gradients[kSide * n],
                         read(given.x.data, given.x.kind, source + kSide * n), sum);
          for (int step = kSide / 2; step > 0; step /= 2)
            sum += __shfl_xor_sync(lanes_of_row, sum, step, kSide);
          if (x != 0) continue;
          float& target = given.edges[view.edge.at(entry)];
          target = first_in ? target + share * sum : share * sum;
        }
      }
      first_in += width;
    }
    __syncthreads();
    memory.walk.advance(view, first_row, relation);
  }
}

// inverse[row][other key * 3 + direction] = 1 / how many neighbours of that band's relation the row
// has; the rest is left as it comes. The view is that of the targets.
__global__ void __launch_bounds__(kThreads, 1)
    inverse_counts_kernel(const __grid_constant__ BandView view, float* inverse) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= view.rows) return;
#pragma unroll 1
  for (Run run = next_run(view, row, view.first_entry(row)); run.relation != kNoRelation;
       run = next_run(view, row, run.end))
#pragma unroll 1
    for (int64_t entry = run.begin; entry < run.end; ++entry)
      inverse[row * 3 * view.keys + view.entries[entry]] = 1.0f / float(run.count);
}

}  // namespace rdfkern
