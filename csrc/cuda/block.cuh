// The shape of every block here, and what its threads do together.
#pragma once

#include <cstdint>

namespace pruneattn::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // at once: 64 registers a thread, 64 KB of row loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace pruneattn::cuda
