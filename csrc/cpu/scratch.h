#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace pruneattn::cpu {

// Scratch memory that each thread keeps between calls, aligned to 64 bytes. New pages would cost more than a small call
// itself.
inline char* scratch_memory(size_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
    size = bytes;
  }
  return memory.get();
}

}  // namespace pruneattn::cpu
