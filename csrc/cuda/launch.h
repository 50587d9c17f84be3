// From torch tensors to kernel arguments, and from kernels to torch's current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

#include "rows.cuh"

namespace rdfkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What every architecture since sm_75 gives a block, unasked and asked for.
constexpr size_t kSharedMemory = 48 * 1024, kMaxSharedMemory = 64 * 1024;

inline Kind kind_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Bool,
                  "expected float32, float16, bfloat16 or bool");
  return type == ScalarType::Float  ? Kind::kFloat
         : type == ScalarType::Half ? Kind::kHalf
         : type == ScalarType::Bool ? Kind::kBool
                                    : Kind::kBFloat16;
}

inline Rows rows_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), kind_of(tensor), tensor.stride(0),
          tensor.stride(1), tensor.stride(2)};
}
inline Rows rows_of(const std::optional<Tensor>& tensor) {
  return tensor ? rows_of(*tensor) : Rows{};
}

template <class T>
T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

inline int64_t tiles_of(int64_t length, int64_t rows) { return (length + rows - 1) / rows; }

// Launches on the device and the current stream of one tensor while it lives.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // One dimension of blocks, each with kThreads threads and one Layout of shared memory.
  template <class Layout, class... Parameters>
  void run(void (*kernel)(Parameters...), int64_t blocks,
           const std::type_identity_t<Parameters>&... arguments) const {
    static_assert(sizeof(Layout) <= kMaxSharedMemory);
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many blocks for one launch");
    if (blocks == 0) return;
    if (sizeof(Layout) > kSharedMemory)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(Layout)));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Layout);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "launch failed: ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace rdfkern
