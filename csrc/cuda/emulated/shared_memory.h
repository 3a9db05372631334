// Emulation of native/shared_memory.cuh, and access to the numbers of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "../tile.cuh"
#include "numbers.h"
#include "runtime.h"

namespace pruneattn::cuda {

inline unsigned char* dynamic_shared() { return emulated::dynamic_shared(); }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    emulated::fail("misaligned copy_async");
  }
  const auto copy = [](const emulated::Operation& operation) {
    if (operation.sources[0]) {
      std::memcpy(operation.destination, operation.sources[0], 16);
    } else {
      std::memset(operation.destination, 0, 16);
    }
  };
  emulated::start(emulated::Async::copies, {copy, shared, {valid ? global : nullptr}, {}});
}
inline void commit_copies() { emulated::commit(emulated::Async::copies); }
template <int kPending>
void wait_copies() {
  emulated::wait(emulated::Async::copies, kPending);
}

template <typename T>
float tile_value(const unsigned char* tile, int row, int channel) {
  T value;
  std::memcpy(&value, tile + tile_offset(row, channel / 8) + channel % 8 * 2, 2);
  return to_float(value);
}

}  // namespace pruneattn::cuda
