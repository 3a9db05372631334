// Exact, stable selection of the `keep` best of up to kMaxPatches scores by one block, keys in registers.
#pragma once

#include <type_traits>

#include "../tokens.h"

namespace pruneattn::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // at once: 64 registers a thread, 64 KB of row loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

// Calls `f(std::integral_constant<int, keys per thread>)` with the smallest instantiation that holds all patches.
template <typename F>
void with_keys_per_thread(int64_t patches, F&& f) {
  if (patches <= kThreads) return f(std::integral_constant<int, 1>{});
  if (patches <= 2 * kThreads) return f(std::integral_constant<int, 2>{});
  if (patches <= 4 * kThreads) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, kMaxPatches / kThreads>{});
}

// Sums, over the block, a value of each warp (the same in all its lanes). `slots` must not be in use by another
// sum since the last barrier but one: callers alternate between two.
__device__ inline uint32_t sum_over_warps(uint32_t value, uint32_t (&slots)[kWarps]) {
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += slots[w];
  return sum;
}

// Writes the numbers of the kept patches to kept[0..keep), ascending. All threads call it; ends with a barrier.
// A warp owns 32 * kKeys patches in a row, lane l those at l, 32 + l, ...: loads coalesce, and the order of patches is
// (warp, key, lane), so a rank is a sum over earlier warps plus ballots inside this one.
template <int kKeys>
__device__ void select_block(const float* __restrict__ scores, int patches, int keep, uint16_t* kept) {
  __shared__ uint32_t all_of_warp[kWarps], any_of_warp[kWarps];
  __shared__ uint32_t counts[2][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = warp * kWarp * kKeys + lane;

  uint32_t key[kKeys];  // 0 where there is no patch: below every real key
  uint32_t all = 0xffffffffu, any = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int patch = first + i * kWarp;
    key[i] = 0;
    if (patch < patches) {
      key[i] = score_key(scores[patch]);
      all &= key[i];
      any |= key[i];
    }
  }
  all = __reduce_and_sync(kAllLanes, all);
  any = __reduce_or_sync(kAllLanes, any);
  if (lane == 0) {
    all_of_warp[warp] = all;
    any_of_warp[warp] = any;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all &= all_of_warp[w];
    any |= any_of_warp[w];
  }

  // The keep-th largest key from its highest bit down: a bit is set if enough keys are at least that large. Scores of
  // one clip are close to each other, so few bits differ and few rounds are needed; each costs one barrier.
  uint32_t threshold = all;  // at least `keep` keys reach it
  uint32_t above = 0;        // keys larger than the final threshold
  int round = 0;
  for (uint32_t open = all ^ any; open != 0;) {
    const uint32_t bit = 0x80000000u >> __clz(static_cast<int>(open));
    open ^= bit;
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) mine += key[i] >= (threshold | bit);
    const uint32_t count = sum_over_warps(__reduce_add_sync(kAllLanes, mine), counts[round++ % 2]);
    if (count >= static_cast<uint32_t>(keep)) {
      threshold |= bit;
      if (count == static_cast<uint32_t>(keep)) break;
    } else {
      above = count;
    }
  }
  const uint32_t ties = keep - above;  // of the keys equal to the threshold, the first ones

  // Of this warp: keys above the threshold in the high half, equal ones in the low half. Padding has key 0 < threshold.
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) mine += key[i] > threshold ? 1u << 16 : key[i] == threshold ? 1u : 0u;
  mine = __reduce_add_sync(kAllLanes, mine);
  uint32_t(&totals)[kWarps] = counts[round % 2];
  if (lane == 0) totals[warp] = mine;
  __syncthreads();
  uint32_t before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) before += w < warp ? totals[w] : 0;
  uint32_t larger = before >> 16, equal = before & 0xffffu;

  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const unsigned larger_here = __ballot_sync(kAllLanes, key[i] > threshold);
    const unsigned equal_here = __ballot_sync(kAllLanes, key[i] == threshold);
    const uint32_t my_equal = equal + __popc(equal_here & lower_lanes);
    if (key[i] > threshold || (key[i] == threshold && my_equal < ties)) {
      const uint32_t rank = larger + __popc(larger_here & lower_lanes) + (my_equal < ties ? my_equal : ties);
      kept[rank] = static_cast<uint16_t>(first + i * kWarp);
    }
    larger += __popc(larger_here);
    equal += __popc(equal_here);
  }
  __syncthreads();
}

}  // namespace pruneattn::cuda
