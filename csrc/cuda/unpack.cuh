// Conversion of all numbers that one memory access loads.
#pragma once

#include <cstring>

#include "device.cuh"

namespace pruneattn::cuda {

// Converts the numbers of type T in `access` to float32.
template <typename T, typename Access>
__device__ void unpack(const Access& access, float (&number)[sizeof(Access) / sizeof(T)]) {
  T raw[sizeof(Access) / sizeof(T)];
  std::memcpy(raw, &access, sizeof access);
#pragma unroll
  for (size_t i = 0; i < sizeof(Access) / sizeof(T); ++i) number[i] = to_float(raw[i]);
}

}  // namespace pruneattn::cuda
