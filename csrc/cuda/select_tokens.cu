#include "kernels.h"
#include "launch.h"
#include "selection.cuh"

namespace pruneattn::cuda {
namespace {

// One block per clip.
template <int kKeys>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    select_tokens_kernel(const float* scores, int patches, int64_t batch_stride, int keep, int64_t* index) {
  __shared__ uint16_t kept[kMaxPatches];
  select_block<kKeys>(scores + blockIdx.x * batch_stride, patches, keep, kept);
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
    launch(name, select_tokens_kernel<keys()>, {batch, kThreads}, stream, scores, patches, batch_stride, keep, index);
  });
}

}  // namespace pruneattn::cuda
