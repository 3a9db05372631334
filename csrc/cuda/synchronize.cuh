// Barriers for a part of a block. (__syncthreads is for all of it.)
#pragma once

#include <cuda_runtime.h>

namespace pruneattn::cuda {

// Waits until `threads` threads, whole warps, are at barrier `id`, 1..15. Orders their memory as __syncthreads does.
__device__ inline void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  shim::meet_at_barrier(id, threads);
#endif
}

}  // namespace pruneattn::cuda
