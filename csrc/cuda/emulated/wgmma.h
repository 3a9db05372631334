// Emulation of native/wgmma.cuh, one number at a time. Accumulators are NaN until the kernel waits for the products.
#pragma once

#include <algorithm>
#include <cmath>

#include "shared_memory.h"

namespace pruneattn::cuda {

constexpr bool kAsyncProducts = true;
template <int kPending>
void wait_products() {
  emulated::wait(emulated::Async::products, kPending);
}
template <int kCount>
void wait_products(float (&)[kCount]) {
  wait_products<0>();
}

template <typename T, int kColumns>
void start_logits(float (&acc)[kColumns / 2], const unsigned char* queries, const unsigned char* keys) {
  const auto multiply = [](const emulated::Operation& operation) {
    const auto* queries = static_cast<const unsigned char*>(operation.sources[0]);
    const auto* keys = static_cast<const unsigned char*>(operation.sources[1]);
    float* acc = static_cast<float*>(operation.destination);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float query[2][kHeadSize];  // of the two rows of this lane
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
  };
  std::fill(acc, acc + kColumns / 2, NAN);
  emulated::start(emulated::Async::products, {multiply, acc, {queries, keys}, {}});
  emulated::commit(emulated::Async::products);
}

template <typename T, bool kFirst, int kSteps>
void add_values(float (&acc)[kHeadSize / 2], const uint32_t (&weights)[4 * kSteps], const unsigned char* values) {
  const auto multiply = [](const emulated::Operation& operation) {
    const auto* values = static_cast<const unsigned char*>(operation.sources[0]);
    float* acc = static_cast<float*>(operation.destination);
    const int lane = threadIdx.x % 32;
    if (kFirst) std::fill(acc, acc + kHeadSize / 2, 0.0f);
    for (int key = 0; key < 16 * kSteps; key += 2) {
      float weight[2][2];  // [key, row]
      for (int i = 0; i < 4; ++i) {
        weight[i % 2][i / 2] = to_float(T{static_cast<uint16_t>(operation.values[key / 2] >> 16 * i)});
      }
      for (int i = 0; i < kHeadSize / 2; ++i) {
        const int channel = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 2; ++k) acc[i] += weight[k][i / 2 % 2] * tile_value<T>(values, key + k, channel);
      }
    }
  };
  emulated::Operation operation = {multiply, acc, {values}, {}};
  static_assert(8 * kSteps <= sizeof(operation.values) / sizeof(*operation.values));
  for (int key = 0; key < 16 * kSteps; key += 2) {
    // One of the four lanes that share a row holds the weights of these two keys.
    const int owner = threadIdx.x % 32 / 4 * 4 + key % 8 / 2, packed = key / 16 * 4 + key % 16 / 8 * 2;
    const uint64_t both = weights[packed] | static_cast<uint64_t>(weights[packed + 1]) << 32;
    operation.values[key / 2] = __shfl_sync(0xffffffffu, both, owner);
  }
  if (kFirst) std::fill(acc, acc + kHeadSize / 2, NAN);
  emulated::start(emulated::Async::products, operation);
  emulated::commit(emulated::Async::products);
}

}  // namespace pruneattn::cuda
