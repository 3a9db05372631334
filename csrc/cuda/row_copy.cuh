// Copies token rows by the threads of a block, with the widest accesses that addresses and sizes allow.
#pragma once

#include <algorithm>

#include "launch.h"
#include "selection.cuh"

namespace pruneattn::cuda {

constexpr uint16_t kNoPatch = 0xffffu;  // in a list of kept patches: the row is filled with zeros
constexpr int kUnroll = 4;              // loads in flight per thread

struct RowCopy {
  Rows rows;
  int width;  // bytes per access: 16, 8, 4, 2 or 1
};

struct RowCopies {
  RowCopy tensor[kMaxTensors];
  int count;
};

inline RowCopies plan_copies(const RowsList& list) {
  RowCopies plan = {};
  plan.count = list.count;
  for (int t = 0; t < list.count; ++t) {
    const Rows& r = list.tensor[t];
    const uint64_t bits = reinterpret_cast<uintptr_t>(r.src) | reinterpret_cast<uintptr_t>(r.dst) |
                          static_cast<uint64_t>(r.src_batch_stride) | static_cast<uint64_t>(r.src_token_stride) |
                          static_cast<uint64_t>(r.row_bytes) | 16u;
    plan.tensor[t] = {r, static_cast<int>(bits & -bits)};
  }
  return plan;
}

// The number of blocks that share the rows of one clip: enough to fill the device, with at least one row per warp.
inline int blocks_per_clip(int64_t batch, int64_t tokens, int device) {
  const int64_t wanted = (kBlocksPerMultiprocessor * multiprocessors(device) + batch - 1) / batch;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, tokens / kWarps)));
}

// The range [first, last) of a clip's output tokens that block `part` of `parts` copies.
struct Share {
  int first, last;
};

__device__ inline Share share_of(int part, int parts, int tokens) {
  return {static_cast<int>(static_cast<int64_t>(tokens) * part / parts),
          static_cast<int>(static_cast<int64_t>(tokens) * (part + 1) / parts)};
}

template <typename Access>
__device__ void copy_rows_as(const Rows& rows, int64_t clip, int tokens, Share share, int extra_tokens,
                             const uint16_t* kept) {
  // The threads do the accesses of the share in a cycle, in the order of the output.
  const int per_row = static_cast<int>(rows.row_bytes / sizeof(Access));
  const int row_step = kThreads / per_row, access_step = kThreads % per_row;
  const char* src = rows.src + clip * rows.src_batch_stride;
  Access* dst = reinterpret_cast<Access*>(rows.dst) + clip * tokens * per_row;
  Access* const end = dst + static_cast<int64_t>(share.last) * per_row;
  dst += static_cast<int64_t>(share.first) * per_row + threadIdx.x;
  int token = share.first + static_cast<int>(threadIdx.x) / per_row;
  int access = static_cast<int>(threadIdx.x) % per_row;
  for (; dst < end; dst += kUnroll * kThreads) {
    Access value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      value[u] = Access{};
      if (token < share.last) {
        const int patch = token < extra_tokens ? token - extra_tokens : kept[token - extra_tokens];
        if (patch != kNoPatch) {
          const char* row = src + (extra_tokens + patch) * rows.src_token_stride;
          // Bypasses the L1 cache: each row is read once, and another block may have written it in this launch.
          value[u] = __ldcg(reinterpret_cast<const Access*>(row) + access);
        }
      }
      token += row_step;
      access += access_step;
      if (access >= per_row) {
        access -= per_row;
        ++token;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (dst + u * kThreads < end) dst[u * kThreads] = value[u];
    }
  }
}

// kept[i] is the patch of output token extra_tokens + i. The function reads only the entries of the share.
__device__ inline void copy_rows(const RowCopies& copies, int64_t clip, int tokens, Share share, int extra_tokens,
                                 const uint16_t* kept) {
  for (int t = 0; t < copies.count; ++t) {
    const Rows& rows = copies.tensor[t].rows;
    switch (copies.tensor[t].width) {
      case 16: copy_rows_as<uint4>(rows, clip, tokens, share, extra_tokens, kept); break;
      case 8: copy_rows_as<uint2>(rows, clip, tokens, share, extra_tokens, kept); break;
      case 4: copy_rows_as<unsigned int>(rows, clip, tokens, share, extra_tokens, kept); break;
      case 2: copy_rows_as<unsigned short>(rows, clip, tokens, share, extra_tokens, kept); break;
      default: copy_rows_as<unsigned char>(rows, clip, tokens, share, extra_tokens, kept);
    }
  }
}

// Returns "name(batch=.., ...)" for an error message.
inline std::string describe(const char* name, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                            const RowsList& rows) {
  std::string text = std::string(name) + "(batch=" + std::to_string(batch) + ", patches=" + std::to_string(patches) +
                     ", keep=" + std::to_string(keep);
  if (rows.count > 0) text += ", extra_tokens=" + std::to_string(extra_tokens) + ", row_bytes=[";
  for (int t = 0; t < rows.count; ++t) text += (t ? ", " : "") + std::to_string(rows.tensor[t].row_bytes);
  return text + (rows.count > 0 ? "])" : ")");
}

}  // namespace pruneattn::cuda
