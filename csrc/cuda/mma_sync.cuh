// Products by mma.sync: done when they return, each warp for its own 16 rows.
#pragma once

#include "tensor_cores.cuh"

#ifndef __CUDACC__
#include "mma_sync_twin.h"
#else

namespace pruneattn::cuda {

// acc (16 x 8) += a (16 x 16) x b (16 x 8), spread over the lanes as the PTX manual has it for m16n8k16.
template <typename T>
__device__ inline void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MULTIPLY(type)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "   \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                        \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Half>) MULTIPLY("f16"); else MULTIPLY("bf16");
#undef MULTIPLY
}

// Four 8 x 8 matrices; lanes 8 i to 8 i + 7 give the rows of the i-th one.
__device__ inline void load_matrices(uint32_t (&r)[4], const unsigned char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&r)[4], const unsigned char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace pruneattn::cuda

#endif

namespace pruneattn::cuda {

constexpr bool kInBackground = false;
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
