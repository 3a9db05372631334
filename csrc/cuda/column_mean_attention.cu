#include "attention.cuh"
#include "attention_launch.h"

namespace pruneattn::cuda {
namespace {

// `parts` blocks per head.
template <typename T, int kKeys>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kKeys>)
    column_mean_attention_kernel(const __grid_constant__ Attention attention, float* partials, int parts) {
  auto& shared = *reinterpret_cast<AttentionMemory<kKeys>*>(dynamic_shared());
  const int patches = attention.tokens - attention.extra_tokens;
  attend<T, kKeys, true>(attention, blockIdx.x / parts, part_of(blockIdx.x % parts, parts, attention.queries),
                         partials + blockIdx.x * static_cast<int64_t>(patches), shared);
}

}  // namespace

void column_mean_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                           int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  with_dtype_and_keys(dtype, attention.tokens, [&](auto type, auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    launch([&] { return describe("column_mean_attention", dtype, batch, attention); },
           column_mean_attention_kernel<decltype(type), kKeys>,
           {batch * attention.heads * parts, kAttentionThreads, sizeof(AttentionMemory<kKeys>)}, stream, attention,
           partials, parts);
  });
}

}  // namespace pruneattn::cuda
