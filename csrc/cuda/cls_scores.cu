#include <cmath>

#include "block.cuh"
#include "kernels.h"
#include "launch.h"
#include "unpack.cuh"

namespace pruneattn::cuda {
namespace {

constexpr int kKeysInFlight = 6;  // loads in flight per thread, limited by 64 registers

// logits[token] = factor * (q . k[token]). `lanes` adjacent threads (a power of two, at most a warp) share a key.
// Each of them does every lanes-th access, so that loads coalesce for any head size.
// q: [channels], k: [tokens, channels], logits: [tokens]
template <typename T, typename Access>
__device__ void logits_of_head(const T* q, const T* k, int64_t token_stride, int tokens, int channels, int lanes,
                               float factor, float* logits) {
  constexpr int kNumbers = sizeof(Access) / sizeof(T);
  const int accesses = channels / kNumbers, keys_at_once = kThreads / lanes;
  const int lane = threadIdx.x % lanes, own_key = threadIdx.x / lanes;
  for (int first = 0; first < tokens; first += kKeysInFlight * keys_at_once) {
    float sum[kKeysInFlight] = {};
    for (int a = lane; a < accesses; a += lanes) {
      Access key[kKeysInFlight];
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        const int token = first + u * keys_at_once + own_key;
        key[u] = Access{};
        if (token < tokens) key[u] = __ldg(reinterpret_cast<const Access*>(k + token * token_stride) + a);
      }
      float query[kNumbers];
      unpack<T>(__ldg(reinterpret_cast<const Access*>(q) + a), query);
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        float number[kNumbers];
        unpack<T>(key[u], number);
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) sum[u] += query[i] * number[i];
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) sum[u] += __shfl_xor_sync(kAllLanes, sum[u], step);
    }
#pragma unroll
    for (int u = 0; u < kKeysInFlight; ++u) {
      const int token = first + u * keys_at_once + own_key;
      if (lane == 0 && token < tokens) logits[token] = sum[u] * factor;
    }
  }
}

// One block per clip and head. partials: [B, H, tokens - extra_tokens]
template <typename T, typename Access>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cls_scores_kernel(const Heads q, const Heads k, int heads, int tokens, int channels, int lanes, float factor,
                      int extra_tokens, float* partials) {
  __shared__ float row[kMaxTokens];
  __shared__ float warp_max[kWarps], warp_sum[kWarps];
  const int64_t clip = blockIdx.x / heads, head = blockIdx.x % heads;
  logits_of_head<T, Access>(reinterpret_cast<const T*>(q.data) + clip * q.batch_stride + head * q.head_stride,
                            reinterpret_cast<const T*>(k.data) + clip * k.batch_stride + head * k.head_stride,
                            k.token_stride, tokens, channels, lanes, factor, row);
  __syncthreads();
  // fmaxf ignores NaN. But the exponentials of NaN and of Inf - Inf are NaN, and the sum spreads NaN to the whole
  // row.
  float row_max = -INFINITY;
  for (int token = threadIdx.x; token < tokens; token += kThreads) row_max = fmaxf(row_max, row[token]);
  row_max = block_reduce(row_max, warp_max, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int token = threadIdx.x; token < tokens; token += kThreads) {
    row[token] = exp2_approximate(row[token] - row_max);
    sum += row[token];
  }
  sum = block_reduce(sum, warp_sum, [](float a, float b) { return a + b; });
  const float share = 1.0f / (sum * heads);
  const int patches = tokens - extra_tokens;
  partials += static_cast<int64_t>(blockIdx.x) * patches - extra_tokens;
  for (int token = threadIdx.x; token < tokens; token += kThreads) {  // the same tokens as above: no barrier
    if (token >= extra_tokens) partials[token] = row[token] * share;
  }
}

bool aligned(const Heads& x, int size) {
  return (reinterpret_cast<uintptr_t>(x.data) | static_cast<uint64_t>(x.batch_stride) * size |
          static_cast<uint64_t>(x.head_stride) * size | static_cast<uint64_t>(x.token_stride) * size) %
             16 ==
         0;
}

}  // namespace

void cls_scores(Dtype dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels, const Heads& q,
                const Heads& k, float scale, int64_t extra_tokens, float* partials, int device, Stream stream) {
  if (batch == 0) return;
  const DeviceGuard guard(device);
  const auto name = [&] {
    return "cls_scores(batch=" + std::to_string(batch) + ", heads=" + std::to_string(heads) +
           ", tokens=" + std::to_string(tokens) + ", channels=" + std::to_string(channels) + ")";
  };
  const auto run = [&](auto kernel, int64_t accesses) {
    int lanes = 1;
    while (lanes < kWarp && lanes < accesses) lanes *= 2;
    const float factor = scale * 1.44269504f;  // log2(e)
    launch(name, kernel, {batch * heads, kThreads}, stream, q, k, heads, tokens, channels, lanes, factor, extra_tokens,
           partials);
  };
  const int size = dtype == Dtype::float32 ? 4 : 2;
  const bool wide =
      aligned({q.data, q.batch_stride, q.head_stride, 0}, size) && aligned(k, size) && channels * size % 16 == 0;
  const int64_t accesses = wide ? channels * size / 16 : channels;
  switch (dtype) {
    case Dtype::float32:
      return wide ? run(cls_scores_kernel<float, uint4>, accesses) : run(cls_scores_kernel<float, float>, accesses);
    case Dtype::bfloat16:
      return wide ? run(cls_scores_kernel<Bfloat16, uint4>, accesses)
                  : run(cls_scores_kernel<Bfloat16, unsigned short>, accesses);
    case Dtype::float16:
      return wide ? run(cls_scores_kernel<Half, uint4>, accesses)
                  : run(cls_scores_kernel<Half, unsigned short>, accesses);
  }
}

}  // namespace pruneattn::cuda
