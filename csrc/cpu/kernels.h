// CPU kernels, one file each. `threads` is the caller's OpenMP thread count; results do not depend on it.
#pragma once

#include "../tokens.h"

namespace pruneattn::cpu {

// scores[clip * batch_stride + patch] -> index[clip][keep], ascending.
void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int threads);

// Copies the extra tokens and the rows that index[batch][keep] names. Throws std::out_of_range for a bad index.
void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int threads);

}  // namespace pruneattn::cpu
