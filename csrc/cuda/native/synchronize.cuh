// Barriers for a part of a block. (__syncthreads is for the whole block.)
#pragma once

namespace pruneattn::cuda {

__device__ inline void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace pruneattn::cuda
