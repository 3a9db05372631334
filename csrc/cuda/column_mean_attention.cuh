// Softmax attention of one head for up to 2 * kKeys keys, with the sums of the softmax matrix's columns: each row of
// the matrix stays in registers from its logits to its share of the sums, so there is one product, one exponential and
// one read of everything.
//
// A block of 256 threads goes through queries 64 at a time. Its two groups of 4 warps have the same queries and half
// the keys each: they meet once for the statistics of the rows and once to add up the output.
#pragma once

#include "attention_row.cuh"
#include "kernels.h"
#include "synchronize.cuh"
#include "tensor_cores.cuh"

namespace pruneattn::cuda {

constexpr int kGroupThreads = kThreads / 2;
constexpr int kChunk = 96;  // keys of one product of logits
constexpr int kBatch = 48;  // keys whose weights are multiplied at once

// Calls f(integral_constant) for 0..kCount-1.
template <int kCount, int kFirst = 0, typename F>
__device__ inline void unrolled(const F& f) {
  if constexpr (kFirst < kCount) {
    f(std::integral_constant<int, kFirst>{});
    unrolled<kCount, kFirst + 1>(f);
  }
}

template <int kKeys>
constexpr int kChunks = (kKeys + kChunk - 1) / kChunk;
template <int kKeys, int kIndex>
constexpr int kChunkKeys = kKeys - kIndex * kChunk < kChunk ? kKeys - kIndex * kChunk : kChunk;
template <int kKeys, int kIndex>
__device__ inline auto& chunk_of(float (&s)[kKeys / 2]) {
  return reinterpret_cast<float(&)[kChunkKeys<kKeys, kIndex> / 2]>(s[kIndex * kChunk / 2]);
}

// Shared memory of a block.
template <int kKeys>
struct AttentionMemory {
  unsigned char keys[2 * kKeys * kRowBytes], values[2 * kKeys * kRowBytes];
  unsigned char queries[2][kTileRows * kRowBytes];  // of this tile and of the next one
  float4 output[2][4][kGroupThreads];               // half of each group's output, for the other group
  float2 statistics[2][kTileRows];                  // of each group: maximum in powers of 2, sum
  float2 columns[8][kKeys / 16][32];                // of each lane of a warp: sums of its columns, over some of its rows
};

// As many queries beyond whole tiles are attended to one by one.
constexpr int kFewRows = 2;

PRUNEATTN_HOST_DEVICE inline int tiles_of(int queries) {
  return queries / kTileRows + (queries < kTileRows || queries % kTileRows > kFewRows);
}

// The queries of a block: tiles [first, last), and rows [first_row, queries).
struct AttentionPart {
  int first_tile, last_tile, first_row;
};

__device__ inline AttentionPart part_of(int part, int parts, int queries) {
  const int tiles = tiles_of(queries);
  return {tiles * part / parts, tiles * (part + 1) / parts, part == parts - 1 ? tiles * kTileRows : queries};
}

struct Head {
  char* rows;
  int64_t row_bytes;
};

__device__ inline Head head_of(const Heads& heads, int64_t clip, int64_t head) {
  return {heads.data + 2 * (clip * heads.batch_stride + head * heads.head_stride), 2 * heads.token_stride};
}

// Rows first.. of a head into `rows` rows of a tile, zeros from row `count` of the head on; by kLoaders threads of which
// this is number `thread`.
template <int kLoaders>
__device__ inline void load_tile(unsigned char* tile, const Head& head, int first, int rows, int count,
                                 int thread) {
  constexpr int kStep = kLoaders / 8;  // 8 threads a row; a multiple of 8: all rows of a thread are swizzled alike
  const char* source = head.rows + (first + thread / 8) * head.row_bytes + thread % 8 * 16;
  unsigned char* to = tile + tile_offset(thread / 8, thread % 8);
  for (int row = thread / 8; row < rows; row += kStep) {
    const bool there = first + row < count;
    copy_async(to, there ? source : head.rows, there);
    source += kStep * head.row_bytes;
    to += kStep * kRowBytes;
  }
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Each column's sums lie with 4 lanes of each warp of a group. A lane has 2 of 8 columns (accumulators, tensor_cores.cuh),
// and of a chunk, after it gave one half to the lane 16 away, the first half or the second one.
template <int kKeys>
__device__ inline float* column_of(AttentionMemory<kKeys>& shared, int warp, int key, int fourth) {
  const int chunk = key / kChunk, in_chunk = key % kChunk;
  const int half_pairs = min(kChunk, kKeys - chunk * kChunk) / 16;  // eights of columns in half a chunk
  const int eighth = in_chunk / 8;
  const int lane = (eighth >= half_pairs ? 16 : 0) + 4 * fourth + in_chunk % 8 / 2;
  float2& pair = shared.columns[warp][chunk * kChunk / 16 + eighth % half_pairs][lane];
  return in_chunk % 2 ? &pair.y : &pair.x;
}

// Logits of keys from `keys` on become -Inf; the largest of each of the lane's two rows.
template <int kKeys>
__device__ inline void mask_and_maximize(float (&s)[kKeys / 2], int keys, int lane, float (&largest)[2]) {
  float chain[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // two for each row: shorter chains
  unrolled<kChunks<kKeys>>([&](auto number) {
    constexpr int c = decltype(number)::value;
    auto& logits = chunk_of<kKeys, c>(s);
    constexpr int kCount = kChunkKeys<kKeys, c> / 2;
    if (keys < c * kChunk + 2 * kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (c * kChunk + i / 4 * 8 + lane % 4 * 2 + i % 2 >= keys) logits[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) chain[i % 4] = fmaxf(chain[i % 4], logits[i]);
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) largest[r] = quad_max(fmaxf(chain[2 * r], chain[2 * r + 1]));
}

// Logits become weights 2^(logit * scale - shift). `sum` gets the lane's part of each row's sum; out = weights x values, in
// the background.
template <typename T, int kKeys>
__device__ inline void weigh_values(float (&s)[kKeys / 2], float scale, const float (&shift)[2],
                                    const unsigned char* values, float (&sum)[2], float (&out)[kHeadSize / 2]) {
  sum[0] = sum[1] = 0;
  unrolled<(kKeys + kBatch - 1) / kBatch>([&](auto number) {
    constexpr int first = decltype(number)::value * kBatch;
    constexpr int kSteps = (kKeys - first < kBatch ? kKeys - first : kBatch) / 16;
    uint32_t weights[4 * kSteps];
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      float(&pair)[2] = reinterpret_cast<float(&)[2]>(s[first / 2 + 2 * i]);
      pair[0] = exp2_approximate(fmaf(pair[0], scale, -shift[i % 2]));
      pair[1] = exp2_approximate(fmaf(pair[1], scale, -shift[i % 2]));
      sum[i % 2] += pair[0] + pair[1];
      weights[i] = pack<T>(pair[0], pair[1]);
    }
    add_values<T, first == 0, kSteps>(out, weights, values + first * kRowBytes);
    if constexpr (first > 0) wait_products<1>();  // frees registers
  });
}

// Adds a chunk's weights, each times its row's share, to the sums of their columns. Rows that are not `scored` are left
// out, and not by a share of 0: their weights may be NaN.
template <int kCount>
__device__ inline void add_columns(float (&weights)[2 * kCount], const float (&share)[2], const bool (&scored)[2],
                                   bool all_scored, int lane, float2 (*columns)[32]) {
  float sums[kCount];
  if (!all_scored) {
    __syncwarp();  // or the compiler makes it selections for all rows
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) weights[i] = scored[i / 2 % 2] ? weights[i] : 0;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int at = i / 2 * 4 + i % 2;
    sums[i] = weights[at] * share[0] + weights[at + 2] * share[1];
  }
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float kept = lane < 16 ? sums[i] : sums[i + kCount / 2];
    const float given = lane < 16 ? sums[i + kCount / 2] : sums[i];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, given, 16);
  }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    float2& pair = columns[i][lane];
    pair = make_float2(pair.x + sums[2 * i], pair.y + sums[2 * i + 1]);
  }
}

// The two halves of the output, by channels: the first group ends with channels 0..31, the second one with 32..63.
// `give_half` leaves the other channels for the other group; after a barrier, `store_half` adds what it left.
__device__ inline void give_half(const float (&out)[kHeadSize / 2], int group, float4 (*given)[kGroupThreads],
                                 int thread) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float half[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) half[e] = group ? out[4 * i + e] : out[16 + 4 * i + e];
    given[i][thread] = make_float4(half[0], half[1], half[2], half[3]);
  }
}

template <typename T>
__device__ inline void store_half(const float (&out)[kHeadSize / 2], int group, const float4 (*given)[kGroupThreads],
                                  int thread, const Head& to, int row, int tokens) {
  char* row_to = to.rows + row * to.row_bytes + (32 * group + thread % 4 * 2) * sizeof(T);
  uint32_t packed[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 other = given[i][thread];
    float mine[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) mine[e] = group ? out[16 + 4 * i + e] : out[4 * i + e];
    packed[0][i] = pack<T>(mine[0] + other.x, mine[1] + other.y);
    packed[1][i] = pack<T>(mine[2] + other.z, mine[3] + other.w);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= tokens) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint32_t*>(row_to + 8 * r * to.row_bytes + i * 8 * sizeof(T)) = packed[r][i];
    }
  }
}

// The head's output and log-sum-exp for the queries of a part; `partial` gets its share of the column means.
template <typename T, int kKeys>
__device__ void attend(const Attention& a, int64_t head_number, AttentionPart part, float* partial,
                       AttentionMemory<kKeys>& shared) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const int group = threadIdx.x / kGroupThreads;
  const int64_t clip = head_number / a.heads, head = head_number % a.heads;
  const Head q = head_of(a.q, clip, head), k = head_of(a.k, clip, head), v = head_of(a.v, clip, head);
  const Head to = head_of(a.out, clip, head);
  const int first_key = group * kKeys;
  const int keys = min(max(a.tokens - first_key, 0), kKeys);
  unsigned char* const my_keys = shared.keys + first_key * kRowBytes;
  unsigned char* const my_values = shared.values + first_key * kRowBytes;

  const auto load_queries = [&](unsigned char* tile, int number) {
    load_tile<kThreads>(tile, q, number * kTileRows, kTileRows, a.tokens, threadIdx.x);
  };
  load_queries(shared.queries[0], part.first_tile);
  load_tile<kGroupThreads>(my_keys, k, first_key, kKeys, a.tokens, thread);
  commit_copies();
  load_tile<kGroupThreads>(my_values, v, first_key, kKeys, a.tokens, thread);
  commit_copies();
  float2(&columns)[kKeys / 16][32] = shared.columns[4 * group + warp];
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) columns[i][lane] = make_float2(0, 0);
  wait_copies<1>();
  __syncthreads();

  float s[kKeys / 2];  // logits, then weights, of rows 16 warp + lane / 4 and that + 8
  const auto start_chunk = [&](auto number, const unsigned char* queries) {
    constexpr int c = decltype(number)::value;
    start_logits<T, kChunkKeys<kKeys, c>>(chunk_of<kKeys, c>(s), queries, my_keys + c * kChunk * kRowBytes);
  };
  if constexpr (kInBackground) {
    unrolled<kChunks<kKeys>>([&](auto number) { start_chunk(number, shared.queries[0]); });
    wait_products(s);
  }
  for (int tile = part.first_tile; tile < part.last_tile; ++tile) {
    const int row = tile * kTileRows + 16 * warp + lane / 4;
    unsigned char* const next_queries = shared.queries[(tile - part.first_tile + 1) % 2];
    if (tile + 1 < part.last_tile) load_queries(next_queries, tile + 1);
    commit_copies();
    if constexpr (!kInBackground) {
      unrolled<kChunks<kKeys>>([&](auto number) { start_chunk(number, shared.queries[(tile - part.first_tile) % 2]); });
    }

    // In powers of 2, rounded up so that no weight exceeds 1.
    float base[2], shift[2], sum[2], out[kHeadSize / 2];
    mask_and_maximize<kKeys>(s, keys, lane, base);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = __fmul_ru(base[r], a.scale);
      shift[r] = base[r] == -INFINITY ? 0 : base[r];
    }
    if (tile == part.first_tile) {  // the values, and not the next queries
      wait_copies<1>();
      barrier_sync(1 + group, kGroupThreads);
    }
    weigh_values<T, kKeys>(s, a.scale, shift, my_values, sum, out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      if (lane % 4 == 0) shared.statistics[group][16 * warp + lane / 4 + 8 * r] = make_float2(base[r], sum[r]);
    }
    wait_copies<0>();  // the next queries
    __syncthreads();

    float share[2];  // what a weight of this group is to be multiplied by
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 first = shared.statistics[0][16 * warp + lane / 4 + 8 * r];
      const float2 second = shared.statistics[1][16 * warp + lane / 4 + 8 * r];
      const float common = fmaxf(first.x, second.x);
      const float of_first = exp2_approximate(first.x - common), of_second = exp2_approximate(second.x - common);
      const float total = of_first * first.y + of_second * second.y;
      share[r] = (group == 0 ? of_first : of_second) * reciprocal_approximate(total);
      if (group == 0 && lane % 4 == 0 && row + 8 * r < a.tokens) {
        a.lse[head_number * a.tokens + row + 8 * r] = (common + log2_approximate(total)) * 0.6931471805599453f;
      }
    }
    wait_products(out);
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) out[i] *= share[i / 2 % 2];
    give_half(out, group, shared.output[group], thread);

    const bool scored[2] = {row >= a.extra_tokens && row < a.tokens, row + 8 >= a.extra_tokens && row + 8 < a.tokens};
    const bool all_scored = __ballot_sync(kAllLanes, scored[0] && scored[1]) == kAllLanes;
#pragma unroll
    for (int r = 0; r < 2; ++r) share[r] = scored[r] ? share[r] : 0;
    unrolled<kChunks<kKeys>>([&](auto number) {
      constexpr int c = decltype(number)::value;
      add_columns<kChunkKeys<kKeys, c> / 4>(chunk_of<kKeys, c>(s), share, scored, all_scored, lane,
                                            columns + c * kChunk / 16);
      // After the last tile, of queries that nobody reads: a branch here would make the compiler wait for the products.
      if constexpr (kInBackground) start_chunk(number, next_queries);
    });

    __syncthreads();
    store_half<T>(out, group, shared.output[1 - group], thread, to, row, a.tokens);
    wait_products(s);
  }

  for (int row = part.first_row; row < a.tokens; ++row) {
    // What the products used is free; a tile of queries and the output of the groups are far apart from each other.
    float* const weights = reinterpret_cast<float*>(shared.queries);
    __syncthreads();
    attend_row<T, 2 * kKeys>(reinterpret_cast<const T*>(q.rows + row * q.row_bytes), shared.keys, shared.values, a.tokens,
                             a.scale, reinterpret_cast<T*>(to.rows + row * to.row_bytes),
                             a.lse + head_number * a.tokens + row, weights, *reinterpret_cast<RowMemory*>(shared.output));
    if (row >= a.extra_tokens) {
      for (int i = thread; i < keys; i += kGroupThreads) *column_of(shared, 4 * group, i, 0) += weights[first_key + i];
    }
  }

  __syncthreads();
  for (int i = thread; i < keys; i += kGroupThreads) {
    const int patch = first_key + i - a.extra_tokens;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 16; ++n) sum += *column_of(shared, 4 * group + n / 4, i, n % 4);
    if (patch >= 0) partial[patch] = sum * a.column_share;
  }
}

}  // namespace pruneattn::cuda
