#include <algorithm>

#include "kernels.h"

namespace pruneattn::cpu {

void average(const float* sums, int64_t batch, int64_t parts, int64_t tokens, int64_t extra_tokens, float factor,
             float* scores, int threads) {
  const int64_t patches = tokens - extra_tokens;
  const int workers = threads_for(batch * parts * patches / 4, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t clip = 0; clip < batch; ++clip) {
    float* to = scores + clip * patches;
    std::fill(to, to + patches, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      const float* from = sums + (clip * parts + part) * tokens + extra_tokens;
      for (int64_t i = 0; i < patches; ++i) to[i] += from[i];
    }
    for (int64_t i = 0; i < patches; ++i) to[i] *= factor;
  }
}

}  // namespace pruneattn::cpu
