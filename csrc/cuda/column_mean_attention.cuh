// Softmax attention of one head for up to 2 * kKeys keys, with the column sums of the softmax matrix. Each row of the
// matrix stays in registers until it is added to the column sums, so each logit and each exponential is computed
// once, and q, k and v are read once.
//
// A block of 256 threads processes 64 queries at a time. Its two groups of 4 warps share the queries, and each group
// has half of the keys. The groups synchronize once to exchange the row statistics and once to sum their outputs.
#pragma once

#include "attention_row.cuh"
#include "device.cuh"
#include "kernels.h"
#include "tensor_cores.cuh"

namespace pruneattn::cuda {

constexpr int kGroupThreads = kThreads / 2;
constexpr int kChunk = 96;  // keys per product of queries and keys
constexpr int kBatch = 48;  // keys per product of weights and values

// Calls f(integral_constant<int, i>) for i in 0..kCount-1.
template <int kCount, int kFirst = 0, typename F>
__device__ inline void static_for(const F& f) {
  if constexpr (kFirst < kCount) {
    f(std::integral_constant<int, kFirst>{});
    static_for<kCount, kFirst + 1>(f);
  }
}

template <int kKeys>
constexpr int kChunks = (kKeys + kChunk - 1) / kChunk;
template <int kKeys, int kIndex>
constexpr int kChunkKeys = kKeys - kIndex * kChunk < kChunk ? kKeys - kIndex * kChunk : kChunk;
template <int kKeys, int kIndex>
__device__ inline auto& chunk_of(float (&s)[kKeys / 2]) {
  return reinterpret_cast<float (&)[kChunkKeys<kKeys, kIndex> / 2]>(s[kIndex * kChunk / 2]);
}

// Shared memory of a block.
template <int kKeys>
struct AttentionMemory {
  unsigned char keys[2 * kKeys * kRowBytes], values[2 * kKeys * kRowBytes];
  unsigned char queries[2][kTileRows * kRowBytes];  // the current and the next tile
  float4 output[2][4][kGroupThreads];               // the half of each group's output that the other group completes
  float2 statistics[2][kTileRows];                  // [group, row]: maximum of the base-2 logits, sum
  float2 columns[8][kKeys / 16][32];                // [warp, pair of columns, lane]: sums over some of the warp's rows
};

// At most this many queries after the last whole tile are processed one by one.
constexpr int kFewRows = 2;

PRUNEATTN_HOST_DEVICE inline int tiles_of(int queries) {
  return queries / kTileRows + (queries < kTileRows || queries % kTileRows > kFewRows);
}

// The queries of a block: tiles [first_tile, last_tile) and rows [first_row, queries).
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

// Loads `rows` rows of a head, starting at row `first`, into a tile: [rows, 64]. Rows from `count` on are zero.
// kLoaders threads call this function; `thread` is the number of the calling thread.
template <int kLoaders>
__device__ inline void load_tile(unsigned char* tile, const Head& head, int first, int rows, int count, int thread) {
  // 8 threads per row. kStep is a multiple of 8, so that all rows of a thread have the same swizzle.
  constexpr int kStep = kLoaders / 8;
  const char* source = head.rows + (first + thread / 8) * head.row_bytes + thread % 8 * 16;
  unsigned char* destination = tile + tile_offset(thread / 8, thread % 8);
  for (int row = thread / 8; row < rows; row += kStep) {
    const bool valid = first + row < count;
    copy_async(destination, valid ? source : head.rows, valid);
    source += kStep * head.row_bytes;
    destination += kStep * kRowBytes;
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

// 4 lanes of each warp of a group hold partial sums of a column. A lane holds 2 of 8 columns (see the accumulators in
// tensor_cores.cuh). After the exchange with the lane 16 away, it holds either the first or the second half of a
// chunk.
template <int kKeys>
__device__ inline float* column_sum(AttentionMemory<kKeys>& shared, int warp, int key, int quarter) {
  const int chunk = key / kChunk, in_chunk = key % kChunk;
  const int half_pairs = min(kChunk, kKeys - chunk * kChunk) / 16;  // groups of 8 columns in half a chunk
  const int eighth = in_chunk / 8;
  const int lane = (eighth >= half_pairs ? 16 : 0) + 4 * quarter + in_chunk % 8 / 2;
  float2& pair = shared.columns[warp][chunk * kChunk / 16 + eighth % half_pairs][lane];
  return in_chunk % 2 ? &pair.y : &pair.x;
}

// Sets the logits of keys from `keys` on to -Inf. Computes the maximum of each of the lane's two rows.
template <int kKeys>
__device__ inline void mask_and_maximize(float (&s)[kKeys / 2], int keys, int lane, float (&largest)[2]) {
  float chain[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // two per row, to shorten the dependency chains
  static_for<kChunks<kKeys>>([&](auto number) {
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

// Replaces logits by weights 2^(logit * scale - shift). `sum` receives the lane's contribution to each row's sum.
// Starts out = weights x values.
template <typename T, int kKeys>
__device__ inline void weigh_values(float (&s)[kKeys / 2], float scale, const float (&shift)[2],
                                    const unsigned char* values, float (&sum)[2], float (&out)[kHeadSize / 2]) {
  sum[0] = sum[1] = 0;
  static_for<(kKeys + kBatch - 1) / kBatch>([&](auto number) {
    constexpr int first = decltype(number)::value * kBatch;
    constexpr int kSteps = (kKeys - first < kBatch ? kKeys - first : kBatch) / 16;
    uint32_t weights[4 * kSteps];
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      float (&pair)[2] = reinterpret_cast<float (&)[2]>(s[first / 2 + 2 * i]);
      pair[0] = exp2_approximate(fmaf(pair[0], scale, -shift[i % 2]));
      pair[1] = exp2_approximate(fmaf(pair[1], scale, -shift[i % 2]));
      sum[i % 2] += pair[0] + pair[1];
      weights[i] = pack<T>(pair[0], pair[1]);
    }
    add_values<T, first == 0, kSteps>(out, weights, values + first * kRowBytes);
    if constexpr (first > 0) wait_products<1>();  // frees the registers of the previous weights
  });
}

// Adds the weights of a chunk, multiplied by the share of their row, to the column sums. Rows that are not `scored`
// are excluded. A share of 0 would not exclude them, because their weights can be NaN.
template <int kCount>
__device__ inline void add_columns(float (&weights)[2 * kCount], const float (&share)[2], const bool (&scored)[2],
                                   bool all_scored, int lane, float2 (*columns)[32]) {
  float sums[kCount];
  if (!all_scored) {
    __syncwarp();  // prevents the compiler from turning the branch into selections
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
    const float own = lane < 16 ? sums[i] : sums[i + kCount / 2];
    const float other = lane < 16 ? sums[i + kCount / 2] : sums[i];
    sums[i] = own + __shfl_xor_sync(kAllLanes, other, 16);
  }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    float2& pair = columns[i][lane];
    pair = make_float2(pair.x + sums[2 * i], pair.y + sums[2 * i + 1]);
  }
}

// The groups exchange halves of the output: group 0 completes channels 0..31, group 1 channels 32..63. `share_half`
// stores the channels of the other group in shared memory. After a barrier, `store_half` adds the stored half and
// writes the result.
__device__ inline void share_half(const float (&out)[kHeadSize / 2], int group, float4 (*shared)[kGroupThreads],
                                  int thread) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float half[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) half[e] = group ? out[4 * i + e] : out[16 + 4 * i + e];
    shared[i][thread] = make_float4(half[0], half[1], half[2], half[3]);
  }
}

template <typename T>
__device__ inline void store_half(const float (&out)[kHeadSize / 2], int group, const float4 (*shared)[kGroupThreads],
                                  int thread, const Head& destination, int row, int tokens) {
  char* row_out = destination.rows + row * destination.row_bytes + (32 * group + thread % 4 * 2) * sizeof(T);
  uint32_t packed[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 other = shared[i][thread];
    float own[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) own[e] = group ? out[16 + 4 * i + e] : out[4 * i + e];
    packed[0][i] = pack<T>(own[0] + other.x, own[1] + other.y);
    packed[1][i] = pack<T>(own[2] + other.z, own[3] + other.w);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= tokens) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint32_t*>(row_out + 8 * r * destination.row_bytes + i * 8 * sizeof(T)) = packed[r][i];
    }
  }
}

// Computes the head's output [N, 64] and log-sum-exp [N] for the queries of a part. Writes the part's contribution to
// the column means to partial [N - extra_tokens].
template <typename T, int kKeys>
__device__ void attend(const Attention& a, int64_t head_number, AttentionPart part, float* partial,
                       AttentionMemory<kKeys>& shared) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const int group = threadIdx.x / kGroupThreads;
  const int64_t clip = head_number / a.heads, head = head_number % a.heads;
  const Head q = head_of(a.q, clip, head), k = head_of(a.k, clip, head), v = head_of(a.v, clip, head);
  const Head out_rows = head_of(a.out, clip, head);
  const int first_key = group * kKeys;
  const int keys = min(max(a.tokens - first_key, 0), kKeys);
  unsigned char* const group_keys = shared.keys + first_key * kRowBytes;
  unsigned char* const group_values = shared.values + first_key * kRowBytes;

  const auto load_queries = [&](unsigned char* tile, int number) {
    load_tile<kThreads>(tile, q, number * kTileRows, kTileRows, a.tokens, threadIdx.x);
  };
  load_queries(shared.queries[0], part.first_tile);
  load_tile<kGroupThreads>(group_keys, k, first_key, kKeys, a.tokens, thread);
  commit_copies();
  load_tile<kGroupThreads>(group_values, v, first_key, kKeys, a.tokens, thread);
  commit_copies();
  float2(&columns)[kKeys / 16][32] = shared.columns[4 * group + warp];
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) columns[i][lane] = make_float2(0, 0);
  wait_copies<1>();
  __syncthreads();

  float s[kKeys / 2];  // logits, then weights, of rows 16 warp + lane / 4 and 16 warp + lane / 4 + 8
  const auto start_chunk = [&](auto number, const unsigned char* queries) {
    constexpr int c = decltype(number)::value;
    start_logits<T, kChunkKeys<kKeys, c>>(chunk_of<kKeys, c>(s), queries, group_keys + c * kChunk * kRowBytes);
  };
  if constexpr (kAsyncProducts) {
    static_for<kChunks<kKeys>>([&](auto number) { start_chunk(number, shared.queries[0]); });
    wait_products(s);
  }
  for (int tile = part.first_tile; tile < part.last_tile; ++tile) {
    const int row = tile * kTileRows + 16 * warp + lane / 4;
    unsigned char* const next_queries = shared.queries[(tile - part.first_tile + 1) % 2];
    if (tile + 1 < part.last_tile) load_queries(next_queries, tile + 1);
    commit_copies();
    if constexpr (!kAsyncProducts) {
      static_for<kChunks<kKeys>>(
          [&](auto number) { start_chunk(number, shared.queries[(tile - part.first_tile) % 2]); });
    }

    // The maximum of the base-2 logits, rounded up so that no weight exceeds 1.
    float base[2], shift[2], sum[2], out[kHeadSize / 2];
    mask_and_maximize<kKeys>(s, keys, lane, base);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = __fmul_ru(base[r], a.scale);
      shift[r] = base[r] == -INFINITY ? 0 : base[r];
    }
    if (tile == part.first_tile) {  // the values; the next queries can be incomplete
      wait_copies<1>();
      barrier_sync(1 + group, kGroupThreads);
    }
    weigh_values<T, kKeys>(s, a.scale, shift, group_values, sum, out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      if (lane % 4 == 0) shared.statistics[group][16 * warp + lane / 4 + 8 * r] = make_float2(base[r], sum[r]);
    }
    wait_copies<0>();  // the next queries
    __syncthreads();

    float share[2];  // factor that normalizes the weights of this group
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
    share_half(out, group, shared.output[group], thread);

    const bool scored[2] = {row >= a.extra_tokens && row < a.tokens, row + 8 >= a.extra_tokens && row + 8 < a.tokens};
    const bool all_scored = __ballot_sync(kAllLanes, scored[0] && scored[1]) == kAllLanes;
#pragma unroll
    for (int r = 0; r < 2; ++r) share[r] = scored[r] ? share[r] : 0;
    static_for<kChunks<kKeys>>([&](auto number) {
      constexpr int c = decltype(number)::value;
      add_columns<kChunkKeys<kKeys, c> / 4>(chunk_of<kKeys, c>(s), share, scored, all_scored, lane,
                                            columns + c * kChunk / 16);
      // After the last tile, these products are unused. A branch here would make the compiler wait for the products.
      if constexpr (kAsyncProducts) start_chunk(number, next_queries);
    });

    __syncthreads();
    store_half<T>(out, group, shared.output[1 - group], thread, out_rows, row, a.tokens);
    wait_products(s);
  }

  for (int row = part.first_row; row < a.tokens; ++row) {
    // Reuses the shared memory of the products. The weights and the RowMemory must not overlap.
    float* const weights = reinterpret_cast<float*>(shared.queries);
    __syncthreads();
    attend_row<T, 2 * kKeys>(reinterpret_cast<const T*>(q.rows + row * q.row_bytes), shared.keys, shared.values,
                             a.tokens, a.scale, reinterpret_cast<T*>(out_rows.rows + row * out_rows.row_bytes),
                             a.lse + head_number * a.tokens + row, weights,
                             *reinterpret_cast<RowMemory*>(shared.output));
    if (row >= a.extra_tokens) {
      for (int i = thread; i < keys; i += kGroupThreads) *column_sum(shared, 4 * group, i, 0) += weights[first_key + i];
    }
  }

  __syncthreads();
  for (int i = thread; i < keys; i += kGroupThreads) {
    const int patch = first_key + i - a.extra_tokens;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 16; ++n) sum += *column_sum(shared, 4 * group + n / 4, i, n % 4);
    if (patch >= 0) partial[patch] = sum * a.column_share;
  }
}

}  // namespace pruneattn::cuda
