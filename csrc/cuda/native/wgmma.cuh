// Asynchronous matrix products by wgmma, by groups of 4 warps. The weights are in registers, all other operands in
// shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../half.h"
#include "../tile.cuh"
#include "shared_memory.cuh"

namespace pruneattn::cuda {

constexpr bool kAsyncProducts = true;

// The matrix descriptor of a tile: its address, a stride of 1024 bytes between groups of 8 rows, the 128-byte
// swizzle.
__device__ inline uint64_t describe_tile(const unsigned char* tile) {
  return (shared_address(tile) >> 4) | uint64_t{64} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Keeps the compiler from moving accesses to these registers across asynchronous products, which it does not track.
template <int kCount>
__device__ inline void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last kPending groups of products are incomplete. The weights of earlier groups can be
// reused.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all products. `acc` can be read afterwards.
template <int kCount>
__device__ inline void wait_products(float (&acc)[kCount]) {
  wait_products<0>();
  pin_registers(acc);
}

#define F8(x, i)                                                                                              \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define F24(x) F8(x, 0), F8(x, 8), F8(x, 16)
#define F32(x) F24(x), F8(x, 24)
#define F40(x) F32(x), F8(x, 32)
#define F48(x) F40(x), F8(x, 40)
#define R24 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23"
#define R32 R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R40 R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R48 R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LOGITS(type, columns, registers, a, b, add, ...)                                                             \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" add                                                                 \
               ", 0;\n"                                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, %" a ", %" b \
               ", p, 1, 1, 0, 0;}"                                                                                   \
               : __VA_ARGS__                                                                                         \
               : "l"(q), "l"(k), "r"(step))
#define VALUES(type)                                                                                                \
  asm volatile(                                                                                                     \
      "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"                                                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" R32                                          \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"                                                                  \
      : F32(acc)                                                                                                    \
      : "r"(weights[4 * step]), "r"(weights[4 * step + 1]), "r"(weights[4 * step + 2]), "r"(weights[4 * step + 3]), \
        "l"(v), "r"(add))

template <typename T, int kColumns>
__device__ inline void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries,
                                    const unsigned char* keys) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  uint64_t q = describe_tile(queries), k = describe_tile(keys);
  begin_products();
#pragma unroll
  for (int step = 0; step < kHeadSize / 16; ++step) {
    if constexpr (kColumns == 96 && kHalf) LOGITS("f16", 96, R48, "48", "49", "50", F48(acc));
    if constexpr (kColumns == 96 && !kHalf) LOGITS("bf16", 96, R48, "48", "49", "50", F48(acc));
    if constexpr (kColumns == 80 && kHalf) LOGITS("f16", 80, R40, "40", "41", "42", F40(acc));
    if constexpr (kColumns == 80 && !kHalf) LOGITS("bf16", 80, R40, "40", "41", "42", F40(acc));
    if constexpr (kColumns == 48 && kHalf) LOGITS("f16", 48, R24, "24", "25", "26", F24(acc));
    if constexpr (kColumns == 48 && !kHalf) LOGITS("bf16", 48, R24, "24", "25", "26", F24(acc));
    q += 2;  // the next 16 channels
    k += 2;
  }
  commit_products();
}

template <typename T, bool kFirst, int kSteps>
__device__ inline void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps],
                                  const unsigned char* values) {
  uint64_t v = describe_tile(values);
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int add = step > 0 || !kFirst;
    if constexpr (std::is_same_v<T, Half>)
      VALUES("f16");
    else
      VALUES("bf16");
    v += 16 * kRowBytes >> 4;  // the next 16 keys
  }
  commit_products();
}

#undef F8
#undef F24
#undef F32
#undef F40
#undef F48
#undef R24
#undef R32
#undef R40
#undef R48
#undef LOGITS
#undef VALUES

}  // namespace pruneattn::cuda
