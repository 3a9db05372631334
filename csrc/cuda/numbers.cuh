// Half-precision numbers as raw bits, and the hardware's exponential: all that the kernels need beyond plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pruneattn::cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace pruneattn::cuda

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pruneattn::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

// Round to the nearest, ties to even; a NaN becomes the NaN 0x7fff.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// 2^x to 2 ulp, one instruction; subnormal results are 0, exp2_approximate(-Inf) is 0, of a NaN it is NaN.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x and log2(x), one instruction each, to 1 and some 2 ulp.
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

}  // namespace pruneattn::cuda

#else
#include "numbers_twin.h"  // tests/csrc/shim: the same in plain C++
#endif

namespace pruneattn::cuda {

// The numbers that one access loads.
template <typename T, typename Access>
__device__ void unpack(const Access& access, float (&number)[sizeof(Access) / sizeof(T)]) {
  T raw[sizeof(Access) / sizeof(T)];
  std::memcpy(raw, &access, sizeof access);
#pragma unroll
  for (size_t i = 0; i < sizeof(Access) / sizeof(T); ++i) number[i] = to_float(raw[i]);
}

}  // namespace pruneattn::cuda
