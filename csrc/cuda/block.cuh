// The shape of every block here, and what its threads do together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneattn::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // at once: 64 registers a thread, 64 KB of row loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

// Combines a value of each thread, always in the same order; every thread gets the result. There is one barrier inside,
// after which `of_warp` is read.
template <typename F>
__device__ float over_block(float value, float (&of_warp)[kWarps], const F& combine) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = combine(value, of_warp[w]);
  return value;
}

}  // namespace pruneattn::cuda
