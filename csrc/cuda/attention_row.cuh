// Attention of a single query by a whole block, without tensor cores. 513 tokens are 8 tiles of 64 queries and one
// more query. A ninth tile for that query would cost as much as each full tile.
#pragma once

#include "block.cuh"
#include "unpack.cuh"

namespace pruneattn::cuda {

struct RowMemory {
  alignas(16) float query[kHeadSize];
  float largest[kWarps], sum[kWarps];
  float partial[kWarps][kHeadSize];
};

// Writes the output and the log-sum-exp of one query. keys and values are tiles. Stores the query's row of the
// softmax matrix in weights[0..tokens), which other threads can read after a barrier. All threads of the block must
// call this function.
template <typename T, int kMostKeys>
__device__ void attend_row(const T* query, const unsigned char* keys, const unsigned char* values, int tokens,
                           float scale, T* out, float* lse, float* weights, RowMemory& shared) {
  constexpr int kPerThread = (kMostKeys + kThreads - 1) / kThreads;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  if (thread < kHeadSize) shared.query[thread] = to_float(query[thread]);
  __syncthreads();

  float logit[kPerThread], largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int key = thread + i * kThreads;
    logit[i] = -INFINITY;
    if (key < tokens) {
      float sum = 0;
#pragma unroll
      for (int piece = 0; piece < 8; ++piece) {
        float k[8];
        unpack<T>(*reinterpret_cast<const uint4*>(keys + tile_offset(key, piece)), k);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum = fmaf(shared.query[8 * piece + c], k[c], sum);
      }
      logit[i] = sum;
    }
    largest = fmaxf(largest, logit[i]);
  }
  largest = block_reduce(largest, shared.largest, [](float a, float b) { return fmaxf(a, b); });
  const float base = __fmul_ru(largest, scale);

  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    logit[i] = exp2_approximate(fmaf(logit[i], scale, -base));
    if (thread + i * kThreads < tokens) sum += logit[i];
  }
  sum = block_reduce(sum, shared.sum, [](float a, float b) { return a + b; });
  const float share = reciprocal_approximate(sum);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (thread + i * kThreads < tokens) weights[thread + i * kThreads] = logit[i] * share;
  }
  if (thread == 0) *lse = (base + log2_approximate(sum)) * 0.6931471805599453f;
  __syncthreads();

  // Each warp processes every eighth key, each lane two channels.
  float channels[2] = {0, 0};
#pragma unroll 8
  for (int key = warp; key < tokens; key += kWarps) {
    float pair[2];
    unpack<T>(*reinterpret_cast<const uint32_t*>(values + tile_offset(key, lane / 4) + lane % 4 * 4), pair);
#pragma unroll
    for (int i = 0; i < 2; ++i) channels[i] = fmaf(weights[key], pair[i], channels[i]);
  }
  shared.partial[warp][2 * lane] = channels[0];
  shared.partial[warp][2 * lane + 1] = channels[1];
  __syncthreads();
  if (thread < kHeadSize) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.partial[w][thread];
    out[thread] = from_float<T>(total);
  }
}

}  // namespace pruneattn::cuda
