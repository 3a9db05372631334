// The copies of csrc/cuda/tile.cuh, and what lies in a tile.
#pragma once

namespace pruneattn::cuda {

inline void copy_async(void* shared, const void* global, bool there) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (there && reinterpret_cast<uintptr_t>(global) % 16)) {
    shim::fail("misaligned copy_async");
  }
  const auto copy = [](const shim::Work& work) {
    if (work.from[0]) {
      std::memcpy(work.to, work.from[0], 16);
    } else {
      std::memset(work.to, 0, 16);
    }
  };
  shim::start(shim::kCopies, {copy, shared, {there ? global : nullptr}, {}});
}
inline void commit_copies() { shim::commit(shim::kCopies); }
template <int kPending>
void wait_copies() {
  shim::wait(shim::kCopies, kPending);
}

template <typename T>
float tile_value(const unsigned char* tile, int row, int channel) {
  T value;
  std::memcpy(&value, tile + tile_offset(row, channel / 8) + channel % 8 * 2, 2);
  return to_float(value);
}

}  // namespace pruneattn::cuda
