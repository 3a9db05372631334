// What ends a pruning block's attention, for one clip by one block of kThreads threads: partial scores are added up, the
// best patches selected, their rows gathered. For a kernel of its own, and for the end of one that has the scores.
#pragma once

#include "kernels.h"
#include "row_copy.cuh"

namespace pruneattn::cuda {

struct Epilogue {
  PartialScores partials;  // [B, rows, patches]
  int patches, keep, extra_tokens;
  float* scores;   // [B, patches], or null
  int64_t* index;  // [B, keep]
  RowCopies copies;
};

// All threads call it, after a barrier if others wrote the partial scores or the rows; kKeys * kThreads >= patches
// (with_keys_per_thread). `kept` is shared memory for `keep` numbers. Of several blocks for a clip (`parts` of them,
// this is number `part`), each repeats sum and selection, which is cheap beside the copies; the first one writes them,
// and each copies its share of the rows.
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
