// CPU kernels, one file each. `threads` is the number of OpenMP threads. Results do not depend on it.
#pragma once

#include "../tokens.h"
#include "isa.h"

namespace pruneattn::cpu {

// Softmax attention into args.out, and column sums if args.column_sums is not null.
void attention(const Attention& args, int threads);

// Self-attention, and the mean of the softmax matrix over heads and patch rows: scores [B, N - extra_tokens].
void column_mean_attention(Attention args, int64_t extra_tokens, float* scores, int threads);

// The class token's row of the softmax matrix, averaged over heads: scores [B, N - extra_tokens].
void cls_scores(ClsScores args, int64_t extra_tokens, float* scores, int threads);

// The numbers of the `keep` best patches: scores [B, patches] (stride batch_stride) -> index [B, keep], ascending.
void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int threads);

// Copies the extra tokens and the rows of the patches in index [B, keep]. Throws std::out_of_range for an invalid
// index.
void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int threads);

// scores[clip, patch] = factor * sum over parts of sums[clip, part, extra_tokens + patch], in the order of the parts.
// sums: [B, parts, N], scores: [B, N - extra_tokens]
void average(const float* sums, int64_t batch, int64_t parts, int64_t tokens, int64_t extra_tokens, float factor,
             float* scores, int threads);

// A linear layer with 8-bit weights. Each row of the input is quantized to 8 bits with its own scale.
void int8_linear(const Int8Linear& args, int threads);

// The number of threads for work of about `nanoseconds`: 1 or all. OpenMP restarts its threads if the team size
// changes, so other numbers are not used.
inline int threads_for(int64_t nanoseconds, int threads) {
  constexpr int64_t kWorthwhile = 20000;  // for less work, waking a thread costs more than it saves
  return nanoseconds < kWorthwhile ? 1 : threads;
}

}  // namespace pruneattn::cpu
