// The epilogue of attention in a pruning block, for one clip by one block of kThreads threads: sums the partial
// scores, selects the best patches and gathers their rows.
#pragma once

#include "kernels.h"
#include "row_copy.cuh"

namespace pruneattn::cuda {

struct Epilogue {
  PartialScores partials;  // [B, rows, patches]
  int patches, keep, extra_tokens;
  float* scores;     // [B, patches], or null
  int64_t* index;    // [B, keep]
  RowCopies copies;  // [B, extra_tokens + patches, ...] -> [B, extra_tokens + keep, ...]
};

// All threads must call this function, after a barrier if other threads wrote the partial scores or the rows. kKeys *
// kThreads >= patches (with_keys_per_thread). `kept` is shared memory for `keep` numbers. `parts` blocks can share a
// clip. Each of them repeats the sum and the selection, which is cheap compared with the copies. Block 0 writes both,
// and block `part` copies its share of the rows.
template <int kKeys>
__device__ void prune_clip(const Epilogue& work, int64_t clip, int part, int parts, uint16_t* kept) {
  float score[kKeys];
  sum_rows(work.partials, clip, work.patches, score);
  if (part == 0 && work.scores != nullptr) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int patch = first_patch<kKeys>() + i * kWarp;
      if (patch < work.patches) work.scores[clip * work.patches + patch] = score[i];
    }
  }
  select_block(score, work.patches, work.keep, kept);
  if (part == 0) {
    for (int i = threadIdx.x; i < work.keep; i += kThreads) work.index[clip * work.keep + i] = kept[i];
  }
  const int tokens = work.extra_tokens + work.keep;
  copy_rows(work.copies, clip, tokens, share_of(part, parts, tokens), work.extra_tokens, kept);
}

}  // namespace pruneattn::cuda
