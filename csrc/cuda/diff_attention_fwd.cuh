// out = norm(alpha softmax(q1 k1ᵀ) v - lam softmax(q2 k2ᵀ) v) in one pass over the keys, or, with
// MAPS of 1, of the first map alone.
#pragma once

#include "diff_attention.cuh"

namespace rdfkern {

struct Outputs {
  Rows out, o2, o;  // the data of o2 and o is null where no backward needs them
  float* lse;       // (map, batch, head, row), contiguous
};

template <int ROWS, int WIDTH, int MAPS>
struct ForwardMemory {
  Tile<ROWS> weights[MAPS];
  Stage<ROWS, WIDTH> stage;
  float top[MAPS][ROWS], total[MAPS][ROWS], rescale[MAPS][ROWS];
};

// Running maxima and sums of the rows of one thread; a sum covers the thread's own columns only.
template <int ROWS, int MAPS>
struct Softmax {
  float top[MAPS][ROWS / kSide], total[MAPS][ROWS / kSide];

  // scores become exp2(factor * (scores - top)); rescale is what earlier products shrink by.
  __device__ void update(Tile<ROWS> (&tiles)[MAPS], float factor, float (&rescale)[MAPS][ROWS]) {
    const int x = thread_x(), y = thread_y();
#pragma unroll
    for (int map = 0; map < MAPS; ++map)
#pragma unroll
      for (int i = 0; i < ROWS / kSide; ++i) {
        float* const scores = tiles[map][y + kSide * i] + x;
        float highest = scores[0];
#pragma unroll
        for (int j = 1; j < kColumnSums; ++j) highest = fmaxf(highest, scores[kSide * j]);
        highest = fmaxf(top[map][i], maximum_of_row(highest));
        const float base = highest == -kInfinity ? 0.0f : highest;
        const float shrink = exp2f((top[map][i] - base) * factor);
        if (x == 0) rescale[map][y + kSide * i] = shrink;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kColumnSums; ++j) {
          const float weight = exp2f((scores[kSide * j] - base) * factor);
          scores[kSide * j] = weight;
          sum += weight;
        }
        total[map][i] = fmaf(total[map][i], shrink, sum);
        top[map][i] = highest;
      }
  }
};

// From unnormalised products to out, o2 and o, 16 rows at a time through shared memory.
template <int ROWS, int WIDTH, int MAPS>
__device__ inline void write_rows(const Problem& problem, const Place& place,
                                  const Outputs& outputs, const Softmax<ROWS, MAPS>& softmax,
                                  const Sums<ROWS, WIDTH> (&products)[MAPS],
                                  ForwardMemory<ROWS, WIDTH, MAPS>& memory) {
  const Sequence& sequence = place.sequence;
  const int x = thread_x(), y = thread_y();
#pragma unroll
  for (int i = 0; i < ROWS / kSide; ++i) {
    __syncthreads();
#pragma unroll
    for (int map = 0; map < MAPS; ++map)
      stage_rows(products[map], kSide * i, kSide * map, memory.stage);
    __syncthreads();
    const int query = place.first + y + kSide * i;
    const bool exists = query < sequence.queries;
    const int64_t row = sequence.first_query + (exists ? query : 0);
    float inverse[MAPS];
#pragma unroll
    for (int map = 0; map < MAPS; ++map) {
      const float total = sum_of_row(softmax.total[map][i]), top = softmax.top[map][i];
      inverse[map] = top == -kInfinity ? 0.0f : 1.0f / total;
      if (x == 0) {
        memory.top[map][y + kSide * i] = top;
        memory.total[map][y + kSide * i] = total;
      }
    }
    const float alpha = problem.alpha.at(sequence.batch, place.head, row) * inverse[0];
    const float lam = MAPS == 2 ? problem.lam.at(sequence.batch, place.head, row) : 0.0f;
    float squares = 0.0f;
    float* const first = memory.stage.whole[y];
    float* const second = memory.stage.whole[kSide + y];
#pragma unroll
    for (int n = 0; n < WIDTH / kSide; ++n) {
      const int d = x + kSide * n;
      float o = first[d] * alpha;
      if constexpr (MAPS == 2) o -= (second[d] *= inverse[1]) * lam;
      squares = fmaf(o, o, squares);
      first[d] = o;
    }
    squares = sum_of_row(squares);
    const float factor = problem.out_scale / sqrtf(squares / problem.value_dim + problem.norm_eps);
    if (!exists) continue;
    auto store = [&](const Rows& rows, int d, float value) {
      write(rows.data, rows.kind, rows.at(sequence.batch, place.head, row) + d, value);
    };
#pragma unroll 1
    for (int d = x; d < problem.value_dim; d += kSide) {
      float value = first[d];
      if (outputs.o2.data) store(outputs.o2, d, second[d]);
      if (outputs.o.data) store(outputs.o, d, value);
      if (problem.has_norm())
        value *= factor * (problem.norm_weight ? problem.norm_weight[d] : 1.0f);
      store(outputs.out, d, value);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < MAPS * ROWS; at += kThreads) {
    const int map = at / ROWS, row = at % ROWS, query = place.first + row;
    if (query >= sequence.queries) continue;
    const double top = memory.top[map][row], total = memory.total[map][row];
    outputs.lse[map * problem.rows() + problem.flat(sequence, place.head, query)] =
        total == 0 ? -kInfinity : float(kLn2 * (top * problem.factor() + log2(total)));
  }
}

template <int ROWS, int WIDTH, int MAPS>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Problem problem,
                   const __grid_constant__ Outputs outputs, const int tiles) {
  auto& memory = shared_memory<ForwardMemory<ROWS, WIDTH, MAPS>>();
  const Place place(problem, problem.heads, tiles, ROWS);
  const Sequence& sequence = place.sequence;
  if (place.first >= sequence.queries) return;
  const bool tensor_cores = problem.tensor_cores();
  const int count = min(ROWS, sequence.queries - place.first);
  Softmax<ROWS, MAPS> softmax;
  Sums<ROWS, WIDTH> products[MAPS];
#pragma unroll
  for (int map = 0; map < MAPS; ++map)
#pragma unroll
    for (int i = 0; i < ROWS / kSide; ++i) {
      softmax.top[map][i] = -kInfinity;
      softmax.total[map][i] = 0.0f;
    }
  const int end = problem.end_seen(sequence, place.first + count - 1);
#pragma unroll 1
  for (int key = problem.first_seen(sequence, place.first); key < end; key += kColumns) {
    auto keys_of = [&](const Rows& rows, int width) {
      return Strip{rows, sequence.batch, problem.kv_head(place.head), sequence.first_key + key,
                   min(kColumns, end - key), width};
    };
#pragma unroll 1
    for (int map = 0; map < MAPS; ++map) {
      const Strip queries{problem.q[map], sequence.batch, place.head,
                          sequence.first_query + place.first, count, problem.head_dim};
      multiply(queries, keys_of(problem.k[map], problem.head_dim), tensor_cores, memory.stage,
               memory.weights[map]);
      for_own_elements<ROWS>([&](int row, int column) {
        float& score = memory.weights[map][row][column];
        score = problem.score(sequence, place.head, place.first + row, key + column, score);
      });
    }
    softmax.update(memory.weights, problem.factor(), memory.rescale);
    if (problem.dropout.probability > 0)
      for_own_elements<ROWS>([&](int row, int column) {
        float kept[2];
        problem.dropout.factors(uint32_t(sequence.index * problem.heads + place.head),
                                place.first + row, key + column, kept);
        for (int map = 0; map < MAPS; ++map) memory.weights[map][row][column] *= kept[map];
      });
    load_whole<WIDTH>(keys_of(problem.v, problem.value_dim), tensor_cores, memory.stage);
#pragma unroll
    for (int map = 0; map < MAPS; ++map) products[map].scale(memory.rescale[map]);
    add_product(memory.weights, memory.stage, tensor_cores, products);
  }
  write_rows<ROWS, WIDTH, MAPS>(problem, place, outputs, softmax, products, memory);
}

}  // namespace rdfkern
