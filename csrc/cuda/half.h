// Half-precision numbers as raw bits, without the CUDA headers' classes.
#pragma once

#include <cstdint>

namespace pruneattn::cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace pruneattn::cuda
