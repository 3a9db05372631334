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
  float query[2][kHeadSize];  // of the two rows
  for (int i = 0; i < 2 * kHeadSize; ++i) {
    query[i / kHeadSize][i % kHeadSize] = tile_value<T>(queries, first + i / kHeadSize * 8, i % kHeadSize);
  }
  for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0;
  for (int i = 0; i < kColumns / 4; ++i) {
    const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
    for (int channel = 0; channel < kHeadSize; ++channel) {
      const float key = tile_value<T>(keys, column, channel);
      for (int r = 0; r < 2; ++r) acc[i / 2 * 4 + i % 2 + 2 * r] += query[r][channel] * key;
    }
  }
}

template <typename T, bool kFirst, int kSteps>
void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps], const unsigned char* values) {
  const int lane = threadIdx.x % 32;
  if (kFirst) std::fill(acc, acc + kHeadSize / 2, 0.0f);
  for (int key = 0; key < 16 * kSteps; key += 2) {
    // The weights of these two keys are with one lane of the four that share a row.
    const int owner = lane / 4 * 4 + key % 8 / 2, packed = key / 16 * 4 + key % 16 / 8 * 2;
    const uint64_t both = weights[packed] | static_cast<uint64_t>(weights[packed + 1]) << 32;
    const uint64_t rows = __shfl_sync(0xffffffffu, both, owner);
    float weight[2][2];  // of a key, of a row
    for (int i = 0; i < 4; ++i) weight[i % 2][i / 2] = to_float(T{static_cast<uint16_t>(rows >> 16 * i)});
    for (int i = 0; i < kHeadSize / 2; ++i) {
      const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 2; ++k) acc[i] += weight[k][i / 2 % 2] * tile_value<T>(values, key + k, channel);
    }
  }
}

}  // namespace pruneattn::cuda
