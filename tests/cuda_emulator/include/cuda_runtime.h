// CUDA C++ on the CPU, for tests: the same kernels and the same launches, compiled by g++.
//
// How to use it. Compile an unchanged .cu with `g++ -x c++ -I tests/cuda_emulator/include`, so that
// this file stands in for CUDA's own cuda_runtime.h, and link runtime.cpp (torch_shims.cpp as well
// where the .cu asks torch for its stream); harness.py does it. A launch, cudaLaunchKernelEx, then
// runs the blocks one after the other; each CUDA thread is a fiber that runs until it waits for
// others: at __syncthreads, __syncwarp, a shuffle or a vote. Which fiber is next is the schedule's
// choice (emulator_set_schedule): a kernel must give the same result under all of them, and one
// with a missing barrier does not.
//
// What a kernel needs: dynamic shared memory only, taken from
// `extern __shared__ __align__(16) char dynamic_shared[]` in namespace rdfkern (shared_memory() of
// csrc/cuda/rows.cuh); no <<<>>>, but cudaLaunchKernelEx; no inline PTX: tensor cores are reached by
// emulator::multiply_fragments.
//
// What is found: barriers that not all threads of a block reach, or at different lines; barriers
// after a thread's exit; shuffles and votes that not all threads of their mask reach; deadlocks;
// shared memory read before it was written (NaN) or beyond the launch's size (with
// -fsanitize=address); and, with its sanitizers, what g++ finds in any C++. A failed launch returns
// cudaErrorLaunchFailure, and cudaGetErrorString says what happened where. Not modelled: memory
// order, blocks at the same time, the rounding of a GPU's exp2f (2 ulp), time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Site {
  const char* file;
  int line;
};

// How the result of a warp's operation follows from what its lanes bring.
enum class Operation { kSynchronise, kExchange, kBallot };

void wait_for_block(Site site);
// kExchange: `bits` of lane `source`; kBallot: one bit per lane of the mask whose bits are not 0.
uint64_t wait_for_warp(Operation operation, unsigned mask, uint64_t bits, int source, Site site);
int lane();
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T exchange(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = wait_for_warp(Operation::kExchange, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int first_of_segment(int width) { return lane() / width * width; }
inline int within_segment(int source, int width) {
  return source >= first_of_segment(width) && source < first_of_segment(width) + width ? source
                                                                                       : lane();
}

}  // namespace emulator

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_SITE) { emulator::wait_for_block({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::wait_for_warp(emulator::Operation::kSynchronise, mask, 0, 0, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_SITE) {
  source = emulator::first_of_segment(width) + source % width;
  return emulator::exchange(mask, value, source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, EMULATOR_SITE) {
  const int source = emulator::within_segment(emulator::lane() ^ bits, width);
  return emulator::exchange(mask, value, source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, EMULATOR_SITE) {
  const int source = emulator::within_segment(emulator::lane() + int(by), width);
  return emulator::exchange(mask, value, source, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, EMULATOR_SITE) {
  const int source = emulator::within_segment(emulator::lane() - int(by), width);
  return emulator::exchange(mask, value, source, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return unsigned(emulator::wait_for_warp(emulator::Operation::kBallot, mask, predicate != 0, 0,
                                          {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

namespace emulator {

// mma.m16n8k8 with TF32 operands, for all lanes of a warp: sums += a b. As tensor cores do, it cuts
// off the lower 13 bits of operands, and everything below the last bit of the largest addend and of
// the sum (Fasi et al. 2021, of the V100; later ones keep a little more).
void multiply_fragments(float (&sums)[4], const float (&a)[4], const float (&b)[2], EMULATOR_SITE);

}  // namespace emulator

template <class T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  return before;
}
template <class T>
T atomicMax(T* target, T value) {
  const T before = *target;
  *target = std::max(before, value);
  return before;
}
template <class T>
T __ldg(const T* source) {
  return *source;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct CUstream_st;
typedef CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cudaError_t(emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                   [&] { kernel(arguments...); }));
}
