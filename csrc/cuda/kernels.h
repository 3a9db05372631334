// Launchers of the CUDA kernels, one file each. They enqueue work on `stream` of `device`, never synchronize,
// allocate no memory, and can be captured in a CUDA graph. Results are deterministic: there are no atomics. A failed
// launch throws std::runtime_error.
#pragma once

#include "../tokens.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; declared here so that bindings.cpp needs no CUDA headers

namespace pruneattn::cuda {

using Stream = CUstream_st*;

// Same as the functions in cpu/kernels.h, for at most kMaxPatches patches. An index outside 0..patches-1 cannot be
// reported without synchronization: its output row is filled with zero bytes.
// scores: [B, patches], index: [B, keep], rows: [B, extra_tokens + patches, ...] -> [B, extra_tokens + keep, ...]
void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int device, Stream stream);
void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int device, Stream stream);

// Partial scores [B, rows, patches], whose sum over the rows is the score: data[clip * batch_stride + row *
// row_stride + patch].
struct PartialScores {
  const float* data;
  int rows;
  int64_t batch_stride, row_stride;
};

// In one launch: sums the partial scores over their rows, in ascending order, into scores [B, patches] (unless null),
// selects the best patches into index [B, keep], and gathers their rows.
void prune_epilogue(const PartialScores& partials, int64_t batch, int64_t patches, int64_t keep, float* scores,
                    int64_t* index, int64_t extra_tokens, const RowsList& rows, int device, Stream stream);

// Each head's contribution to the CLS scores: the class token's row of the head's softmax matrix, divided by the
// number of heads, without the columns of the extra tokens. At most kMaxTokens tokens. q.token_stride is not used.
// q: [B, H, D], k: [B, H, N, D], partials: [B, H, N - extra_tokens]
void cls_scores(Dtype dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels, const Heads& q,
                const Heads& k, float scale, int64_t extra_tokens, float* partials, int device, Stream stream);

// Arguments of column_mean_attention: float16 or bfloat16, heads of 64 channels. Pointers and strides of q, k, v and
// out are multiples of 16 bytes.
struct Attention {
  Heads q, k, v, out;  // [B, H, N, 64]
  float* lse;          // [B, H, N]
  float scale;         // of the logits, times log2(e)
  int heads, tokens;
  int extra_tokens;    // rows and columns that the column means exclude
  float column_share;  // 1 / (heads * patches)
};

// The limit of column_mean_attention, which holds all keys of a head in shared memory. most_tokens() is the limit of
// a device, which can be lower.
constexpr int kMaxAttentionTokens = 576;
int64_t most_tokens(int device);

// The number of blocks that share a head. Each of them writes one row of partial column means. `heads` counts the
// heads of all clips.
int attention_parts(int64_t heads, int64_t tokens, int device);

// Softmax attention, and the column means of the softmax matrix as partial sums: the scores are the sum of
// partials [B, H * parts, N - extra_tokens] over the second dimension.
void column_mean_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                           int device, Stream stream);

}  // namespace pruneattn::cuda
