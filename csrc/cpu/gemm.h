// C = beta C + A B on small row-major float matrices: tiles of 6 rows by kTileVectors vectors whose
// sums live in registers while the inner dimension runs.
#pragma once

#include "simd.h"

namespace rdfkern {

constexpr int kTileRows = 6;
constexpr int64_t kInner = 64;  // longest sum in one register before it joins C
constexpr int64_t kTileColumns = kTileVectors * kLanes;

enum class Order { kRows, kColumns };  // A[i][k] at i * lda + k, or at k * lda + i
enum class Update { kOverwrite, kAdd, kRescale };  // kRescale: row i of C times beta[i] first

// What else is done while a product runs: step() for every term of its sums, where vectors are so wide
// that it costs no time, and operator() after every tile.
struct Nothing {
  void step() const {}
  void operator()() const {}
};

template <Order ORDER, Update UPDATE, int ROWS, int VECTORS, class Beside>
inline __attribute__((always_inline)) void gemm_tile(
    int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* beta, const Beside& beside) {
  // A loop over sums that the pragmas below did not unroll whole would keep them in memory.
  static_assert(ROWS <= 12 && VECTORS <= 4);
  Vec sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < inner; ++k) {
    if constexpr (kLanes == 16) beside.step();
    Vec row[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) row[n] = load(b + k * ldb + n * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const Vec factor = broadcast(ORDER == Order::kRows ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) sums[i][n] += factor * row[n];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      float* target = c + i * ldc + n * kLanes;
      // Only here does the old value join: short sums of short sums round less than one long sum.
      if constexpr (UPDATE == Update::kAdd) sums[i][n] += load(target);
      if constexpr (UPDATE == Update::kRescale) sums[i][n] += load(target) * beta[i];
      store(target, sums[i][n]);
    }
}

// Rows of a tile of so many vectors: as many sums as leave registers for what is multiplied.
constexpr int tile_rows(int vectors) {
  return vectors == 1 ? 2 * kTileRows : kTileRows * kTileVectors / vectors;
}

template <Order ORDER, Update UPDATE, int VECTORS, class Beside>
inline void gemm_panel(
    int64_t rows, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* beta, const Beside& beside) {
  const int64_t step = ORDER == Order::kRows ? lda : 1;
  auto run = [&](auto tile_rows) {
    constexpr int ROWS = decltype(tile_rows)::value;
    gemm_tile<ORDER, UPDATE, ROWS, VECTORS>(inner, a, lda, b, ldb, c, ldc, beta, beside);
    beside();
    a += ROWS * step;
    c += ROWS * ldc;
    if (UPDATE == Update::kRescale) beta += ROWS;
    rows -= ROWS;
  };
  constexpr int ROWS = tile_rows(VECTORS);
  // No row is left to a tile of its own, whose few sums would wait for each other.
  while (rows >= ROWS && rows != ROWS + 1) run(std::integral_constant<int, ROWS>{});
  auto run_once = [&](auto tile_rows) {
    constexpr int FEWER = decltype(tile_rows)::value;
    if constexpr (FEWER < ROWS)
      if (rows >= FEWER && rows != FEWER + 1) run(tile_rows);
  };
  run_once(std::integral_constant<int, 8>{});
  run_once(std::integral_constant<int, 6>{});
  run_once(std::integral_constant<int, 5>{});
  run_once(std::integral_constant<int, 4>{});
  run_once(std::integral_constant<int, 3>{});
  run_once(std::integral_constant<int, 2>{});
  run_once(std::integral_constant<int, 1>{});
}

// c (rows, columns), a (rows, inner), b (inner, columns); columns is a multiple of kLanes.
// b may be in panels of kTileColumns columns, `panel` floats apart. INNER: as kInner.
template <Order ORDER, Update UPDATE, int64_t INNER = kInner, class Beside = Nothing>
__attribute__((noinline)) void gemm(
    int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t lda, const float* b,
    int64_t ldb, float* c, int64_t ldc, const float* beta = nullptr, const Beside& beside = {},
    int64_t panel = kTileColumns) {
  if constexpr (UPDATE == Update::kAdd)
    for (; inner > INNER; inner -= INNER) {
      gemm<ORDER, UPDATE, INNER>(rows, columns, INNER, a, lda, b, ldb, c, ldc, beta, beside,
                                 panel);
      a += INNER * (ORDER == Order::kRows ? 1 : lda);
      b += INNER * ldb;
    }
  auto run = [&](auto tile_vectors) {
    constexpr int VECTORS = decltype(tile_vectors)::value;
    gemm_panel<ORDER, UPDATE, VECTORS>(rows, inner, a, lda, b, ldb, c, ldc, beta, beside);
    b += VECTORS == kTileVectors ? panel : VECTORS * kLanes;
    c += VECTORS * kLanes;
    columns -= VECTORS * kLanes;
  };
  // A vector alone has few sums, which wait for each other: it is taken with those before it.
  const int64_t joined = panel == kTileColumns ? kTileColumns + kLanes : 0;
  while (columns >= kTileColumns && columns != joined)
    run(std::integral_constant<int, kTileVectors>{});
  if (columns >= 3 * kLanes) run(std::integral_constant<int, 3>{});
  if constexpr (kTileVectors > 2)
    if (columns >= 2 * kLanes) run(std::integral_constant<int, 2>{});
  if (columns > 0) run(std::integral_constant<int, 1>{});
}

}  // namespace rdfkern
