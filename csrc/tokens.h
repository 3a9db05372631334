// Definitions that the CPU and CUDA kernels share: limits, tensor strides, rows to copy, the order of scores,
// argument checks.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define PRUNEATTN_HOST_DEVICE __host__ __device__
#else
#define PRUNEATTN_HOST_DEVICE
#endif

namespace pruneattn {

constexpr int kMaxPatches = 4096;            // on CUDA, one block holds all keys of a clip in registers
constexpr int kMaxTokens = kMaxPatches + 8;  // of cls_scores on CUDA: one block holds a head's logits in shared memory
constexpr int kMaxTensors = 4;               // tensors gathered in one launch

enum class Dtype { float32, bfloat16, float16 };

// A [B, H, N, D] tensor: strides in elements, channels contiguous.
struct Heads {
  char* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Rows of one tensor: src [B, N, row_bytes] -> dst [B, extra_tokens + keep, row_bytes], contiguous. Strides in bytes.
struct Rows {
  const char* src;
  char* dst;
  int64_t src_batch_stride;
  int64_t src_token_stride;
  int64_t row_bytes;
};

struct RowsList {
  Rows tensor[kMaxTensors];
  int count;
};

// Maps a score to an integer that orders like a descending sort of floats: NaN first, then +Inf ... -Inf; -0 == +0.
// The smallest key, that of -Inf, is 0x007fffff, so 0 can mean "no patch".
PRUNEATTN_HOST_DEVICE inline uint32_t score_key(float score) {
  uint32_t bits;
#ifdef __CUDA_ARCH__
  bits = __float_as_uint(score);
#else
  std::memcpy(&bits, &score, sizeof bits);
#endif
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;  // NaN of either sign
  if (magnitude == 0) return 0x80000000u;           // both zeros
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check_selection(int64_t batch, int64_t patches, int64_t keep) {
  check(batch >= 0, "batch must not be negative, got " + std::to_string(batch));
  check(patches >= 1, "patches must be at least 1, got " + std::to_string(patches));
  check(keep >= 1 && keep <= patches,
        "keep must be in 1.." + std::to_string(patches) + " (the number of patches), got " + std::to_string(keep));
}

inline void check_rows(const RowsList& rows, int64_t extra_tokens) {
  check(extra_tokens >= 0, "extra_tokens must not be negative, got " + std::to_string(extra_tokens));
  for (int t = 0; t < rows.count; ++t) {
    const int64_t bytes = rows.tensor[t].row_bytes;
    check(bytes >= 1 && bytes <= INT32_MAX,
          "row_bytes of tensor " + std::to_string(t) + " must be in 1..2147483647, got " + std::to_string(bytes));
  }
}

}  // namespace pruneattn
