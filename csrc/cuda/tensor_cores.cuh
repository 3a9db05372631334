// Matrix products of half precision, accumulated in float32, of the 4 warps that share 64 query rows: by wgmma where the
// GPU has it (sm_90a), else by mma.sync. What is an instruction there has a twin for the CPU in tests/csrc/shim.
//
// Accumulators: warp w, lane l have rows 16 w + l / 4 and that + 8, columns 8 j + 2 (l % 4) and the next one:
//   acc[4 j], acc[4 j + 1]: the first row; acc[4 j + 2], acc[4 j + 3]: the second one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "numbers.cuh"
#include "tile.cuh"

namespace pruneattn::cuda {

// acc = queries (64 rows) x keys^T (kColumns rows). In the background: read acc after wait_products.
template <typename T, int kColumns>
__device__ void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries, const unsigned char* keys);

// acc += weights (64 rows x 16 kSteps keys, packed as accumulators are laid out) x values (16 kSteps rows); kFirst: acc =
// that. In the background: acc and weights are in use until wait_products.
template <typename T, bool kFirst, int kSteps>
__device__ void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps],
                           const unsigned char* values);

}  // namespace pruneattn::cuda

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "wgmma.cuh"
#elif defined(__CUDACC__) || defined(SHIM_MMA_SYNC)
#include "mma_sync.cuh"
#else
#include "wgmma_twin.h"
#endif
