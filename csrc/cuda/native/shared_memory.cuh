// Dynamic shared memory, and asynchronous copies to it by cp.async.
#pragma once

#include <cstdint>

#include "../tile.cuh"

namespace pruneattn::cuda {

// A block can have more than 48 KB of shared memory only as dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(kDynamicSharedAlignment) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#if PRUNEATTN_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads shared memory through the async proxy
#endif
}

}  // namespace pruneattn::cuda
