// Emulation of native/synchronize.cuh.
#pragma once

#include "runtime.h"

namespace pruneattn::cuda {

inline void barrier_sync(int id, int threads) { emulated::wait_at_barrier(id, threads); }

}  // namespace pruneattn::cuda
