#include "attention.cuh"
#include "attention_launch.h"

namespace pruneattn::cuda {
namespace {

// `parts` blocks per head.
template <typename T, int kKeys>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kKeys>)
    attention_kernel(const __grid_constant__ Attention attention, int parts) {
  auto& shared = *reinterpret_cast<AttentionMemory<kKeys>*>(dynamic_shared());
  attend<T, kKeys, false>(attention, blockIdx.x / parts, part_of(blockIdx.x % parts, parts, attention.queries),
                          nullptr, shared);
}

}  // namespace

// Blocks that share the queries of a head. Each loads all keys and values, which costs it about as much as a tile of
// queries; of the splits, the one whose longest multiprocessor has least to do.
int attention_parts(int64_t heads, int64_t queries, int device) {
  const int64_t tiles = tiles_of(static_cast<int>(queries)), processors = multiprocessors(device);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= tiles; ++parts) {
    const int64_t rounds = (heads * parts + processors - 1) / processors;
    const int64_t work = rounds * ((tiles + parts - 1) / parts + 1);
    if (work < least) {
      least = work;
      best = parts;
    }
  }
  return static_cast<int>(best);
}

int64_t most_tokens(int device) {
  int64_t tokens = kMaxKeys;
  while (tokens > 0 && attention_memory(tokens) > static_cast<size_t>(shared_limit(device))) --tokens;
  return tokens;
}

void attention(Dtype dtype, int64_t batch, const Attention& attention, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const int parts = attention_parts(batch * attention.heads, attention.queries, device);
  with_dtype_and_keys(dtype, attention.tokens, [&](auto type, auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    launch([&] { return describe("attention", dtype, batch, attention); },
           attention_kernel<decltype(type), kKeys>,
           {batch * attention.heads * parts, kAttentionThreads, sizeof(AttentionMemory<kKeys>)}, stream, attention,
           parts);
  });
}

}  // namespace pruneattn::cuda
