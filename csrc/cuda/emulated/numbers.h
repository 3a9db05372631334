// Emulation of native/numbers.cuh. Results are equal to the bit, except that the approximate functions are exact
// in the emulation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../half.h"

namespace pruneattn::cuda {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Read as a float, the exponent is too small by the difference of the biases. The product is exact, also for
  // subnormal numbers.
  return float_of(sign | magnitude << 13) * 0x1p112f;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // The magnitude in units in the last place of a half of this size. nearbyint rounds ties to even. If it rounds up
  // to the next power of two, the carry increments the exponent.
  const int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // false for a NaN
}
inline float reciprocal_approximate(float x) { return 1 / x; }
inline float log2_approximate(float x) { return std::log2(x); }

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace pruneattn::cuda
