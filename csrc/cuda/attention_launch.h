// What the launches of the kernels with attention.cuh share: the instantiation for a number of keys, and how many blocks
// a head is worth.
#pragma once

#include "attention.cuh"
#include "dynamic_shared.cuh"
#include "launch.h"

namespace pruneattn::cuda {

// Blocks of a multiprocessor that the registers are to be enough for.
template <int kKeys>
constexpr int kBlocks = kKeys <= 48 ? 2 : 1;

// Calls f(T{}, integral_constant<int, keys of half a block>) with the smallest instantiation that holds all keys.
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

inline size_t attention_memory(int64_t tokens) {
  size_t bytes = 0;
  with_dtype_and_keys(Dtype::float16, tokens, [&](auto, auto keys) { bytes = sizeof(AttentionMemory<decltype(keys)::value>); });
  return bytes;
}

inline std::string describe(const char* name, Dtype dtype, int64_t batch, const Attention& a) {
  return std::string(name) + "(" + (dtype == Dtype::float16 ? "float16" : "bfloat16") + ", batch=" +
         std::to_string(batch) + ", heads=" + std::to_string(a.heads) + ", queries=" + std::to_string(a.queries) +
         ", tokens=" + std::to_string(a.tokens) + ", extra_tokens=" + std::to_string(a.extra_tokens) + ")";
}

}  // namespace pruneattn::cuda
