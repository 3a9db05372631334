// Matrix products in half precision with float32 accumulation, by the 4 warps that share 64 query rows: wgmma on GPUs
// that have it (sm_90a), mma.sync on all other GPUs.
//
// Accumulators: lane l of warp w holds rows 16 w + l / 4 and 16 w + l / 4 + 8, columns 8 j + 2 (l % 4) and the next
// column:
//   acc[4 j], acc[4 j + 1]: the first row; acc[4 j + 2], acc[4 j + 3]: the second row.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace pruneattn::cuda {

// acc = queries (64 rows) x keys^T (kColumns rows). Asynchronous if kAsyncProducts: read acc only after
// wait_products.
template <typename T, int kColumns>
__device__ void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries, const unsigned char* keys);

// acc += weights (64 rows x 16 kSteps keys, packed in the accumulators' layout) x values (16 kSteps rows). If kFirst,
// acc is set instead of increased. Asynchronous if kAsyncProducts: acc and weights are in use until wait_products.
template <typename T, bool kFirst, int kSteps>
__device__ void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps],
                           const unsigned char* values);

}  // namespace pruneattn::cuda

#if !PRUNEATTN_HAS_WGMMA
#include "mma_sync.cuh"
#endif
