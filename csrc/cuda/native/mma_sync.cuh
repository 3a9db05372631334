// The instructions for matrix products by mma.sync.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../half.h"
#include "shared_memory.cuh"

namespace pruneattn::cuda {

template <typename T>
__device__ inline void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MULTIPLY(type)                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "              \
               "{%8, %9}, {%0, %1, %2, %3};"                            \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Half>)
    MULTIPLY("f16");
  else
    MULTIPLY("bf16");
#undef MULTIPLY
}

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
