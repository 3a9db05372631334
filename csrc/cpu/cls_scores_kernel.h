// The class token's row of the softmax matrix, for one instruction set.
#pragma once

#include "attention_kernel.h"

namespace pruneattn::cpu::PRUNEATTN_ISA {

// Scaled logits of kLanes keys: accumulates a vector of partial products per key, then reduces all vectors at once.
template <class T>
Vec cls_logits(const T* q, const T* const (&keys)[kLanes], int64_t channels, float factor) {
  const int64_t whole = channels / kLanes * kLanes;
  Vec sums[kLanes] = {};
  for (int64_t channel = 0; channel < whole; channel += kLanes) {
    const Vec query = load(q + channel);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] += query * load(keys[i] + channel);
  }
  if (whole < channels) {
    const Vec query = load_first(q + whole, channels - whole);
    for (int i = 0; i < kLanes; ++i) sums[i] += query * load_first(keys[i] + whole, channels - whole);
  }
  return sum_rows(sums) * factor;
}

// Processes all heads of a few keys at a time: in a packed qkv, the heads of a token are contiguous, and tokens are
// pages apart. weights: [B, H, N]
template <class T>
void cls_logits_of(const ClsScores& args, int64_t first, int64_t last) {
  const float factor = args.scale * 1.44269504f;  // log2(e)
  for (int64_t block = first; block < last; ++block) {
    const int64_t clip = block / args.key_blocks(), begin = block % args.key_blocks() * kKeyBlock;
    const int64_t end = smaller(begin + kKeyBlock, args.tokens);
    const T* q = reinterpret_cast<const T*>(args.q.data) + clip * args.q.batch_stride;
    const T* k = reinterpret_cast<const T*>(args.k.data) + clip * args.k.batch_stride;
    for (int64_t head = 0; head < args.heads; ++head) {
      float* weights = args.weights + (clip * args.heads + head) * args.tokens;
      for (int64_t key = begin; key < end; key += kLanes) {
        const T* keys[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {  // repeats the last key beyond the end
          keys[i] = k + head * args.k.head_stride + smaller(key + i, end - 1) * args.k.token_stride;
        }
        const Vec logits = cls_logits(q + head * args.q.head_stride, keys, args.channels, factor);
        store_first(weights + key, logits, smaller(kLanes, end - key));
      }
    }
  }
}

inline void cls_logits(const ClsScores& args, int64_t first, int64_t last) {
  args.dtype == Dtype::bfloat16 ? cls_logits_of<bf16>(args, first, last) : cls_logits_of<float>(args, first, last);
}

inline void cls_softmax(const ClsScores& args, int64_t first, int64_t last) {
  for (int64_t head = first; head < last; ++head) {
    float* weights = args.weights + head * args.tokens;
    float row_max = weights[0];
    for (int64_t key = 1; key < args.tokens; ++key) row_max = weights[key] > row_max ? weights[key] : row_max;
    Vec sums = {};
    for (int64_t key = 0; key < args.tokens; key += kLanes) {
      const int64_t count = smaller(kLanes, args.tokens - key);
      store_first(weights + key, exp2_of_nonpositive(load_first(weights + key, count) - row_max), count);
      sums += load_first(weights + key, count);
    }
    const float inverse = 1.0f / reduce_sum(sums)[0];
    for (int64_t key = 0; key < args.tokens; ++key) weights[key] *= inverse;
  }
}

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
