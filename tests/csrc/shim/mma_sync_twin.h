// The instructions of csrc/cuda/mma_sync.cuh, by what the PTX manual says of the lanes' fragments.
#pragma once

namespace pruneattn::cuda {

template <typename T>
void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t fragments[3][shim::kWarp];  // of all lanes: two of a, b
  const auto share = [&](int number, uint32_t low, uint32_t high) {
    const uint64_t* all = shim::meet_warp("mma.sync", 0xffffffffu, low | static_cast<uint64_t>(high) << 32);
    std::copy(all, all + shim::kWarp, fragments[number]);
  };
  share(0, a[0], a[1]);
  share(1, a[2], a[3]);
  share(2, b0, b1);
  const auto number = [&](int fragment, int lane, int place) {
    return to_float(T{static_cast<uint16_t>(fragments[fragment][lane] >> 16 * place)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = shim_lane() / 4 + i / 2 * 8, column = shim_lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;  // lanes that follow one another have pairs of k
      const float left = number(k / 8, row % 8 * 4 + pair, row / 8 * 2 + k % 2);
      acc[i] += left * number(2, column * 4 + pair, k / 8 * 2 + k % 2);
    }
  }
}

// The numbers of the lane's two places in each of four 8 x 8 matrices, whose rows all lanes name.
template <typename Place>
void load_four(uint32_t (&r)[4], const unsigned char* row, const char* name, const Place& place) {
  if (reinterpret_cast<uintptr_t>(row) % 16) shim::fail("misaligned ldmatrix");
  const uint64_t* all = shim::meet_warp(name, 0xffffffffu, reinterpret_cast<uintptr_t>(row));
  const unsigned char* rows[shim::kWarp];
  for (int lane = 0; lane < shim::kWarp; ++lane) rows[lane] = reinterpret_cast<const unsigned char*>(all[lane]);
  for (int matrix = 0; matrix < 4; ++matrix) {
    r[matrix] = 0;
    for (int i = 0; i < 2; ++i) {
      const auto [at_row, column] = place(shim_lane() / 4, shim_lane() % 4 * 2 + i);
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
