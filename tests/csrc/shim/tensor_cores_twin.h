// The functions of csrc/cuda/tensor_cores.cuh, one number at a time.
#pragma once

namespace pruneattn::cuda {

inline void copy_async(void* shared, const void* global, bool there) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (there && reinterpret_cast<uintptr_t>(global) % 16)) {
    throw std::logic_error("misaligned copy_async");
  }
  if (there) {
    std::memcpy(shared, global, 16);
  } else {
    std::memset(shared, 0, 16);
  }
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
float tile_value(const unsigned char* tile, int row, int channel) {
  T value;
  std::memcpy(&value, tile + tile_offset(row, channel / 8) + channel % 8 * 2, 2);
  return to_float(value);
}

constexpr bool kInBackground = true;
template <int kPending>
void wait_products() {}
template <int kCount>
void wait_products(float (&)[kCount]) {}

template <typename T, int kColumns>
void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries, const unsigned char* keys) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = first + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    acc[i] = 0;
    for (int channel = 0; channel < kHeadSize; ++channel) {
      acc[i] += tile_value<T>(queries, row, channel) * tile_value<T>(keys, column, channel);
    }
  }
}

template <typename T, bool kFirst, int kSteps>
void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps], const unsigned char* values) {
  const int lane = threadIdx.x % 32;
  if (kFirst) std::fill(acc, acc + kHeadSize / 2, 0.0f);
  for (int key = 0; key < 16 * kSteps; ++key) {
    // The weights of this key are with one lane of the four that share a row.
    const int owner = lane / 4 * 4 + key % 8 / 2, packed = key / 16 * 4 + key % 16 / 8 * 2;
    const uint32_t pair[2] = {__shfl_sync(0xffffffffu, weights[packed], owner),
                              __shfl_sync(0xffffffffu, weights[packed + 1], owner)};
    for (int i = 0; i < kHeadSize / 2; ++i) {
      const T weight = {static_cast<uint16_t>(pair[i / 2 % 2] >> key % 2 * 16)};
      acc[i] += to_float(weight) * tile_value<T>(values, key, i / 4 * 8 + lane % 4 * 2 + i % 2);
    }
  }
}

}  // namespace pruneattn::cuda
