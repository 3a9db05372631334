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

}  // namespace pruneattn::cuda
