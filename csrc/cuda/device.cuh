// Device primitives: the only header that separates the kernels from the hardware.
//
// nvcc compiles the primitives in native/ (inline PTX and CUDA intrinsics). A host compiler compiles their emulation
// in emulated/, which needs a runtime that implements emulated/runtime.h. Both define the same functions in
// pruneattn::cuda:
//
// Numbers. T is float, Half or Bfloat16.
//   float to_float(T x);                  exact
//   T from_float<T>(float x);             rounds to nearest, ties to even; a NaN becomes the NaN 0x7fff
//   uint32_t pack<T>(low, high);          rounds two floats into one register, the first float into the low half
//   float exp2_approximate(float x);      2^x within 2 ulp, 0 for a subnormal result and for -Inf, NaN for NaN
//   float reciprocal_approximate(float x);  1 / x within 1 ulp
//   float log2_approximate(float x);        log2(x) within about 2 ulp
//
// Shared memory.
//   unsigned char* dynamic_shared();      start of the block's dynamic shared memory
//   void copy_async(shared, global, valid);  starts to copy 16 bytes to shared memory, or 16 zero bytes if not `valid`
//   void commit_copies();                 closes a group of the thread's copies
//   void wait_copies<kPending>();         waits until at most the last kPending groups of the thread's copies are
//                                         incomplete; other threads see the copied bytes after a barrier
//
// Barriers.
//   void barrier_sync(int id, int threads);  waits until `threads` threads (whole warps) reach barrier `id`, 1..15;
//                                            orders their memory accesses as __syncthreads does
//
// Tensor cores, if PRUNEATTN_HAS_WGMMA is 1: the functions that tensor_cores.cuh documents, by asynchronous wgmma.
// Otherwise the instructions of mma.sync, from which mma_sync.cuh builds these functions:
//   void multiply<T>(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
//                                         acc (16 x 8) += a (16 x 16) x b (16 x 8) per warp, distributed over the lanes
//                                         as the PTX manual defines for m16n8k16
//   void load_matrices(uint32_t (&r)[4], const unsigned char* row);
//                                         loads four 8 x 8 matrices; lanes 8 i to 8 i + 7 point to the rows of matrix i
//   void load_transposed(uint32_t (&r)[4], const unsigned char* row);  the same, transposed
#pragma once

#include <cuda_runtime.h>

#include "half.h"
#include "tile.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !(defined(__CUDACC__) || defined(PRUNEATTN_EMULATE_MMA_SYNC))
#define PRUNEATTN_HAS_WGMMA 1
#else
#define PRUNEATTN_HAS_WGMMA 0
#endif

#if defined(__CUDACC__)
#include "native/numbers.cuh"
#include "native/shared_memory.cuh"
#include "native/synchronize.cuh"
#if PRUNEATTN_HAS_WGMMA
#include "native/wgmma.cuh"
#else
#include "native/mma_sync.cuh"
#endif
#else
#include "emulated/numbers.h"
#include "emulated/shared_memory.h"
#include "emulated/synchronize.h"
#if PRUNEATTN_HAS_WGMMA
#include "emulated/wgmma.h"
#else
#include "emulated/mma_sync.h"
#endif
#endif
