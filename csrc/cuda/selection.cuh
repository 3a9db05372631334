// Exact, stable selection of the `keep` best of up to kMaxPatches scores by one block, with the keys in registers.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "block.cuh"
#include "kernels.h"

namespace pruneattn::cuda {

// Calls `f(std::integral_constant<int, keys per thread>)` with the smallest instantiation that holds all patches.
template <typename F>
void with_keys_per_thread(int64_t patches, F&& f) {
  if (patches <= kThreads) return f(std::integral_constant<int, 1>{});
  if (patches <= 2 * kThreads) return f(std::integral_constant<int, 2>{});
  if (patches <= 4 * kThreads) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, kMaxPatches / kThreads>{});
}

// Sums one value per warp, which is the same in all lanes of the warp, over the block. Consecutive calls must
// alternate between two `slots`: a thread can still read the slots of the previous call.
__device__ inline uint32_t sum_over_warps(uint32_t value, uint32_t (&slots)[kWarps]) {
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += slots[w];
  return sum;
}

// The patches of a thread are first_patch() + 32 * i for i < kKeys. A warp owns 32 * kKeys consecutive patches, so
// that loads coalesce and the order of patches is (warp, key, lane).
template <int kKeys>
__device__ int first_patch() {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return warp * kWarp * kKeys + lane;
}

// The scores of this thread's patches: the sums of the clip's rows, from the first to the last. Reads bypass the L1
// cache, so the function sees data that other blocks wrote in this launch, if the caller has waited for them.
template <int kKeys>
__device__ void sum_rows(const PartialScores& partials, int64_t clip, int patches, float (&score)[kKeys]) {
  constexpr int kRows = kKeys < 16 ? 32 / kKeys : 1;  // 32 loads in flight per thread
  constexpr float kNothing = -0.0f;                   // kNothing + x is equal to x, to the bit
  int patch[kKeys];                                   // the last patch is repeated beyond the end
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    patch[i] = min(first_patch<kKeys>() + i * kWarp, patches - 1);
    score[i] = kNothing;
  }
  const float* data = partials.data + clip * partials.batch_stride;
  const auto add = [&](int rows) {  // adds the next `rows` rows, at most kRows
    float value[kRows][kKeys];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        value[r][i] = r < rows ? __ldcg(data + r * partials.row_stride + patch[i]) : kNothing;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) score[i] += value[r][i];
    }
  };
  int left = partials.rows;
  for (; left >= kRows; left -= kRows, data += kRows * partials.row_stride) add(kRows);
  if (left > 0) add(left);
}

// Writes the numbers of the kept patches to kept[0..keep) in ascending order. All threads of the block must call this
// function with the scores of their patches. Scores beyond the last patch are ignored. Ends with a barrier. The rank
// of a kept patch is a sum over the previous warps plus ballots within its warp.
template <int kKeys>
__device__ void select_block(const float (&score)[kKeys], int patches, int keep, uint16_t* kept) {
  __shared__ uint32_t warp_all[kWarps], warp_any[kWarps];
  __shared__ uint32_t counts[2][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = first_patch<kKeys>();

  uint32_t key[kKeys];  // 0 where there is no patch: less than the key of any patch
  uint32_t all = 0xffffffffu, any = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    key[i] = 0;
    if (first + i * kWarp < patches) {
      key[i] = score_key(score[i]);
      all &= key[i];
      any |= key[i];
    }
  }
  all = __reduce_and_sync(kAllLanes, all);
  any = __reduce_or_sync(kAllLanes, any);
  if (lane == 0) {
    warp_all[warp] = all;
    warp_any[warp] = any;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all &= warp_all[w];
    any |= warp_any[w];
  }

  // Determines the keep-th largest key from the highest bit down: a bit is set if at least `keep` keys reach the
  // resulting value. The scores of a clip are close to each other, so few bits differ and few rounds are needed. Each
  // round has one barrier.
  uint32_t threshold = all;  // invariant: at least `keep` keys reach it
  uint32_t above = 0;        // number of keys greater than the final threshold
  int round = 0;
  for (uint32_t open = all ^ any; open != 0;) {
    const uint32_t bit = 0x80000000u >> __clz(static_cast<int>(open));
    open ^= bit;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) own += key[i] >= (threshold | bit);
    const uint32_t count = sum_over_warps(__reduce_add_sync(kAllLanes, own), counts[round++ % 2]);
    if (count >= static_cast<uint32_t>(keep)) {
      threshold |= bit;
      if (count == static_cast<uint32_t>(keep)) break;
    } else {
      above = count;
    }
  }
  const uint32_t ties = keep - above;  // number of kept keys that are equal to the threshold: the first of them

  // Counts of this warp: keys above the threshold in the high half, keys equal to it in the low half. Padding has key
  // 0, which is less than the threshold.
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) own += key[i] > threshold ? 1u << 16 : key[i] == threshold ? 1u : 0u;
  own = __reduce_add_sync(kAllLanes, own);
  uint32_t (&totals)[kWarps] = counts[round % 2];
  if (lane == 0) totals[warp] = own;
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
