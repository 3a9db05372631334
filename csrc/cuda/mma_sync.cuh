// Matrix products by mma.sync. They are complete when the functions return. Each warp computes its own 16 rows.
#pragma once

#include "tensor_cores.cuh"

namespace pruneattn::cuda {

constexpr bool kAsyncProducts = false;
template <int kPending>
__device__ inline void wait_products() {}
template <int kCount>
__device__ inline void wait_products(float (&)[kCount]) {}

template <typename T, int kColumns>
__device__ inline void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries,
                                    const unsigned char* keys) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0;
#pragma unroll
  for (int step = 0; step < kHeadSize / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, queries + tile_offset(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, keys + tile_offset(16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      multiply<T>(acc + 8 * j, a, b[0], b[1]);
      multiply<T>(acc + 8 * j + 4, a, b[2], b[3]);
    }
  }
}

template <typename T, bool kFirst, int kSteps>
__device__ inline void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps],
                                  const unsigned char* values) {
  const int lane = threadIdx.x % 32;
  if constexpr (kFirst) {
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) acc[i] = 0;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3]};
#pragma unroll
    for (int j = 0; j < kHeadSize / 16; ++j) {
      uint32_t b[4];
      load_transposed(b, values + tile_offset(16 * step + lane % 16, 2 * j + lane / 16));
      multiply<T>(acc + 8 * j, a, b[0], b[1]);
      multiply<T>(acc + 8 * j + 4, a, b[2], b[3]);
    }
  }
}

}  // namespace pruneattn::cuda
