// Replaces the CUDA runtime, so that g++ compiles csrc/cuda/*.cu unchanged and the kernels run without a GPU.
//
// Execution: one block at a time in one OS thread. Each CUDA thread is a fiber that runs until its next barrier or
// warp shuffle. A warp runs as far as possible before the next warp, so that a missing barrier changes results.
// Asynchronous copies and products run when the kernel waits for them, so that a missing wait changes results.
//
// Errors: writes next to dynamic shared memory, a barrier that only some threads reach, different operations within a
// warp, and partial masks. Shared memory contains a poison value at the start of each block. race.h describes `make
// race`.
//
// Environment variables:
//   EMULATED_ORDER            order of threads and blocks: forward, reverse or shuffle
//   EMULATED_EARLY            "copies", "products" or both run immediately
//   EMULATED_MULTIPROCESSORS, EMULATED_SHARED_LIMIT, EMULATED_CAPABILITY (for example 8.0)
//                             attributes of the device
//   EMULATED_LAUNCH_ERROR     if set, launches fail
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // see shared_edge.cpp

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#include "fibers.h"
#include "vectors.h"

namespace emulated = pruneattn::emulated;

// Barriers and warp shuffles.
inline void __syncthreads() { emulated::wait_for_block("__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange_in_warp("__syncwarp", mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = emulated::exchange_in_warp("__ballot_sync", mask, predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
template <typename F>
unsigned emulated_reduce(const char* operation, unsigned mask, unsigned value, F f) {
  const uint64_t* all = emulated::exchange_in_warp(operation, mask, value);
  return static_cast<unsigned>(std::accumulate(all + 1, all + emulated::kWarp, all[0], f));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulated_reduce("__reduce_add_sync", mask, value, std::plus<uint64_t>());
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulated_reduce("__reduce_and_sync", mask, value, std::bit_and<uint64_t>());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulated_reduce("__reduce_or_sync", mask, value, std::bit_or<uint64_t>());
}
template <typename T>
T emulated_shuffle(const char* operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = emulated::exchange_in_warp(operation, mask, bits);
  std::memcpy(&value, &all[source], sizeof(T));
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated_shuffle("__shfl_sync", mask, value, lane % emulated::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulated_shuffle("__shfl_xor_sync", mask, value, static_cast<int>(threadIdx.x) % emulated::kWarp ^ lanes);
}

// Atomic operations and fences.
__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) { return emulated::atomic_add(address, value); }
__forceinline__ int atomicAdd(int* address, int value) {
  return static_cast<int>(emulated::atomic_add(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(value)));
}
inline void __threadfence() { emulated::fence(); }

// Intrinsics of a single thread.
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
template <typename T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) emulated::fail("misaligned load");
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  return __ldg(pointer);
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fmul_ru(float a, float b) {
  const double exact = static_cast<double>(a) * b;
  const float nearest = static_cast<float>(exact);
  return nearest < exact ? std::nextafter(nearest, INFINITY) : nearest;
}

// The host API.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorInvalidDevice) return "invalid device ordinal";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline const char* emulated_setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const char* capability = emulated_setting("EMULATED_CAPABILITY", "9.0");
  const int shared = std::atoi(emulated_setting("EMULATED_SHARED_LIMIT", "232448"));
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMultiProcessorCount: *value = std::atoi(emulated_setting("EMULATED_MULTIPROCESSORS", "1")); break;
    case cudaDevAttrComputeCapabilityMajor: *value = std::atoi(capability); break;
    case cudaDevAttrComputeCapabilityMinor: *value = std::atoi(std::strchr(capability, '.') + 1); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared + 1024; break;  // 1 KB per block is reserved
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

inline std::map<const void*, size_t> emulated_allowed_shared;  // bytes of dynamic shared memory, by kernel
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > limit) return cudaErrorInvalidValue;
  emulated_allowed_shared[kernel] = value;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (std::getenv("EMULATED_LAUNCH_ERROR") || grid.x == 0 || grid.y == 0 || grid.z == 0 || threads.x == 0 ||
      threads.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > max(size_t{48 << 10}, emulated_allowed_shared[address])) return cudaErrorInvalidValue;
  if (threads.y != 1 || threads.z != 1) throw std::logic_error("the emulation supports only one-dimensional blocks");
  if (threads.x % emulated::kWarp) throw std::logic_error("the emulation supports only blocks of whole warps");
  blockDim = threads;
  gridDim = grid;
  emulated::run({grid, threads.x, config->dynamicSmemBytes, address}, [&] { kernel(arguments...); });
  return cudaSuccess;
}
