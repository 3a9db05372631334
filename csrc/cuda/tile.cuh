// Layout of a tile: rows of half-precision numbers in shared memory, as the tensor cores read them.
//
// A row has 64 channels (128 bytes). Its eight 16-byte pieces are permuted by the row number, so that reading one
// piece of 8 rows, or all pieces of one row, causes no bank conflicts. The hardware calls this the 128-byte swizzle.
// A tile starts at a multiple of 1024 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pruneattn::cuda {

constexpr int kHeadSize = 64;  // channels of a tile
constexpr int kRowBytes = 2 * kHeadSize;
constexpr int kTileRows = 64;  // query rows of 4 warps
constexpr int kDynamicSharedAlignment = 1024;

// Byte offset of 16-byte piece `piece` of row `row` in a tile.
__device__ inline uint32_t tile_offset(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ (row & 7)) << 4));
}

}  // namespace pruneattn::cuda
