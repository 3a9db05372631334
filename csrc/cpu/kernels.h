// CPU kernels, one file each. `threads` is the caller's OpenMP thread count; results do not depend on it.
#pragma once

#include "../tokens.h"
#include "isa.h"

namespace pruneattn::cpu {

// Softmax attention into args.out; column sums too, if args has a place for them.
void attention(const Attention& args, int threads);

// The same for queries and keys of the same tokens, and scores[batch][tokens - extra_tokens].
void column_mean_attention(Attention args, int64_t extra_tokens, float* scores, int threads);

// scores[batch][tokens - extra_tokens]
void cls_scores(ClassScores args, int64_t extra_tokens, float* scores, int threads);

// scores[clip * batch_stride + patch] -> index[clip][keep], ascending.
void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int threads);

// Copies the extra tokens and the rows that index[batch][keep] names. Throws std::out_of_range for a bad index.
void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int threads);

// scores[clip][patch] = factor * sum over parts of sums[clip][part][extra_tokens + patch], in the order of the parts.
void average(const float* sums, int64_t batch, int64_t parts, int64_t tokens, int64_t extra_tokens, float factor,
             float* scores, int threads);

// Threads for work of about so many nanoseconds: all of them or none beside the caller's, for a team of another size
// makes OpenMP start its threads anew.
inline int threads_for(int64_t nanoseconds, int threads) {
  constexpr int64_t kWorthwhile = 20000;  // below, waking a thread costs more than it saves
  return nanoseconds < kWorthwhile ? 1 : threads;
}

}  // namespace pruneattn::cpu
