#include <algorithm>

#include "column_mean_attention.cuh"
#include "launch.h"

namespace pruneattn::cuda {
namespace {

// The number of concurrent blocks per multiprocessor for which the registers must suffice.
template <int kKeys>
constexpr int kBlocks = kKeys <= 48 ? 2 : 1;

// Calls f(T{}, integral_constant<int, keys of half a block>) for the smallest instantiation that holds all keys.
template <typename F>
void with_dtype_and_keys(Dtype dtype, int64_t tokens, F&& f) {
  const auto with_keys = [&](auto type) {
    const auto keys = [&](auto number) { f(type, number); };
    if (tokens <= 96) return keys(std::integral_constant<int, 48>{});
    if (tokens <= 288) return keys(std::integral_constant<int, 144>{});
    if (tokens <= 384) return keys(std::integral_constant<int, 192>{});
    if (tokens <= 480) return keys(std::integral_constant<int, 240>{});
    if (tokens <= 544) return keys(std::integral_constant<int, 272>{});
    keys(std::integral_constant<int, 288>{});
  };
  dtype == Dtype::float16 ? with_keys(Half{}) : with_keys(Bfloat16{});
}

size_t attention_memory(int64_t tokens) {
  size_t bytes = 0;
  with_dtype_and_keys(Dtype::float16, tokens,
                      [&](auto, auto keys) { bytes = sizeof(AttentionMemory<decltype(keys)::value>); });
  return bytes;
}

// `parts` blocks per head. partials: [B, H * parts, N - extra_tokens]
template <typename T, int kKeys>
__global__ void __launch_bounds__(kThreads, kBlocks<kKeys>)
    column_mean_attention_kernel(const __grid_constant__ Attention attention, float* partials, int parts) {
  auto& shared = *reinterpret_cast<AttentionMemory<kKeys>*>(dynamic_shared());
  const int patches = attention.tokens - attention.extra_tokens;
  attend<T, kKeys>(attention, blockIdx.x / parts, part_of(blockIdx.x % parts, parts, attention.tokens),
                   partials + blockIdx.x * static_cast<int64_t>(patches), shared);
}

std::string describe(Dtype dtype, int64_t batch, const Attention& a) {
  return std::string("column_mean_attention(") + (dtype == Dtype::float16 ? "float16" : "bfloat16") +
         ", batch=" + std::to_string(batch) + ", heads=" + std::to_string(a.heads) +
         ", tokens=" + std::to_string(a.tokens) + ", extra_tokens=" + std::to_string(a.extra_tokens) + ")";
}

}  // namespace

// Each block loads all keys and values of its head, which costs about as much as a tile of queries. Returns the split
// that minimizes the work of the busiest multiprocessor.
int attention_parts(int64_t heads, int64_t tokens, int device) {
  const int64_t tiles = tiles_of(static_cast<int>(tokens)), processors = multiprocessors(device);
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
  int64_t tokens = kMaxAttentionTokens;
  while (tokens > 0 && attention_memory(tokens) > static_cast<size_t>(shared_limit(device))) --tokens;
  return tokens;
}

void column_mean_attention(Dtype dtype, int64_t batch, const Attention& attention, float* partials, int parts,
                           int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  with_dtype_and_keys(dtype, attention.tokens, [&](auto type, auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    launch([&] { return describe(dtype, batch, attention); }, column_mean_attention_kernel<decltype(type), kKeys>,
           {batch * attention.heads * parts, kThreads, sizeof(AttentionMemory<kKeys>)}, stream, attention, partials,
           parts);
  });
}

}  // namespace pruneattn::cuda
