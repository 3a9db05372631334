// Launches a kernel on a device and stream. The error of a failed launch names the kernel and the shapes.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pruneattn::cuda {

inline void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or the next call would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Makes `device` the current device for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors(int device) { return device_attribute(cudaDevAttrMultiProcessorCount, device); }

// The maximum shared memory of a block, in bytes.
inline int shared_limit(int device) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

// Kernels need permission for more than 48 KB of shared memory, once per kernel and device.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kDefaultLimit = 48 << 10;
  if (bytes <= kDefaultLimit) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& before = allowed[{kernel, device}];
  if (bytes <= before) return cudaSuccess;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) before = bytes;
  return status;
}

struct Grid {
  int64_t blocks;
  int threads;        // per block
  size_t shared = 0;  // bytes of dynamic shared memory per block
};

// `describe` returns the kernel's name and shapes. It is called only in case of an error.
template <typename Describe, typename... Parameters, typename... Arguments>
void launch(const Describe& describe, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), grid.shared);
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status == cudaSuccess) return;
  const std::string shared = grid.shared ? " with " + std::to_string(grid.shared) + " bytes of shared memory" : "";
  check_cuda(status, "CUDA kernel " + describe() + " could not be launched" + shared);
}

}  // namespace pruneattn::cuda
