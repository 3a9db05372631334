// Emulation of native/mma_sync.cuh. The PTX manual defines which lane holds which number of a matrix.
#pragma once

#include <algorithm>
#include <utility>

#include "shared_memory.h"

namespace pruneattn::cuda {

template <typename T>
void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32;
  uint64_t fragments[3][32];  // of all lanes: two of a, one of b
  const auto share = [&](int number, uint32_t low, uint32_t high) {
    const uint64_t* all = emulated::exchange_in_warp("mma.sync", 0xffffffffu, low | static_cast<uint64_t>(high) << 32);
    std::copy(all, all + 32, fragments[number]);
  };
  share(0, a[0], a[1]);
  share(1, a[2], a[3]);
  share(2, b0, b1);
  const auto number = [&](int fragment, int owner, int place) {
    return to_float(T{static_cast<uint16_t>(fragments[fragment][owner] >> 16 * place)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;  // consecutive lanes hold consecutive pairs of k
      const float left = number(k / 8, row % 8 * 4 + pair, row / 8 * 2 + k % 2);
      acc[i] += left * number(2, column * 4 + pair, k / 8 * 2 + k % 2);
    }
  }
}

// Loads the lane's two numbers of each of four 8 x 8 matrices. The lanes point to the rows.
template <typename Place>
void load_four(uint32_t (&r)[4], const unsigned char* row, const char* name, const Place& place) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("misaligned ldmatrix");
  const int lane = threadIdx.x % 32;
  const uint64_t* all = emulated::exchange_in_warp(name, 0xffffffffu, reinterpret_cast<uintptr_t>(row));
  const unsigned char* rows[32];
  for (int l = 0; l < 32; ++l) rows[l] = reinterpret_cast<const unsigned char*>(all[l]);
  for (int matrix = 0; matrix < 4; ++matrix) {
    r[matrix] = 0;
    for (int i = 0; i < 2; ++i) {
      const auto [at_row, column] = place(lane / 4, lane % 4 * 2 + i);
      uint16_t bits;
      std::memcpy(&bits, rows[8 * matrix + at_row] + 2 * column, 2);
      r[matrix] |= static_cast<uint32_t>(bits) << 16 * i;
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const unsigned char* row) {
  load_four(r, row, "ldmatrix", [](int i, int j) { return std::pair(i, j); });
}
inline void load_transposed(uint32_t (&r)[4], const unsigned char* row) {
  load_four(r, row, "ldmatrix.trans", [](int i, int j) { return std::pair(j, i); });
}

}  // namespace pruneattn::cuda
