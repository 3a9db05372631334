// Shared memory of a size that the launch says. Above 48 KB a block can have it in no other way.
#pragma once

#include <cuda_runtime.h>

namespace pruneattn::cuda {

constexpr int kDynamicSharedAlignment = 1024;

// The same address in all threads of a block.
__device__ inline unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(kDynamicSharedAlignment) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
#else
  return shim::dynamic_shared();
#endif
}

}  // namespace pruneattn::cuda
