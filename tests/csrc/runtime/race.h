// Finds unordered accesses to shared and global memory, for `make race`. The compiler inserts a call before each
// memory access of a kernel (-fsanitize=thread; its own runtime is not linked, because it does not know threads and
// blocks of CUDA).
//
// Two accesses race if they touch the same byte, at least one is not a read, at least one is not atomic, and neither
// happens before the other. __syncthreads, __syncwarp and barrier_sync order the accesses of the participating
// threads. The sequence __threadfence, atomic operation on the same address, __threadfence orders the accesses of
// different blocks. Warp shuffles do not order memory accesses. The race finder checks every pair of accesses of a
// launch, in any order of execution.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace pruneattn::emulated::race {

#ifdef EMULATED_RACE

// True while kernel code runs, false while the runtime runs.
extern bool watching;

class Pause {
 public:
  Pause() : before_(watching) { watching = false; }
  ~Pause() { watching = before_; }

 private:
  bool before_;
};

using Range = std::pair<const char*, const char*>;

void start_launch();
void start_block(unsigned number, size_t threads, const std::vector<Range>& shared);

void order(const std::vector<size_t>& threads);  // these threads passed a barrier
void atomic(const void* address, const void* code);
void fence();

#else

inline bool watching;
struct Pause {
  Pause() {}
};
using Range = std::pair<const char*, const char*>;
inline void start_launch() {}
inline void start_block(unsigned, size_t, const std::vector<Range>&) {}
inline void order(const std::vector<size_t>&) {}
inline void atomic(const void*, const void*) {}
inline void fence() {}

#endif

}  // namespace pruneattn::emulated::race
