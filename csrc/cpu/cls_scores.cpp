#include <omp.h>

#include <memory>

#include "kernels.h"

namespace pruneattn::cpu {

void cls_scores(ClsScores args, int64_t extra_tokens, float* scores, int threads) {
  const Isa& kernels = isa();
  const int64_t heads = args.batch * args.heads, blocks = args.batch * args.key_blocks();
  const std::unique_ptr<float[]> weights(new float[heads * args.tokens]);
  args.weights = weights.get();
  const int workers = threads_for(heads * args.tokens * args.channels / 10, threads);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    kernels.cls_logits(args, blocks * thread / count, blocks * (thread + 1) / count);
#pragma omp barrier
    kernels.cls_softmax(args, heads * thread / count, heads * (thread + 1) / count);
  }
  average(weights.get(), args.batch, args.heads, args.tokens, extra_tokens, 1.0f / static_cast<float>(args.heads),
          scores, threads);
}

}  // namespace pruneattn::cpu
