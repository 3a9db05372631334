// The block size of all kernels, and a reduction over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneattn::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // concurrent: 64 registers per thread, 64 KB of row loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

// Combines one value per thread, always in the same order, and returns the result in every thread. Contains one
// barrier. `warp_values` is shared memory that the function reads after the barrier.
template <typename F>
__device__ float block_reduce(float value, float (&warp_values)[kWarps], const F& combine) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_values[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = combine(value, warp_values[w]);
  return value;
}

}  // namespace pruneattn::cuda
