// Launchers of the CUDA kernels, one file each. They queue on `stream` of `device`, never synchronise, allocate
// nothing, and can be captured in a CUDA graph. Deterministic: no atomics. A refused launch throws std::runtime_error.
#pragma once

#include "../tokens.h"

struct CUstream_st;  // cudaStream_t points to it; spelled out so that bindings.cpp needs no CUDA headers

namespace pruneattn::cuda {

using Stream = CUstream_st*;

// As the functions of the same names in cpu/kernels.h, for at most kMaxPatches patches. An index outside
// 0..patches-1 cannot be reported without a synchronisation: nothing is read for it, and its row is all zero bytes.
void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int device, Stream stream);
void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int device, Stream stream);

// Scores in `rows` rows that are yet to be added up: data[clip * batch_stride + row * row_stride + patch].
struct PartialScores {
  const float* data;
  int rows;
  int64_t batch_stride, row_stride;
};

// In one launch: adds up the rows, in ascending order, into scores[batch][patches] (unless null), selects by them into
// index[batch][keep], and gathers.
void prune_epilogue(const PartialScores& partials, int64_t batch, int64_t patches, int64_t keep, float* scores,
                    int64_t* index, int64_t extra_tokens, const RowsList& rows, int device, Stream stream);

// Each head's share of the class scores: the class token's row of its softmax matrix, over heads, of the patches alone.
// partials[batch][heads][tokens - extra_tokens]. At most kMaxTokens tokens. Of q, token_stride is not used.
void cls_scores(Dtype dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels, const Heads& q,
                const Heads& k, float scale, int64_t extra_tokens, float* partials, int device, Stream stream);

// float16 or bfloat16, heads of 64 channels; pointers and strides of q, k, v and out are multiples of 16 bytes.
struct Attention {
  Heads q, k, v, out;
  float* lse;  // [batch, heads, tokens]
  float scale;  // of the logits, times log2(e)
  int heads, tokens;
  int extra_tokens;    // rows and columns that are no part of the column means
  float column_share;  // 1 / (heads * patches)
};

// What column_mean_attention holds on chip: at most so many tokens, and most_tokens() on a device with less shared memory.
constexpr int kMaxAttentionTokens = 576;
int64_t most_tokens(int device);

// Blocks that share a head (`heads` of all clips together), each with a row of partial column means.
int attention_parts(int64_t heads, int64_t tokens, int device);

// Softmax attention, and the means of the softmax matrix's columns in parts that are yet to be added up:
// partials[batch][heads * parts][tokens - extra_tokens].
void column_mean_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                           int device, Stream stream);

}  // namespace pruneattn::cuda
