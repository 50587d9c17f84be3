// Gradients of differential attention without atomics: after the kernel of the rows, one block of
// queries runs along the keys for dq, dlam and dalpha, and then one block of keys runs along the
// queries for dk and dv. With MAPS of 1 the second map is left out.
#pragma once

#include "diff_attention_terms.cuh"

namespace rdfkern {

template <int ROWS, int WIDTH>
struct QueryMemory {
  Tile<ROWS> tiles[3];  // scores 1, scores 2, dP; then scale * dS1, scale * dS2
  Stage<ROWS, WIDTH> stage;
  RowTerms<ROWS> terms;
  float dalpha[ROWS][kSide];  // each thread's share
};

// Rows that see at most so many keys get softmax and D anew, by the arithmetic of plain softmax:
// with few keys dP - D nearly cancels, and a D from saved rows would leave their rounding.
constexpr int kExactKeys = 128;

// While the tiles pass by, the terms of a row hold its maximum, and the sums of its unnormalised
// weights and of those times dP.
template <int MAPS, int ROWS, int WIDTH>
__device__ inline void begin_exact_terms(QueryMemory<ROWS, WIDTH>& memory) {
#pragma unroll 1
  for (int at = threadIdx.x; at < MAPS * ROWS; at += kThreads) {
    memory.terms.values[kBase][at / ROWS][at % ROWS] = -kInfinity;
    memory.terms.values[kWeight][at / ROWS][at % ROWS] = 0.0f;
    memory.terms.values[kDelta][at / ROWS][at % ROWS] = 0.0f;
  }
}

template <int MAPS, int ROWS, int WIDTH>
__device__ inline void add_to_exact_terms(const Problem& problem, const Place& place, int first_key,
                                          QueryMemory<ROWS, WIDTH>& memory) {
  const int x = thread_x();
#pragma unroll 1
  for (int row = thread_y(); row < ROWS; row += kSide) {
    float top[MAPS], total[MAPS] = {}, delta[MAPS] = {};
#pragma unroll
    for (int map = 0; map < MAPS; ++map) {
      const float* scores = memory.tiles[map][row];
      top[map] = fmaxf(memory.terms.values[kBase][map][row],
                       maximum_of_row(fmaxf(scores[x], scores[x + kSide])));
    }
#pragma unroll 1
    for (int column = x; column < kColumns; column += kSide) {
      float kept[2];
      dropout_factors(problem, place.sequence, place.head, place.first + row, first_key + column,
                      kept);
#pragma unroll
      for (int map = 0; map < MAPS; ++map) {
        const float base = top[map] == -kInfinity ? 0.0f : top[map];
        const float p = exp2f((memory.tiles[map][row][column] - base) * problem.factor());
        total[map] += p;
        delta[map] = fmaf(p, memory.tiles[2][row][column] * kept[map], delta[map]);
      }
    }
#pragma unroll
    for (int map = 0; map < MAPS; ++map) {
      const float base = top[map] == -kInfinity ? 0.0f : top[map];
      const float rescale = exp2f((memory.terms.values[kBase][map][row] - base) * problem.factor());
      const float sum = sum_of_row(total[map]), overlap = sum_of_row(delta[map]);
      __syncwarp();
      if (x > 0) continue;
      auto& values = memory.terms.values;
      values[kBase][map][row] = top[map];
      values[kWeight][map][row] = fmaf(values[kWeight][map][row], rescale, sum);
      values[kDelta][map][row] = fmaf(values[kDelta][map][row], rescale, overlap);
    }
  }
}

// From sums to the terms, also for the kernel of keys.
template <int MAPS, int ROWS, int WIDTH>
__device__ inline void end_exact_terms(const Problem& problem, const Gradients& gradients,
                                       const Place& place, QueryMemory<ROWS, WIDTH>& memory) {
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < MAPS * ROWS; at += kThreads) {
    const int map = at / ROWS, row = at % ROWS, query = place.first + row;
    auto& values = memory.terms.values;
    const bool alive = values[kBase][map][row] != -kInfinity;
    const float total = values[kWeight][map][row];
    values[kBase][map][row] = alive ? values[kBase][map][row] : 0.0f;
    values[kWeight][map][row] = alive ? 1.0f / total : 0.0f;
    values[kDelta][map][row] = alive ? values[kDelta][map][row] / total : 0.0f;
    if (query >= place.sequence.queries) continue;
    const int64_t flat = problem.flat(place.sequence, place.head, query);
    for (int term = 0; term < kTerms; ++term)
      term_of(problem, gradients, term, map, flat) = values[term][map][row];
  }
  __syncthreads();
}

template <int ROWS, int WIDTH, int MAPS>
__global__ void __launch_bounds__(kThreads, 1)
    query_gradients_kernel(const __grid_constant__ Problem problem,
                           const __grid_constant__ Gradients gradients, const int tiles) {
  auto& memory = shared_memory<QueryMemory<ROWS, WIDTH>>();
  const Place place(problem, problem.heads, tiles, ROWS);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.queries) return;
  const bool tensor_cores = problem.tensor_cores();
  const int count = min(ROWS, sequence.queries - place.first);
  const int x = thread_x(), y = thread_y();
  auto queries_of = [&](const Rows& rows, int width) {
    return Strip{rows, sequence.batch, place.head, sequence.first_query + place.first, count,
                 width};
  };
  memory.terms.load(problem, gradients, sequence, place.head, place.first);
  for (int row = y; row < ROWS; row += kSide) memory.dalpha[row][x] = 0.0f;
  Sums<ROWS, WIDTH> dq[MAPS][1];
  const int begin = problem.first_seen(sequence, place.first);
  const int end = problem.end_seen(sequence, place.first + count - 1);
  __syncthreads();
  const bool exact = end - begin <= kExactKeys;
  if (exact) begin_exact_terms<MAPS>(memory);
#pragma unroll 1
  for (int pass = exact ? 0 : 1; pass < 2; ++pass) {
    if (exact && pass == 1) end_exact_terms<MAPS>(problem, gradients, place, memory);
#pragma unroll 1
    for (int key = begin; key < end; key += kColumns) {
      auto keys_of = [&](const Rows& rows, int width) {
        return Strip{rows, sequence.batch, problem.kv_head(place.head), sequence.first_key + key,
                     min(kColumns, end - key), width};
      };
      // A single tile is still there in the second pass.
      const bool compute = pass == 0 || !exact || end - begin > kColumns;
#pragma unroll 1
      for (int part = 0; compute && part < 3; part += 3 - MAPS) {
        const int width = part < 2 ? problem.head_dim : problem.value_dim;
        multiply(queries_of(part < 2 ? problem.q[part] : gradients.grad_o, width),
                 keys_of(part < 2 ? problem.k[part] : problem.v, width), tensor_cores,
                 memory.stage, memory.tiles[part]);
        if (part == 2) break;
        for_own_elements<ROWS>([&](int row, int column) {
          float& score = memory.tiles[part][row][column];
          score = problem.score(sequence, place.head, place.first + row, key + column, score);
        });
      }
      if (pass == 0) {
        add_to_exact_terms<MAPS>(problem, place, key, memory);
        continue;
      }
      for_own_elements<ROWS>([&](int row, int column) {
        const Derivative derivative = differentiate<MAPS>(
            problem, sequence, place.head, place.first + row, key + column, memory.terms, row,
            memory.tiles[0][row][column], memory.tiles[1][row][column],
            memory.tiles[2][row][column]);
        for (int map = 0; map < MAPS; ++map)
          memory.tiles[map][row][column] = derivative.scores[map];
        memory.dalpha[row][x] += derivative.alpha;
      });
#pragma unroll
      for (int map = 0; map < MAPS; ++map) {
        load_whole<WIDTH>(keys_of(problem.k[map], problem.head_dim), tensor_cores, memory.stage);
        add_product(&memory.tiles[map], memory.stage, tensor_cores, dq[map]);
      }
    }
  }
#pragma unroll
  for (int map = 0; map < MAPS; ++map)
    write_sums(dq[map][0], memory.stage, queries_of(gradients.q[map], problem.head_dim));
#pragma unroll 1
  for (int row = y; row < ROWS; row += kSide) {
    const float dalpha = sum_of_row(memory.dalpha[row][x]);
    if (x > 0 || row >= count) continue;
    const int64_t flat = problem.flat(sequence, place.head, place.first + row);
    gradients.alpha[flat] = dalpha;
    if (MAPS == 2) gradients.lam[flat] = -memory.terms.values[kDelta][1][row];
  }
}

template <int ROWS, int WIDTH>
struct KeyMemory {
  Tile<ROWS> tiles[3];  // scores 1, scores 2, dP; then scale * dS1, scale * dS2, alpha P1 - lam P2
  Stage<ROWS, WIDTH> stage;
  RowTerms<kColumns> terms;
};

template <int ROWS, int HEAD_WIDTH, int VALUE_WIDTH, int MAPS>
__global__ void __launch_bounds__(kThreads, 1)
    key_gradients_kernel(const __grid_constant__ Problem problem,
                         const __grid_constant__ Gradients gradients, const int tiles) {
  constexpr int WIDTH = HEAD_WIDTH > VALUE_WIDTH ? HEAD_WIDTH : VALUE_WIDTH;
  auto& memory = shared_memory<KeyMemory<ROWS, WIDTH>>();
  const Place place(problem, problem.kv_heads, tiles, ROWS);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.keys) return;
  const bool tensor_cores = problem.tensor_cores();
  const int count = min(ROWS, sequence.keys - place.first);
  auto keys_of = [&](const Rows& rows, int width) {
    return Strip{rows, sequence.batch, place.head, sequence.first_key + place.first, count, width};
  };
  Sums<ROWS, HEAD_WIDTH> dk[MAPS][1];
  Sums<ROWS, VALUE_WIDTH> dv[1];
  const int64_t aligned = int64_t(place.first) + sequence.queries - sequence.keys;
  const int begin = problem.right < 0 ? 0 : int(max(aligned - problem.right, int64_t(0)));
  const int end = problem.left < 0 ? sequence.queries
                                   : int(min(max(aligned + count + problem.left, int64_t(0)),
                                             int64_t(sequence.queries)));
  const int64_t group = problem.heads / problem.kv_heads;
#pragma unroll 1
  for (int64_t head = place.head * group; head < (place.head + 1) * group; ++head)
#pragma unroll 1
    for (int query = begin; query < end; query += kColumns) {
      auto queries_of = [&](const Rows& rows, int width) {
        return Strip{rows, sequence.batch, head, sequence.first_query + query,
                     min(kColumns, end - query), width};
      };
      memory.terms.load(problem, gradients, sequence, head, query);
#pragma unroll 1
      for (int part = 0; part < 3; part += 3 - MAPS) {
        const int width = part < 2 ? problem.head_dim : problem.value_dim;
        multiply(keys_of(part < 2 ? problem.k[part] : problem.v, width),
                 queries_of(part < 2 ? problem.q[part] : gradients.grad_o, width),
                 tensor_cores, memory.stage, memory.tiles[part]);
        if (part == 2) break;
        for_own_elements<ROWS>([&](int row, int column) {
          float& score = memory.tiles[part][row][column];
          score = row < count ? problem.score(sequence, head, query + column, place.first + row,
                                              score)
                              : -kInfinity;
        });
      }
      for_own_elements<ROWS>([&](int row, int column) {
        const Derivative derivative = differentiate<MAPS>(
            problem, sequence, head, query + column, place.first + row, memory.terms, column,
            memory.tiles[0][row][column], memory.tiles[1][row][column],
            memory.tiles[2][row][column]);
        for (int map = 0; map < MAPS; ++map)
          memory.tiles[map][row][column] = derivative.scores[map];
        memory.tiles[2][row][column] = derivative.applied;
      });
      load_whole<VALUE_WIDTH>(queries_of(gradients.grad_o, problem.value_dim), tensor_cores,
                              memory.stage);
      add_product(&memory.tiles[2], memory.stage, tensor_cores, dv);
#pragma unroll
      for (int map = 0; map < MAPS; ++map) {
        load_whole<HEAD_WIDTH>(queries_of(problem.q[map], problem.head_dim), tensor_cores,
                               memory.stage);
        add_product(&memory.tiles[map], memory.stage, tensor_cores, dk[map]);
      }
    }
#pragma unroll
  for (int map = 0; map < MAPS; ++map)
    write_sums(dk[map][0], memory.stage, keys_of(gradients.k[map], problem.head_dim));
  write_sums(dv[0], memory.stage, keys_of(gradients.v, problem.value_dim));
}

}  // namespace rdfkern
