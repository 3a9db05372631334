// Stands in for the CUDA runtime so that g++ can compile csrc/cuda/*.cu unchanged and run them without a GPU.
//
// One block runs at a time in one OS thread. Each CUDA thread is a fibre that runs until its next barrier or warp
// exchange; SHIM_ORDER (forward, reverse, shuffle) sets who goes first, so that a missing barrier shows. Shared memory
// is poisoned before each block. A barrier that some threads of the block never reach, different operations within a
// warp, and partial masks are errors. SHIM_MULTIPROCESSORS sets what the device claims to have; SHIM_LAUNCH_ERROR
// makes launches fail. Memory is the host's.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static __attribute__((section("shim_shared")))

extern char __start_shim_shared[] __attribute__((visibility("hidden")));
extern char __stop_shim_shared[] __attribute__((visibility("hidden")));

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

// A set of lanes that meet: the block, or one warp. The last to arrive publishes what all of them brought.
struct Meeting {
  std::vector<uint64_t> brought, published;
  size_t arrived = 0;
  uint64_t generation = 0;
  std::string operation;
};

struct Lane {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started, finished;
  Meeting* waits_for;
  uint64_t generation;
};

inline std::vector<Lane> lanes;
inline std::vector<Meeting> warps;
inline Meeting block;
inline size_t current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::string failure;

inline void lane_main() {
  try {
    body();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  lanes[current].finished = true;
  _longjmp(scheduler, 1);
}

inline void resume(size_t lane) {
  current = lane;
  threadIdx = dim3(static_cast<unsigned>(lane));
  if (_setjmp(scheduler)) return;
  if (lanes[lane].started) _longjmp(lanes[lane].here, 1);
  lanes[lane].started = true;
  setcontext(&lanes[lane].start);
}

inline const std::vector<uint64_t>& meet(Meeting& meeting, size_t slot, const char* operation, uint64_t value) {
  if (meeting.arrived == 0) meeting.operation = operation;
  if (meeting.operation != operation) {
    throw std::logic_error("threads that should meet are at " + meeting.operation + " and at " + operation);
  }
  meeting.brought[slot] = value;
  if (++meeting.arrived == meeting.brought.size()) {
    meeting.published = meeting.brought;
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    Lane& lane = lanes[current];
    lane.waits_for = &meeting;
    lane.generation = meeting.generation;
    if (!_setjmp(lane.here)) _longjmp(scheduler, 1);
  }
  return meeting.published;
}

inline const std::vector<uint64_t>& meet_block(const char* operation, uint64_t value) {
  return meet(block, current, operation, value);
}

inline const std::vector<uint64_t>& meet_warp(const char* operation, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) throw std::logic_error(std::string(operation) + ": only full masks are emulated");
  return meet(warps[current / kWarp], current % kWarp, operation, value);
}

inline std::vector<size_t> lane_order(size_t threads) {
  const char* name = std::getenv("SHIM_ORDER");
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (name && std::string(name) == "reverse") std::reverse(order.begin(), order.end());
  if (name && std::string(name) == "shuffle") std::shuffle(order.begin(), order.end(), std::mt19937(blockIdx.x));
  return order;
}

inline void run_block(size_t threads) {
  std::memset(__start_shim_shared, 0xa5, __stop_shim_shared - __start_shim_shared);
  failure.clear();
  block = Meeting();
  block.brought.resize(threads);
  warps.assign(threads / kWarp, Meeting());
  for (Meeting& warp : warps) warp.brought.resize(kWarp);
  lanes.resize(threads);
  for (Lane& lane : lanes) {
    getcontext(&lane.start);
    lane.start.uc_stack.ss_sp = lane.stack.get();
    lane.start.uc_stack.ss_size = kStack;
    makecontext(&lane.start, lane_main, 0);
    lane.started = lane.finished = false;
    lane.waits_for = nullptr;
  }
  const std::vector<size_t> order = lane_order(threads);
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t lane : order) {
      Lane& l = lanes[lane];
      if (l.finished || (l.waits_for && l.waits_for->generation == l.generation)) continue;
      l.waits_for = nullptr;
      resume(lane);
      if (!failure.empty()) throw std::logic_error("shim: " + failure);
      progress = true;
    }
  }
  for (const Lane& lane : lanes) {
    if (!lane.finished) throw std::logic_error("shim: a thread waits forever at " + lane.waits_for->operation);
  }
}

}  // namespace shim

// Barriers and warp exchanges.
inline void __syncthreads() { shim::meet_block("__syncthreads", 0); }
inline int __syncthreads_count(int predicate) {
  const auto& all = shim::meet_block("__syncthreads_count", predicate != 0);
  return static_cast<int>(std::count(all.begin(), all.end(), 1u));
}
inline int __syncthreads_or(int predicate) {
  const auto& all = shim::meet_block("__syncthreads_or", predicate != 0);
  return std::count(all.begin(), all.end(), 1u) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet_warp("__syncwarp", mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto& all = shim::meet_warp("__ballot_sync", mask, predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < shim::kWarp; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
template <typename F>
unsigned shim_reduce(const char* operation, unsigned mask, unsigned value, F f) {
  const auto& all = shim::meet_warp(operation, mask, value);
  return static_cast<unsigned>(std::accumulate(all.begin() + 1, all.end(), all[0], f));
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
  const auto& all = shim::meet_warp(operation, mask, bits);
  std::memcpy(&value, &all[source], sizeof(T));
  return value;
}
inline int shim_lane() { return static_cast<int>(shim::current % shim::kWarp); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return shim_shuffle("__shfl_sync", mask, value, lane % shim::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shim_shuffle("__shfl_xor_sync", mask, value, shim_lane() ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  return shim_shuffle("__shfl_up_sync", mask, value, shim_lane() < delta ? shim_lane() : shim_lane() - delta);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int source = shim_lane() + delta;
  return shim_shuffle("__shfl_down_sync", mask, value, source < shim::kWarp ? source : shim_lane());
}

// Intrinsics of one thread.
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
template <typename T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) throw std::logic_error("misaligned __ldg");
  return *pointer;
}

// The host's side.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidDevice) return "invalid device ordinal";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* count = std::getenv("SHIM_MULTIPROCESSORS");
  *value = count ? std::atoi(count) : 1;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  if (std::getenv("SHIM_LAUNCH_ERROR") || blocks == 0 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (threads % shim::kWarp) throw std::logic_error("shim: blocks are whole warps");
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  shim::body = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(b);
    shim::run_block(threads);
  }
  return cudaSuccess;
}
