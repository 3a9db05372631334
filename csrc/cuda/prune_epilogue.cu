#include "epilogue.cuh"
#include "kernels.h"

namespace pruneattn::cuda {
namespace {

// `parts` blocks per clip.
template <int kKeys>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    prune_epilogue_kernel(int parts, const __grid_constant__ Epilogue work) {
  __shared__ uint16_t kept[kMaxPatches];
  prune_clip<kKeys>(work, blockIdx.x / parts, blockIdx.x % parts, parts, kept);
}

}  // namespace

void prune_epilogue(const PartialScores& partials, int64_t batch, int64_t patches, int64_t keep, float* scores,
                    int64_t* index, int64_t extra_tokens, const RowsList& rows, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const int parts = blocks_per_clip(batch, extra_tokens + keep, device);
  const Epilogue work = {
      partials, static_cast<int>(patches), static_cast<int>(keep), static_cast<int>(extra_tokens), scores,
      index,    plan_copies(rows)};
  with_keys_per_thread(patches, [&](auto keys) {
    launch([&] { return describe("prune_epilogue", batch, patches, keep, extra_tokens, rows); },
           prune_epilogue_kernel<keys()>, {batch * parts, kThreads}, stream, parts, work);
  });
}

}  // namespace pruneattn::cuda
