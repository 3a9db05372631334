#include "kernels.h"

#include <omp.h>

#include <memory>
#include <new>

namespace pruneattn::cpu {
namespace {

// Scratch memory that each thread keeps between calls. New pages would cost more than a small call itself.
float* scratch_memory(size_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
    size = floats;
  }
  return memory.get();
}

}  // namespace

void attention(const Attention& args, int threads) {
  const Isa& kernels = isa();
  const int64_t products = args.batch * args.heads * args.queries * args.tokens * args.channels;
  const int workers = threads_for(products / 16, threads);
  const size_t per_thread = kernels.attention_scratch(args);
  float* scratch = scratch_memory(workers * per_thread);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t first = args.units() * thread / count, last = args.units() * (thread + 1) / count;
    if (first < last) kernels.attention(args, first, last, scratch + thread * per_thread);
  }
}

}  // namespace pruneattn::cpu
