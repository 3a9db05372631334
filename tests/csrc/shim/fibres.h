// The threads of a block as fibres of one OS thread, and where they meet. Implemented in fibres.cpp, apart from the
// kernels, so that `make race` can instrument these and not the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define SHIM_HIDDEN __attribute__((visibility("hidden")))

namespace shim SHIM_HIDDEN {

constexpr int kWarp = 32;

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared;       // bytes of dynamic shared memory
  const void* kernel;  // for its name
};

// Runs `body` as every thread of every block; throws std::logic_error on what is wrong with a kernel.
void run(const Launch& launch, const std::function<void()>& body);

// Of the running thread.
size_t lane();  // number in its block
bool on_own_stack(const void* address);
unsigned char* dynamic_shared();

// Wait for the others; what each of them brought, by its place.
const uint64_t* meet_block(const char* operation, uint64_t value);
const uint64_t* meet_warp(const char* operation, unsigned mask, uint64_t value);
void meet_at_barrier(int id, int threads);

// What a thread has running beside it, in groups. It is done when its group is waited for, or, if SHIM_EARLY names it
// (copies, products), when it is started. Each shows mistakes that the other hides.
enum Background { kCopies, kProducts };
struct Work {
  void (*run)(const Work&);
  void* to;
  const void* from[2];
  uint64_t more[24];
};
void start(Background what, const Work& work);
void commit(Background what);                 // what was started since the last one is a group
void wait(Background what, size_t pending);  // until at most so many groups, the last ones, are left

// The running thread is never resumed, and run() throws.
[[noreturn]] void fail(const std::string& message);

unsigned atomic_add(unsigned* address, unsigned value);
void fence();

// Function, file and line of an address in this module, as far as addr2line knows them.
std::string place_of(const void* code);

}  // namespace shim
