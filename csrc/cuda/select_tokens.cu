#include "kernels.h"
#include "launch.h"
#include "selection.cuh"

namespace pruneattn::cuda {
namespace {

// One block per clip. scores: [B, patches] -> index: [B, keep]
template <int kKeys>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    select_tokens_kernel(const PartialScores scores, int patches, int keep, int64_t* index) {
  __shared__ uint16_t kept[kMaxPatches];
  float score[kKeys];
  sum_rows(scores, blockIdx.x, patches, score);
  select_block(score, patches, keep, kept);
  int64_t* out = index + static_cast<int64_t>(blockIdx.x) * keep;
  for (int i = threadIdx.x; i < keep; i += kThreads) out[i] = kept[i];
}

}  // namespace

void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const auto name = [&] {
    return "select_tokens(batch=" + std::to_string(batch) + ", patches=" + std::to_string(patches) +
           ", keep=" + std::to_string(keep) + ")";
  };
  with_keys_per_thread(patches, [&](auto keys) {
    launch(name, select_tokens_kernel<keys()>, {batch, kThreads}, stream, PartialScores{scores, 1, batch_stride, 0},
           patches, keep, index);
  });
}

}  // namespace pruneattn::cuda
