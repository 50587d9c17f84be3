// Rows of tensors of any floating dtype, read and written as float by a 16 by 16 block of threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rdfkern {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

enum class Kind : int { kFloat, kHalf, kBFloat16, kBool };

// A (batch, head, row, element) view; the last stride is 1.
struct Rows {
  char* data = nullptr;
  Kind kind = Kind::kFloat;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  __device__ int64_t at(int64_t batch, int64_t head, int64_t row) const {
    return batch * batch_stride + head * head_stride + row * row_stride;
  }
};

__device__ inline float read(const char* data, Kind kind, int64_t at) {
  if (kind == Kind::kFloat) return reinterpret_cast<const float*>(data)[at];
  if (kind == Kind::kHalf) return __half2float(reinterpret_cast<const __half*>(data)[at]);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[at]);
}

// Four neighbours, of which the first is aligned to all four.
__device__ inline float4 read_four(const char* data, Kind kind, int64_t at) {
  if (kind == Kind::kFloat) return *reinterpret_cast<const float4*>(data + 4 * at);
  const uint2 bits = *reinterpret_cast<const uint2*>(data + 2 * at);
  const char* const halves = reinterpret_cast<const char*>(&bits);
  return {read(halves, kind, 0), read(halves, kind, 1), read(halves, kind, 2),
          read(halves, kind, 3)};
}

__device__ inline void write(char* data, Kind kind, int64_t at, float value) {
  if (kind == Kind::kFloat)
    reinterpret_cast<float*>(data)[at] = value;
  else if (kind == Kind::kHalf)
    reinterpret_cast<__half*>(data)[at] = __float2half_rn(value);
  else
    reinterpret_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
}

// `count` rows of one head from `first` on; the rows after them count as zeros.
struct Strip {
  const Rows& rows;
  int64_t batch, head, first;
  int count, width;

  // Whether columns can be read four at a time.
  __device__ bool is_in_fours() const {
    const int size = rows.kind == Kind::kFloat ? 4 : 2;
    const char* const start = rows.data + rows.at(batch, head, first) * size;
    return reinterpret_cast<uintptr_t>(start) % (4 * size) == 0 && rows.row_stride % 4 == 0 &&
           width % 4 == 0;
  }
  // Of a row that is there, from a column on that is a multiple of 4.
  __device__ float4 four_at(int row, int column) const {
    return read_four(rows.data, rows.kind, rows.at(batch, head, first + row) + column);
  }
  __device__ float at(int row, int column) const {
    if (row >= count || column >= width) return 0.0f;
    return read(rows.data, rows.kind, rows.at(batch, head, first + row) + column);
  }
  __device__ void write_at(int row, int column, float value) const {
    write(rows.data, rows.kind, rows.at(batch, head, first + row) + column, value);
  }
};

// Threads of equal `ty` are one half of a warp: they share rows, and their columns interleave.
__device__ inline int thread_x() { return threadIdx.x % kSide; }
__device__ inline int thread_y() { return threadIdx.x / kSide; }

__device__ inline float sum_of_row(float value) {
  for (int step = kSide / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(kAllLanes, value, step, kSide);
  return value;
}

__device__ inline float maximum_of_row(float value) {
  for (int step = kSide / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step, kSide));
  return value;
}

// The block's shared memory; a launch asks for sizeof(Layout) bytes.
template <class Layout>
__device__ inline Layout& shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared[];
  return *reinterpret_cast<Layout*>(dynamic_shared);
}

}  // namespace rdfkern
