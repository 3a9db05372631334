// Runs the threads of a block as fibers of one OS thread, with barriers between them. Implements
// csrc/cuda/emulated/runtime.h. The implementation in fibers.cpp is not a header, so that `make race` can instrument
// the kernels without the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda/emulated/runtime.h"

namespace pruneattn::emulated {

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared;       // bytes of dynamic shared memory
  const void* kernel;  // for its name
};

// Runs `body` as every thread of every block. Throws std::logic_error if the kernel has an error.
void run(const Launch& launch, const std::function<void()>& body);

// The number of the running thread in its block.
size_t thread_number();
bool on_own_stack(const void* address);

// Waits for all threads of the block.
void wait_for_block(const char* operation);

unsigned atomic_add(unsigned* address, unsigned value);
void fence();

// Function, file and line of an address in this module, as far as addr2line knows them.
std::string place_of(const void* code);

}  // namespace pruneattn::emulated
