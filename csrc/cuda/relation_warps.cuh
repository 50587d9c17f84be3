// Warps that have a row each.
#pragma once

#include "rows.cuh"

namespace rdfkern {

constexpr int kLanes = 32;

__device__ inline int lane_of_thread() { return threadIdx.x % kLanes; }
__device__ inline int64_t warp_of_grid() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
}

__device__ inline float sum_of_warp(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float maximum_of_warp(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

__device__ inline int minimum_of_warp(int value) {
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = min(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace rdfkern
