#include <memory>

#include "kernels.h"

namespace pruneattn::cpu {

void column_mean_attention(Attention args, int64_t extra_tokens, float* scores, int threads) {
  const int64_t units = args.heads * args.units_per_head();
  const std::unique_ptr<float[]> sums(new float[args.batch * units * args.tokens]);
  args.column_sums = sums.get();
  args.first_scored = extra_tokens;
  attention(args, threads);
  const float rows = static_cast<float>(args.heads) * static_cast<float>(args.tokens - extra_tokens);
  average(sums.get(), args.batch, units, args.tokens, extra_tokens, 1.0f / rows, scores, threads);
}

}  // namespace pruneattn::cpu
