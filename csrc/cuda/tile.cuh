// Tiles of rows in shared memory, as the tensor cores read them.
//
// A row is 64 channels (128 bytes); its 16-byte pieces are permuted by the row's number so that neither 8 rows of a piece
// nor the pieces of a row meet in a bank: what the hardware calls the 128-byte swizzle. Tiles begin at a multiple of 1024
// bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneattn::cuda {

constexpr int kHeadSize = 64;  // channels of a tile
constexpr int kRowBytes = 2 * kHeadSize;
constexpr int kTileRows = 64;  // query rows of 4 warps

// Where 16-byte piece `piece` of a row lies.
__device__ inline uint32_t tile_offset(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ (row & 7)) << 4));
}

}  // namespace pruneattn::cuda

#ifndef __CUDACC__
#include "tile_twin.h"
#else

namespace pruneattn::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory, in the background; zeros if not `there`.
__device__ inline void copy_async(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last kPending groups of this thread's copies are on their way; a barrier makes them seen.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads by another path than loads do
#endif
}

}  // namespace pruneattn::cuda

#endif
