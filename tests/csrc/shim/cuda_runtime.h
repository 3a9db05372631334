// Stands in for the CUDA runtime so that g++ can compile csrc/cuda/*.cu unchanged and run them without a GPU.
//
// One block runs at a time in one OS thread. Each CUDA thread is a fibre that runs until its next barrier or warp
// exchange, and a warp runs as far as it can before the next one does, so that a missing barrier shows; SHIM_ORDER
// (forward, reverse, shuffle) sets which thread and which block goes first. Asynchronous copies and products happen when
// they are waited for, so that a missing wait shows, or at once, if SHIM_EARLY names them. Shared memory is poisoned
// before each block, and what is written beside dynamic shared memory is found after it. A barrier that some threads
// never reach, different operations within a warp, and partial masks are errors. SHIM_MULTIPROCESSORS, SHIM_SHARED_LIMIT
// and SHIM_CAPABILITY (such as 8.0) set what the device claims to have; SHIM_LAUNCH_ERROR makes launches fail. Memory is
// the host's. race.h says what `make race` adds.
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

#include "fibres.h"
#include "vectors.h"

// Barriers and warp exchanges.
inline void __syncthreads() { shim::meet_block("__syncthreads", 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet_warp("__syncwarp", mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = shim::meet_warp("__ballot_sync", mask, predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < shim::kWarp; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
template <typename F>
unsigned shim_reduce(const char* operation, unsigned mask, unsigned value, F f) {
  const uint64_t* all = shim::meet_warp(operation, mask, value);
  return static_cast<unsigned>(std::accumulate(all + 1, all + shim::kWarp, all[0], f));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return shim_reduce("__reduce_add_sync", mask, value, std::plus<uint64_t>());
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return shim_reduce("__reduce_and_sync", mask, value, std::bit_and<uint64_t>());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return shim_reduce("__reduce_or_sync", mask, value, std::bit_or<uint64_t>());
}
template <typename T>
T shim_shuffle(const char* operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = shim::meet_warp(operation, mask, bits);
  std::memcpy(&value, &all[source], sizeof(T));
  return value;
}
inline int shim_lane() { return static_cast<int>(shim::lane() % shim::kWarp); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return shim_shuffle("__shfl_sync", mask, value, lane % shim::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shim_shuffle("__shfl_xor_sync", mask, value, shim_lane() ^ lanes);
}

// Atomic operations and fences.
__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) { return shim::atomic_add(address, value); }
__forceinline__ int atomicAdd(int* address, int value) {
  return static_cast<int>(shim::atomic_add(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(value)));
}
inline void __threadfence() { shim::fence(); }

// Intrinsics of one thread.
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
template <typename T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) shim::fail("misaligned load");
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

// The host's side.
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
inline const char* shim_setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const char* capability = shim_setting("SHIM_CAPABILITY", "9.0");
  const int shared = std::atoi(shim_setting("SHIM_SHARED_LIMIT", "232448"));
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMultiProcessorCount: *value = std::atoi(shim_setting("SHIM_MULTIPROCESSORS", "1")); break;
    case cudaDevAttrComputeCapabilityMajor: *value = std::atoi(capability); break;
    case cudaDevAttrComputeCapabilityMinor: *value = std::atoi(std::strchr(capability, '.') + 1); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared + 1024; break;  // 1 KB of a block is the system's
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

inline std::map<const void*, size_t> shim_allowed_shared;  // dynamic shared memory, by kernel
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > limit) return cudaErrorInvalidValue;
  shim_allowed_shared[kernel] = value;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (std::getenv("SHIM_LAUNCH_ERROR") || grid.x == 0 || grid.y == 0 || grid.z == 0 || threads.x == 0 ||
      threads.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > max(size_t{48 << 10}, shim_allowed_shared[address])) return cudaErrorInvalidValue;
  if (threads.y != 1 || threads.z != 1) throw std::logic_error("shim: only blocks of one dimension are emulated");
  if (threads.x % shim::kWarp) throw std::logic_error("shim: blocks are whole warps");
  blockDim = threads;
  gridDim = grid;
  shim::run({grid, threads.x, config->dynamicSmemBytes, address}, [&] { kernel(arguments...); });
  return cudaSuccess;
}
