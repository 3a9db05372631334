// The interface that the emulated primitives need from a runtime that runs kernels on the CPU. The runtime implements
// these functions and provides <cuda_runtime.h> with CUDA's built-in variables, warp shuffles and vector types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pruneattn::emulated {

constexpr int kWarp = 32;

// Ends the kernel with an error. The calling thread does not continue.
[[noreturn]] void fail(const std::string& message);

unsigned char* dynamic_shared();

// Waits for all lanes of the calling thread's warp. Returns the value of each lane. All lanes must name the same
// operation.
const uint64_t* exchange_in_warp(const char* operation, unsigned mask, uint64_t value);
// Waits until `threads` threads reach barrier `id`.
void wait_at_barrier(int id, int threads);

// Asynchronous operations of one thread. A runtime may run an operation at any time between start() and the wait()
// that completes its group.
enum class Async { copies, products };
struct Operation {
  void (*run)(const Operation&);
  void* destination;
  const void* sources[2];
  uint64_t values[24];
};
void start(Async kind, const Operation& operation);
// Closes a group: all operations since the previous commit.
void commit(Async kind);
// Waits until at most the last `pending` groups are incomplete.
void wait(Async kind, size_t pending);

}  // namespace pruneattn::emulated
