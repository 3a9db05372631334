// Vectors of floats for the instruction set of the compiler flags. setup.py compiles this code once per instruction
// set. All code is in a namespace of its instruction set and calls no function template of the standard library: the
// linker keeps one copy of such a function for all objects, and this copy could contain unsupported instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__)
#define PRUNEATTN_ISA avx512_bf16
#elif defined(__AVX512VNNI__)
#define PRUNEATTN_ISA avx512_vnni
#elif defined(__AVX512F__)
#define PRUNEATTN_ISA avx512
#elif defined(__AVXVNNI__)
#define PRUNEATTN_ISA avx_vnni
#elif defined(__AVX2__)
#define PRUNEATTN_ISA avx2
#else
#define PRUNEATTN_ISA baseline
#endif

namespace pruneattn::cpu::PRUNEATTN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));  // 0 or -1 per lane
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
using bf16 = uint16_t;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Bits widen(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Bits);
}
inline Vec load(const bf16* p) { return (Vec)(widen(p) << 16); }

// Rounds to nearest, ties to even, as PyTorch does. A NaN stays a NaN.
inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
#else
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, Halves);
#endif
  std::memcpy(p, &h, sizeof h);
}

// Loads or stores the first `count` lanes. All other lanes are zero.
template <class T>
Vec load_first(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <class T>
void store_first(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// Both return b if either operand is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// 2^t for t <= 0, by a minimax polynomial on [-1/2, 1/2]. Relative error below 2e-7. Subnormal results can be 0. NaN
// for NaN.
inline Vec exp2_of_nonpositive(Vec t) {
#if defined(__AVX512F__)
  const Vec whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shifted = t + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the rounded integer
  const Vec whole = shifted - 12582912.0f;
#endif
  const Vec f = t - whole;
  Vec p = broadcast(0x1.5bba14p-10f);
  p = p * f + broadcast(0x1.3cea88p-7f);
  p = p * f + broadcast(0x1.c6b752p-5f);
  p = p * f + broadcast(0x1.ebf9bcp-3f);
  p = p * f + broadcast(0x1.62e42ap-1f);
  p = p * f + broadcast(1.0f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);  // 0 for t = -Inf, even though p is NaN
#else
  p = p * (Vec)(((Bits)shifted << 23) + 0x3f800000u);
  return t < -126.0f ? Vec{} : p;
#endif
}

// One step of a transposition: swaps the off-diagonal blocks of two rows that are `Step` apart.
template <int Step, int... Lane>
void exchange(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
  const Vec upper = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane : Lane + Step)...);
  a = upper;
}
using Lanes = std::make_integer_sequence<int, kLanes>;

template <int Step = 1>
void transpose(Vec (&rows)[kLanes]) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], Lanes{});
    }
    transpose<2 * Step>(rows);
  }
}

// Lane i of the result is the sum of row i.
template <int Step = 1>
Vec sum_rows(Vec (&rows)[kLanes]) {
  if constexpr (Step == kLanes) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * Step) {
      exchange<Step>(rows[i], rows[i + Step], Lanes{});
      rows[i] += rows[i + Step];
    }
    return sum_rows<2 * Step>(rows);
  }
}

// Combines all lanes. Every lane of the result has the combined value.
template <int Step, int... Lane>
Vec swap(Vec v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ Step)...);
}
template <int Step = kLanes / 2, class Combine>
Vec reduce(Vec v, Combine combine) {
  if constexpr (Step == 0) {
    return v;
  } else {
    return reduce<Step / 2>(combine(v, swap<Step>(v, Lanes{})), combine);
  }
}
inline Vec reduce_max(Vec v) { return reduce(v, max); }
inline Vec reduce_sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
