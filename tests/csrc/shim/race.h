// Finds accesses to shared and global memory that nothing orders, for `make race`. The compiler calls it before each
// access of a kernel (-fsanitize=thread, whose own run time knows neither lanes nor blocks and is not linked).
//
// Two accesses race if they touch a byte, one of them is no read, not both are atomic, and no order leads from one to
// the other. Order comes from __syncthreads, __syncwarp and barrier_sync among those who meet there, and between blocks
// from __threadfence, an atomic operation on the same address by each, and __threadfence. Warp exchanges give none.
// Every pair of accesses of a launch counts, whichever happened to come first.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace shim::race {

#ifdef SHIM_RACE

// Kernel code runs, and not the shim. Set whenever one hands over to the other.
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

void order(const std::vector<size_t>& lanes);  // these meet
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

}  // namespace shim::race
