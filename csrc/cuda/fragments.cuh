// Products of matrices in shared memory, with sums in registers: on tensor cores where the operands
// allow for it, by the same threads for the same sums elsewhere.
#pragma once

#include "rows.cuh"

namespace rdfkern {

// TF32 holds numbers of both half types exactly; of float32 it would drop 13 bits.
__device__ inline bool fits_tensor_cores(Kind kind) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return false;
#else
  return kind == Kind::kHalf || kind == Kind::kBFloat16;
#endif
}

// To the nearest TF32 number, ties away from zero. Tensor cores cut the bits off instead.
__device__ inline float round_to_tf32(float value) {
  const unsigned bits = unsigned(__float_as_int(value)) + 0x1000u;
  return value == value ? __int_as_float(int(bits & ~0x1fffu)) : value;  // NaN would become 0
}
__device__ inline float cut_off_by_tf32(float value) {
  return round_to_tf32(value - __int_as_float(__float_as_int(value) & ~0x1fff));
}

// The sums of a ROWS by WIDTH product. A warp has 16 rows and its share of the columns, in
// fragments of 16 by 8; of each a lane has two neighbours in two rows, as mma.m16n8k8 has it.
template <int ROWS, int WIDTH>
struct Sums {
  static constexpr int kAcross = kWarps / (ROWS / 16);  // warps that share the same rows
  static constexpr int kFragments = WIDTH / 8 / kAcross;

  float values[kFragments][4] = {};

  __device__ static int first_row() { return threadIdx.x / 32 / kAcross * 16; }
  __device__ static int first_column() { return threadIdx.x / 32 % kAcross * kFragments * 8; }
  // Of values[n][i].
  __device__ static int row(int i) { return first_row() + threadIdx.x % 32 / 4 + i / 2 * 8; }
  __device__ static int column(int n, int i) {
    return first_column() + 8 * n + threadIdx.x % 4 * 2 + i % 2;
  }

  template <int COUNT>
  __device__ void add(const float (&part)[COUNT][4], int first = 0) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[first + n][i] += part[n][i];
  }
  __device__ void scale(const float* factors_of_rows) {
    const float factors[2] = {factors_of_rows[row(0)], factors_of_rows[row(2)]};
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] *= factors[i / 2];
  }

  // body(row, column, sum)
  template <class Body>
  __device__ void for_each(const Body& body) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(row(i), column(n, i), values[n][i]);
  }
};

// sums += a b by one warp, with a of 16 by 8 and b of 8 by 8, both of TF32 numbers.
__device__ inline void multiply_fragments(float (&sums)[4], const float (&a)[4],
                                          const float (&b)[2]) {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
      "%7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_int(a[0])), "r"(__float_as_int(a[1])), "r"(__float_as_int(a[2])),
        "r"(__float_as_int(a[3])), "r"(__float_as_int(b[0])), "r"(__float_as_int(b[1])));
#endif
#else  // the tests' stand-in
  emulator::multiply_fragments(sums, a, b);
#endif
}

// part[t][n] += the product over DEPTH terms, where left(t, row, k) and right(k, column) read the
// operands; rows and columns count from the warp's own first ones.
template <int DEPTH, int TILES, int COUNT, class Left, class Right>
__device__ inline void multiply_on_tensor_cores(const Left& left, const Right& right,
                                                float (&part)[TILES][COUNT][4]) {
  const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
#pragma unroll 2
  for (int k = 0; k < DEPTH; k += 8) {
    float a[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[t][i] = left(t, group + i % 2 * 8, k + place + i / 2 * 4);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float b[2] = {right(k + place, 8 * n + group),
                          right(k + place + 4, 8 * n + group)};
#pragma unroll
      for (int t = 0; t < TILES; ++t) multiply_fragments(part[t][n], a[t], b);
    }
  }
}

// The same in float32; sums add their terms in the order of k.
template <int DEPTH, int TILES, int COUNT, class Left, class Right>
__device__ inline void multiply_by_threads(const Left& left, const Right& right,
                                           float (&part)[TILES][COUNT][4]) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll 4
  for (int k = 0; k < DEPTH; ++k) {
    float a[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) a[t][i] = left(t, row + 8 * i, k);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float b[2] = {right(k, 8 * n + column), right(k, 8 * n + column + 1)};
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[t][n][i] = fmaf(a[t][i / 2], b[i % 2], part[t][n][i]);
    }
  }
}

}  // namespace rdfkern
