// Matrix products of half precision, accumulated in float32, of the 4 warps that share 64 query rows: by wgmma where
// the GPU has it (sm_90a), else by mma.sync. The twin for a CPU without either is tests/csrc/shim/tensor_cores_twin.h.
//
// A tile in shared memory is rows of 64 channels (128 bytes), its 16-byte pieces permuted by the row's number so that
// neither 8 rows of a piece nor the pieces of a row meet in a bank: what the hardware calls the 128-byte swizzle. Tiles
// begin at a multiple of 1024 bytes.
//
// Accumulators: warp w, lane l have rows 16 w + l / 4 and that + 8, columns 8 j + 2 (l % 4) and the next one:
//   acc[4 j], acc[4 j + 1]: the first row; acc[4 j + 2], acc[4 j + 3]: the second one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "numbers.cuh"

namespace pruneattn::cuda {

constexpr int kHeadSize = 64;         // channels of a tile
constexpr int kRowBytes = 2 * kHeadSize;
constexpr int kTileRows = 64;         // query rows of 4 warps

// Where 16-byte piece `piece` of a row lies.
__device__ inline uint32_t tile_offset(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ (row & 7)) << 4));
}

}  // namespace pruneattn::cuda

#ifndef __CUDACC__
#include "tensor_cores_twin.h"
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

// Two numbers in one register, the first one in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// acc = queries (64 rows) x keys^T (kColumns rows). In the background: read acc after wait_products.
template <typename T, int kColumns>
__device__ void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries, const unsigned char* keys);

// acc += weights (64 rows x 16 kSteps keys, packed as accumulators are laid out) x values (16 kSteps rows); kFirst: acc =
// that. In the background: acc and weights are in use until wait_products.
template <typename T, bool kFirst, int kSteps>
__device__ void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps],
                           const unsigned char* values);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr bool kInBackground = true;

// Shared memory as wgmma is told of it: the address, 1024 bytes from 8 rows to the next 8, 128-byte swizzle.
__device__ inline uint64_t describe_tile(const unsigned char* tile) {
  return (shared_address(tile) >> 4) | uint64_t{64} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// The compiler must not move what it does to these registers beyond a wgmma that it does not know to be running.
template <int kCount>
__device__ inline void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last kPending groups of products are running: the weights of earlier ones are free again.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all products, so that `acc` can be read.
template <int kCount>
__device__ inline void wait_products(float (&acc)[kCount]) {
  wait_products<0>();
  hold(acc);
}

#define F8(x, i) \
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
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" add ", 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, %" a ", %" b \
               ", p, 1, 1, 0, 0;}"                                                                                   \
               : __VA_ARGS__                                                                                         \
               : "l"(q), "l"(k), "r"(step))
#define VALUES(type)                                                                                             \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" R32                                \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"                                                        \
               : F32(acc)                                                                                          \
               : "r"(weights[4 * step]), "r"(weights[4 * step + 1]), "r"(weights[4 * step + 2]),                   \
                 "r"(weights[4 * step + 3]), "l"(v), "r"(add))

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
    q += 2;  // 16 channels further
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
    if constexpr (std::is_same_v<T, Half>) VALUES("f16"); else VALUES("bf16");
    v += 16 * kRowBytes >> 4;  // 16 keys further
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

#else  // mma.sync: done when it returns, each warp for its own 16 rows

constexpr bool kInBackground = false;
template <int kPending>
__device__ inline void wait_products() {}
template <int kCount>
__device__ inline void wait_products(float (&)[kCount]) {}

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

#endif

}  // namespace pruneattn::cuda

#endif
