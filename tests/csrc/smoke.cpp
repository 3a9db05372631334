// The launchers of all CUDA kernels without Python bindings, which take longer to compile than the kernels.
// test_cuda_smoke.py calls them.
#include <string>

#include "cuda/kernels.h"

using namespace pruneattn;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Returns the error of f(), or "".
template <typename F>
const char* error_of(const F& f) {
  static std::string error;
  error.clear();
  try {
    f();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

// One tensor [B, N, row_bytes] -> [B, extra_tokens + keep, row_bytes].
RowsList rows_of(const char* src, char* dst, int64_t tokens, int64_t row_bytes) {
  RowsList list = {};
  list.tensor[0] = {src, dst, tokens * row_bytes, row_bytes, row_bytes};
  list.count = 1;
  return list;
}

// A contiguous tensor [B, H, N, D].
Heads heads_of(void* data, int64_t heads, int64_t tokens, int64_t channels) {
  return {static_cast<char*>(data), heads * tokens * channels, tokens * channels, channels};
}

}  // namespace

EXPORT const char* select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t keep, int64_t* index) {
  return error_of([&] { cuda::select_tokens(scores, batch, patches, patches, keep, index, 0, nullptr); });
}

EXPORT const char* gather_tokens(const int64_t* index, int64_t batch, int64_t patches, int64_t keep, const char* src,
                                 char* dst, int64_t row_bytes) {
  const RowsList rows = rows_of(src, dst, 1 + patches, row_bytes);
  return error_of([&] { cuda::gather_tokens(index, batch, patches, keep, 1, rows, 0, nullptr); });
}

EXPORT const char* prune_epilogue(const float* partials, int64_t batch, int64_t partial_rows, int64_t patches,
                                  int64_t keep, float* scores, int64_t* index, const char* src, char* dst,
                                  int64_t row_bytes) {
  const cuda::PartialScores parts = {partials, static_cast<int>(partial_rows), partial_rows * patches, patches};
  const RowsList rows = rows_of(src, dst, 1 + patches, row_bytes);
  return error_of([&] { cuda::prune_epilogue(parts, batch, patches, keep, scores, index, 1, rows, 0, nullptr); });
}

EXPORT const char* cls_scores(float* q, float* k, int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                              float* partials) {
  return error_of([&] {
    cuda::cls_scores(Dtype::float32, batch, heads, tokens, channels, heads_of(q, heads, 1, channels),
                     heads_of(k, heads, tokens, channels), 0.25f, 1, partials, 0, nullptr);
  });
}

EXPORT const char* column_mean_attention(void* q, void* k, void* v, int64_t batch, int64_t heads, int64_t tokens,
                                         void* out, float* lse, float* partials) {
  cuda::Attention args = {};
  args.q = heads_of(q, heads, tokens, 64);
  args.k = heads_of(k, heads, tokens, 64);
  args.v = heads_of(v, heads, tokens, 64);
  args.out = heads_of(out, heads, tokens, 64);
  args.lse = lse;
  args.scale = 0.125f * 1.44269504f;  // log2(e)
  args.heads = static_cast<int>(heads);
  args.tokens = static_cast<int>(tokens);
  args.extra_tokens = 1;
  args.column_share = 1.0f / static_cast<float>(heads * (tokens - 1));
  return error_of([&] { cuda::column_mean_attention(Dtype::float16, batch, args, partials, 1, 0, nullptr); });
}
