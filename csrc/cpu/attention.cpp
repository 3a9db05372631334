#include <omp.h>

#include "kernels.h"
#include "scratch.h"

namespace pruneattn::cpu {
void attention(const Attention& args, int threads) {
  const Isa& kernels = isa();
  const int64_t products = args.batch * args.heads * args.queries * args.tokens * args.channels;
  const int workers = threads_for(products / 16, threads);
  const size_t per_thread = kernels.attention_scratch(args);
  float* scratch = reinterpret_cast<float*>(scratch_memory(workers * per_thread * sizeof(float)));
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t first = args.units() * thread / count, last = args.units() * (thread + 1) / count;
    if (first < last) kernels.attention(args, first, last, scratch + thread * per_thread);
  }
}

}  // namespace pruneattn::cpu
