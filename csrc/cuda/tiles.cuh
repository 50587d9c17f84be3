// Tiles of matrices in shared memory, and their products.
#pragma once

#include "fragments.cuh"

namespace rdfkern {

constexpr int kColumns = 32;  // columns of a tile, and rows or elements that are held at a time
constexpr int kColumnSums = kColumns / kSide;

// Rows are apart so that the lanes of a fragment meet different banks: 4 modulo 32 where they read
// along rows, 8 modulo 32 where they read down columns.
template <int ROWS>
using Tile = float[ROWS][kColumns + 4];

// The memory through which operands pass: pieces of rows, or whole rows of up to WIDTH elements.
template <int ROWS, int WIDTH>
union alignas(16) Stage {
  struct {
    Tile<ROWS> rows;
    Tile<kColumns> columns;
  } pieces;
  float whole[kColumns][WIDTH + 8];
};

// target[i][j] = strip(i, first_column + j) for COLUMNS columns, zeros beyond its ends. With
// `round`, numbers are rounded to TF32.
template <int COLUMNS, int ROWS, int STRIDE>
__device__ inline void load(const Strip& strip, int first_column, bool round,
                            float (&target)[ROWS][STRIDE]) {
  static_assert(COLUMNS % 4 == 0 && STRIDE % 4 == 0);
  const int width = strip.width - first_column;
  if (strip.is_in_fours()) {
#pragma unroll
    for (int at = threadIdx.x; at < ROWS * (COLUMNS / 4); at += kThreads) {
      const int row = at / (COLUMNS / 4), column = at % (COLUMNS / 4) * 4;
      float4 values = {};
      if (row < strip.count && column < width) values = strip.four_at(row, first_column + column);
      if (round)
        values = {round_to_tf32(values.x), round_to_tf32(values.y), round_to_tf32(values.z),
                  round_to_tf32(values.w)};
      *reinterpret_cast<float4*>(&target[row][column]) = values;
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS * COLUMNS; at += kThreads) {
      const float value = strip.at(at / COLUMNS, first_column + at % COLUMNS);
      target[at / COLUMNS][at % COLUMNS] = round ? round_to_tf32(value) : value;
    }
  }
}

// tile[i][j] = rows(i) . columns(j), for all threads to read. Every sum adds its terms in the same
// groups, whoever is row and who is column, so that two kernels get the very same scores. On tensor
// cores one operand may be of float32: what they cut off of it makes a product of its own.
template <int ROWS, int WIDTH>
__device__ inline void multiply(const Strip& rows, const Strip& columns, bool tensor_cores,
                                Stage<ROWS, WIDTH>& stage, Tile<ROWS>& tile) {
  Sums<ROWS, kColumns> sums;
  const int row = sums.first_row(), column = sums.first_column();
  auto left = [&](int, int i, int k) { return stage.pieces.rows[row + i][k]; };
  auto right = [&](int k, int j) { return stage.pieces.columns[column + j][k]; };
  const bool wide_rows = rows.rows.kind == Kind::kFloat;
  const bool wide_columns = columns.rows.kind == Kind::kFloat;
#pragma unroll 1
  for (int start = 0; start < rows.width; start += kColumns) {
    __syncthreads();
    load<kColumns>(rows, start, false, stage.pieces.rows);
    load<kColumns>(columns, start, false, stage.pieces.columns);
    __syncthreads();
    float part[1][Sums<ROWS, kColumns>::kFragments][4] = {};
    if (!tensor_cores) {
      multiply_by_threads<kColumns>(left, right, part);
    } else {
      multiply_on_tensor_cores<kColumns>(left, right, part);
      if (wide_rows || wide_columns)
        multiply_on_tensor_cores<kColumns>(
            [&](int t, int i, int k) {
              return wide_rows ? cut_off_by_tf32(left(t, i, k)) : left(t, i, k);
            },
            [&](int k, int j) { return wide_columns ? cut_off_by_tf32(right(k, j)) : right(k, j); },
            part);
    }
    sums.add(part[0]);
  }
  sums.for_each([&](int i, int j, float sum) { tile[i][j] = sum; });
  __syncthreads();
}

// Calls body(row, column) for the thread's own elements of a tile.
template <int ROWS, class Body>
__device__ inline void for_own_elements(const Body& body) {
#pragma unroll 1
  for (int at = 0; at < ROWS / kSide * kColumnSums; ++at)
    body(thread_y() + kSide * (at / kColumnSums), thread_x() + kSide * (at % kColumnSums));
}

// Up to kColumns whole rows for add_product; waits until the stage is free, and until it is full.
template <int WIDTH, int ROWS, int STAGE_WIDTH>
__device__ inline void load_whole(const Strip& strip, bool tensor_cores,
                                  Stage<ROWS, STAGE_WIDTH>& stage) {
  static_assert(WIDTH <= STAGE_WIDTH);
  __syncthreads();
  load<WIDTH>(strip, 0, tensor_cores && strip.rows.kind == Kind::kFloat, stage.whole);
  __syncthreads();
}

// sums[t] += tiles[t] times the stage's whole rows. On tensor cores those rows must hold TF32
// numbers; the tiles may hold any. Short sums of short sums round less than one long sum.
template <int ROWS, int WIDTH, int TILES, int STAGE_WIDTH>
__device__ inline void add_product(const Tile<ROWS>* tiles, const Stage<ROWS, STAGE_WIDTH>& stage,
                                   bool tensor_cores, Sums<ROWS, WIDTH> (&sums)[TILES]) {
  constexpr int kFragments = Sums<ROWS, WIDTH>::kFragments;
  constexpr int kGroup = kFragments < 4 ? kFragments : 4;
  const int row = sums[0].first_row();
#pragma unroll
  for (int first = 0; first < kFragments; first += kGroup) {
    const int column = sums[0].first_column() + 8 * first;
    auto left = [&](int t, int i, int k) { return tiles[t][row + i][k]; };
    auto right = [&](int k, int j) { return stage.whole[k][column + j]; };
    float part[TILES][kGroup][4] = {};
    if (tensor_cores)
      multiply_on_tensor_cores<kColumns>(
          [&](int t, int i, int k) { return round_to_tf32(left(t, i, k)); }, right, part);
    else
      multiply_by_threads<kColumns>(left, right, part);
#pragma unroll
    for (int t = 0; t < TILES; ++t) sums[t].add(part[t], first);
  }
}

// 16 rows of sums at a time pass through the stage from its row `at` on; the caller synchronises.
template <int ROWS, int WIDTH, int STAGE_WIDTH>
__device__ inline void stage_rows(const Sums<ROWS, WIDTH>& sums, int first_row, int at,
                                  Stage<ROWS, STAGE_WIDTH>& stage) {
  if (sums.first_row() == first_row)
    sums.for_each([&](int i, int j, float sum) { stage.whole[at + i - first_row][j] = sum; });
}

template <int ROWS, int WIDTH, int STAGE_WIDTH>
__device__ inline void write_sums(const Sums<ROWS, WIDTH>& sums, Stage<ROWS, STAGE_WIDTH>& stage,
                                  const Strip& target) {
#pragma unroll 1
  for (int first_row = 0; first_row < ROWS; first_row += kSide) {
    __syncthreads();
    stage_rows(sums, first_row, 0, stage);
    __syncthreads();
    const int row = first_row + thread_y();
    if (row >= target.count) continue;
#pragma unroll 1
    for (int d = thread_x(); d < target.width; d += kSide)
      target.write_at(row, d, stage.whole[thread_y()][d]);
  }
}

}  // namespace rdfkern
