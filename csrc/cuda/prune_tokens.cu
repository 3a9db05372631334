#include "kernels.h"
#include "row_copy.cuh"

namespace pruneattn::cuda {
namespace {

// `parts` blocks per clip: each repeats the selection, which is cheap beside the copies, and copies its share of rows.
template <int kKeys>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    prune_tokens_kernel(const float* scores, int patches, int64_t batch_stride, int keep, int64_t* index,
                        int extra_tokens, int parts, const __grid_constant__ RowCopies copies) {
  __shared__ uint16_t kept[kMaxPatches];
  const int64_t clip = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  select_block<kKeys>(scores + clip * batch_stride, patches, keep, kept);
  if (part == 0) {
    for (int i = threadIdx.x; i < keep; i += kThreads) index[clip * keep + i] = kept[i];
  }
  const int tokens = extra_tokens + keep;
  copy_rows(copies, clip, tokens, share_of(part, parts, tokens), extra_tokens, kept);
}

}  // namespace

void prune_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                  int64_t* index, int64_t extra_tokens, const RowsList& rows, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const int parts = blocks_per_clip(batch, extra_tokens + keep, device);
  const RowCopies copies = plan_copies(rows);
  with_keys_per_thread(patches, [&](auto keys) {
    launch([&] { return describe("prune_tokens", batch, patches, keep, extra_tokens, rows); },
           prune_tokens_kernel<keys()>, {batch * parts, kThreads}, stream, scores, patches, batch_stride, keep, index,
           extra_tokens, parts, copies);
  });
}

}  // namespace pruneattn::cuda
