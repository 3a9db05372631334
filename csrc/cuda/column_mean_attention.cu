#include "attention.cuh"
#include "attention_launch.h"
#include "epilogue.cuh"

namespace pruneattn::cuda {
namespace {

// What a kernel that prunes does besides: the block that finishes a clip last selects and gathers for it. Nothing waits
// for another block, so the order in which they run does not matter.
struct Pruning {
  uint32_t* finished;  // [batch], zeros: blocks of the clip that are done
  Epilogue epilogue;
};

// `parts` blocks per head. `partials` [batch, heads * parts, patches].
template <typename T, int kKeys, bool kPrune>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kKeys>)
    column_mean_attention_kernel(const __grid_constant__ Attention attention, float* partials, int parts,
                                 const __grid_constant__ Pruning pruning) {
  auto& shared = *reinterpret_cast<AttentionMemory<kKeys>*>(dynamic_shared());
  const int64_t head = blockIdx.x / parts;
  const int patches = attention.tokens - attention.extra_tokens;
  attend<T, kKeys, true>(attention, head, part_of(blockIdx.x % parts, parts, attention.queries),
                         partials + blockIdx.x * static_cast<int64_t>(patches), shared);
  if constexpr (kPrune) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    const int64_t clip = head / attention.heads;
    if (threadIdx.x == 0) {
      last = atomicAdd(&pruning.finished[clip], 1u) == static_cast<uint32_t>(attention.heads * parts - 1);
    }
    __syncthreads();
    if (last) {
      __threadfence();
      constexpr int kKeysPerThread = 2 * kKeys <= kThreads ? 1 : 2 * kKeys <= 2 * kThreads ? 2 : 4;
      prune_clip<kKeysPerThread>(pruning.epilogue, clip, 0, 1, reinterpret_cast<uint16_t*>(shared.output));
    }
  }
}

template <bool kPrune>
void run(const char* name, Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
         const Pruning& pruning, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  with_dtype_and_keys(dtype, attention.tokens, [&](auto type, auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    launch([&] { return describe(name, dtype, batch, attention); },
           column_mean_attention_kernel<decltype(type), kKeys, kPrune>,
           {batch * attention.heads * parts, kAttentionThreads, sizeof(AttentionMemory<kKeys>)}, stream, attention,
           partials, parts, pruning);
  });
}

}  // namespace

void column_mean_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                           int device, Stream stream) {
  run<false>("column_mean_attention", dtype, batch, attention, partials, parts, {}, device, stream);
}

void pruned_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                      uint32_t* finished, int64_t keep, float* scores, int64_t* index, const RowsList& rows,
                      int device, Stream stream) {
  const int64_t patches = attention.tokens - attention.extra_tokens;
  const int row_count = attention.heads * parts;
  const Epilogue epilogue = {{partials, row_count, row_count * patches, patches},
                             static_cast<int>(patches),
                             static_cast<int>(keep),
                             attention.extra_tokens,
                             scores,
                             index,
                             plan_copies(rows)};
  run<true>("pruned_attention", dtype, batch, attention, partials, parts, {finished, epilogue}, device, stream);
}

}  // namespace pruneattn::cuda
