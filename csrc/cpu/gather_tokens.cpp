#include "kernels.h"

namespace pruneattn::cpu {

void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int threads) {
  for (int64_t i = 0; i < batch * keep; ++i) {
    if (index[i] < 0 || index[i] >= patches) {
      throw std::out_of_range("index[" + std::to_string(i / keep) + ", " + std::to_string(i % keep) + "] is " +
                              std::to_string(index[i]) + ", expected a patch number in 0.." +
                              std::to_string(patches - 1));
    }
  }
  const int64_t tokens = extra_tokens + keep;
  int64_t bytes = 0;
  for (int t = 0; t < rows.count; ++t) bytes += batch * tokens * rows.tensor[t].row_bytes;
  // Parallel over rows instead of clips, so that a single clip uses all threads.
  const int workers = threads_for(bytes / 8, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const int64_t clip = row / tokens, token = row % tokens;
    const int64_t from = token < extra_tokens ? token : extra_tokens + index[clip * keep + token - extra_tokens];
    for (int t = 0; t < rows.count; ++t) {
      const Rows& r = rows.tensor[t];
      std::memcpy(r.dst + row * r.row_bytes, r.src + clip * r.src_batch_stride + from * r.src_token_stride,
                  r.row_bytes);
    }
  }
}

}  // namespace pruneattn::cpu
