#include "kernels.h"
#include "row_copy.cuh"

namespace pruneattn::cuda {
namespace {

// `parts` blocks per clip. index: [B, keep]
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gather_tokens_kernel(const int64_t* index, int patches, int keep, int extra_tokens, int parts,
                         const __grid_constant__ RowCopies copies) {
  __shared__ uint16_t kept[kMaxPatches];
  const int64_t clip = blockIdx.x / parts;
  const int tokens = extra_tokens + keep;
  const Share share = share_of(blockIdx.x % parts, parts, tokens);
  index += clip * keep;
  for (int i = max(share.first - extra_tokens, 0) + threadIdx.x; i < share.last - extra_tokens; i += kThreads) {
    const int64_t patch = index[i];
    kept[i] = patch >= 0 && patch < patches ? static_cast<uint16_t>(patch) : kNoPatch;
  }
  __syncthreads();
  copy_rows(copies, clip, tokens, share, extra_tokens, kept);
}

}  // namespace

void gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                   const RowsList& rows, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const int parts = blocks_per_clip(batch, extra_tokens + keep, device);
  launch([&] { return describe("gather_tokens", batch, patches, keep, extra_tokens, rows); }, gather_tokens_kernel,
         {batch * parts, kThreads}, stream, index, patches, keep, extra_tokens, parts, plan_copies(rows));
}

}  // namespace pruneattn::cuda
